//! Members for the shell's tests: real servers in a folder of the test's own, run by a user that PostgreSQL accepts.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test program uses its own part")]

use std::{
    collections::BTreeMap,
    fs,
    future::Future,
    os::unix::{
        fs::{chown, symlink},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use bots_core::{
    machine::Span,
    shell::{
        clock::Clock,
        runtime::{Queue, queue},
        testing::free_port,
    },
};
use postgres_bot::{
    machine::{DataDir, Event, Job, JobResult, Rules, Server, StopMode, Upstream},
    shell::{
        binaries::Binaries,
        config::Config,
        hands::Hands,
        inspect::inspect,
        jobs,
        observe::{self, Poke},
        processes,
        report::Reporter,
    },
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

/// The bot's program.
const BOT: &str = env!("CARGO_BIN_EXE_postgres-bot");

/// The bot's program, where the user of the servers can run it.
pub fn bot_program() -> PathBuf {
    std::env::var_os("POSTGRES_BOT").map_or_else(|| PathBuf::from(BOT), PathBuf::from)
}

/// Who runs the servers when the tests are run by root, whom PostgreSQL refuses.
const SERVER_USER: &str = "postgres";

/// Runs the body of the test called `name` as a user that PostgreSQL accepts: root runs this test program once more as
/// the user `postgres`, in a folder of its own.
pub fn as_server_user<F: Future<Output = ()>>(name: &str, body: impl FnOnce() -> F) {
    if !rustix::process::geteuid().is_root() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        return runtime.block_on(body());
    }
    let scratch = scratch();
    // The build directory may be closed to that user.
    let program = scratch.path().join("test");
    fs::copy(std::env::current_exe().expect("our own path"), &program).expect("copy the test program");
    fs::copy(BOT, scratch.path().join("postgres-bot")).expect("copy the bot");
    let (uid, gid) = server_user();
    let status = Command::new(&program)
        .args([name, "--exact", "--nocapture"])
        .env("TMPDIR", scratch.path())
        .env("POSTGRES_BOT", scratch.path().join("postgres-bot"))
        .current_dir(scratch.path())
        .uid(uid)
        .gid(gid)
        .status()
        .expect("run the test as the other user");
    assert!(status.success(), "the test failed as user {SERVER_USER}: {status}");
}

/// A folder that the user of the servers may write to.
pub fn scratch() -> TempDir {
    let dir = tempfile::Builder::new().prefix("pgbot").tempdir().expect("a folder");
    if rustix::process::geteuid().is_root() {
        let (uid, gid) = server_user();
        chown(dir.path(), Some(uid), Some(gid)).expect("give the folder away");
    }
    dir
}

/// User and group of the servers.
pub fn server_user() -> (u32, u32) {
    let users = fs::read_to_string("/etc/passwd").expect("the list of users");
    let line = users.lines().find(|line| line.split(':').next() == Some(SERVER_USER)).expect("a user called postgres");
    let mut numbers = line.split(':').skip(2).map(|field| field.parse().expect("a number"));
    (numbers.next().expect("uid"), numbers.next().expect("gid"))
}

/// The configuration of a member, as its file would have it.
pub fn document(dir: &Path, name: &str, port: u16) -> Value {
    json!({
        "scope": "main",
        "name": name,
        "etcd3": {"hosts": "127.0.0.1:2379"},
        "bootstrap": {"initdb": [{"encoding": "UTF8"}, "data-checksums"]},
        "postgresql": {
            "listen": format!("127.0.0.1:{port}"),
            "data_dir": dir.join(name).join("data"),
            "authentication": {
                "superuser": {"username": "postgres", "password": "su'per\\"},
                "replication": {"username": "replicator", "password": "re:pl\\"},
                "rewind": {"username": "rewinder", "password": "rew ind"},
            },
        },
    })
}

/// Stopped by force, with hardly any time to do it in good order.
pub const AT_ONCE: StopMode = StopMode::Immediate { kill_after: Span::from_millis(500) };

/// The server that a job has started.
pub fn started(result: JobResult) -> Server {
    match result {
        JobResult::Started(server) => server,
        other => panic!("{other:?}"),
    }
}

/// A member without a machine: the test is its machine.
pub struct Member {
    pub hands: Arc<Hands>,
    pub queue: Queue<Event>,
    pub port: u16,
    /// Where its server's programs are, if not in the usual place.
    bin_dir: Option<PathBuf>,
}

impl Member {
    pub fn new(dir: &Path, name: &str) -> Self {
        Self::at(dir, name, free_port().expect("a port"), None)
    }

    /// A member whose server's program is found by the name `postgres`, and has another.
    pub fn with_renamed_program(dir: &Path, name: &str) -> Self {
        let bin_dir = dir.join("programs");
        fs::create_dir_all(&bin_dir).expect("a folder");
        let usual = Binaries::find(None, dir).expect("programs");
        for program in ["initdb", "pg_basebackup", "pg_controldata", "pg_rewind"] {
            symlink(usual.program(program), bin_dir.join(program)).expect("a link");
        }
        fs::copy(usual.program("postgres"), bin_dir.join("edb-postgres")).expect("a copy");
        symlink("edb-postgres", bin_dir.join("postgres")).expect("a link");
        Self::at(dir, name, free_port().expect("a port"), Some(bin_dir))
    }

    /// Another life of the same member, which knows nothing of this one.
    pub fn again(&self, dir: &Path) -> Self {
        Self::at(dir, &self.hands.node.name, self.port, self.bin_dir.clone())
    }

    fn at(dir: &Path, name: &str, port: u16, bin_dir: Option<PathBuf>) -> Self {
        let config: Config = serde_json::from_value(document(dir, name, port)).expect("a configuration");
        config.check().expect("a good configuration");
        let node =
            config.node(Binaries::find(bin_dir.as_deref(), &config.data_dir().expect("a path")).expect("programs"));
        let mut node = node.expect("a node");
        node.guard = bot_program();
        let (events, queue) = queue();
        fs::create_dir_all(dir.join(name)).expect("a folder");
        let hands = Arc::new(Hands::new(node, Arc::new(Reporter::new(events))));
        // As the machine has it: a standby that is turned away looks again at once, and not after Postgres's 5 s.
        let soon = BTreeMap::from([(String::from("wal_retrieve_retry_interval"), String::from("100ms"))]);
        hands.configure(soon, Rules::default());
        // No test takes as long, and none that fails leaves a server for ever.
        hands.postmaster.set_fence(Clock::now() + Span::from_secs(120), None);
        Self { hands, queue, port, bin_dir }
    }

    /// The guard of its server.
    pub fn guard(&self) -> Option<Pid> {
        Pid::from_raw(fs::read_to_string(self.hands.node.guard_lock()).ok()?.parse().ok()?)
    }

    pub fn kill_guard(&self) {
        kill_process(self.guard().expect("a guard"), Signal::KILL).expect("kill");
    }

    pub fn data_dir(&self) -> PathBuf {
        self.hands.node.data_dir.clone()
    }

    /// Does a job that must succeed.
    pub async fn does(&self, job: Job) -> JobResult {
        let shown = format!("{job:?}");
        jobs::run(&self.hands, job).await.unwrap_or_else(|error| panic!("{shown}: {}", error.why))
    }

    /// Does a job that must fail; why it did.
    pub async fn fails(&self, job: Job) -> String {
        let shown = format!("{job:?}");
        jobs::run(&self.hands, job).await.map_or_else(|error| error.why, |done| panic!("{shown}: {done:?}"))
    }

    /// Makes a cluster of one and starts it.
    pub async fn bootstraps(&self) -> String {
        let JobResult::Initialized { system_id } = self.does(Job::Initialize).await else { panic!("no identifier") };
        self.does(Job::StartPrimary).await;
        self.does(Job::CreateRoles).await;
        self.does(Job::Complete).await;
        system_id
    }

    pub fn as_upstream(&self) -> Upstream {
        let conn_url = format!("postgres://127.0.0.1:{}/postgres", self.port);
        Upstream { name: self.hands.node.name.clone(), conn_url }
    }

    /// Begins to observe.
    pub fn observes(&self) -> Poke {
        let poke = Poke::default();
        tokio::spawn(observe::run(Arc::clone(&self.hands), poke.clone()));
        poke
    }

    /// The next event of the kind that `pick` takes; others are passed over.
    pub async fn hears<T>(&mut self, what: &str, pick: impl Fn(Event) -> Option<T>) -> T {
        let search = async {
            loop {
                let event = self.queue.next().await.expect("the queue is open");
                if let Some(found) = pick(event) {
                    return found;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), search).await.unwrap_or_else(|_| panic!("not heard: {what}"))
    }

    /// A client over TCP, with a password, as an application would come.
    pub async fn client(&self) -> Client {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(self.port).user("postgres").password("su'per\\").dbname("postgres");
        let (client, connection) = config.connect(NoTls).await.expect("connect");
        tokio::spawn(connection);
        client
    }

    /// A backend that is busy, and so does not notice that its postmaster is gone.
    pub async fn busy_backend(&self) -> Pid {
        self.backend_that_runs("SELECT count(*) FROM generate_series(1, 10000000000)").await
    }

    /// A backend that has begun with `query`, which takes longer than any test.
    pub async fn backend_that_runs(&self, query: &str) -> Pid {
        let client = self.client().await;
        let row = client.query_one("SELECT pg_backend_pid()", &[]).await.expect("its number");
        let pid: i32 = row.get(0);
        let query = query.to_owned();
        tokio::spawn(async move { client.batch_execute(&query).await });
        let works =
            format!("SELECT query !~ 'pg_backend_pid' AND state = 'active' FROM pg_stat_activity WHERE pid = {pid}");
        self.comes_to(&works, "true").await;
        Pid::from_raw(pid).expect("a number")
    }

    /// Stops the checkpointer of a standby in the middle of a restartpoint, where it reads no files.
    pub async fn stops_its_checkpointer_at_work(&self, primary: &Self) -> Pid {
        const WAITS: &str = "SELECT wait_event IN ('CheckpointerMain', 'CheckpointWriteDelay') FROM pg_stat_activity \
                             WHERE backend_type = 'checkpointer'";
        let pid = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'";
        let pid = Pid::from_raw(self.asks(pid).await.parse().expect("a number")).expect("a process");
        let (to_primary, to_us) = (primary.client().await, self.client().await);
        for _until_it_is_met_at_work in 0..50 {
            let write = "CREATE TABLE IF NOT EXISTS much AS SELECT 1 AS x; \
                         INSERT INTO much SELECT generate_series(1, 200000); CHECKPOINT";
            to_primary.batch_execute(write).await.expect("write");
            let lsn = primary.asks("SELECT pg_current_wal_lsn()").await;
            self.comes_to(&format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'"), "true").await;
            let restartpoint = self.client().await;
            tokio::spawn(async move { restartpoint.batch_execute("CHECKPOINT").await });
            for _while_it_works in 0..20 {
                kill_process(pid, Signal::STOP).expect("stops");
                let waits = to_us.query_one(WAITS, &[]).await.expect("a row").get::<_, Option<bool>>(0);
                if waits != Some(true) {
                    return pid;
                }
                kill_process(pid, Signal::CONT).expect("goes on");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        panic!("the checkpointer was never met at work");
    }

    /// How its server ended, once no process of it is left.
    pub async fn hears_its_end(&mut self) -> String {
        self.hears("its end", |event| if let Event::PostgresExited { how } = event { Some(how) } else { None }).await
    }

    /// Whether its guard answers, once that changes.
    pub async fn hears_of_its_guard(&mut self) -> bool {
        let answers = |event| if let Event::GuardObserved { answers } = event { Some(answers) } else { None };
        self.hears("whether its guard answers", answers).await
    }

    /// What the data directory looks like.
    pub async fn looks(&self) -> DataDir {
        match inspect(&self.hands).await {
            Event::DataInspected(found) => found,
            other => panic!("{other:?}"),
        }
    }

    /// The one value that a query yields, as text.
    pub async fn asks(&self, query: &str) -> String {
        let query = format!("SELECT ({query})::text");
        self.client().await.query_one(&query, &[]).await.expect("a row").get::<_, Option<String>>(0).unwrap_or_default()
    }

    /// Waits until a query yields `wanted`.
    pub async fn comes_to(&self, query: &str, wanted: &str) {
        let wait = async {
            while self.asks(query).await != wanted {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(20), wait).await;
        assert!(waited.is_ok(), "{query} does not come to {wanted}");
    }
}

/// A test that fails leaves nothing running: a standby's guard has no fence.
impl Drop for Member {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for pid in self.guard().into_iter().chain(processes::of_server(&[&self.data_dir()]).expect("/proc is read")) {
            let _already_gone = kill_process(pid, Signal::KILL);
        }
    }
}
