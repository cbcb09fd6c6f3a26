//! The body of an answer: from memory or from the app, and what must live until it has been handed over.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body, Frame, Incoming, SizeHint};

use super::InFlight;

/// A body that keeps its request in flight.
pub(super) struct Answer {
    source: Source,
    /// The request, and the app's own count of it.
    _in_flight: [Option<InFlight>; 2],
}

enum Source {
    Memory(Full<Bytes>),
    App(Incoming),
}

impl Answer {
    /// A body from memory.
    pub(super) fn memory(body: Full<Bytes>, in_flight: Option<InFlight>) -> Self {
        Self { source: Source::Memory(body), _in_flight: [in_flight, None] }
    }

    /// A body that streams from the app.
    pub(super) fn app(body: Incoming, in_flight: InFlight, at_app: InFlight) -> Self {
        Self { source: Source::App(body), _in_flight: [Some(in_flight), Some(at_app)] }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.get_mut().source {
            Source::Memory(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
            Source::App(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Memory(body) => body.is_end_stream(),
            Source::App(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Memory(body) => body.size_hint(),
            Source::App(body) => body.size_hint(),
        }
    }
}
