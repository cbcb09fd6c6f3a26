//! A site: the files of one commit, and which of them answers a request. Nothing outside of it can be reached, because
//! there is nothing but a table of paths.

mod content;
mod encoding;
mod page;
mod range;
mod rules;
mod short;
#[cfg(test)]
mod tests;
mod types;
mod vault;

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use hyper::{
    HeaderMap, Method, Response, StatusCode, Uri,
    header::{self, HeaderValue},
};

pub(crate) use self::{
    content::Content,
    short::{Asked, Short},
    vault::{Extent, Spill, Vault},
};
use self::{
    page::Page,
    rules::{Outcome, Rules},
};

/// The methods that a static site knows.
const METHODS: HeaderValue = HeaderValue::from_static("GET, HEAD, OPTIONS");

/// What every answer of one commit says.
#[derive(Debug)]
struct Stamp {
    sha: HeaderValue,
    name: HeaderValue,
    /// The commit's time: when its files were last modified, as far as anybody outside can tell.
    modified: HeaderValue,
    modified_s: u64,
}

/// The files of one commit.
#[derive(Debug)]
pub(crate) struct Site {
    stamp: Arc<Stamp>,
    places: BTreeMap<String, Place>,
    rules: Rules,
}

/// What a path leads to.
#[derive(Debug, Clone)]
enum Place {
    File(Arc<Page>),
    /// A folder without the slash at its end: relative links would go wrong.
    Folder,
    /// A page with a slash at its end: the same.
    NoFolder,
}

/// A site that is being put together.
#[derive(Debug)]
pub(crate) struct SiteBuilder {
    vault: Arc<Vault>,
    spill: Spill,
    site: Site,
    pages: BTreeMap<String, Arc<Page>>,
}

/// Why a site cannot be put together.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SiteError {
    /// One of its files with rules.
    #[error("{0}")]
    Rules(String),
    /// No room for what memory does not hold.
    #[error("cannot keep a large file below data_dir: {0}")]
    Spill(#[from] std::io::Error),
}

impl SiteBuilder {
    /// A site without files. `modified_s` is the commit's time, in seconds since 1970.
    pub(crate) fn new(sha: &str, modified_s: u64, name: &str, vault: &Arc<Vault>) -> Self {
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(modified_s.min(TIME_S_MAX));
        let value = |text: &str| HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static("unknown"));
        let stamp = Stamp {
            sha: value(sha),
            name: value(name),
            modified: value(&httpdate::fmt_http_date(time)),
            modified_s: modified_s.min(TIME_S_MAX),
        };
        let site = Site { stamp: Arc::new(stamp), places: BTreeMap::new(), rules: Rules::default() };
        Self { vault: Arc::clone(vault), spill: Spill::default(), site, pages: BTreeMap::new() }
    }

    /// Adds a file; `id` is its blob's. Files whose name begins with a dot are not for the world, but `.well-known` is.
    pub(crate) fn add(&mut self, path: &str, id: &str, data: &[u8]) -> Result<(), SiteError> {
        if rules::FILES.contains(&path) {
            return self.site.rules.read(path, data).map_err(SiteError::Rules);
        }
        if path.split('/').any(|part| part.starts_with('.') && part != ".well-known") {
            return Ok(());
        }
        let blob = self.vault.take(id, data, &mut self.spill)?;
        self.pages.insert(path.to_owned(), Arc::new(Page::new(blob, path, &self.site.stamp)));
        Ok(())
    }

    /// The site, with every path that leads somewhere.
    pub(crate) fn finish(mut self) -> Site {
        let places = &mut self.site.places;
        places.extend(self.pages.iter().map(|(path, page)| (format!("/{path}"), Place::File(Arc::clone(page)))));
        // A page that is there under its very name wins, then the index of a folder, then a page without its ending.
        for (path, page) in &self.pages {
            let Some(folder) = path.strip_suffix("index.html").filter(|f| f.is_empty() || f.ends_with('/')) else {
                continue;
            };
            places.entry(format!("/{folder}")).or_insert_with(|| Place::File(Arc::clone(page)));
            if let Some(name) = folder.strip_suffix('/') {
                places.entry(format!("/{name}")).or_insert(Place::Folder);
            }
        }
        for (path, page) in &self.pages {
            let Some(clean) = path.strip_suffix(".html").filter(|c| !c.is_empty() && !c.ends_with('/')) else {
                continue;
            };
            places.entry(format!("/{clean}")).or_insert_with(|| Place::File(Arc::clone(page)));
            places.entry(format!("/{clean}/")).or_insert(Place::NoFolder);
        }
        self.vault.sweep();
        self.site
    }

    /// Compresses what can be, while the site is served already; for a thread of its own.
    pub(crate) fn press(&self) -> impl FnOnce() + Send + 'static {
        let blobs: Vec<_> = self.pages.values().filter_map(|page| page.to_compress()).map(Arc::downgrade).collect();
        let vault = Arc::clone(&self.vault);
        move || vault.compress(blobs)
    }
}

/// The last second that a date in a header can name: the year 9999.
const TIME_S_MAX: u64 = 253_402_300_799;

impl Site {
    /// The commit.
    pub(crate) fn sha(&self) -> &str {
        self.stamp.sha.to_str().unwrap_or_default()
    }

