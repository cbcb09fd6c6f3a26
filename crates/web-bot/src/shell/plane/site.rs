//! A site in memory: the files of one commit, and which of them answers a request. Nothing outside of it can be reached,
//! because there is nothing but a table of paths.

use std::collections::BTreeMap;

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    HeaderMap, Method, Response, StatusCode,
    header::{self, HeaderValue},
};

/// The files of one commit.
#[derive(Debug)]
pub(crate) struct Site {
    sha: String,
    files: BTreeMap<String, File>,
}

#[derive(Debug)]
struct File {
    etag: HeaderValue,
    content_type: &'static str,
    data: Bytes,
}

/// What a path leads to.
enum Found<'s> {
    File(&'s File),
    /// A folder without the slash at its end: relative links would go wrong.
    Folder,
    Nothing,
}

impl Site {
    /// A site without files.
    pub(crate) fn new(sha: &str) -> Self {
        Self { sha: sha.to_owned(), files: BTreeMap::new() }
    }

    /// Adds a file; `id` is its blob's.
    pub(crate) fn add(&mut self, path: &str, id: &str, data: &[u8]) {
        let etag = HeaderValue::from_str(&format!("\"{id}\"")).unwrap_or(HeaderValue::from_static("\"\""));
        let file = File { etag, content_type: content_type(path), data: Bytes::copy_from_slice(data) };
        self.files.insert(path.to_owned(), file);
    }

    /// The commit.
    pub(crate) fn sha(&self) -> &str {
        &self.sha
    }

    /// Answers a request for `path`.
    pub(crate) fn answer(&self, method: &Method, path: &str, headers: &HeaderMap) -> Response<Full<Bytes>> {
        if !matches!(*method, Method::GET | Method::HEAD) {
            let mut answer = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD: this is a static site\n");
            answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            return answer;
        }
        let decoded = decode(path);
        match decoded.as_deref().map_or(Found::Nothing, |path| self.find(path)) {
            Found::File(file) => file.answer(method, headers),
            Found::Folder => redirect(path),
            Found::Nothing => match self.files.get("404.html") {
                Some(page) => page.whole(StatusCode::NOT_FOUND, method),
                None => plain(StatusCode::NOT_FOUND, "no such page\n"),
            },
        }
    }

    fn find(&self, path: &str) -> Found<'_> {
        let Some(rest) = path.strip_prefix('/') else { return Found::Nothing };
        if rest.split('/').any(|part| matches!(part, "." | "..") || part.eq_ignore_ascii_case(".git")) {
            return Found::Nothing;
        }
        let index = match rest {
            "" => String::from("index.html"),
            folder if folder.ends_with('/') => format!("{folder}index.html"),
            file => match self.files.get(file) {
                Some(file) => return Found::File(file),
                None if self.files.contains_key(&format!("{file}/index.html")) => return Found::Folder,
                None => return Found::Nothing,
            },
        };
        self.files.get(&index).map_or(Found::Nothing, Found::File)
    }
}

impl File {
    fn answer(&self, method: &Method, headers: &HeaderMap) -> Response<Full<Bytes>> {
        if headers.get(header::IF_NONE_MATCH).is_some_and(|asked| self.matches(asked)) {
            let mut answer = Response::new(Full::default());
            *answer.status_mut() = StatusCode::NOT_MODIFIED;
            answer.headers_mut().insert(header::ETAG, self.etag.clone());
            return answer;
        }
        let whole_only = headers.get(header::IF_RANGE).is_some_and(|etag| *etag != self.etag);
        match headers.get(header::RANGE).filter(|_| !whole_only).map(|range| self.range(range)) {
            Some(Some((first, last))) => self.part(first, last, method),
            Some(None) | None => self.whole(StatusCode::OK, method),
        }
    }

    fn matches(&self, asked: &HeaderValue) -> bool {
        let mine = self.etag.as_bytes();
        let asked = asked.as_bytes().split(|b| *b == b',').map(<[u8]>::trim_ascii);
        asked.into_iter().any(|etag| etag == b"*" || etag.strip_prefix(b"W/").unwrap_or(etag) == mine)
    }

