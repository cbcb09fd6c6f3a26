//! Child processes: started with a log file, stopped by pid, and never left behind.
//!
//! Every child gets a parent-death signal, so that even a harness that is killed leaves nothing. The signal is tied to
//! the *thread* that started the child; one thread that lives as long as the process therefore starts all of them.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt::Write as _,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        LazyLock, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::{ground::Site, orphans, scratch::Account};

/// How much of each log a missed deadline shows.
const TAIL_LINES: usize = 12;
const TAIL_BYTES: i64 = 8 * 1024;

/// Between two looks at whether a process has ended.
const EXIT_LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// How long a process that is asked to stop may take until it is killed.
pub const STOP_DEADLINE: Duration = Duration::from_secs(20);

type Order = (Command, mpsc::SyncSender<io::Result<Child>>);

static SPAWNER: LazyLock<mpsc::SyncSender<Order>> = LazyLock::new(|| {
    let (orders, inbox) = mpsc::sync_channel::<Order>(16);
    thread::Builder::new()
        .name(String::from("spawner"))
        .spawn(move || {
            for (mut command, reply) in inbox {
                let _asker_gone = reply.send(orphans::spawn(&mut command));
            }
        })
        .expect("a thread can be started");
    orders
});

/// Counts the programs that were run to their end, so that each has files of its own for what it prints.
static RUNS: AtomicU64 = AtomicU64::new(0);

/// The logs of what runs, for the message of a missed deadline.
static LOGS: Mutex<BTreeMap<String, PathBuf>> = Mutex::new(BTreeMap::new());

/// What to run, and how.
#[derive(Debug, Clone)]
pub struct Program {
    /// What people call it; also the name of its log file.
    pub name: String,
    /// The binary.
    pub path: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its environment beyond ours.
    pub env: Vec<(String, String)>,
    /// Whom it runs as, if not as us.
    pub account: Option<Account>,
    /// Where it runs.
    pub site: Site,
}

impl Program {
    /// A program under our own account.
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        let (args, env) = (Vec::new(), Vec::new());
        Self { name: name.into(), path: path.into(), args, env, account: None, site: Site::default() }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.push((name.to_owned(), value.into()));
        self
    }

    /// Runs it as somebody else.
    #[must_use]
    pub const fn account(mut self, account: Option<Account>) -> Self {
        self.account = account;
        self
    }

    /// Runs it there.
    #[must_use]
    pub fn at(mut self, site: &Site) -> Self {
        self.site = site.clone();
        self
    }

    fn command(&self) -> Command {
        // Each of these becomes the next in the same process, so that its number is the program's.
        let mut words = Vec::new();
        if let Some(group) = &self.site.group {
            words.extend(["sh", "-c", "echo $$ > \"$0\" && exec \"$@\""].map(OsString::from));
            words.push(group.join("cgroup.procs").into());
        }
        if let Some(namespace) = &self.site.namespace {
            words.push("nsenter".into());
            words.push(format!("--net={}", namespace.display()).into());
        }
        words.push("setpriv".into());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(["--pdeathsig", "TERM"]);
        if let Some(Account { uid, gid }) = self.account {
            command.args([format!("--reuid={uid}"), format!("--regid={gid}"), String::from("--init-groups")]);
        }
        command.arg("--").arg(&self.path).args(&self.args).envs(self.env.clone());
        // A group of its own: Ctrl-C reaches the harness alone, which then stops all in order.
        command.process_group(0).stdin(Stdio::null()).current_dir("/");
        command
    }

    /// Starts it; what it prints goes to `logs/<name>.log`, after what earlier runs printed.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(&self, logs: &Path) -> Result<Process> {
        let log_path = logs.join(format!("{}.log", self.name));
        let log = OpenOptions::new().create(true).append(true).open(&log_path);
        let log = log.with_context(|| format!("open {}", log_path.display()))?;
        let mut command = self.command();
        command.stdout(log.try_clone().context("share a log file")?).stderr(log);
        let (reply, answer) = mpsc::sync_channel(1);
        SPAWNER.send((command, reply)).ok().context("the spawning thread lives")?;
        let child = answer.recv().context("the spawning thread answers")?;
        let child = child.with_context(|| format!("start {} through setpriv (package util-linux)", self.name))?;
        LOGS.lock().unwrap_or_else(PoisonError::into_inner).insert(self.name.clone(), log_path.clone());
        Ok(Process { name: self.name.clone(), child, log: log_path, asked: false })
    }

    /// Runs it to its end within `deadline`.
    ///
    /// # Errors
    /// If it cannot be started or does not end in time.
    pub async fn run(&self, logs: &Path, deadline: Duration) -> Result<Finished> {
        let run = RUNS.fetch_add(1, Ordering::Relaxed);
        let out = logs.join(format!("{}-{run}.out", self.name));
        let err = logs.join(format!("{}-{run}.err", self.name));
        let mut command = self.command();
        command.stdout(File::create(&out).context("make a file for the output")?);
        command.stderr(File::create(&err).context("make a file for the errors")?);
        let (reply, answer) = mpsc::sync_channel(1);
        SPAWNER.send((command, reply)).ok().context("the spawning thread lives")?;
        let child = answer.recv().context("the spawning thread answers")?;
        let child = child.with_context(|| format!("start {}", self.name))?;
        let mut process = Process { name: self.name.clone(), child, log: err.clone(), asked: false };
        let status = process.ended(deadline).await;
        let take = |path: &Path| {
            let text = fs::read_to_string(path).unwrap_or_default();
            let _gone_already = fs::remove_file(path);
            text
        };
        let (stdout, stderr) = (take(&out), take(&err));
        let status = status.with_context(|| format!("printed: {stdout}{stderr}"))?;
        Ok(Finished { code: status.code(), stdout, stderr })
    }
}

