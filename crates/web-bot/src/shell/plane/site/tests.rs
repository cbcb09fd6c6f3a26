//! A small site is asked for everything that it has, and for what it must not give.

use proptest::prelude::*;

use super::*;

const TIME: &str = "Sat, 24 Oct 2026 08:00:00 GMT";
const TIME_S: u64 = 1_792_828_800;

fn site_with(rules: &[(&str, &str, &str)]) -> Site {
    let vault = Vault::new(&std::env::temp_dir(), 1 << 20);
    let mut site = SiteBuilder::new("sha", TIME_S, "web-1", &vault);
    let long = "all work and no play ".repeat(100);
    let files = [
        ("index.html", "aa", "<p>home</p>"),
        ("404.html", "bb", "<p>lost</p>"),
        ("docs/404.html", "bd", "<p>lost in docs</p>"),
        ("about.html", "cc", "<p>about</p>"),
        ("blog/index.html", "dd", "<p>blog</p>"),
        ("css/site.css", "ee", "0123456789"),
        ("long.txt", "ff", &long),
        ("a b.txt", "a0", "blank"),
        ("über.txt", "a1", "umlaut"),
        (".env", "a2", "secret"),
        (".well-known/security.txt", "a3", "contact"),
        ("x/.git/config", "a4", "git"),
        ("empty.txt", "a5", ""),
    ];
    for (path, id, data) in files.iter().chain(rules) {
        site.add(path, id, data.as_bytes()).expect("added");
    }
    site.press()();
    site.finish()
}

/// A small answer, taken apart.
struct Seen {
    status: u16,
    head: HeaderMap,
    body: Vec<u8>,
}

impl Seen {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("text")
    }

    fn header(&self, name: &str) -> &str {
        self.head.get(name).map_or("", |value| value.to_str().expect("ascii"))
    }
}

fn ask_at(site: &Site, method: Method, path: &str, headers: &[(&str, &str)]) -> Seen {
    let mut asked = HeaderMap::new();
    for (name, value) in headers {
        asked.append(name.parse::<header::HeaderName>().expect("name"), value.parse().expect("value"));
    }
    let (head, content) = site.answer(&method, &path.parse().expect("a path"), &asked).into_parts();
    let body = match content {
        Content::Empty => Vec::new(),
        Content::Memory(bytes) => bytes.to_vec(),
        Content::Pieces(pieces) => pieces.into_iter().flatten().collect(),
        Content::Disk(extent) => {
            use std::os::unix::fs::FileExt;
            let mut read = vec![0; usize::try_from(extent.length).expect("small")];
            extent.file().read_exact_at(&mut read, extent.offset).expect("read");
            read
        }
    };
    if method == Method::GET && head.headers.contains_key("content-length") {
        assert_eq!(head.headers["content-length"], body.len().to_string(), "{path}");
    }
    Seen { status: head.status.as_u16(), head: head.headers, body }
}

fn ask(path: &str, headers: &[(&str, &str)]) -> Seen {
    ask_at(&site_with(&[]), Method::GET, path, headers)
}

#[test]
fn paths_lead_to_files() {
    let check = |path: &str, expected: &str| {
        let seen = ask(path, &[]);
        assert_eq!((seen.status, seen.text()), (200, expected), "{path}");
    };
    check("/", "<p>home</p>");
    check("/index.html", "<p>home</p>");
    check("/index", "<p>home</p>");
    check("/about", "<p>about</p>");
    check("/about.html?x=1", "<p>about</p>");
    check("/blog/", "<p>blog</p>");
    check("/css/site.css", "0123456789");
    check("/css%2Fsite.css", "0123456789");
    check("/a%20b.txt", "blank");
    check("/%C3%BCber.txt", "umlaut");
    check("/.well-known/security.txt", "contact");
    check("/empty.txt", "");
}

#[test]
fn nothing_else_can_be_reached() {
    for path in [
        "/nothing",
        "/css/",
        "/css",
        "//index.html",
        "/../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2f..%2fetc/passwd",
        "/css/../index.html",
        "/./index.html",
        "/css\\site.css",
        "/css%5csite.css",
        "/index.html%00",
        "/%",
        "/%zz",
        "/%ff",
        "/.env",
        "/x/.git/config",
        "/.git/config",
        "/x/%2egit/config",
        "/_redirects",
        "/index.html/",
        "/about.html/",
    ] {
        let seen = ask(path, &[]);
        assert_eq!((seen.status, seen.text()), (404, "<p>lost</p>"), "{path}");
    }
    assert_eq!(ask("/docs/a/b", &[]).text(), "<p>lost in docs</p>");
    let lost = ask("/nothing", &[]);
    assert_eq!((lost.header("etag"), lost.header("last-modified"), lost.header("x-bots-revision")), ("", "", "sha"));
}

