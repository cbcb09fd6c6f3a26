//! The short way of the commonest request: GET a whole file that memory holds, over HTTP/1.1 without TLS. What it answers is
//! built once, head and all, and leaves in one write.
//!
//! It knows no other request, and no body of a request at all. At the first byte of anything else (another method, a length
//! or an encoding of a body, a range, an upgrade, a head that is odd, long or not whole yet) the connection is hyper's, with
//! all that was read and not answered. What is refused, waited for or passed on is decided there and nowhere else.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    pin::{Pin, pin},
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use bots_core::{machine::Time, shell::Clock};
use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::watch,
    time::{Sleep, sleep, timeout},
};

use super::{
    InFlight, Target,
    site::{Asked, Short},
    workers::Worker,
};

/// A longer head than this goes the long way; those of browsers fit several times.
const READ_BYTES_MAX: usize = 8 * 1024;

/// A head with more lines than this goes the long way.
const LINES_MAX: usize = 48;

/// A body up to this is copied behind its head, which costs less than telling the kernel of two pieces.
const COPY_BYTES_MAX: usize = 16 * 1024;

/// Lines of a head that are not for the short way, whatever they say.
const LONG_WAY: [&str; 11] = [
    "content-length",
    "transfer-encoding",
    "expect",
    "upgrade",
    "range",
    "te",
    "trailer",
    "if-match",
    "if-range",
    "if-unmodified-since",
    "http2-settings",
];

/// What is left of a connection.
pub(super) enum Left {
    /// Nothing.
    Ended,
    /// Bytes that were read and not answered.
    Rest(Bytes),
}

impl Worker {
    /// Answers what can be answered on the short way.
    pub(super) async fn short_way(&self, stream: &mut TcpStream, closing: &mut watch::Receiver<()>) -> Left {
        let patience = self.shared.patience;
        let mut read = vec![0; READ_BYTES_MAX];
        let mut written = Vec::new();
        let leave = closing.clone();
        let mut asked_to_leave = pin!(closing.changed());
        let mut since = Clock::now();
        let mut timer = pin!(sleep(patience));
        loop {
            let came = poll_fn(|cx| {
                let mut buffer = ReadBuf::new(&mut read);
                if let Poll::Ready(came) = Pin::new(&mut *stream).poll_read(cx, &mut buffer) {
                    return Poll::Ready(came.map_or(0, |()| buffer.filled().len()));
                }
                if asked_to_leave.as_mut().poll(cx).is_ready() || is_over(timer.as_mut(), cx, (since, patience)) {
                    return Poll::Ready(0);
                }
                Poll::Pending
            });
            let length = came.await;
            let mut unread = read.get(..length).filter(|unread| !unread.is_empty());
            if unread.is_none() {
                return Left::Ended;
            }
            while let Some(bytes) = unread.filter(|unread| !unread.is_empty()) {
                let Some((used, short, in_flight)) = self.look(bytes) else {
                    return Left::Rest(Bytes::copy_from_slice(bytes));
                };
                self.shared.counters.count(short.status);
                if send(stream, patience, &mut written, &short).await.is_err() {
                    return Left::Ended;
                }
                drop(in_flight);
                unread = bytes.get(used..);
            }
            if leave.has_changed().unwrap_or(true) {
                return Left::Ended;
            }
            since = Clock::now();
        }
    }

    /// The length of the first head and its answer, if it is one for the short way. The request is in flight before the
    /// route is left: who waits for the end of all requests misses none.
    fn look(&self, unread: &[u8]) -> Option<(usize, Short, InFlight)> {
        let mut lines = [httparse::EMPTY_HEADER; LINES_MAX];
        let mut request = httparse::Request::new(&mut lines);
        let httparse::Status::Complete(length) = request.parse(unread).ok()? else { return None };
        let asked = asked(&request)?;
        let target = self.shared.route.borrow();
        let Target::Static { site, closing: false } = &*target else { return None };
        let short = site.short(&asked)?;
        Some((length, short, self.shared.meter.begin()))
    }
}

