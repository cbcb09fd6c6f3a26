//! One file of a site as requests see it: conditions, ranges, forms, and heads that are built once.

use std::{
    collections::VecDeque,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use hyper::{
    HeaderMap, Method, Response, StatusCode,
    header::{self, HeaderName, HeaderValue},
};

use super::{
    Stamp,
    content::Content,
    encoding::{self, Encoding},
    range::{self, Part, Wanted},
    short::{Asked, Blocks, Short},
    vault::{Bits, Blob},
};

/// Says where one part of an answer in several parts ends. It need not be a secret: lengths are given.
const BOUNDARY: &str = "bots-not-cattle-7c1d4e9a";

/// A file of a site.
#[derive(Debug)]
pub(super) struct Page {
    blob: Arc<Blob>,
    content_type: &'static str,
    compressible: bool,
    stamp: Arc<Stamp>,
    heads: [OnceLock<HeaderMap>; 4],
    blocks: Blocks,
}

impl Page {
    pub(super) fn new(blob: Arc<Blob>, path: &str, stamp: &Arc<Stamp>) -> Self {
        let content_type = super::types::content_type(path);
        let compressible = super::types::is_compressible(content_type);
        Self {
            blob,
            content_type,
            compressible,
            stamp: Arc::clone(stamp),
            heads: Default::default(),
            blocks: Blocks::default(),
        }
    }

    /// The blob, if it is to be compressed still.
    pub(super) fn to_compress(&self) -> Option<&Arc<Blob>> {
        Some(&self.blob).filter(|blob| self.compressible && !blob.is_settled())
    }

    /// Answers GET or HEAD, in the order that RFC 9110 (13.2.2) gives to conditions.
    pub(super) fn answer(&self, method: &Method, headers: &HeaderMap) -> Response<Content> {
        let encoding = self.choose(headers);
        if let Some(status) = self.condition(headers) {
            return self.without_body(status, encoding);
        }
        // Ranges are for GET alone.
        let ranged = headers.get(header::RANGE).filter(|_| *method == Method::GET && self.may_range(headers));
        let length = self.length(encoding);
        match ranged.and_then(|value| value.to_str().ok()).map_or(Wanted::Whole, |range| range::read(range, length)) {
            Wanted::Whole => self.whole(StatusCode::OK, encoding, method),
            Wanted::One(part) => self.part(part, encoding),
            Wanted::Several(parts) => match self.blob.bits(encoding) {
                Bits::Memory(bytes) => self.parts(&parts, &bytes, encoding),
                // A reader of a large file in pieces asks for one after another.
                Bits::Disk(_) => self.whole(StatusCode::OK, encoding, method),
            },
            Wanted::Unsatisfiable => {
                let mut answer = self.without_body(StatusCode::RANGE_NOT_SATISFIABLE, encoding);
                put(answer.headers_mut(), header::CONTENT_RANGE, &format!("bytes */{length}"));
                answer.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
                answer
            }
        }
    }

    /// The answer to a request for the whole file: the same as [`Self::answer`] gives, already written.
    pub(super) fn short(&self, asked: &Asked<'_>) -> Option<Short> {
        let encoding = match asked.accept_encoding.filter(|_| self.compressible) {
            Some(list) => encoding::choose_from(std::str::from_utf8(list).ok()?, |encoding| self.blob.has(encoding)),
            None => Encoding::Identity,
        };
        let unchanged = match (asked.if_none_match, asked.if_modified_since) {
            (Some(tags), _) => self.matches(tags, true),
            (None, Some(time)) => self.stamp.is_time(time),
            (None, None) => false,
        };
        if unchanged {
            let (status, body) = (StatusCode::NOT_MODIFIED, Bytes::new());
            let head = self.blocks.get(encoding, status, || self.without_body(status, encoding));
            return Some(Short { status, head, body });
        }
        let Bits::Memory(body) = self.blob.bits(encoding) else { return None };
        let status = StatusCode::OK;
        let head = self.blocks.get(encoding, status, || self.whole(status, encoding, &Method::GET));
        Some(Short { status, head, body })
    }

    /// The file as the body of another answer, such as a page for what is not found.
    pub(super) fn stand_in(&self, status: StatusCode, method: &Method, headers: &HeaderMap) -> Response<Content> {
        let mut answer = self.whole(status, self.choose(headers), method);
        // It is not the representation of what was asked for.
        for name in [header::ETAG, header::LAST_MODIFIED, header::ACCEPT_RANGES] {
            answer.headers_mut().remove(name);
        }
        answer
    }

    fn choose(&self, headers: &HeaderMap) -> Encoding {
        match self.compressible {
            true => encoding::choose(headers, |encoding| self.blob.has(encoding)),
            false => Encoding::Identity,
        }
    }

    /// The answer that conditions force, if they do: 412 or 304.
    fn condition(&self, headers: &HeaderMap) -> Option<StatusCode> {
        let same_time = |value: &HeaderValue| self.stamp.is_time(value.as_bytes());
        let changed = match headers.get(header::IF_MATCH) {
            Some(_) => !headers.get_all(header::IF_MATCH).iter().any(|asked| self.matches(asked.as_bytes(), false)),
            None => headers.get(header::IF_UNMODIFIED_SINCE).is_some_and(|value| !same_time(value)),
        };
        if changed {
            return Some(StatusCode::PRECONDITION_FAILED);
        }
        let unchanged = match headers.get(header::IF_NONE_MATCH) {
            Some(_) => headers.get_all(header::IF_NONE_MATCH).iter().any(|asked| self.matches(asked.as_bytes(), true)),
            // Not "older than": after a return to an earlier commit, what was modified earlier is new.
            None => headers.get(header::IF_MODIFIED_SINCE).is_some_and(same_time),
        };
        unchanged.then_some(StatusCode::NOT_MODIFIED)
    }

    /// Whether a list of entity tags names this file, in whatever form: what the client has is this blob's.
    fn matches(&self, asked: &[u8], weakly: bool) -> bool {
        asked.split(|b| *b == b',').map(<[u8]>::trim_ascii).any(|tag| {
            let tag = if weakly { tag.strip_prefix(b"W/").unwrap_or(tag) } else { tag };
            let inner = tag.strip_prefix(b"\"").and_then(|tag| tag.strip_suffix(b"\""));
            tag == b"*" || inner.and_then(|inner| inner.strip_prefix(self.blob.id.as_bytes())).is_some_and(is_suffix)
        })
    }

    /// A range holds for the representation that the client has a part of, and for no other. A time with the resolution
    /// of a second is no proof of that.
    fn may_range(&self, headers: &HeaderMap) -> bool {
        headers.get(header::IF_RANGE).is_none_or(|tag| Some(tag) == self.head(self.choose(headers)).get(header::ETAG))
    }

    fn length(&self, encoding: Encoding) -> u64 {
        match self.blob.bits(encoding) {
            Bits::Memory(bytes) => u64::try_from(bytes.len()).unwrap_or(u64::MAX),
            Bits::Disk(extent) => extent.length,
        }
    }

    /// The head of the whole file in one form, built at its first use.
    fn head(&self, encoding: Encoding) -> &HeaderMap {
        self.heads[encoding.index()].get_or_init(|| {
            let mut head = HeaderMap::with_capacity(12);
            head.insert(header::CONTENT_LENGTH, HeaderValue::from(self.length(encoding)));
            head.insert(header::CONTENT_TYPE, HeaderValue::from_static(self.content_type));
            put(&mut head, header::ETAG, &format!("\"{}{}\"", self.blob.id, encoding.etag_suffix()));
            head.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
            // A commit may be replaced at any moment; the strong entity tag makes asking again cheap.
            head.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
            head.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
            if self.compressible {
                head.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
            }
            if let Some(name) = encoding.name() {
                head.insert(header::CONTENT_ENCODING, HeaderValue::from_static(name));
            }
            self.stamp.mark(&mut head);
            head
        })
    }

    fn whole(&self, status: StatusCode, encoding: Encoding, method: &Method) -> Response<Content> {
        let content = match (*method == Method::HEAD, self.blob.bits(encoding)) {
            (true, _) => Content::Empty,
            (false, Bits::Memory(bytes)) => Content::Memory(bytes),
            (false, Bits::Disk(extent)) => Content::Disk(extent),
        };
        answer(status, self.head(encoding).clone(), content)
    }

    fn part(&self, part: Part, encoding: Encoding) -> Response<Content> {
        let mut head = self.head(encoding).clone();
        put(&mut head, header::CONTENT_RANGE, &content_range(part, self.length(encoding)));
        head.insert(header::CONTENT_LENGTH, HeaderValue::from(part.len()));
        let content = match self.blob.bits(encoding) {
            Bits::Memory(bytes) => Content::Memory(slice(&bytes, part)),
            Bits::Disk(mut extent) => {
                (extent.offset, extent.length) = (extent.offset + part.first, part.len());
                Content::Disk(extent)
            }
        };
        answer(StatusCode::PARTIAL_CONTENT, head, content)
    }

    fn parts(&self, parts: &[Part], bytes: &Bytes, encoding: Encoding) -> Response<Content> {
        let mut pieces = VecDeque::new();
        for part in parts {
            let range = content_range(*part, self.length(encoding));
            let kind = self.content_type;
            let head = format!("\r\n--{BOUNDARY}\r\ncontent-type: {kind}\r\ncontent-range: {range}\r\n\r\n");
            pieces.push_back(Bytes::from(head));
            pieces.push_back(slice(bytes, *part));
        }
        pieces.push_back(Bytes::from(format!("\r\n--{BOUNDARY}--\r\n")));
        let mut head = self.head(encoding).clone();
        head.insert(header::CONTENT_LENGTH, HeaderValue::from(pieces.iter().map(Bytes::len).sum::<usize>()));
        put(&mut head, header::CONTENT_TYPE, &format!("multipart/byteranges; boundary={BOUNDARY}"));
        answer(StatusCode::PARTIAL_CONTENT, head, Content::Pieces(pieces))
    }

    fn without_body(&self, status: StatusCode, encoding: Encoding) -> Response<Content> {
        let mut head = self.head(encoding).clone();
        for name in [header::CONTENT_LENGTH, header::CONTENT_TYPE, header::CONTENT_ENCODING] {
            head.remove(name);
        }
        answer(status, head, Content::Empty)
    }
}

fn answer(status: StatusCode, head: HeaderMap, content: Content) -> Response<Content> {
    let mut answer = Response::new(content);
    *answer.status_mut() = status;
    *answer.headers_mut() = head;
    answer
}

fn is_suffix(suffix: &[u8]) -> bool {
    let known = encoding::COMPRESSED.iter().map(|e| e.etag_suffix().as_bytes());
    suffix.is_empty() || known.into_iter().any(|k| k == suffix)
}

fn content_range(part: Part, length: u64) -> String {
    format!("bytes {}-{}/{length}", part.first, part.last)
}

fn slice(bytes: &Bytes, part: Part) -> Bytes {
    let at = |n: u64| usize::try_from(n).unwrap_or(usize::MAX).min(bytes.len());
    bytes.slice(at(part.first)..at(part.last.saturating_add(1)))
}

fn put(head: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        head.insert(name, value);
    }
}
