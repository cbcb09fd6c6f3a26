//! Requests to others: the canary's pages are read, caches are told to forget. Not what follows from the answers.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use bots_core::shell::{
    Secret, http,
    process::{Ended, Output, Program},
};
use bytes::Bytes;
use hyper::{HeaderMap, Method, header::HeaderName, header::HeaderValue};

/// The header by which a web bot says which commit an answer is from.
const REVISION_HEADER: &str = "x-bots-revision";

/// Where calls leave files for a moment, below the folder that they are given.
const CALLS_FOLDER: &str = "calls";

/// How long one page or one call may take.
const CALL_DEADLINE: Duration = Duration::from_secs(10);

/// The largest answer that is read; what is in it is of no interest.
const ANSWER_LEN_MAX: usize = 16 * 1024 * 1024;

/// One call to a cache.
#[derive(Debug, Clone)]
pub struct Call {
    /// GET, POST, PURGE, BAN, …
    pub method: Method,
    /// Where; `{sha}` stands for the live commit.
    pub url: String,
    /// Headers that may be shown.
    pub headers: Vec<(String, String)>,
    /// Headers with secrets, each in a file that is read for every call.
    pub header_files: Vec<(String, PathBuf)>,
    /// The certificates that an https server must be known by; without it those of the machine.
    pub ca_file: Option<PathBuf>,
    /// The body; `{sha}` stands for the live commit.
    pub body: String,
}

/// What caches are told, and where it is seen whether they have understood.
#[derive(Debug, Clone, Default)]
pub struct Purging {
    /// One after the other.
    pub calls: Vec<Call>,
    /// Pages through the cache that must be of the live commit afterwards.
    pub probes: Vec<Call>,
}

/// What of an answer is of interest.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Answer {
    status: u16,
    /// The commit that it is from, if it says so.
    revision: String,
}

impl Answer {
    /// Whether it is a good page of the commit; one line if not.
    fn check(&self, sha: &str) -> Result<(), String> {
        if self.status >= 400 {
            return Err(format!("it answers {}", self.status));
        }
        if self.revision == sha {
            Ok(())
        } else {
            Err(format!("it answers from commit `{}`", self.revision.get(..8).unwrap_or(&self.revision)))
        }
    }
}

/// Reads every path once: how many, how many failed, and what was wrong with one.
pub(super) async fn read_pages(url: &str, paths: &[String], sha: &str) -> (u64, u64, Option<String>) {
    let (mut asked, mut failed, mut why) = (0, 0, None);
    for path in paths {
        asked += 1;
        let page = format!("{}/{}", url.trim_end_matches('/'), path.trim_start_matches('/'));
        if let Err(wrong) = by_http(Method::GET, &page, HeaderMap::new(), Bytes::new()).await.and_then(|a| a.check(sha))
        {
            failed += 1;
            why = Some(format!("/{}: {wrong}", path.trim_start_matches('/')));
        }
    }
    (asked, failed, why)
}

async fn by_http(method: Method, url: &str, headers: HeaderMap, body: Bytes) -> Result<Answer, String> {
    let answer = http::request(method, url, headers, body, CALL_DEADLINE, ANSWER_LEN_MAX).await;
    let answer = answer.map_err(|e| chain(&e))?;
    let revision = answer.headers.get(REVISION_HEADER).and_then(|v| v.to_str().ok()).unwrap_or_default();
    Ok(Answer { status: answer.status, revision: revision.to_owned() })
}

impl Purging {
    /// Tells every cache, and looks whether it has understood.
    ///
    /// # Errors
    /// One line: who did not.
    pub(super) async fn purge(&self, sha: &str, scratch: &Path) -> Result<(), String> {
        for call in &self.calls {
            let status = call.make(sha, scratch).await.map_err(|why| format!("cannot purge {}: {why}", call.url))?;
            if !(200..300).contains(&status) {
                return Err(format!("cannot purge {}: it answers {status} to {}", call.url, call.method));
            }
        }
        for page in &self.probes {
            let answer = page.ask(sha, scratch).await;
            answer.and_then(|a| a.check(sha)).map_err(|why| format!("{} is not purged: {why}", page.url))?;
        }
        Ok(())
    }
}

impl Call {
    /// Reads a page.
    #[must_use]
    pub fn page(url: &str, ca_file: Option<PathBuf>) -> Self {
        let (url, body) = (url.to_owned(), String::new());
        Self { method: Method::GET, url, headers: Vec::new(), header_files: Vec::new(), ca_file, body }
    }

    /// Makes it; yields the status.
    ///
    /// # Errors
    /// One line, if there is no answer.
    pub(super) async fn make(&self, sha: &str, scratch: &Path) -> Result<u16, String> {
        self.ask(sha, scratch).await.map(|answer| answer.status)
    }

