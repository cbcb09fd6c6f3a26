//! Real web bots on a real etcd and a real git repository: wake, serve, swap, scale, crash, stop, seen from outside.
//!
//! The app of app mode is this very test program: [`stand_in_app`] serves when it is started with a `REVISION`.

use std::{
    fs::{self, File},
    io::{Read, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bots_core::{
    dcs::{Outcome, Scope, Transaction, Write},
    machine::Span,
    shell::{
        Clock, Etcd, http,
        process::send_signal,
        testing::{EtcdServer, free_port, skipped},
    },
    wire::{ContentRevision, Member, WebFacts},
};
use git2::{Repository, Signature};
use rustix::process::Signal;

/// A busy machine needs its time; nothing here waits for it when all is well.
const PATIENCE: Span = Span::from_secs(40);

/// How long a client waits for an app that may hang.
const HUNG_DEADLINE: Duration = Duration::from_millis(500);

/// Three checks, five seconds apart, the last of which takes two; and the start of another app.
const REPLACED_WITHIN: Span = Span::from_secs(20);

/// Not a test of its own: the app that the app bots run.
#[test]
fn stand_in_app() {
    let Ok(revision) = std::env::var("REVISION") else { return };
    let variable = |name: &str| std::env::var(name).expect("set for apps");
    let page = fs::read_to_string(Path::new(&variable("CONTENT_DIR")).join("index.html")).expect("the page");
    assert!(std::env::var("BOT_SECRET").is_err(), "the bot's own environment is not for apps");
    let port = variable("PORT").parse().expect("a port");
    let text =
        format!("{page} {revision} {} {} pid {}\n", variable("DATABASE_URL"), variable("CDN_URL"), std::process::id());
    let text =
        std::env::var("GREETING").map_or(text.clone(), |greeting| text.replace(" pid ", &format!(" {greeting} pid ")));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("bind");
    for stream in listener.incoming() {
        let text = text.clone();
        std::thread::spawn(move || answer(stream.expect("accept"), &text));
    }
}

fn answer(mut stream: TcpStream, text: &str) {
    let mut request = [0; 4096];
    let Ok(n) = stream.read(&mut request) else { return };
    if request[..n].starts_with(b"GET /slow") {
        std::thread::sleep(Duration::from_millis(300));
    }
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", text.len());
    let _gone = stream.write_all((head + text).as_bytes());
}

struct Fleet {
    dir: tempfile::TempDir,
    etcd: EtcdServer,
    hosts: String,
    store: Etcd,
    origin: Repository,
    generation: u64,
}

struct Bot {
    name: String,
    api: String,
    url: String,
    log: PathBuf,
    config: PathBuf,
    child: Child,
}

impl Fleet {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let etcd = EtcdServer::start(&dir.path().join("etcd")).expect("etcd");
        let origin = Repository::init_bare(dir.path().join("origin.git")).expect("a repository");
        Self { hosts: etcd.endpoint(), store: etcd.client(), etcd, origin, generation: 0, dir }
    }

    fn start(&self, name: &str, more: &str) -> Bot {
        let [api, web] = [(); 2].map(|()| format!("127.0.0.1:{}", free_port().expect("a port")));
        let at = |file: String| self.dir.path().join(file);
        let config = at(format!("{name}.yml"));
        let text = format!(
            "scope: web\nname: {name}\netcd3: {{hosts: '{}'}}\nrestapi: {{listen: '{api}'}}\ncontent: {{scope: site}}\n\
             data_dir: {}\nttl_s: 2\nscaling: {{min: 1, max: 2, target_in_flight: 4, stable_window_s: 2}}\n{}\n",
            self.hosts,
            at(name.to_owned()).display(),
            more.replace("LISTEN", &web),
        );
        fs::write(&config, text).expect("write the configuration");
        let log = at(format!("{name}.log"));
        let output = File::options().create(true).append(true).open(&log).expect("a log");
        let child = Command::new(env!("CARGO_BIN_EXE_web-bot"))
            .arg(&config)
            .env("BOT_SECRET", "do not pass on")
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a log"))
            .stderr(output)
            .spawn()
            .expect("the bot starts");
        Bot { name: name.to_owned(), api: format!("http://{api}"), url: format!("http://{web}"), log, config, child }
    }

    fn static_bot(&self, name: &str) -> Bot {
        self.start(name, "web: {mode: static, listen: 'LISTEN', drain_timeout_s: 5}")
    }

    fn app_bot(&self, name: &str) -> Bot {
        let program = std::env::current_exe().expect("this program");
        let command = format!("['{}', '--exact', stand_in_app, '--nocapture']", program.display());
        self.start(
            name,
            &format!(
                "web: {{mode: app, listen: 'LISTEN', drain_timeout_s: 5, command: {command}}}\n\
                 database: {{scope: main, dbname: book, username: web, password: 'p@ss'}}\ncdn: {{base_url: 'http://cdn'}}"
            ),
        )
    }

    async fn put(&self, scope: &str, key: &str, value: &str) {
        let key = Scope::new("service", scope).expect("scope").key(key);
        let transaction = Transaction::new(Vec::new(), vec![Write::put(key, value)]);
        assert!(matches!(self.store.transact(&transaction).await, Outcome::Done(_)), "etcd takes it");
    }

    /// Commits a page and makes it live; yields the commit.
    async fn publish(&mut self, page: &str) -> String {
        let repository = &self.origin;
        let mut tree = repository.treebuilder(None).expect("tree");
        tree.insert("index.html", repository.blob(page.as_bytes()).expect("blob"), 0o100_644).expect("insert");
        let tree = repository.find_tree(tree.write().expect("write")).expect("tree");
        let who = Signature::new("a", "a@example.org", &git2::Time::new(0, 0)).expect("signature");
        let parent = repository.find_reference("refs/heads/main").and_then(|r| r.peel_to_commit()).ok();
        let parents: Vec<&git2::Commit<'_>> = parent.iter().collect();
        let id = repository.commit(Some("refs/heads/main"), &who, &who, page, &tree, &parents).expect("commit");
        self.generation += 1;
        let revision = ContentRevision {
            sha: id.to_string(),
            generation: self.generation,
            reference: String::from("main"),
            origin: format!("file://{}", repository.path().display()),
            subject: page.to_owned(),
            detected_unix_ms: 0,
        };
        self.put("site", "revision/live", &serde_json::to_string(&revision).expect("json")).await;
        revision.sha
    }

    async fn member(&self, name: &str) -> Option<Member> {
        let key = Scope::new("service", "web").expect("scope").member(name);
        let (_, found) = self.store.list(&key).await.expect("etcd answers");
        Member::from_json(&found.first()?.value)
    }

    async fn is(&self, bot: &Bot, state: &str) -> bool {
        self.member(&bot.name).await.is_some_and(|m| m.head.state == state)
    }

    async fn serves(&self, bot: &Bot, sha: &str) -> bool {
        let facts = self.member(&bot.name).await.and_then(|m| m.facts::<WebFacts>());
        facts.is_some_and(|facts| facts.serving.as_deref() == Some(sha))
    }
}

impl Bot {
    fn signal(&self, signal: Signal) {
        send_signal(self.child.id(), signal).expect("a signal");
    }

    async fn get(&self, path: &str) -> (u16, http::Response) {
        let url = format!("{}{path}", self.url);
        let none = (hyper::HeaderMap::new(), bytes::Bytes::new());
        let deadline = Duration::from_secs(15);
        let answer = http::request(hyper::Method::GET, &url, none.0, none.1, deadline, 1 << 20).await;
        let answer =
            answer.unwrap_or_else(|e| panic!("{} answers: {:#}\n{}", self.name, anyhow::Error::new(e), self.tail()));
        (answer.status, answer)
    }

    async fn page(&self) -> String {
        let (status, answer) = self.get("/").await;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert_eq!(status, 200, "{}: {text}", self.name);
        text
    }

    /// The process that has made the page, if it is there in time.
    async fn answers_within(&self, deadline: Duration) -> Option<u32> {
        let (status, body) = http::get(&format!("{}/", self.url), deadline).await.ok()?;
        (status == 200).then(|| pid_of(&String::from_utf8_lossy(&body)))
    }

    /// Replaces a part of its file.
    fn edit(&self, from: &str, to: &str) {
        let text = fs::read_to_string(&self.config).expect("its file");
        assert!(text.contains(from), "{text}");
        fs::write(&self.config, text.replace(from, to)).expect("write");
    }

    /// Has it read its file again, and yields what it says to that.
    async fn reload(&self) -> (u16, String) {
        let url = format!("{}/reload", self.api);
        let (status, body) = http::post(&url, None, String::new(), Duration::from_secs(15)).await.expect("an answer");
        (status, String::from_utf8_lossy(&body).into_owned())
    }

    async fn api(&self, path: &str) -> u16 {
        http::get(&format!("{}{path}", self.api), Duration::from_secs(5)).await.map_or(0, |(status, _)| status)
    }

    fn tail(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }

    async fn exit_code(&mut self) -> Option<i32> {
        let started = Clock::now();
        while Clock::now().since(started) < PATIENCE {
            if let Some(status) = self.child.try_wait().expect("wait") {
                return status.code();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{} does not end\n{}", self.name, self.tail());
    }
}

impl Drop for Bot {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _ended = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.name, self.tail());
        }
    }
}

