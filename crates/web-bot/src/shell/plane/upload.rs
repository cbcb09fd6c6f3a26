//! The body of a request on its way to the app: passed on as it comes, with a note of who is waited for, so that the app is
//! not blamed for a slow client, nor for one that breaks off.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Wake, Waker},
};

use bots_core::{machine::Time, shell::Clock};
use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};

/// The client has broken its request off, or sent what is none.
#[derive(Debug, thiserror::Error)]
#[error("the client broke off")]
pub(super) struct BrokenOff(#[source] hyper::Error);

/// Who is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Awaited {
    /// The next part of the request.
    Client,
    /// The app takes what is there, or has it all and is to answer.
    App,
}

/// Who is waited for, and since when.
#[derive(Debug, Clone)]
pub(super) struct Progress {
    inner: Arc<Mutex<(Awaited, Time)>>,
}

impl Progress {
    pub(super) fn begin() -> Self {
        Self { inner: Arc::new(Mutex::new((Awaited::App, Clock::now()))) }
    }

    pub(super) fn now(&self) -> (Awaited, Time) {
        *self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, awaited: Awaited) {
        let mut noted = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        // Who is asked again for what has not come has been waited for all the time.
        if (noted.0, awaited) != (Awaited::Client, Awaited::Client) {
            *noted = (awaited, Clock::now());
        }
    }
}

/// Wakes who waits for the client, and notes that there is something to take.
struct Came {
    waiting: Waker,
    progress: Progress,
}

impl Wake for Came {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.progress.note(Awaited::App);
        self.waiting.wake_by_ref();
    }
}

/// The body.
pub(super) struct Upload {
    body: Incoming,
    progress: Progress,
}

impl Upload {
    pub(super) const fn new(body: Incoming, progress: Progress) -> Self {
        Self { body, progress }
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = BrokenOff;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        let this = self.get_mut();
        this.progress.note(Awaited::Client);
        // What comes may stay where it is, if the app takes no more: this is not asked again then.
        let came = Waker::from(Arc::new(Came { waiting: cx.waker().clone(), progress: this.progress.clone() }));
        let polled = Pin::new(&mut this.body).poll_frame(&mut Context::from_waker(&came));
        if polled.is_ready() {
            this.progress.note(Awaited::App);
        }
        polled.map_err(BrokenOff)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Upload {
    /// An app that answers before it has all has had enough: nobody waits for the rest.
    fn drop(&mut self) {
        self.progress.note(Awaited::App);
    }
}
