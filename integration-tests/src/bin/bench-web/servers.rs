//! What is compared: a web bot with its etcd and its repository, an nginx that serves the same files, and one app behind
//! both.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bots_core::wire::ContentRevision;
use fleet::{
    bots::{Bot, Place},
    etcd::EtcdCluster,
    free_port,
    git::Origin,
    ground::Site,
    process::{Process, Program, system_binary},
    scratch::Scratch,
    store::Store,
    usage::round,
    wait::until,
};

/// The small file and the large one.
pub(crate) const SMALL: &str = "/small.txt";
pub(crate) const LARGE: &str = "/large.bin";

/// What to do when a program is missing.
pub(crate) const TO_INSTALL: &str = "this comparison needs nginx and wrk: apt-get install nginx wrk";

/// Files that are asked for once each, to compare first answers.
const MANY: usize = 300;

/// Everything comes up within this.
const UP: Duration = Duration::from_secs(60);

/// All servers, running.
pub(crate) struct Stand {
    /// Our static mode, without a path.
    pub(crate) ours: String,
    /// nginx with the same files.
    pub(crate) nginx: String,
    /// Our app mode.
    pub(crate) our_proxy: String,
    /// nginx in front of the same kind of app.
    pub(crate) nginx_proxy: String,
    /// The app itself.
    pub(crate) app: String,
    bots: Vec<Bot>,
    _servers: Vec<Process>,
    _etcd: EtcdCluster,
    logs: PathBuf,
    _scratch: Scratch,
}

impl Stand {
    /// Starts all of them.
    pub(crate) async fn start(web_bot: &Path, nginx: &Path) -> Result<Self> {
        // Bots run in folders of their own.
        let web_bot = &web_bot
            .canonicalize()
            .with_context(|| format!("{} is not there: cargo build --release --package web-bot", web_bot.display()))?;
        let scratch = Scratch::new()?;
        let logs = scratch.dir("logs", None)?;
        let etcd = EtcdCluster::start(&scratch, &logs, &[Site::default()])?;
        let store = Store::new(&etcd.hosts())?;
        until("etcd answers", UP, || async { store.look("web").await }).await?;
        let seed = scratch.dir("seed", None)?;
        site(&seed)?;
        let origin = Origin::new(&scratch, &logs, "site", &seed).await?;
        let sha = fs::read_to_string(origin.bare().join("refs/heads/main")).context("read the branch")?;
        let live = ContentRevision {
            sha: sha.trim().to_owned(),
            generation: 1,
            reference: String::from("main"),
            origin: origin.url(),
            subject: String::from("bench"),
            detected_unix_ms: 0,
        };
        store.put("site", "revision/live", &serde_json::to_string(&live).context("a revision as JSON")?).await?;
        let ports = [(); 5].map(|()| free_port());
        let [static_port, nginx_port, our_proxy, nginx_proxy, app] = ports;
        let (static_port, nginx_port, our_proxy, nginx_proxy, app) =
            (static_port?, nginx_port?, our_proxy?, nginx_proxy?, app?);
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let conf = nginx_conf(cores, origin.work(), nginx_port, nginx_proxy, app, &scratch)?;
        let servers = vec![Program::new("nginx", nginx).args(["-c", &conf.to_string_lossy()]).start(&logs)?];
        let app_conf = app_conf(&scratch, "PORT")?;
        let command = format!(
            "sed \"s/PORT/$PORT/\" {conf} > {conf}.$PORT && exec {nginx} -c {conf}.$PORT",
            conf = app_conf.display(),
            nginx = nginx.display()
        );
        let place = Place::plain(&scratch, &logs, etcd.hosts());
        let bot = |scope: &str, web: String| {
            let data_dir = scratch.dir(&format!("{scope}-data"), None)?;
            let rest = format!("data_dir: {}\nttl_s: 5\ncontent:\n  scope: site\n{web}", data_dir.display());
            Bot::of(&place, (scope, "web-1"), web_bot.to_owned(), &rest, None)
        };
        let mut bots = vec![
            bot("files", format!("web:\n  listen: 127.0.0.1:{static_port}\n  mode: static\n"))?,
            bot(
                "app",
                format!(
                    "web:\n  listen: 127.0.0.1:{our_proxy}\n  mode: app\n  health_path: /\n  command: [bash, -c, {}]\n",
                    serde_json::to_string(&command).context("a command as JSON")?
                ),
            )?,
        ];
        for bot in &mut bots {
            bot.start()?;
        }
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let stand = Self {
            ours: url(static_port),
            nginx: url(nginx_port),
            our_proxy: url(our_proxy),
            nginx_proxy: url(nginx_proxy),
            app: url(app),
            bots,
            _servers: servers,
            _etcd: etcd,
            logs,
            _scratch: scratch,
        };
        for url in [&stand.ours, &stand.nginx, &stand.our_proxy, &stand.nginx_proxy, &stand.app] {
            until(&format!("{url} serves"), UP, || async { serves(url) }).await?;
        }
        Ok(stand)
    }