/// How a program that was run to its end has ended.
#[derive(Debug, Clone)]
pub struct Finished {
    /// The exit code; nothing if a signal ended it.
    pub code: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
}

/// A running child. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    asked: bool,
}

impl Process {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where it logs.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// How it ended; nothing while it runs.
    pub fn exit(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it still runs after `deadline`.
    pub async fn ended(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.exit() {
                return Ok(status);
            }
            if start.elapsed() > deadline {
                bail!("{} still runs after {deadline:?}{}", self.name, log_tails());
            }
            tokio::time::sleep(EXIT_LOOK_INTERVAL).await;
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        signal_pid(self.pid(), signal);
    }

    /// Asks it to stop, once: a second time means "at once" to many programs.
    pub fn ask_to_stop(&mut self) {
        if !std::mem::replace(&mut self.asked, true) {
            self.signal(Signal::TERM);
            // One that is frozen would not hear.
            self.signal(Signal::CONT);
        }
    }

    /// Asks it to stop, and kills it if it has not within [`STOP_DEADLINE`]. Says whether it went by itself.
    pub fn stop(&mut self) -> bool {
        if self.exit().is_some() {
            return true;
        }
        self.ask_to_stop();
        let start = Instant::now();
        while start.elapsed() < STOP_DEADLINE {
            if self.exit().is_some() {
                return true;
            }
            thread::sleep(EXIT_LOOK_INTERVAL);
        }
        self.kill();
        false
    }

    /// Kills it and the helpers that it runs in its process group.
    pub fn kill_group(&mut self) {
        if let Some(group) = i32::try_from(self.pid()).ok().and_then(Pid::from_raw).filter(|_| self.exit().is_none()) {
            let _gone_already = kill_process_group(group, Signal::KILL);
        }
        self.kill();
    }

    /// Kills it at once and reaps it.
    pub fn kill(&mut self) {
        let _gone_already = self.child.kill();
        let _reaped_already = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        orphans::forget(self.pid());
        LOGS.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

/// Runs a program of the system to its end, which must come at once, and yields what it printed.
///
/// # Errors
/// If it is not there, or fails.
pub fn run_now(program: &str, args: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = orphans::spawn(&mut command).with_context(|| format!("run {program}"))?;
    let pid = child.id();
    let ended = child.wait_with_output();
    orphans::forget(pid);
    let ended = ended.with_context(|| format!("wait for {program}"))?;
    let complaint = String::from_utf8_lossy(&ended.stderr);
    ensure!(ended.status.success(), "{program} {}: {}: {}", args.join(" "), ended.status, complaint.trim());
    Ok(String::from_utf8_lossy(&ended.stdout).into_owned())
}

/// Sends a signal to a process that may be gone.
pub fn signal_pid(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    if let Some(pid) = pid {
        let _gone_already = kill_process(pid, signal);
    }
}

/// Whether a process of this id exists and is no zombie.
#[must_use]
pub fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// The processes that `parent` has started.
#[must_use]
pub fn children_of(parent: u32) -> Vec<u32> {
    let is_child = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // Behind the name, which may hold anything: the state, then the parent.
        let fields = stat.rsplit_once(") ").map(|(_, fields)| fields).unwrap_or_default();
        fields.split(' ').nth(1) == Some(&parent.to_string())
    };
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_child).collect()
}

/// The ends of the logs of everything that runs.
#[must_use]
pub fn log_tails() -> String {
    let logs = LOGS.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut text = String::new();
    for (name, path) in logs {
        let _infallible = write!(text, "\n--- {name}");
        for line in tail(&path) {
            let _infallible = write!(text, "\n    {line}");
        }
    }
    text
}

/// The last lines of a file.
fn tail(path: &Path) -> Vec<String> {
    let read = || {
        let mut file = File::open(path)?;
        let length = i64::try_from(file.metadata()?.len()).unwrap_or(i64::MAX);
        file.seek(SeekFrom::End(-length.min(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        io::Result::Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_else(|error| error.to_string());
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].to_vec()
}

/// A binary of this workspace: beside the running program (or one folder up, where tests run), or in `$BOTS_BIN_DIR`.
///
/// # Errors
/// If it is not there.
pub fn workspace_binary(name: &str) -> Result<PathBuf> {
    let folders = match std::env::var_os("BOTS_BIN_DIR") {
        Some(folder) => vec![PathBuf::from(folder)],
        None => {
            let own = std::env::current_exe().context("find the running program")?;
            own.ancestors().skip(1).take(2).map(Path::to_path_buf).collect()
        }
    };
    let found = folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file());
    let looked = folders.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(" and ");
    found.with_context(|| format!("{name} is not in {looked}: run `make build`, or set BOTS_BIN_DIR"))
}

/// A program of the system: in one of the `folders`, or on the PATH.
///
/// # Errors
/// If it is not installed.
pub fn system_binary(name: &str, folders: &[PathBuf]) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path);
    let found = folders.iter().cloned().chain(on_path).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("{name} is not installed: run `make setup`"))
}
