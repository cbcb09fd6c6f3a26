//! The postmaster as our child: the single place where a server is started, signalled and found dead.
//!
//! It never outlives the bot (parent-death signal), and it is *gone* only when every process of its server is.

use std::{
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{process::Child, sync::watch};

use super::{
    processes::{self, PidFile},
    report::Reporter,
};
use crate::machine::StopMode;

/// How often a server that is not our child is looked at while it stops.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// What is left after a clean end (the log collector) may end on its own for this long.
const LEFTOVERS_GRACE: Duration = Duration::from_secs(1);

/// Whether our server lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// No process of it does.
    Down,
    /// The postmaster does, as far as we know.
    Alive {
        /// The postmaster.
        pid: Pid,
        /// It has taken queries since its start.
        ready: bool,
    },
}

/// The server of one data directory.
#[derive(Debug)]
pub struct Postmaster {
    data_dir: PathBuf,
    /// Where its private socket is.
    socket_dir: PathBuf,
    life: watch::Sender<Life>,
}

impl Postmaster {
    /// A server that we have not started.
    pub fn new(data_dir: PathBuf, socket_dir: PathBuf) -> Self {
        Self { data_dir, socket_dir, life: watch::Sender::new(Life::Down) }
    }

    /// Whether it lives.
    pub fn life(&self) -> Life {
        *self.life.borrow()
    }

    /// The server takes queries.
    pub fn set_ready(&self) {
        self.life.send_if_modified(|life| match life {
            Life::Alive { ready, .. } => !std::mem::replace(ready, true),
            Life::Down => false,
        });
    }