    /// Where everything logs.
    pub(crate) fn logs(&self) -> &Path {
        &self.logs
    }

    /// The mean time to the whole of a file that was never asked for, over one connection, in microseconds.
    pub(crate) async fn first_answers(&self, url: &str) -> Result<f64> {
        let mut asking = Asking::connect(url)?;
        asking.get(SMALL, "")?;
        let began = Instant::now();
        for number in 0..MANY {
            asking.get(&format!("/many/{number}.html"), "")?;
        }
        Ok(round(began.elapsed().as_secs_f64() * 1e6 / MANY as f64))
    }

    /// Stops the bots in order.
    pub(crate) async fn stop(&mut self) {
        for bot in &mut self.bots {
            bot.stop();
        }
    }
}

/// The distribution's nginx, which is measured and serves as the app.
pub(crate) fn find_nginx() -> Result<PathBuf> {
    system_binary("nginx", &[PathBuf::from("/usr/sbin")]).context(TO_INSTALL)
}

/// What the server says of a file's age, for a client that has it already.
pub(crate) async fn last_modified(url: &str) -> Result<String> {
    let (host, path) = url.trim_start_matches("http://").split_once('/').context("a path")?;
    let head = Asking::connect(&format!("http://{host}"))?.get(&format!("/{path}"), "")?.0;
    let line = head.lines().find(|line| line.to_ascii_lowercase().starts_with("last-modified: "));
    line.map(|line| line.split_at(15).1.trim().to_owned()).context("the server says when the file was modified")
}

/// One connection that asks one thing after another.
struct Asking {
    reader: BufReader<TcpStream>,
    host: String,
}

impl Asking {
    fn connect(url: &str) -> Result<Self> {
        let host = url.trim_start_matches("http://").to_owned();
        let stream = TcpStream::connect(&host).with_context(|| format!("connect to {host}"))?;
        stream.set_nodelay(true).context("set TCP_NODELAY")?;
        stream.set_read_timeout(Some(Duration::from_secs(10))).context("set a deadline")?;
        Ok(Self { reader: BufReader::new(stream), host })
    }

    /// The head and the length of the body.
    fn get(&mut self, path: &str, headers: &str) -> Result<(String, usize)> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: {}\r\n{headers}\r\n", self.host);
        self.reader.get_mut().write_all(request.as_bytes()).context("send")?;
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            ensure!(self.reader.read_line(&mut head).context("read a head")? > 0, "{path}: the connection ended");
        }
        ensure!(head.starts_with("HTTP/1.1 200"), "{path}: {head}");
        let length =
            head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
        let mut body = vec![0; length.with_context(|| format!("{path}: no length: {head}"))?];
        self.reader.read_exact(&mut body).context("read a body")?;
        Ok((head, body.len()))
    }
}