    async fn ask(&self, sha: &str, scratch: &Path) -> Result<Answer, String> {
        let (url, body) = (self.url.replace("{sha}", sha), self.body.replace("{sha}", sha));
        let mut headers: Vec<(String, Secret)> = Vec::new();
        headers
            .extend(self.headers.iter().map(|(name, value)| (name.clone(), Secret::new(value.replace("{sha}", sha)))));
        for (name, path) in &self.header_files {
            headers.push((name.clone(), Secret::from_file(path)?));
        }
        if url.starts_with("https://") {
            return self.by_curl(&url, &headers, &body, scratch).await;
        }
        let pair = |(name, value): &(String, Secret)| {
            let value =
                HeaderValue::from_str(value.expose()).map_err(|_| format!("the header {name} has no usable value"))?;
            let name = HeaderName::try_from(name.as_str()).map_err(|_| format!("`{name}` is no name of a header"))?;
            Ok::<_, String>((name, value))
        };
        let headers = headers.iter().map(pair).collect::<Result<HeaderMap, String>>()?;
        by_http(self.method.clone(), &url, headers, Bytes::from(body)).await
    }

    /// TLS is curl's: the certificates and proxies of the machine hold for it. What it is told goes through a file, for
    /// arguments can be read by everybody.
    async fn by_curl(
        &self,
        url: &str,
        headers: &[(String, Secret)],
        body: &str,
        scratch: &Path,
    ) -> Result<Answer, String> {
        let quoted = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let mut config = format!("url = \"{}\"\nrequest = \"{}\"\n", quoted(url), self.method);
        for (name, value) in headers {
            config.push_str(&format!("header = \"{name}: {}\"\n", quoted(value.expose())));
        }
        if let Some(path) = &self.ca_file {
            config.push_str(&format!("cacert = \"{}\"\n", quoted(&path.display().to_string())));
        }
        if !body.is_empty() {
            config.push_str(&format!("data-raw = \"{}\"\n", quoted(body)));
        }
        let disk = |e: std::io::Error| format!("cannot write to {}: {e}", scratch.display());
        let files = Files::new(scratch).map_err(disk)?;
        let mut file = fs::File::options().create_new(true).write(true).mode(0o600).open(&files.told).map_err(disk)?;
        file.write_all(config.as_bytes()).map_err(disk)?;
        let deadline = CALL_DEADLINE.as_secs().to_string();
        let program = Program::new("curl", "curl")
            .args([
                "--silent",
                "--output",
                "/dev/null",
                "--dump-header",
                "-",
                "--suppress-connect-headers",
                "--write-out",
                "%{http_code}",
                "--max-time",
                &deadline,
                "--config",
                "-",
            ])
            .input(&files.told)
            .output(Output::File(files.said.clone()))
            .dies_with_us();
        let ended = program.run().await.map_err(|e| format!("https needs curl, which cannot be run: {e}"));
        let said = fs::read(&files.said).unwrap_or_default();
        match ended? {
            ended if ended.is_success() => heard(&said).ok_or_else(|| String::from("curl says no status")),
            ended => Err(format!("curl ended with {ended}{}", meaning(ended))),
        }
    }
}

/// What curl has written: heads of answers, of which the last one counts, and the status behind it.
fn heard(said: &[u8]) -> Option<Answer> {
    let said = String::from_utf8_lossy(said);
    let mut lines = said.lines().rev();
    let status = lines.next()?.trim().parse().ok()?;
    let head = lines.take_while(|line| !line.starts_with("HTTP/"));
    let revision = head
        .filter_map(|line| line.split_once(':'))
        .find_map(|(name, value)| name.eq_ignore_ascii_case(REVISION_HEADER).then(|| value.trim().to_owned()));
    Some(Answer { status, revision: revision.unwrap_or_default() })
}

/// What some exit codes of curl mean (`man curl`, EXIT CODES).
const fn meaning(ended: Ended) -> &'static str {
    match ended {
        Ended::Code(6) => ": the host's name cannot be resolved",
        Ended::Code(7) => ": nobody takes connections there",
        Ended::Code(28) => ": no answer in time",
        Ended::Code(35) => ": TLS could not be agreed on",
        Ended::Code(60) => ": the server's certificate is not trusted here: give its authority in `ca_file`",
        Ended::Code(_) | Ended::Signal(_) => "",
    }
}

/// The files of one call: calls overlap, for caches are purged while a hook is told. They go with it, also if it is given up.
struct Files {
    told: PathBuf,
    said: PathBuf,
}

impl Files {
    fn new(scratch: &Path) -> std::io::Result<Self> {
        static CALLS: AtomicU64 = AtomicU64::new(0);
        let (folder, number) = (scratch.join(CALLS_FOLDER), CALLS.fetch_add(1, Ordering::Relaxed));
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        let name = |what: &str| folder.join(format!("{number}.{what}"));
        Ok(Self { told: name("config"), said: name("status") })
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for used in [&self.told, &self.said] {
            let _absent = fs::remove_file(used);
        }
    }
}

/// Removes what calls of a killed predecessor have left, secrets among it.
pub(super) fn clear(scratch: &Path) -> std::io::Result<()> {
    match fs::remove_dir_all(scratch.join(CALLS_FOLDER)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// An error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests;
