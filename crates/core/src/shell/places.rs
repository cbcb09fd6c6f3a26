//! The places for clients of the API, and what keeps a slow or silent client from costing anybody else anything: when all places
//! are taken, whoever has sat idle for longest goes; and a request's body must arrive in time.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{Router, body::Body};
use bytes::Bytes;
use hyper::{
    Request, Response,
    body::{Body as HttpBody, Frame, Incoming, SizeHint},
    service::Service,
};
use hyper_util::service::TowerToHyperService;
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;

/// How long a request's body may take to arrive. The largest is a webhook of a megabyte.
const BODY_DEADLINE: Duration = Duration::from_secs(10);

/// The places. Clones share.
#[derive(Debug, Clone)]
pub(super) struct Places {
    max: usize,
    /// Whoever has been idle for longest stands in front of whoever is idle for a shorter time.
    taken: Arc<Mutex<VecDeque<Arc<Place>>>>,
}

#[derive(Debug)]
struct Place {
    /// Requests whose answer is being made.
    busy: AtomicUsize,
    leave: CancellationToken,
}

/// A place that is taken, until it is dropped.
#[derive(Debug)]
pub(super) struct Taken {
    place: Arc<Place>,
    places: Places,
}

impl Places {
    /// So many of them.
    pub(super) fn new(max: usize) -> Self {
        Self { max, taken: Arc::default() }
    }

    /// Takes one for a client that has just come. If there is none left, whoever has been without a request for longest leaves;
    /// nothing if all are busy.
    pub(super) fn take(&self) -> Option<Taken> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.len() >= self.max {
            let idle = taken.iter().position(|place| place.busy.load(Ordering::Relaxed) == 0)?;
            taken.remove(idle)?.leave.cancel();
        }
        let place = Arc::new(Place { busy: AtomicUsize::new(0), leave: CancellationToken::new() });
        taken.push_back(Arc::clone(&place));
        Some(Taken { place, places: self.clone() })
    }

    /// This one has had an answer just now.
    fn answered(&self, place: &Arc<Place>) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = taken.iter().position(|held| Arc::ptr_eq(held, place))
            && let Some(held) = taken.remove(at)
        {
            taken.push_back(held);
        }
    }
}

impl Taken {
    /// Ends once the place is wanted for another.
    pub(super) async fn wanted(&self) {
        self.place.leave.cancelled().await;
    }

    /// Answers this client's requests.
    pub(super) fn answering(&self, router: Router) -> Answering {
        let (place, places) = (Arc::clone(&self.place), self.places.clone());
        Answering { place, places, inner: TowerToHyperService::new(router) }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.retain(|place| !Arc::ptr_eq(place, &self.place));
    }
}

/// The routes, as one client sees them.
#[derive(Clone)]
pub(super) struct Answering {
    place: Arc<Place>,
    places: Places,
    inner: TowerToHyperService<Router>,
}

impl Service<Request<Incoming>> for Answering {
    type Response = Response<Body>;
    type Error = std::convert::Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let busy = Busy::new(&self.place, &self.places);
        let deadline = Box::pin(tokio::time::sleep(BODY_DEADLINE));
        let answer = self.inner.call(request.map(|body| Body::new(InTime { body, deadline })));
        Box::pin(async move {
            let _busy = busy;
            answer.await
        })
    }
}

struct Busy {
    place: Arc<Place>,
    places: Places,
}

impl Busy {
    fn new(place: &Arc<Place>, places: &Places) -> Self {
        place.busy.fetch_add(1, Ordering::Relaxed);
        Self { place: Arc::clone(place), places: places.clone() }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.places.answered(&self.place);
        self.place.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A body that fails if it has not arrived in time.
struct InTime {
    body: Incoming,
    deadline: Pin<Box<Sleep>>,
}

impl HttpBody for InTime {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        match self.deadline.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Some(Err("the request's body took too long".into()))),
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::{Busy, Places};

    #[test]
    fn whoever_has_been_idle_for_longest_leaves() {
        let places = Places::new(2);
        let (first, second) = (places.take().expect("free"), places.take().expect("free"));
        // The first one came first, but has asked something since.
        drop(Busy::new(&first.place, &places));
        let third = places.take().expect("someone is idle");
        assert!(second.place.leave.is_cancelled());
        assert!(!first.place.leave.is_cancelled());
        let _at_work = [Busy::new(&first.place, &places), Busy::new(&third.place, &places)];
        assert!(places.take().is_none(), "nobody at work is sent away");
    }
}