    /// Starts the postmaster. Must be called on the main thread: the kernel sends the parent-death signal when the
    /// *thread* that forked ends.
    ///
    /// # Errors
    /// If it already runs or the program cannot be started.
    pub fn launch(self: &Arc<Self>, program: &Path, log_file: &Path, reporter: &Arc<Reporter>) -> anyhow::Result<()> {
        if let Life::Alive { pid, .. } = self.life() {
            bail!("Postgres already runs as process {}", pid.as_raw_nonzero());
        }
        processes::clear_dead_locks(&self.data_dir, &self.socket_dir)
            .context("clear the lock files of a dead server")?;
        let log = super::files::append_only(log_file)?;
        let mut command = super::tool::clean_command(program);
        command.arg("-D").arg(&self.data_dir).stdin(Stdio::null());
        command.stdout(log.try_clone().context("share the server's log file")?).stderr(log);
        // Not in our process group: Ctrl-C on a terminal is for the bot, which hands over first.
        command.as_std_mut().process_group(0);
        // An immediate shutdown: no more commits, and crash recovery at the next start.
        die_with_bot(&mut command, Signal::QUIT);
        let child = command.spawn().with_context(|| format!("start {}", program.display()))?;
        let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed())).context("the postmaster ended at once")?;
        self.life.send_replace(Life::Alive { pid, ready: false });
        tracing::info!(pid = pid.as_raw_nonzero(), "postmaster started");
        tokio::spawn(Arc::clone(self).watch(child, Arc::clone(reporter), log_file.to_owned()));
        Ok(())
    }

    /// Waits until no process of the server is left.
    pub async fn gone(&self) {
        let mut life = self.life.subscribe();
        let _sender_is_self = life.wait_for(|life| *life == Life::Down).await;
    }

    /// Sends a signal to the postmaster, if it lives.
    pub fn signal(&self, signal: Signal) {
        if let Life::Alive { pid, .. } = self.life() {
            let _already_gone = kill_process(pid, signal);
        }
    }

    /// Stops the server, ours or one that was left behind; returns when every process of it is gone.
    pub async fn stop(&self, mode: StopMode) {
        let signal = match mode {
            StopMode::Fast => Signal::INT,
            StopMode::Immediate { .. } => Signal::QUIT,
        };
        match self.life() {
            Life::Alive { .. } => self.signal(signal),
            Life::Down => self.signal_left_behind(signal),
        }
        match mode {
            StopMode::Fast => self.all_gone().await,
            StopMode::Immediate { kill_after } => {
                if tokio::time::timeout(kill_after.to_std(), self.all_gone()).await.is_err() {
                    self.signal(Signal::KILL);
                    processes::kill_all(&[&self.data_dir]).await;
                    self.all_gone().await;
                }
            }
        }
    }

    fn signal_left_behind(&self, signal: Signal) {
        let left = processes::of_server(&[&self.data_dir]);
        let postmaster = PidFile::read(&self.data_dir).map(|file| file.pid).filter(|pid| left.contains(pid));
        // Without a postmaster nothing stops backends in good order.
        let (targets, signal) = match postmaster {
            Some(pid) => (vec![pid], signal),
            None => (left, Signal::KILL),
        };
        for pid in targets {
            let _already_gone = kill_process(pid, signal);
        }
    }

    async fn all_gone(&self) {
        self.gone().await;
        while !processes::of_server(&[&self.data_dir]).is_empty() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Waits for the end of the postmaster, then makes sure of every other process, then tells the machine.
    async fn watch(self: Arc<Self>, mut child: Child, reporter: Arc<Reporter>, log_file: PathBuf) {
        let shared_memory = || PidFile::read(&self.data_dir).and_then(|file| file.shared_memory);
        let mut segment = shared_memory();
        let status = loop {
            tokio::select! {
                status = child.wait() => break status,
                // Known only once the server has written it, and gone again after a clean end.
                () = tokio::time::sleep(LOOK_EVERY), if segment.is_none() => segment = shared_memory(),
            }
        };
        let clean = status.as_ref().is_ok_and(ExitStatus::success);
        let dirs = [self.data_dir.as_path()];
        if clean {
            let ended = async {
                while !processes::of_server(&dirs).is_empty() {
                    tokio::time::sleep(LOOK_EVERY).await;
                }
            };
            let _killed_below = tokio::time::timeout(LEFTOVERS_GRACE, ended).await;
        }
        processes::kill_all(&dirs).await;
        while segment.is_some_and(|id| processes::attached(id) > 0) {
            tracing::warn!(segment, "somebody is still attached to the shared memory of the server that ended");
            processes::kill_all(&dirs).await;
            tokio::time::sleep(LOOK_EVERY * 10).await;
        }
        let how = match status {
            Ok(status) if status.success() => String::from("shut down"),
            Ok(status) => describe(status, &log_file),
            Err(error) => format!("its end could not be observed: {error}"),
        };
        self.life.send_replace(Life::Down);
        tracing::info!(how, "every process of Postgres is gone");
        reporter.exited(how).await;
    }
}

/// How a server ended, with the last words of its log.
fn describe(status: ExitStatus, log_file: &Path) -> String {
    let words = super::files::last_words(log_file);
    if words.is_empty() { status.to_string() } else { format!("{status}: {words}") }
}

/// Makes the child get `signal` when the thread that starts it ends: nothing that the bot started acts without it.
#[expect(unsafe_code, reason = "the parent-death signal can only be set between fork and exec, where std wants unsafe")]
pub fn die_with_bot(command: &mut tokio::process::Command, signal: Signal) {
    let bot = rustix::process::getpid();
    let set = move || {
        rustix::process::set_parent_process_death_signal(Some(signal))?;
        // The bot may have died before the line above.
        if rustix::process::getppid() == Some(bot) { Ok(()) } else { Err(rustix::io::Errno::SRCH.into()) }
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; these are two plain system calls that
    // neither allocate nor lock.
    unsafe {
        command.pre_exec(set);
    }
}

/// Adopts the orphans of dead postmasters, so that they can be seen to end, and collects them.
///
/// # Errors
/// If the kernel refuses.
pub fn adopt_orphans() -> anyhow::Result<()> {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).context("become a child subreaper")?;
    let mut ended = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::child()).context("watch children")?;
    tokio::spawn(async move {
        while ended.recv().await.is_some() {
            processes::reap_orphans();
        }
    });
    Ok(())
}