    /// Answers a request. Every answer says from which commit it is.
    pub(crate) fn answer(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> Response<Content> {
        if !matches!(*method, Method::GET | Method::HEAD) {
            return self.other_method(method);
        }
        let path = uri.path();
        let place = self.place(path);
        if let Some(outcome) = self.rules.redirect(path, uri.query(), place.is_some()) {
            return self.ruled(outcome, path, method, headers);
        }
        match place {
            Some(Place::File(page)) => self.amended(path, page.answer(method, headers)),
            Some(Place::Folder) => self.redirect(path, "/", uri.query()),
            Some(Place::NoFolder) => self.redirect(path, "", uri.query()),
            None => self.not_found(path, method, headers),
        }
    }

    /// The answer to a request for the whole of a file, if memory holds it and no rule of the site has a say in it.
    pub(crate) fn short(&self, asked: &Asked<'_>) -> Option<Short> {
        match self.places.get(asked.path).filter(|_| self.rules.is_empty())? {
            Place::File(page) => page.short(asked),
            Place::Folder | Place::NoFolder => None,
        }
    }

    fn place(&self, path: &str) -> Option<&Place> {
        // Most paths are written as the files are.
        self.places.get(path).or_else(|| match decode(path)? {
            Cow::Owned(path) => self.places.get(&path),
            Cow::Borrowed(_) => None,
        })
    }

    fn ruled(&self, outcome: Outcome, path: &str, method: &Method, headers: &HeaderMap) -> Response<Content> {
        match outcome {
            Outcome::Elsewhere { status, location } => {
                let mut answer = self.plain(status, "it is elsewhere\n");
                answer.headers_mut().insert(header::LOCATION, location);
                self.amended(path, answer)
            }
            Outcome::Rewrite { status, path: target } => match self.place(&target) {
                Some(Place::File(page)) if status == StatusCode::OK => self.amended(path, page.answer(method, headers)),
                Some(Place::File(page)) => self.amended(path, page.stand_in(status, method, headers)),
                Some(Place::Folder | Place::NoFolder) | None => self.not_found(path, method, headers),
            },
        }
    }

    /// The nearest `404.html`, in the folder that was asked for or above it.
    fn not_found(&self, path: &str, method: &Method, headers: &HeaderMap) -> Response<Content> {
        let mut folder = decode(path).unwrap_or(Cow::Borrowed("/")).into_owned();
        while let Some((above, _)) = folder.rsplit_once('/') {
            if let Some(Place::File(page)) = self.places.get(&format!("{above}/404.html")) {
                return self.amended(path, page.stand_in(StatusCode::NOT_FOUND, method, headers));
            }
            folder.truncate(above.len());
        }
        self.amended(path, self.plain(StatusCode::NOT_FOUND, "no such page\n"))
    }

    fn other_method(&self, method: &Method) -> Response<Content> {
        let mut answer = match *method {
            Method::OPTIONS => {
                let mut answer = self.plain(StatusCode::NO_CONTENT, "");
                answer.headers_mut().remove(header::CONTENT_TYPE);
                answer
            }
            _ => match self.places.get("/405.html") {
                Some(Place::File(page)) => {
                    page.stand_in(StatusCode::METHOD_NOT_ALLOWED, &Method::GET, &HeaderMap::new())
                }
                Some(Place::Folder | Place::NoFolder) | None => {
                    self.plain(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD: this is a static site\n")
                }
            },
        };
        answer.headers_mut().insert(header::ALLOW, METHODS);
        answer
    }

    /// To the same path with this ending. Slashes at the front are made one, since two would name another host.
    fn redirect(&self, path: &str, ending: &str, query: Option<&str>) -> Response<Content> {
        let mut answer = self.plain(StatusCode::MOVED_PERMANENTLY, "one slash more or less\n");
        let query = query.map_or_else(String::new, |query| format!("?{query}"));
        let target = format!("/{}{ending}{query}", path.trim_matches('/'));
        answer.headers_mut().extend(HeaderValue::from_str(&target).ok().map(|target| (header::LOCATION, target)));
        answer
    }

    fn amended(&self, path: &str, mut answer: Response<Content>) -> Response<Content> {
        self.rules.amend(path, answer.headers_mut());
        answer
    }

    /// A short answer of words.
    fn plain(&self, status: StatusCode, text: &'static str) -> Response<Content> {
        let mut answer = plain(status, text).map(Content::Memory);
        self.stamp.mark(answer.headers_mut());
        answer.headers_mut().remove(header::LAST_MODIFIED);
        answer
    }
}

impl Stamp {
    fn mark(&self, head: &mut HeaderMap) {
        head.insert(header::LAST_MODIFIED, self.modified.clone());
        head.insert(super::serve::REVISION_HEADER, self.sha.clone());
        head.insert(super::serve::NAME_HEADER, self.name.clone());
    }

    /// Whether a header names the commit's time.
    fn is_time(&self, value: &[u8]) -> bool {
        let time = std::str::from_utf8(value).ok().and_then(|text| httpdate::parse_http_date(text).ok());
        let since = time.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
        since.is_some_and(|since| since.as_secs() == self.modified_s)
    }
}

/// A short answer of words.
pub(super) fn plain(status: StatusCode, text: &'static str) -> Response<Bytes> {
    let mut answer = Response::new(Bytes::from(text));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

/// Percent-decodes a path; nothing if it is not UTF-8 or holds a zero byte or a backslash.
fn decode(path: &str) -> Option<Cow<'_, str>> {
    if !path.contains(['%', '\0', '\\']) {
        return Some(Cow::Borrowed(path));
    }
    let mut decoded = Vec::with_capacity(path.len());
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let digit = |b: Option<u8>| char::from(b?).to_digit(16).and_then(|d| u8::try_from(d).ok());
                digit(bytes.next())? << 4 | digit(bytes.next())?
            }
            other => other,
        });
    }
    String::from_utf8(decoded).ok().filter(|path| !path.contains(['\0', '\\'])).map(Cow::Owned)
}
