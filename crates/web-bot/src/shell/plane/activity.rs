//! What a connection with many requests at once has to do, and since when it has nothing to do.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bots_core::{machine::Time, shell::Clock};
use hyper::body::{Body, Frame, SizeHint};

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
    _busy: Busy,
}

impl Busy {
    pub(super) const fn until_end_of<B>(self, body: B) -> Answering<B> {
        Answering { body, _busy: self }
    }
}

impl<B: Body + Unpin> Body for Answering<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.activity.change(|requests| requests - 1);
    }
}
