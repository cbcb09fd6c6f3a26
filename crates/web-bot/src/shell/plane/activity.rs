//! What a connection with many requests at once has to do, and since when it has nothing to do.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bots_core::{machine::Time, shell::Clock};
use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};

/// A body is handed over in parts of this size. The connection takes a part as soon as there is room for its first byte, and sends the
/// rest of it after the end of the body: the slowest client needs no longer for the last part than it may be idle.
const PART_BYTES: usize = 64 * 1024;

/// Requests that are not answered to the end, and when the last of them was. Clones share.
#[derive(Clone)]
pub(super) struct Activity {
    inner: Arc<Mutex<(usize, Time)>>,
}

/// A request, until this is dropped.
pub(super) struct Busy {
    activity: Activity,
}

impl Activity {
    pub(super) fn new() -> Self {
        Self { inner: Arc::new(Mutex::new((0, Clock::now()))) }
    }

    pub(super) fn begin(&self) -> Busy {
        self.change(|requests| requests + 1);
        Busy { activity: self.clone() }
    }

    /// Waits until there has been nothing to do for so long. It may be noticed as much later.
    pub(super) async fn ends_for(&self, patience: Duration) {
        loop {
            let (requests, since) = *self.inner.lock().unwrap_or_else(PoisonError::into_inner);
            let left = patience.saturating_sub(Clock::now().since(since).to_std());
            match (requests, left.is_zero()) {
                (0, true) => return,
                (0, false) => tokio::time::sleep(left).await,
                (1.., _) => tokio::time::sleep(patience).await,
            }
        }
    }

    fn change(&self, by: impl Fn(usize) -> usize) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        *inner = (by(inner.0), Clock::now());
    }
}

/// The body of an answer, and that the connection is busy until its end.
pub(super) struct Answering<B> {
    body: B,
    /// What was taken from the body and is not handed over yet.
    rest: Bytes,
    _busy: Busy,
}

impl Busy {
    pub(super) const fn until_end_of<B>(self, body: B) -> Answering<B> {
        Answering { body, rest: Bytes::new(), _busy: self }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Answering<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if self.rest.is_empty() {
            let frame = match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => frame,
                other => return other,
            };
            match frame.into_data() {
                Ok(data) => self.rest = data,
                Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
            }
        }
        let part = PART_BYTES.min(self.rest.len());
        Poll::Ready(Some(Ok(Frame::data(self.rest.split_to(part)))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (inner, rest) = (self.body.size_hint(), u64::try_from(self.rest.len()).unwrap_or(u64::MAX));
        let mut hint = SizeHint::new();
        if let Some(upper) = inner.upper() {
            hint.set_upper(upper.saturating_add(rest));
        }
        hint.set_lower(inner.lower().saturating_add(rest));
        hint
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.activity.change(|requests| requests - 1);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http_body_util::{BodyExt, Full};
    use hyper::body::Body;

    use super::{Activity, PART_BYTES};

    #[tokio::test]
    async fn a_body_keeps_its_connection_busy_until_its_last_part_is_taken() {
        let whole = Bytes::from((0..=255).cycle().take(3 * PART_BYTES + 5).collect::<Vec<u8>>());
        let activity = Activity::new();
        let mut body = activity.begin().until_end_of(Full::new(whole.clone()));
        let busy = || activity.inner.lock().expect("nobody panics").0;
        let mut taken = Vec::new();
        for part in 0..4 {
            assert!(!body.is_end_stream() && busy() == 1, "part {part}");
            assert_eq!(body.size_hint().exact(), u64::try_from(whole.len() - taken.len()).ok());
            let frame = body.frame().await.expect("a part").expect("it is whole");
            let data = frame.into_data().expect("data");
            assert!(data.len() <= PART_BYTES);
            taken.extend_from_slice(&data);
        }
        assert!(body.is_end_stream() && taken == whole);
        drop(body);
        assert_eq!(busy(), 0);
    }
}