async fn until(what: &str, mut look: impl AsyncFnMut() -> bool) {
    let started = Clock::now();
    while !look().await {
        assert!(Clock::now().since(started) < PATIENCE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}

/// Visitors that ask one bot's page without a pause, and check that each answer is from the commit that it names.
struct Visitors {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    tasks: tokio::task::JoinSet<()>,
}

impl Visitors {
    fn start(count: usize, bot: &Bot, path: &'static str) -> Self {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..count {
            let (stop, answered, url) = (Arc::clone(&stop), Arc::clone(&answered), format!("{}{path}", bot.url));
            tasks.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let none = (hyper::HeaderMap::new(), bytes::Bytes::new());
                    let deadline = Duration::from_secs(15);
                    let answer = http::request(hyper::Method::GET, &url, none.0, none.1, deadline, 1 << 20).await;
                    let answer = answer.unwrap_or_else(|e| panic!("a visitor fails: {:#}", anyhow::Error::new(e)));
                    let text = String::from_utf8_lossy(&answer.body);
                    assert_eq!(answer.status, 200, "{text}");
                    // The page names itself by its commit's subject, which the header must lead to.
                    let revision = answer.headers["x-bots-revision"].to_str().expect("ascii");
                    assert!(text.contains(revision) || text.starts_with("page"), "{revision}: {text}");
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        Self { stop, answered, tasks }
    }

    async fn leave(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(done) = self.tasks.join_next().await {
            done.expect("no visitor was turned away");
        }
        self.answered.load(Ordering::Relaxed)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_are_served_swapped_and_handed_over() {
    let mut fleet = Fleet::new();
    let mut first = fleet.static_bot("web-1");
    until("it waits for content", async || fleet.is(&first, "preparing").await).await;
    let (status, answer) = first.get("/").await;
    assert_eq!((status, answer.headers["retry-after"].as_bytes()), (503, &b"1"[..]));
    let one = fleet.publish("page one").await;
    until("it serves", async || fleet.is(&first, "serving").await).await;
    assert_eq!(first.page().await, "page one");
    let second = fleet.static_bot("web-2");
    until("the other is idle", async || fleet.is(&second, "idle").await).await;
    assert_eq!(second.get("/").await.0, 503);
    assert_eq!([first.api("/health").await, second.api("/health").await], [200, 200]);
    assert_eq!([first.api("/readiness").await, second.api("/readiness").await], [200, 503]);
    assert_eq!(first.api("/load").await, 200);

    let visitors = Visitors::start(3, &first, "/");
    let two = fleet.publish("page two").await;
    until("the new page is served", async || fleet.serves(&first, &two).await).await;
    assert_eq!(first.page().await, "page two");
    assert_ne!(one, two);
    assert!(visitors.leave().await > 0);

    // Asked to stop: the last answers are sent, the place is given back with the lease, the other takes it at once.
    first.signal(Signal::TERM);
    assert_eq!(first.exit_code().await, Some(0), "{}", first.tail());
    until("the other serves", async || fleet.is(&second, "serving").await).await;
    assert_eq!(second.page().await, "page two");
    assert!(fleet.member("web-1").await.is_none(), "its key went with its lease");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn load_wakes_an_idle_bot_and_its_end_sends_one_to_rest() {
    let mut fleet = Fleet::new();
    fleet.publish("page").await;
    let bots = [fleet.app_bot("web-1"), fleet.app_bot("web-2")];
    let conn_url = r#"{"state":"running","role":"primary","conn_url":"postgres://10.9.8.7:5432/postgres"}"#;
    fleet.put("main", "members/pg-1", conn_url).await;
    let serving = async |count: usize| {
        let mut found = 0;
        for bot in &bots {
            found += usize::from(fleet.is(bot, "serving").await);
        }
        found == count
    };
    until("one serves", async || serving(1).await).await;
    let busy = if fleet.is(&bots[0], "serving").await { &bots[0] } else { &bots[1] };
    // Ten visitors at four a bot call for more than there may be; a slow page keeps them in flight.
    let visitors = Visitors::start(10, busy, "/slow");
    until("both serve", async || serving(2).await).await;
    assert!(visitors.leave().await > 0);
    until("one is at rest again", async || serving(1).await).await;
    until("and idle", async || fleet.is(&bots[0], "idle").await || fleet.is(&bots[1], "idle").await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_is_woken_replaced_and_restarted_without_a_lost_request() {
    let mut fleet = Fleet::new();
    let one = fleet.publish("page one").await;
    let mut bot = fleet.app_bot("web-1");
    until("it knows no database yet", async || fleet.is(&bot, "resting").await).await;
    let conn_url = r#"{"state":"running","role":"primary","conn_url":"postgres://10.9.8.7:5432/postgres"}"#;
    fleet.put("main", "members/pg-1", conn_url).await;
    until("it serves", async || fleet.is(&bot, "serving").await).await;
    let page = bot.page().await;
    let url = "postgresql://web:p%40ss@10.9.8.7:5432/book?target_session_attrs=read-write&connect_timeout=2";
    assert!(page.starts_with(&format!("page one {one} {url} http://cdn pid ")), "{page}");

    let visitors = Visitors::start(3, &bot, "/");
    let two = fleet.publish("page two").await;
    until("the new app serves", async || fleet.serves(&bot, &two).await).await;
    let page = bot.page().await;
    assert!(page.starts_with(&format!("page two {two}")), "{page}");

    // The app is killed: visitors wait for the next one.
    send_signal(pid_of(&page), Signal::KILL).expect("kill the app");
    until("another app answers", async || pid_of(&bot.page().await) != pid_of(&page)).await;
    assert!(visitors.leave().await > 0);

    // The bot is killed: no app is left behind.
    let app = pid_of(&bot.page().await);
    bot.child.kill().expect("kill the bot");
    until("the app is gone", async || !lives(app)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_configuration_replaces_the_app_without_a_lost_request() {
    let mut fleet = Fleet::new();
    let one = fleet.publish("page one").await;
    let bot = fleet.app_bot("web-1");
    let conn_url = r#"{"state":"running","role":"primary","conn_url":"postgres://10.9.8.7:5432/postgres"}"#;
    fleet.put("main", "members/pg-1", conn_url).await;
    until("it serves", async || fleet.is(&bot, "serving").await).await;
    let first = pid_of(&bot.page().await);
    let visitors = Visitors::start(3, &bot, "/");

    // Nothing of it is new to the app.
    bot.edit("drain_timeout_s: 5", "drain_timeout_s: 4");
    let (status, said) = bot.reload().await;
    assert_eq!((status, said.as_str()), (202, "the configuration was read again: the app runs on\n"));

    // A variable, by a signal: another instance, and the old one goes.
    bot.edit("mode: app", "mode: app, env: {GREETING: hello}");
    bot.signal(Signal::HUP);
    until("the new app answers", async || bot.page().await.contains(" hello pid ")).await;
    until("the old one is gone", async || !lives(first)).await;

    // A command that cannot be run: what serves serves on, and the bot says what is wrong.
    let second = pid_of(&bot.page().await);
    bot.edit("command: ['", "command: ['/no/such");
    let (status, said) = bot.reload().await;
    assert!(status == 202 && said.contains("the app is replaced"), "{status} {said}");
    until("it says so", async || {
        let facts = fleet.member("web-1").await.and_then(|m| m.facts::<WebFacts>()).expect("its facts");
        facts.trouble.is_some_and(|trouble| trouble.contains("correct web.command"))
    })
    .await;
    assert_eq!(pid_of(&bot.page().await), second);

    // A file that cannot be used changes nothing; what needs a new start is named, and the rest taken over.
    bot.edit("/no/such", "");
    bot.edit("ttl_s: 2", "ttl_s: 1");
    let (status, said) = bot.reload().await;
    assert!(status == 422 && said.starts_with("nothing was changed: ttl_s is 1"), "{status} {said}");
    bot.edit("ttl_s: 1", "ttl_s: 3");
    bot.edit("GREETING: hello", "GREETING: welcome");
    let (status, said) = bot.reload().await;
    assert!(status == 202 && said.ends_with("when the bot is started anew: ttl_s\n"), "{status} {said}");
    until("the corrected app answers", async || bot.page().await.contains(" welcome pid ")).await;
    until("the second one is gone", async || !lives(second)).await;
    assert!(fleet.serves(&bot, &one).await);
    assert!(visitors.leave().await > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_that_hangs_is_replaced() {
    let mut fleet = Fleet::new();
    fleet.publish("page").await;
    let bot = fleet.app_bot("web-1");
    let conn_url = r#"{"state":"running","role":"primary","conn_url":"postgres://10.9.8.7:5432/postgres"}"#;
    fleet.put("main", "members/pg-1", conn_url).await;
    until("it serves", async || fleet.is(&bot, "serving").await).await;
    let hung = pid_of(&bot.page().await);
    let since = Clock::now();
    send_signal(hung, Signal::STOP).expect("stop the app");
    until("another app answers", async || bot.answers_within(HUNG_DEADLINE).await.is_some_and(|pid| pid != hung)).await;
    let taken = Clock::now().since(since);
    assert!(taken < REPLACED_WITHIN, "it took {taken}");
    until("the hung one is gone", async || !lives(hung)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stall_of_the_processor_is_counted_and_is_no_load_where_nobody_asks() {
    let mut fleet = Fleet::new();
    fleet.publish("page").await;
    let bot = fleet.static_bot("web-1");
    until("it serves", async || fleet.is(&bot, "serving").await).await;
    if fs::read_to_string(&bot.log).expect("its log").contains("no pressure-stall events here") {
        return skipped("stalls of the processor", "this kernel tells of none, or not of them to this user");
    }
    let hogs = Hogs::start();
    until("a stall is counted", async || {
        let metrics = http::get(&format!("{}/metrics", bot.api), Duration::from_secs(5)).await;
        let text = metrics.map(|(_, body)| String::from_utf8_lossy(&body).into_owned()).unwrap_or_default();
        let counts = |line: &str| line.strip_prefix("web_processor_stalls_total ").is_some_and(|n| n.trim() != "0");
        text.lines().any(counts)
    })
    .await;
    drop(hogs);
    let facts = fleet.member("web-1").await.and_then(|m| m.facts::<WebFacts>()).expect("its facts");
    assert!(!facts.stalled, "{facts:?}");
}

/// Threads that want more processors than there are.
struct Hogs(Arc<AtomicBool>);

impl Hogs {
    fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        for _ in 0..2 * processors {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        Self(stop)
    }
}

impl Drop for Hogs {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn pid_of(page: &str) -> u32 {
    page.trim().rsplit(' ').next().and_then(|pid| pid.parse().ok()).expect("the page ends with a pid")
}

fn lives(pid: u32) -> bool {
    let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !state.is_empty() && !state.contains(") Z ")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_of_the_store_drops_nobody() {
    let mut fleet = Fleet::new();
    fleet.publish("page").await;
    let bot = fleet.static_bot("web-1");
    until("it serves", async || fleet.is(&bot, "serving").await).await;
    let visitors = Visitors::start(2, &bot, "/");
    fleet.etcd.kill().expect("kill etcd");
    // Longer than the lease.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(bot.page().await, "page");
    fleet.etcd.restart().expect("restart etcd");
    until("it is a member again, with its place", async || {
        let facts = fleet.member("web-1").await.and_then(|m| m.facts::<WebFacts>());
        facts.is_some_and(|f| f.slot == Some(0)) && fleet.is(&bot, "serving").await
    })
    .await;
    assert!(visitors.leave().await > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_run_says_why_and_ends() {
    let fleet = Fleet::new();
    let check = async |more: &str, code: i32, expected: &str| {
        let mut bot = fleet.start("web-1", more);
        assert_eq!(bot.exit_code().await, Some(code), "{}", bot.tail());
        assert!(bot.tail().contains(expected), "{}", bot.tail());
        fs::remove_file(&bot.log).expect("forget the log");
    };
    check("web: {mode: app, listen: 'LISTEN'}", 2, "web.command is empty").await;
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
    let port = taken.local_addr().expect("address").port();
    check(&format!("web: {{mode: static, listen: '127.0.0.1:{port}'}}"), 4, "is in use").await;
    let first = fleet.static_bot("web-1");
    until("the name is taken", async || fleet.member("web-1").await.is_some()).await;
    let instance = fleet.member("web-1").await.expect("member").head.instance;
    let mut second = fleet.static_bot("web-1");
    assert_eq!(second.exit_code().await, Some(3), "{}", second.tail());
    assert!(second.tail().contains("another live bot"), "{}", second.tail());
    assert_eq!(fleet.member("web-1").await.expect("member").head.instance, instance, "the first is untouched");
    drop(first);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_cannot_have_the_live_commit_leaves_the_serving_set_and_serves_again_as_the_last() {
    let mut fleet = Fleet::new();
    fleet.put("web", "config", r#"{"scaling":{"min":2}}"#).await;
    let one = fleet.publish("page one").await;
    let (mut first, second) = (fleet.static_bot("web-1"), fleet.static_bot("web-2"));
    until("both serve", async || fleet.serves(&first, &one).await && fleet.serves(&second, &one).await).await;

    // The second has no place for what it fetches any more.
    let drafts = fleet.dir.path().join("web-2/drafts");
    fs::remove_dir_all(&drafts).expect("take the folder away");
    fs::write(&drafts, "no folder").expect("put something in its place");
    let two = fleet.publish("page two").await;
    until("the first serves the new page", async || fleet.serves(&first, &two).await).await;
    until("the second rests", async || fleet.is(&second, "resting").await).await;
    assert_eq!(second.get("/").await.0, 503);
    assert_eq!(first.page().await, "page two");

    // Older content is better than none.
    first.signal(Signal::TERM);
    assert_eq!(first.exit_code().await, Some(0), "{}", first.tail());
    until("the second serves the older page", async || fleet.serves(&second, &one).await).await;
    assert_eq!(second.page().await, "page one");

    // Mended, it catches up by itself.
    fs::remove_file(&drafts).expect("clear the place");
    fs::create_dir(&drafts).expect("bring the folder back");
    until("the second serves the new page", async || fleet.serves(&second, &two).await).await;
    assert_eq!(second.page().await, "page two");
}