fn serves(url: &str) -> Result<(), String> {
    Asking::connect(url).and_then(|mut asking| asking.get("/", "")).map(drop).map_err(|e| format!("{e:#}"))
}

/// The files of the site: what does not compress is made of a fixed sequence.
fn site(seed: &Path) -> Result<()> {
    let write = |path: &str, data: &[u8]| fs::write(seed.join(path), data).with_context(|| format!("write {path}"));
    let mut state = 7_u64;
    let mut noise = |length: usize| -> Vec<u8> {
        let next = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        });
        next.take(length).collect()
    };
    write("index.html", b"<p>a page</p>\n")?;
    write("small.txt", "a small file, word by word\n".repeat(38).as_bytes())?;
    write("page.html", "<p>a paragraph that says what all the others say, too</p>\n".repeat(400).as_bytes())?;
    write("medium.bin", &noise(64 << 10))?;
    write("large.bin", &noise(1 << 20))?;
    write("huge.bin", &noise(32 << 20))?;
    fs::create_dir(seed.join("many")).context("make a folder")?;
    (0..MANY).try_for_each(|number| {
        write(&format!("many/{number}.html"), format!("<p>{number}</p>\n").repeat(100).as_bytes())
    })
}

fn nginx_conf(cores: usize, root: &Path, port: u16, proxy: u16, app: u16, scratch: &Scratch) -> Result<PathBuf> {
    let dir = scratch.dir("nginx", None)?;
    let root = root.display();
    let text = format!(
        "{head}worker_processes {cores};\nhttp {{\n{temp}  include /etc/nginx/mime.types;\n  sendfile on;\n  tcp_nopush on;\n  \
         open_file_cache max=10000 inactive=60s;\n  open_file_cache_valid 60s;\n  gzip on;\n  gzip_static off;\n  \
         keepalive_requests 1000000;\n  server {{\n    listen 127.0.0.1:{port} backlog=4096;\n    root {root};\n  }}\n  \
         upstream app {{ server 127.0.0.1:{app}; keepalive 64; keepalive_requests 1000000; }}\n  server {{\n    \
         listen 127.0.0.1:{proxy};\n    location / {{\n      proxy_pass http://app;\n      proxy_http_version 1.1;\n      \
         proxy_set_header Connection \"\";\n      proxy_set_header Host $host;\n      \
         proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;\n      proxy_set_header X-Forwarded-Proto $scheme;\n    }}\n  }}\n{app_server}}}\n",
        head = head(&dir),
        temp = temp(&dir),
        app_server = app_server(&app.to_string()),
    );
    scratch.file("nginx/nginx.conf", &text, None)
}

/// The app: another nginx, with one thread, which answers a few words.
fn app_conf(scratch: &Scratch, port: &str) -> Result<PathBuf> {
    let dir = scratch.dir("app", None)?;
    let text = format!(
        "{}worker_processes 1;\nhttp {{\n{}  keepalive_requests 1000000;\n{}}}\n",
        head(&dir).replace("nginx.pid", "nginx-PORT.pid"),
        temp(&dir),
        app_server(port)
    );
    scratch.file("app/nginx.conf", &text, None)
}

fn app_server(port: &str) -> String {
    format!(
        "  server {{ listen 127.0.0.1:{port}; location / {{ default_type text/plain; return 200 \"an answer of the app\\n\"; }} }}\n"
    )
}

fn head(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        "daemon off;\nuser root;\npid {dir}/nginx.pid;\nerror_log {dir}/error.log;\nevents {{ worker_connections 4096; }}\n"
    )
}

fn temp(dir: &Path) -> String {
    let dir = dir.display();
    let kinds = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
    let lines: String = kinds.iter().map(|kind| format!("  {kind}_temp_path {dir}/{kind};\n")).collect();
    format!("  access_log off;\n{lines}")
}
