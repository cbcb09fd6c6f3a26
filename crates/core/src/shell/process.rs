//! Child processes: spawned with the identity, environment and log that they shall have; ended by their own pid.

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    io,
    os::{fd::OwnedFd, unix::process::ExitStatusExt},
    path::PathBuf,
    process::{ExitStatus, Stdio},
};

pub use rustix::process::Signal;
use rustix::process::{Pid, kill_process, kill_process_group};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, BufReader, Interest, unix::AsyncFd},
    process::{Child, Command},
};

/// The longest line of a child's output that is logged as one; the rest of it becomes another line.
const LINE_BYTES_MAX: usize = 4 * 1024;

/// Where a child's output goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Line by line into our own log, under this name.
    Log(&'static str),
    /// Appended to a file.
    File(PathBuf),
    /// Nowhere.
    Discard,
}

/// The user and group that a child runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

/// What to run.
#[derive(Debug, Clone)]
pub struct Program {
    /// The executable; looked up on PATH if it has no slash.
    pub path: PathBuf,
    /// Its arguments. Never passwords: every user of the machine can read them.
    pub args: Vec<OsString>,
    /// Added to our own environment.
    pub env: Vec<(OsString, OsString)>,
    /// Whether our own environment is kept from it.
    pub clear_env: bool,
    /// Where it runs.
    pub dir: Option<PathBuf>,
    /// As whom; ourselves if nothing is said.
    pub identity: Option<Identity>,
    /// The file that it reads as its standard input; nothing if there is none.
    pub input: Option<PathBuf>,
    /// Where its output goes.
    pub output: Output,
    /// Whether the child leads a process group of its own, so that signals to ours do not reach it.
    pub own_group: bool,
    /// Whether the kernel kills the child when the thread that started it ends: for children that must not outlive us.
    pub dies_with_us: bool,
}

impl Program {
    /// `path` without arguments, as ourselves, logged under `name`, in a process group of its own.
    pub fn new(name: &'static str, path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            args: Vec::new(),
            env: Vec::new(),
            clear_env: false,
            dir: None,
            identity: None,
            input: None,
            output: Output::Log(name),
            own_group: true,
            dies_with_us: false,
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets a variable.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Sets the directory.
    #[must_use]
    pub fn dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.dir = Some(dir.into());
        self
    }

    /// Runs it as somebody else; nothing changes with `None`.
    #[must_use]
    pub const fn identity(mut self, identity: Option<Identity>) -> Self {
        self.identity = identity;
        self
    }

    /// Lets it read a file.
    #[must_use]
    pub fn input(mut self, path: impl Into<PathBuf>) -> Self {
        self.input = Some(path.into());
        self
    }

    /// Keeps our environment, which may hold passwords, from it.
    #[must_use]
    pub const fn clear_env(mut self) -> Self {
        self.clear_env = true;
        self
    }

    /// Sends its output elsewhere.
    #[must_use]
    pub fn output(mut self, output: Output) -> Self {
        self.output = output;
        self
    }

    /// Lets the kernel kill it when the thread that starts it ends.
    #[must_use]
    pub const fn dies_with_us(mut self) -> Self {
        self.dies_with_us = true;
        self
    }

    /// Starts it. Must be called inside a runtime. The child lives on if the handle is dropped.
    ///
    /// # Errors
    /// If it cannot be started or its log cannot be opened.
    pub fn spawn(&self) -> io::Result<Running> {
        let mut command = Command::new(&self.path);
        let input = match &self.input {
            Some(path) => File::open(path)?.into(),
            None => Stdio::null(),
        };
        command.args(&self.args).stdin(input).kill_on_drop(false);
        if self.clear_env {
            command.env_clear();
        }
        command.envs(self.env.iter().map(|(k, v)| (k, v)));
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        if let Some(Identity { uid, gid }) = self.identity {
            command.uid(uid).gid(gid);
        }
        if self.own_group {
            command.process_group(0);
        }
        if self.dies_with_us {
            die_with_parent(&mut command);
        }
        match &self.output {
            Output::Log(_) => command.stdout(Stdio::piped()).stderr(Stdio::piped()),
            Output::File(path) => {
                let file = append(path)?;
                command.stdout(file.try_clone()?).stderr(file)
            }
            Output::Discard => command.stdout(Stdio::null()).stderr(Stdio::null()),
        };
        let mut child = command.spawn()?;
        if let Output::Log(name) = self.output {
            child.stdout.take().map(|out| tokio::spawn(log_lines(name, out)));
            child.stderr.take().map(|err| tokio::spawn(log_lines(name, err)));
        }
        let pid = child.id().ok_or_else(|| io::Error::other("the child ended before it had a pid"))?;
        Ok(Running { child, pid })
    }

    /// Starts it and waits for its end.
    ///
    /// # Errors
    /// If it cannot be started.
    pub async fn run(&self) -> io::Result<Ended> {
        self.spawn()?.ended().await
    }
}