#[test]
fn slashes_are_put_right_and_never_lead_to_another_host() {
    let check = |path: &str, location: &str| {
        let seen = ask(path, &[]);
        assert_eq!((seen.status, seen.header("location")), (301, location), "{path}");
    };
    check("/blog", "/blog/");
    check("/blog?a=b", "/blog/?a=b");
    check("/about/", "/about");
    assert_eq!(site_with(&[]).redirect("//evil.example/x", "/", None).headers()[header::LOCATION], "/evil.example/x/");
}

#[test]
fn a_head_says_all() {
    let seen = ask("/css/site.css", &[]);
    let expected = [
        ("content-length", "10"),
        ("content-type", "text/css; charset=utf-8"),
        ("etag", "\"ee\""),
        ("last-modified", TIME),
        ("accept-ranges", "bytes"),
        ("cache-control", "no-cache"),
        ("x-content-type-options", "nosniff"),
        ("vary", "accept-encoding"),
        ("x-bots-revision", "sha"),
        ("x-bots-name", "web-1"),
    ];
    assert_eq!(seen.head.len(), expected.len(), "{:?}", seen.head);
    for (name, value) in expected {
        assert_eq!(seen.header(name), value, "{name}");
    }
}

#[test]
fn what_the_client_has_is_not_sent_again() {
    let check = |headers: &[(&str, &str)], status: u16| {
        let seen = ask("/css/site.css", headers);
        assert_eq!(seen.status, status, "{headers:?}");
        if status == 304 {
            assert_eq!((seen.header("etag"), seen.header("content-length"), seen.body.len()), ("\"ee\"", "", 0));
        }
    };
    for same in ["\"ee\"", "W/\"ee\"", "\"x\", \"ee\"", "*", "\"ee-gz\""] {
        check(&[("if-none-match", same)], 304);
    }
    check(&[("if-none-match", "\"eef\"")], 200);
    check(&[("if-none-match", "\"other\""), ("if-modified-since", TIME)], 200);
    check(&[("if-modified-since", TIME)], 304);
    // A return to an older commit is news, too.
    check(&[("if-modified-since", "Sun, 25 Oct 2026 08:00:00 GMT")], 200);
    check(&[("if-modified-since", "nonsense")], 200);
    check(&[("if-match", "\"ee\"")], 200);
    check(&[("if-match", "W/\"ee\"")], 412);
    check(&[("if-match", "\"x\"")], 412);
    check(&[("if-unmodified-since", TIME)], 200);
    check(&[("if-unmodified-since", "Fri, 23 Oct 2026 08:00:00 GMT")], 412);
}

#[test]
fn parts_of_files() {
    let check = |headers: &[(&str, &str)], status: u16, range: &str, body: &str| {
        let seen = ask("/css/site.css", headers);
        assert_eq!((seen.status, seen.header("content-range"), seen.text()), (status, range, body), "{headers:?}");
    };
    check(&[("range", "bytes=2-4")], 206, "bytes 2-4/10", "234");
    check(&[("range", "bytes=-3")], 206, "bytes 7-9/10", "789");
    check(&[("range", "bytes=5-2")], 200, "", "0123456789");
    check(&[("range", "bytes=50-60")], 416, "bytes */10", "");
    check(&[("range", "bytes=2-4"), ("if-range", "\"ee\"")], 206, "bytes 2-4/10", "234");
    check(&[("range", "bytes=2-4"), ("if-range", "\"other\"")], 200, "", "0123456789");
    check(&[("range", "bytes=2-4"), ("if-range", TIME)], 200, "", "0123456789");
    let several = ask("/css/site.css", &[("range", "bytes=0-1,8-9")]);
    assert_eq!(several.status, 206);
    let boundary = several.header("content-type").strip_prefix("multipart/byteranges; boundary=").expect("a boundary");
    let kind = "content-type: text/css; charset=utf-8\r\n";
    let expected = format!(
        "\r\n--{boundary}\r\n{kind}content-range: bytes 0-1/10\r\n\r\n01\
         \r\n--{boundary}\r\n{kind}content-range: bytes 8-9/10\r\n\r\n89\r\n--{boundary}--\r\n"
    );
    assert_eq!(several.text(), expected);
    let head = ask_at(&site_with(&[]), Method::HEAD, "/css/site.css", &[("range", "bytes=2-4")]);
    assert_eq!((head.status, head.header("content-length"), head.body.len()), (200, "10", 0));
}