/// Whether the other end was silent for too long. The timer is set anew only when it fires.
fn is_over(mut timer: Pin<&mut Sleep>, cx: &mut Context<'_>, (since, patience): (Time, Duration)) -> bool {
    while timer.as_mut().poll(cx).is_ready() {
        let silent = Clock::now().since(since).to_std();
        match patience.checked_sub(silent) {
            Some(left) if !left.is_zero() => timer.set(sleep(left)),
            Some(_) | None => return true,
        }
    }
    false
}

/// What a request asks for, if that is all.
fn asked<'h>(request: &httparse::Request<'_, 'h>) -> Option<Asked<'h>> {
    let target = request.path.filter(|_| request.method == Some("GET") && request.version == Some(1))?;
    let path = target.split_once('?').map_or(target, |(path, _)| path);
    let mut asked = Asked { path, accept_encoding: None, if_none_match: None, if_modified_since: None };
    for line in request.headers.iter() {
        let is = |known: &str| line.name.eq_ignore_ascii_case(known);
        let place = match () {
            () if is("accept-encoding") => &mut asked.accept_encoding,
            () if is("if-none-match") => &mut asked.if_none_match,
            () if is("if-modified-since") => &mut asked.if_modified_since,
            () if is("connection") && line.value.eq_ignore_ascii_case(b"keep-alive") => continue,
            () if is("connection") || LONG_WAY.into_iter().any(is) => return None,
            () => continue,
        };
        // Lists over several lines are rare, and read on the long way.
        if place.replace(line.value).is_some() {
            return None;
        }
    }
    Some(asked)
}

/// Sends an answer. Who reads nothing of it for too long is given up.
async fn send(stream: &mut TcpStream, patience: Duration, written: &mut Vec<u8>, short: &Short) -> io::Result<()> {
    written.clear();
    written.extend_from_slice(&short.head);
    push_date(written);
    let copied = short.body.len() <= COPY_BYTES_MAX;
    if copied {
        written.extend_from_slice(&short.body);
    }
    let body = if copied { &[][..] } else { &short.body[..] };
    let (mut head, mut body) = (written.as_slice(), body);
    while !head.is_empty() || !body.is_empty() {
        let write = poll_fn(|cx| match body.is_empty() {
            true => Pin::new(&mut *stream).poll_write(cx, head),
            false => Pin::new(&mut *stream).poll_write_vectored(cx, &[io::IoSlice::new(head), io::IoSlice::new(body)]),
        });
        // The timer is made only for who has to be waited for.
        let sent = match now_or_never(write).await {
            Ok(sent) => sent,
            Err(write) => timeout(patience, write).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
        }?;
        if sent == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        let of_head = sent.min(head.len());
        (head, body) = (head.get(of_head..).unwrap_or_default(), body.get(sent - of_head..).unwrap_or_default());
    }
    Ok(())
}

/// The end of a future if it is there, or the future.
async fn now_or_never<F: Future + Unpin>(mut future: F) -> Result<F::Output, F> {
    let polled = poll_fn(|cx| Poll::Ready(Pin::new(&mut future).poll(cx))).await;
    match polled {
        Poll::Ready(output) => Ok(output),
        Poll::Pending => Err(future),
    }
}

/// The length of a date in a head.
const DATE_BYTES: usize = 29;

thread_local! {
    /// The second since 1970 that was last written, and how.
    static DATE: RefCell<(u64, [u8; DATE_BYTES])> = const { RefCell::new((0, [b' '; DATE_BYTES])) };
}

/// The end of a head: the date, and an empty line.
fn push_date(written: &mut Vec<u8>) {
    let now_s = Clock::unix_ms() / 1_000;
    DATE.with_borrow_mut(|(second, date)| {
        if *second != now_s {
            let text = httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + Duration::from_secs(now_s));
            if let Ok(bytes) = <[u8; DATE_BYTES]>::try_from(text.as_bytes()) {
                (*second, *date) = (now_s, bytes);
            }
        }
        written.extend_from_slice(b"date: ");
        written.extend_from_slice(date);
    });
    written.extend_from_slice(b"\r\n\r\n");
}