    /// The first and last byte of a single range that lies in the file. Anything else is answered in whole, as the
    /// standard allows.
    fn range(&self, range: &HeaderValue) -> Option<(usize, usize)> {
        let (first, last) = range.to_str().ok()?.strip_prefix("bytes=")?.split_once('-')?;
        let end = self.data.len().checked_sub(1)?;
        let (first, last) = match (first, last) {
            ("", suffix) => (self.data.len().saturating_sub(suffix.parse().ok().filter(|n| *n > 0)?), end),
            (first, "") => (first.parse().ok()?, end),
            (first, last) => (first.parse().ok()?, last.parse::<usize>().ok()?.min(end)),
        };
        (first <= last).then_some((first, last))
    }

    fn part(&self, first: usize, last: usize, method: &Method) -> Response<Full<Bytes>> {
        let mut answer = self.with_body(StatusCode::PARTIAL_CONTENT, method, self.data.slice(first..=last));
        let range = format!("bytes {first}-{last}/{}", self.data.len());
        answer.headers_mut().extend(HeaderValue::from_str(&range).ok().map(|range| (header::CONTENT_RANGE, range)));
        answer
    }

    fn whole(&self, status: StatusCode, method: &Method) -> Response<Full<Bytes>> {
        self.with_body(status, method, self.data.clone())
    }

    fn with_body(&self, status: StatusCode, method: &Method, data: Bytes) -> Response<Full<Bytes>> {
        let length = HeaderValue::from(data.len());
        let body = if *method == Method::HEAD { Bytes::new() } else { data };
        let mut answer = Response::new(Full::new(body));
        *answer.status_mut() = status;
        let headers = answer.headers_mut();
        headers.insert(header::CONTENT_LENGTH, length);
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(self.content_type));
        headers.insert(header::ETAG, self.etag.clone());
        headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        // A commit may be replaced at any moment; the strong entity tag makes asking again cheap.
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        answer
    }
}

/// A short answer of words.
pub(super) fn plain(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::from(text));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

/// To the same path with a slash. Slashes at the front are made one, since two would name another host.
fn redirect(path: &str) -> Response<Full<Bytes>> {
    let mut answer = plain(StatusCode::MOVED_PERMANENTLY, "a folder\n");
    let target = format!("/{}/", path.trim_matches('/'));
    answer.headers_mut().extend(HeaderValue::from_str(&target).ok().map(|target| (header::LOCATION, target)));
    answer
}

/// Percent-decodes a path; nothing if it is not UTF-8 or holds a zero byte or a backslash.
fn decode(path: &str) -> Option<String> {
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
    String::from_utf8(decoded).ok().filter(|path| !path.contains(['\0', '\\']))
}