#[test]
fn what_can_be_compressed_is_sent_as_the_client_likes_it() {
    let check = |accept: &str, encoding: &str, etag: &str| {
        let seen = ask("/long.txt", &[("accept-encoding", accept)]);
        assert_eq!(
            (seen.header("content-encoding"), seen.header("etag"), seen.header("vary")),
            (encoding, etag, "accept-encoding")
        );
        assert_eq!(seen.body.len() < 2_000, !encoding.is_empty());
    };
    check("gzip, br, zstd", "br", "\"ff-br\"");
    check("gzip", "gzip", "\"ff-gz\"");
    check("zstd", "zstd", "\"ff-zst\"");
    check("identity", "", "\"ff\"");
    let short = ask("/css/site.css", &[("accept-encoding", "gzip, br")]);
    assert_eq!((short.header("content-encoding"), short.text()), ("", "0123456789"));
}

#[test]
fn other_methods_are_told_what_there_is() {
    let site = site_with(&[]);
    let seen = ask_at(&site, Method::POST, "/", &[]);
    assert_eq!((seen.status, seen.header("allow")), (405, "GET, HEAD, OPTIONS"));
    let seen = ask_at(&site, Method::OPTIONS, "/", &[]);
    assert_eq!((seen.status, seen.header("allow"), seen.body.len()), (204, "GET, HEAD, OPTIONS", 0));
}

#[test]
fn rules_of_the_site_are_followed() {
    let site = site_with(&[
        ("_redirects", "r1", "/old /about 302\n/app/* /index.html 200\n/gone /about 404\n/broken /nowhere 200\n"),
        ("_headers", "r2", "/*\n  X-Frame-Options: DENY\n/css/*\n  Cache-Control: max-age=60\n"),
    ]);
    let get = |path: &str| ask_at(&site, Method::GET, path, &[]);
    assert_eq!((get("/old").status, get("/old").header("location")), (302, "/about"));
    assert_eq!((get("/app/any/thing").status, get("/app/any/thing").text()), (200, "<p>home</p>"));
    assert_eq!((get("/gone").status, get("/gone").text()), (404, "<p>about</p>"));
    assert_eq!(get("/broken").status, 404);
    assert_eq!(
        (get("/css/site.css").header("cache-control"), get("/").header("x-frame-options")),
        ("max-age=60", "DENY")
    );
    assert_eq!(get("/nothing").header("x-frame-options"), "DENY");
    assert_eq!(get("/_headers").status, 404);
    let vault = Vault::new(&std::env::temp_dir(), 1 << 20);
    let error = SiteBuilder::new("sha", 0, "web-1", &vault).add("_redirects", "r", b"/a /b 299").expect_err("refused");
    assert!(error.to_string().starts_with("_redirects, line 1: status `299`"), "{error}");
}

#[test]
fn a_large_file_comes_from_disk_the_same_way() {
    let vault = Vault::new(&std::env::temp_dir(), 4);
    let mut site = SiteBuilder::new("sha", TIME_S, "web-1", &vault);
    site.add("a.bin", "a", b"first").expect("added");
    site.add("b.bin", "b", b"0123456789").expect("added");
    let site = site.finish();
    let get = |headers: &[(&str, &str)]| ask_at(&site, Method::GET, "/b.bin", headers);
    assert_eq!((get(&[]).status, get(&[]).text()), (200, "0123456789"));
    assert_eq!((get(&[("range", "bytes=3-5")]).status, get(&[("range", "bytes=3-5")]).text()), (206, "345"));
    assert_eq!(get(&[("range", "bytes=0-0,3-5")]).text(), "0123456789");
}

proptest! {
    #[test]
    fn any_path_is_answered_and_hidden_files_never(path in "/[ -~]{0,40}", accept in "[a-z*;=., 0-9]{0,30}", range in "bytes=[-0-9,]{0,12}") {
        prop_assume!(path.parse::<Uri>().is_ok());
        let seen = ask(&path, &[("accept-encoding", &accept), ("range", &range)]);
        prop_assert!([200, 206, 301, 404, 416].contains(&seen.status), "{path}: {}", seen.status);
        let body = String::from_utf8_lossy(&seen.body);
        prop_assert!(!body.contains("secret") && !body.contains("git"), "{path}");
    }

    #[test]
    fn decoding_never_makes_what_paths_must_not_hold(path in "/([a-z./%0-9A-F]|%2e|%5c|%00|%2F){0,30}") {
        if let Some(plain) = decode(&path) {
            prop_assert!(!plain.contains(['\0', '\\']));
        }
    }
}
