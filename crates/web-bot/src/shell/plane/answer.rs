//! The body of an answer: from memory, from disk or from the app, and what must live until it has been handed over.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use rustix::io::{Errno, ReadWriteFlags};
use tokio::task::JoinHandle;

use super::{
    InFlight,
    log::Line,
    site::{Content, Extent},
};

/// What is read from disk at once: enough to keep a fast connection busy, little enough for thousands of slow ones.
const CHUNK_BYTES: u64 = 256 * 1024;

/// A body that keeps its request in flight.
pub(super) struct Answer {
    source: Source,
    /// The request, and the app's own count of it.
    _in_flight: [Option<InFlight>; 2],
    line: Option<Box<Line>>,
}

enum Source {
    Memory(Option<Bytes>),
    Pieces(VecDeque<Bytes>),
    Disk(Reader),
    App(Incoming),
}

/// Why a body ended before its end.
#[derive(Debug, thiserror::Error)]
pub(super) enum BodyError {
    #[error("the app broke off")]
    App(#[source] hyper::Error),
    #[error("a file cannot be read")]
    Disk(#[from] io::Error),
}

impl Answer {
    /// A body from memory.
    pub(super) fn memory(body: Bytes, in_flight: Option<InFlight>) -> Self {
        Self {
            source: Source::Memory(Some(body).filter(|body| !body.is_empty())),
            _in_flight: [in_flight, None],
            line: None,
        }
    }

    /// A body of a static site.
    pub(super) fn content(content: Content, in_flight: InFlight) -> Self {
        let source = match content {
            Content::Empty => Source::Memory(None),
            Content::Memory(bytes) => Source::Memory(Some(bytes).filter(|bytes| !bytes.is_empty())),
            Content::Pieces(pieces) => Source::Pieces(pieces),
            Content::Disk(extent) => Source::Disk(Reader { extent, waiting: None }),
        };
        Self { source, _in_flight: [Some(in_flight), None], line: None }
    }

    /// A body that streams from the app.
    pub(super) fn app(body: Incoming, in_flight: InFlight, at_app: InFlight) -> Self {
        Self { source: Source::App(body), _in_flight: [Some(in_flight), Some(at_app)], line: None }
    }

    /// Writes a line of the access log at its end.
    pub(super) fn log(&mut self, line: Box<Line>) {
        self.line = Some(line);
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let polled = match &mut this.source {
            Source::Memory(body) => Poll::Ready(body.take().map(|bytes| Ok(Frame::data(bytes)))),
            Source::Pieces(pieces) => Poll::Ready(pieces.pop_front().map(|bytes| Ok(Frame::data(bytes)))),
            Source::Disk(reader) => {
                reader.poll(cx).map(|read| read.map(|r| r.map(Frame::data).map_err(BodyError::Disk)))
            }
            Source::App(body) => Pin::new(body).poll_frame(cx).map_err(BodyError::App),
        };
        if let (Some(line), Poll::Ready(Some(Ok(frame)))) = (&mut this.line, &polled) {
            line.sent_bytes += u64::try_from(frame.data_ref().map_or(0, Bytes::len)).unwrap_or(0);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Memory(body) => body.is_none(),
            Source::Pieces(pieces) => pieces.is_empty(),
            Source::Disk(reader) => reader.extent.length == 0,
            Source::App(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        let length = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        match &self.source {
            Source::Memory(body) => SizeHint::with_exact(length(body.as_ref().map_or(0, Bytes::len))),
            Source::Pieces(pieces) => SizeHint::with_exact(pieces.iter().map(|p| length(p.len())).sum()),
            Source::Disk(reader) => SizeHint::with_exact(reader.extent.length),
            Source::App(body) => body.size_hint(),
        }
    }
}

/// Reads a stretch of a file, chunk by chunk: what the kernel has in memory at once, the rest on a thread that may wait.
struct Reader {
    extent: Extent,
    waiting: Option<JoinHandle<io::Result<Bytes>>>,
}

impl Reader {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        if self.extent.length == 0 {
            return Poll::Ready(None);
        }
        let read = match &mut self.waiting {
            Some(waiting) => {
                let read = ready!(Pin::new(waiting).poll(cx)).map_err(io::Error::other).flatten();
                self.waiting = None;
                read
            }
            None => match read(&self.extent, ReadWriteFlags::NOWAIT) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock || e.raw_os_error() == Some(NOT_SUPPORTED) => {
                    let extent = self.extent.clone();
                    self.waiting = Some(tokio::task::spawn_blocking(move || read(&extent, ReadWriteFlags::empty())));
                    return self.poll(cx);
                }
                read => read,
            },
        };
        if let Ok(bytes) = &read {
            let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
            self.extent.offset += length;
            self.extent.length = self.extent.length.saturating_sub(length);
        }
        Poll::Ready(Some(read))
    }
}

/// Not every file system can say what it has in memory.
const NOT_SUPPORTED: i32 = Errno::OPNOTSUPP.raw_os_error();

fn read(extent: &Extent, flags: ReadWriteFlags) -> io::Result<Bytes> {
    let mut buffer = vec![0; usize::try_from(extent.length.min(CHUNK_BYTES)).unwrap_or(0)];
    let slice = &mut [io::IoSliceMut::new(&mut buffer)];
    let n = rustix::io::preadv2(extent.file(), slice, extent.offset, flags)?;
    if n == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file on disk is shorter than it was"));
    }
    buffer.truncate(n);
    Ok(Bytes::from(buffer))
}
