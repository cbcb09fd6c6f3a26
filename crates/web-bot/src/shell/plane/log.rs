//! The access log: a line for each answer, in the combined format, with the seconds that it took and its commit. Written
//! on a thread of its own; if the disk cannot keep up, lines are left out and counted, and no request waits.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Write},
    net::IpAddr,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::Duration,
};

use bots_core::shell::{Clock, Metrics, Networks};
use hyper::{HeaderMap, Request, header};
use prometheus_client::metrics::counter::Counter;

use super::{proxy::FORWARDED_FOR, workers::Client};

/// Lines that wait to be written.
const QUEUE_MAX: usize = 8_192;

/// How long a line may wait in the buffer.
const FLUSH_INTERVAL: Duration = Duration::from_secs(1);

/// What a client sends of itself is cut off here.
const TEXT_BYTES_MAX: usize = 1_024;

/// Takes lines. Clones share.
#[derive(Clone)]
pub(super) struct AccessLog {
    lines: SyncSender<Line>,
    dropped: Counter,
}

/// A line in the making; written when dropped, at the end of the answer.
pub(super) struct Line {
    log: Option<AccessLog>,
    client: IpAddr,
    request: String,
    referer: String,
    agent: String,
    began_unix_ms: u64,
    began_us: u64,
    took_us: u64,
    pub(super) status: u16,
    pub(super) sent_bytes: u64,
    pub(super) commit: String,
}

impl AccessLog {
    /// Opens the file and starts its thread, which ends with the last clone.
    pub(super) fn open(path: PathBuf, metrics: &Metrics) -> io::Result<Self> {
        let out = Out::open(path)?;
        let (sender, lines) = sync_channel(QUEUE_MAX);
        std::thread::Builder::new().name(String::from("access-log")).spawn(move || out.write_all(&lines))?;
        let dropped = Counter::default();
        let counter = dropped.clone();
        metrics.with(|registry| {
            registry.register("web_access_log_dropped", "Lines that the access log had no room for", counter);
        });
        Ok(Self { lines: sender, dropped })
    }

    /// Begins the line of a request.
    pub(super) fn begin<B>(&self, request: &Request<B>, client: Client, trusted: &Networks) -> Box<Line> {
        let target = request.uri().path_and_query().map_or("-", |target| target.as_str());
        Box::new(Line {
            log: Some(self.clone()),
            client: asker(request.headers(), client, trusted),
            request: format!("{} {target} {:?}", request.method(), request.version()),
            referer: text(request.headers(), &header::REFERER),
            agent: text(request.headers(), &header::USER_AGENT),
            began_unix_ms: Clock::unix_ms(),
            began_us: Clock::micros(),
            took_us: 0,
            status: 0,
            sent_bytes: 0,
            commit: String::from("-"),
        })
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let Some(log) = self.log.take() else { return };
        let line = Self {
            log: None,
            client: self.client,
            request: std::mem::take(&mut self.request),
            referer: std::mem::take(&mut self.referer),
            agent: std::mem::take(&mut self.agent),
            took_us: Clock::micros().saturating_sub(self.began_us),
            commit: std::mem::take(&mut self.commit),
            ..*self
        };
        if log.lines.try_send(line).is_err() {
            log.dropped.inc();
        }
    }
}

impl Line {
    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let time =
            jiff::Timestamp::from_millisecond(i64::try_from(self.began_unix_ms).unwrap_or(0)).unwrap_or_default();
        writeln!(
            out,
            "{} - - [{}] \"{}\" {} {} \"{}\" \"{}\" {}.{:06} {}",
            self.client,
            time.strftime("%d/%b/%Y:%H:%M:%S +0000"),
            Escaped(&self.request),
            self.status,
            self.sent_bytes,
            Escaped(&self.referer),
            Escaped(&self.agent),
            self.took_us / 1_000_000,
            self.took_us % 1_000_000,
            self.commit,
        )
    }
}

/// Who asked: the last that a trusted proxy names and that is not one itself.
fn asker(headers: &HeaderMap, client: Client, trusted: &Networks) -> IpAddr {
    let mut address = client.address.ip().to_canonical();
    let lists = headers.get_all(&FORWARDED_FOR).iter().rev().filter_map(|value| value.to_str().ok());
    for named in lists.flat_map(|list| list.rsplit(',')) {
        match named.trim().parse::<IpAddr>() {
            Ok(named) if trusted.contains(address) => address = named.to_canonical(),
            Ok(_) | Err(_) => break,
        }
    }
    address
}