fn content_type(path: &str) -> &'static str {
    let name = path.rsplit('/').next().unwrap_or(path);
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
    match extension.to_ascii_lowercase().as_str() {
        "html" | "htm" => "text/html; charset=utf-8",
        "css" => "text/css; charset=utf-8",
        "js" | "mjs" => "text/javascript; charset=utf-8",
        "json" | "map" => "application/json",
        "webmanifest" => "application/manifest+json",
        "xml" => "application/xml",
        "txt" => "text/plain; charset=utf-8",
        "md" => "text/markdown; charset=utf-8",
        "csv" => "text/csv; charset=utf-8",
        "svg" => "image/svg+xml",
        "png" => "image/png",
        "jpg" | "jpeg" => "image/jpeg",
        "gif" => "image/gif",
        "webp" => "image/webp",
        "avif" => "image/avif",
        "ico" => "image/x-icon",
        "woff" => "font/woff",
        "woff2" => "font/woff2",
        "ttf" => "font/ttf",
        "otf" => "font/otf",
        "pdf" => "application/pdf",
        "wasm" => "application/wasm",
        "mp3" => "audio/mpeg",
        "mp4" => "video/mp4",
        "webm" => "video/webm",
        "zip" => "application/zip",
        "gz" => "application/gzip",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    fn site() -> Site {
        let mut site = Site::new("sha");
        site.add("index.html", "aa", b"<p>home</p>");
        site.add("css/site.css", "bb", b"0123456789");
        site.add("blog/index.html", "cc", b"blog");
        site.add(".well-known/x", "dd", b"x");
        site
    }

    fn ask(method: Method, path: &str, headers: &[(&str, &str)]) -> (StatusCode, HeaderMap, String) {
        let headers: HeaderMap =
            headers.iter().map(|(k, v)| (k.parse().expect("name"), v.parse().expect("value"))).collect();
        let (head, body) = site().answer(&method, path, &headers).into_parts();
        let body = futures_util::FutureExt::now_or_never(body.collect()).expect("in memory").expect("infallible");
        (head.status, head.headers, String::from_utf8(body.to_bytes().to_vec()).expect("text"))
    }

    #[test]
    fn paths_lead_to_files_and_nowhere_else() {
        let check = |path: &str, status: u16, body: &str| {
            let (found, _, text) = ask(Method::GET, path, &[]);
            assert_eq!((found.as_u16(), text.as_str()), (status, body), "{path}");
        };
        check("/", 200, "<p>home</p>");
        check("/blog/", 200, "blog");
        check("/blog", 301, "a folder\n");
        check("/css/site.css", 200, "0123456789");
        check("/c%73s/site%2ecss", 200, "0123456789");
        check("/.well-known/x", 200, "x");
        for nowhere in [
            "/../etc/passwd",
            "/%2e%2e/etc/passwd",
            "/css/../index.html",
            "/.git/config",
            "/.GIT/config",
            "/css\\x",
            "/%00",
            "/%",
            "/%zz",
            "/%ff",
            "/css/",
            "/css",
            "//index.html",
            "index.html",
            "*",
        ] {
            check(nowhere, 404, "no such page\n");
        }
    }

    #[test]
    fn a_folder_never_redirects_to_another_host() {
        let (_, headers, _) = ask(Method::GET, "/blog", &[]);
        assert_eq!(headers[header::LOCATION], "/blog/");
        assert_eq!(redirect("//evil.example/x").headers()[header::LOCATION], "/evil.example/x/");
    }

    #[test]
    fn etags_save_the_body() {
        let (_, headers, _) = ask(Method::GET, "/", &[]);
        assert_eq!(headers[header::ETAG], "\"aa\"");
        for same in ["\"aa\"", "W/\"aa\"", "\"x\", \"aa\"", "*"] {
            assert_eq!(ask(Method::GET, "/", &[("if-none-match", same)]).0, StatusCode::NOT_MODIFIED, "{same}");
        }
        assert_eq!(ask(Method::GET, "/", &[("if-none-match", "\"bb\"")]).0, StatusCode::OK);
    }

    #[test]
    fn head_has_the_length_and_no_body() {
        let (status, headers, body) = ask(Method::HEAD, "/", &[]);
        assert_eq!((status, body.as_str()), (StatusCode::OK, ""));
        assert_eq!(headers[header::CONTENT_LENGTH], "11");
        assert_eq!(headers[header::CONTENT_TYPE], "text/html; charset=utf-8");
        assert_eq!(ask(Method::POST, "/", &[]).0, StatusCode::METHOD_NOT_ALLOWED);
    }

    #[test]
    fn single_ranges_are_served_and_odd_ones_in_whole() {
        let check = |range: &str, status: u16, body: &str| {
            let (found, _, text) = ask(Method::GET, "/css/site.css", &[("range", range)]);
            assert_eq!((found.as_u16(), text.as_str()), (status, body), "{range}");
        };
        check("bytes=2-4", 206, "234");
        check("bytes=7-", 206, "789");
        check("bytes=-3", 206, "789");
        check("bytes=8-99", 206, "89");
        check("bytes=5-2", 200, "0123456789");
        check("bytes=50-60", 200, "0123456789");
        check("bytes=0-1,4-5", 200, "0123456789");
        let other = [("range", "bytes=2-4"), ("if-range", "\"other\"")];
        assert_eq!(ask(Method::GET, "/css/site.css", &other).0, StatusCode::OK);
    }
}