/// A child that was started.
#[derive(Debug)]
pub struct Running {
    child: Child,
    pid: u32,
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ended {
    /// With this exit code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl Ended {
    /// Whether it ended with code 0.
    #[must_use]
    pub const fn is_success(self) -> bool {
        matches!(self, Self::Code(0))
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

impl From<ExitStatus> for Ended {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Code(code),
            (None, signal) => Self::Signal(signal.unwrap_or(0)),
        }
    }
}

impl Running {
    /// Its process id.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for its end. Can be dropped and asked again.
    ///
    /// # Errors
    /// If the kernel does not know the child any more.
    pub async fn ended(&mut self) -> io::Result<Ended> {
        self.child.wait().await.map(Ended::from)
    }

    /// Waits for its end, and kills what it leaves behind in the process group that it leads. Can be dropped and asked again.
    ///
    /// # Errors
    /// If the kernel does not know the child any more, or refuses the signal.
    pub async fn ended_with_group(&mut self) -> io::Result<Ended> {
        if self.child.id().is_none() {
            return self.ended().await;
        }
        // As long as the leader is not waited for, its number is nobody else's.
        if exit_of(self.pid).await.is_ok() {
            self.signal_group(Signal::KILL)?;
            return self.ended().await;
        }
        // There may be no descriptor left to see its end with. Its number stays taken while a member of the group lives.
        let ended = self.ended().await?;
        send_group_signal(self.pid, Signal::KILL)?;
        Ok(ended)
    }

    /// Sends a signal to the process group that the child leads, unless the child has been waited for already.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn signal_group(&self, signal: Signal) -> io::Result<()> {
        match self.child.id() {
            Some(pid) => send_group_signal(pid, signal),
            None => Ok(()),
        }
    }

    /// Sends a signal, unless the child has been waited for already.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match self.child.id() {
            Some(pid) => send_signal(pid, signal),
            None => Ok(()),
        }
    }
}

/// Sends a signal to a process that is known by its pid; a process that is gone is no error. Never by name, never to a group.
///
/// # Errors
/// If the kernel refuses.
pub fn send_signal(pid: u32, signal: Signal) -> io::Result<()> {
    sent(kill_process(known(pid)?, signal))
}

/// Sends a signal to the process group of a child of ours; a group without members is no error.
fn send_group_signal(leader: u32, signal: Signal) -> io::Result<()> {
    sent(kill_process_group(known(leader)?, signal))
}

fn known(pid: u32) -> io::Result<Pid> {
    let pid = i32::try_from(pid).ok().filter(|p| *p > 0).and_then(Pid::from_raw);
    pid.ok_or_else(|| io::Error::other("not a process id"))
}

fn sent(result: rustix::io::Result<()>) -> io::Result<()> {
    match result {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Arranges that the kernel kills the child when its parent is gone, also if that happens before it begins.
#[expect(unsafe_code, reason = "what runs between fork and exec makes two system calls and touches no memory of ours")]
fn die_with_parent(command: &mut Command) {
    let parent = rustix::process::getpid();
    let prepare = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        match rustix::process::getppid() {
            Some(pid) if pid == parent => Ok(()),
            _gone => Err(rustix::io::Errno::SRCH.into()),
        }
    };
    // SAFETY: `prepare` only makes the system calls prctl and getppid and allocates nothing, so it is safe between fork
    // and exec.
    unsafe {
        command.pre_exec(prepare);
    }
}

/// Waits for the end of a process that is not our child, through a pidfd: at once, without polling.
///
/// # Errors
/// If there is no such process or the kernel has no pidfd.
pub async fn exit_of(pid: u32) -> io::Result<()> {
    let pidfd = rustix::process::pidfd_open(known(pid)?, rustix::process::PidfdFlags::NONBLOCK)?;
    let pidfd = watch_readable(pidfd)?;
    let _readable = pidfd.readable().await?;
    Ok(())
}

/// Lets the runtime watch a descriptor for being readable.
#[expect(deprecated, reason = "unsound only for types that may close their descriptor early; the substitute is unsafe")]
pub(super) fn watch_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, Interest::READABLE)
}

fn append(path: &std::path::Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// Logs the lines of a child's output until it ends.
async fn log_lines(name: &'static str, output: impl AsyncRead + Unpin) {
    let mut reader = BufReader::with_capacity(LINE_BYTES_MAX, output);
    let mut line = Vec::new();
    while let Ok(bytes) = reader.fill_buf().await {
        if bytes.is_empty() {
            break;
        }
        let end = bytes.iter().position(|b| *b == b'\n');
        let taken = end.map_or(bytes.len(), |i| i + 1);
        line.extend_from_slice(&bytes[..end.unwrap_or(bytes.len())]);
        reader.consume(taken);
        if end.is_some() || line.len() >= LINE_BYTES_MAX {
            tracing::info!(program = name, "{}", String::from_utf8_lossy(&line));
            line.clear();
        }
    }
    if !line.is_empty() {
        tracing::info!(program = name, "{}", String::from_utf8_lossy(&line));
    }
}