/// The open file. Whoever moves it away gets a new one in its place within a second.
struct Out {
    path: PathBuf,
    file: BufWriter<File>,
    inode: u64,
}

impl Out {
    fn open(path: PathBuf) -> io::Result<Self> {
        let (file, inode) = append(&path)?;
        Ok(Self { path, file: BufWriter::new(file), inode })
    }

    fn write_all(mut self, lines: &Receiver<Line>) {
        use std::sync::mpsc::RecvTimeoutError;
        let mut failing = false;
        loop {
            let written = match lines.recv_timeout(FLUSH_INTERVAL) {
                Ok(line) => line.write(&mut self.file),
                Err(RecvTimeoutError::Timeout) => self.settle(),
                Err(RecvTimeoutError::Disconnected) => break,
            };
            if let Err(error) = &written
                && !failing
            {
                tracing::warn!(%error, path = %self.path.display(), "the access log cannot be written");
            }
            failing = written.is_err();
        }
        let _last = self.file.flush();
    }

    fn settle(&mut self) -> io::Result<()> {
        self.file.flush()?;
        if fs::metadata(&self.path).map(|m| m.ino()).ok() != Some(self.inode) {
            let (file, inode) = append(&self.path)?;
            (self.file, self.inode) = (BufWriter::new(file), inode);
        }
        Ok(())
    }
}

fn append(path: &Path) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().create(true).append(true).open(path)?;
    let inode = file.metadata()?.ino();
    Ok((file, inode))
}

fn text(headers: &HeaderMap, name: &header::HeaderName) -> String {
    let value = headers.get(name).map_or(&b"-"[..], |value| value.as_bytes());
    String::from_utf8_lossy(value.get(..TEXT_BYTES_MAX).unwrap_or(value)).into_owned()
}

/// What a client sent can neither end its field nor its line.
struct Escaped<'t>(&'t str);

impl std::fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        use std::fmt::Write;
        for c in self.0.chars() {
            match c {
                '"' | '\\' => write!(f, "\\{c}")?,
                c if c.is_control() => write!(f, "\\x{:02x}", u32::from(c))?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// The log, if there is one, for what is shared.
pub(super) type MaybeLog = Option<Arc<AccessLog>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_holds_what_was_asked_and_answered_and_cannot_be_forged() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("access.log");
        let log = AccessLog::open(path.clone(), &Metrics::new()).expect("open");
        let request = Request::get("/a?b=c").header("user-agent", "evil\" \\ agent").body(()).expect("a request");
        let client = Client { address: "10.0.0.7:4711".parse().expect("address"), secure: false };
        let mut line = log.begin(&request, client, &Networks::loopback());
        (line.status, line.sent_bytes, line.commit) = (200, 42, String::from("abc"));
        drop(line);
        drop(log);
        let text = loop {
            let text = fs::read_to_string(&path).expect("read");
            if text.ends_with('\n') {
                break text;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        assert!(text.starts_with("10.0.0.7 - - ["), "{text}");
        assert!(text.contains("\"GET /a?b=c HTTP/1.1\" 200 42 \"-\" \"evil\\\" \\\\ agent\" 0."), "{text}");
        assert!(text.ends_with(" abc\n") && text.lines().count() == 1, "{text}");
    }

    #[test]
    fn the_client_is_who_a_trusted_proxy_says_it_is() {
        let asker = |peer: &str, said: &[&str]| {
            let said = said.iter().map(|text| (FORWARDED_FOR, text.parse().expect("a header")));
            let client = Client { address: peer.parse().expect("an address"), secure: false };
            asker(&said.collect(), client, &Networks::loopback()).to_string()
        };
        assert_eq!(asker("127.0.0.1:1", &["192.0.2.7"]), "192.0.2.7");
        assert_eq!(asker("[::ffff:127.0.0.1]:1", &["203.0.113.9, 192.0.2.7"]), "192.0.2.7", "the client's own word");
        assert_eq!(asker("127.0.0.1:1", &["192.0.2.7, 127.0.0.2"]), "192.0.2.7", "two proxies");
        assert_eq!(asker("127.0.0.1:1", &["203.0.113.9", "192.0.2.7"]), "192.0.2.7", "two lines");
        assert_eq!(asker("192.0.2.1:1", &["192.0.2.7"]), "192.0.2.1", "no proxy of ours");
        assert_eq!(asker("127.0.0.1:1", &["192.0.2.7, unknown"]), "127.0.0.1");
        assert_eq!(asker("127.0.0.1:1", &[]), "127.0.0.1");
    }
}
