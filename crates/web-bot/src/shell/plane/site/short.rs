//! What the short way asks of a site, and what it gets: heads that are written already, but for the date.

use std::sync::OnceLock;

use bytes::Bytes;
use hyper::{Response, StatusCode};

use super::{content::Content, encoding::Encoding};

/// A request for a whole file, as it was sent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked<'h> {
    /// Without the query.
    pub(crate) path: &'h str,
    /// Lines of the head; each was there once, or not.
    pub(crate) accept_encoding: Option<&'h [u8]>,
    pub(crate) if_none_match: Option<&'h [u8]>,
    pub(crate) if_modified_since: Option<&'h [u8]>,
}

/// An answer, already written: only the line of the date is to be put between head and body, and an empty one after it.
#[derive(Debug, Clone)]
pub(crate) struct Short {
    pub(crate) status: StatusCode,
    pub(crate) head: Bytes,
    pub(crate) body: Bytes,
}

/// The heads of one file that were asked for: in each form, the file and "not modified".
#[derive(Debug, Default)]
pub(super) struct Blocks([[OnceLock<Bytes>; 2]; 4]);

impl Blocks {
    /// The head of `answer`, which is the same whenever it is made.
    pub(super) fn get(
        &self,
        encoding: Encoding,
        status: StatusCode,
        answer: impl FnOnce() -> Response<Content>,
    ) -> Bytes {
        let Self(blocks) = self;
        let kind = usize::from(status == StatusCode::NOT_MODIFIED);
        blocks[encoding.index()][kind].get_or_init(|| write(&answer())).clone()
    }
}

fn write(answer: &Response<Content>) -> Bytes {
    let status = answer.status();
    let mut head =
        format!("HTTP/1.1 {} {}\r\n", status.as_str(), status.canonical_reason().unwrap_or_default()).into_bytes();
    for (name, value) in answer.headers() {
        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            head.extend_from_slice(part);
        }
    }
    Bytes::from(head)
}
