//! The server and its guard: the single place where a server is started, adopted, signalled and found dead.
//!
//! The guard is the postmaster's parent and outlives the bot; a bot that was started again finds both as they were. The
//! server is *gone* only when every process of it is, and its guard, too.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, bail};
use bots_core::{
    machine::{Span, Time},
    shell::{clock::Clock, process::exit_of},
};
use prometheus_client::metrics::counter::Counter;
use rustix::{
    fs::{FlockOperation, flock},
    process::{Pid, Signal, kill_process},
};
use tokio::{process::Child, sync::watch};

use super::{
    guard::{self, Ended, Fence, Link, Watch},
    guard_news::tell_of_link,
    node::Node,
    processes::{self, Marks, PidFile},
    report::Reporter,
};
use crate::machine::{StopMode, WatchdogOrder};

/// How often a server that is not our child is looked at while it stops.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Every so often it is complained about who has a dead server's shared memory.
const COMPLAIN_EVERY: Span = Span::from_secs(5);

/// The guard opens a device within a millisecond.
const WATCH_PATIENCE: Duration = Duration::from_secs(2);

/// A guard whose server has ended is gone within this time; one that is not is killed.
const BURIAL_PATIENCE: Duration = Duration::from_secs(2);

/// Whether our server lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// No process of it does.
    Down,
    /// The postmaster does, as far as we know.
    Alive {
        /// The postmaster, once its guard has said.
        pid: Option<Pid>,
        /// It has taken queries since its start, or since we adopted it.
        ready: bool,
    },
}

/// The server of one data directory.
#[derive(Debug)]
pub struct Postmaster {
    data_dir: PathBuf,
    /// Where its private socket is.
    socket_dir: PathBuf,
    /// The program that guards it.
    guard: PathBuf,
    guard_socket: PathBuf,
    guard_lock: PathBuf,
    log_file: PathBuf,
    /// The watchdog device.
    device: PathBuf,
    life: watch::Sender<Life>,
    run: Mutex<Run>,
    /// How often a guard has stopped it.
    guard_fences: Counter,
}

/// The present run of the server.
#[derive(Debug)]
struct Run {
    /// Where the machine wants the fence of a server that takes writes.
    wanted: Fence,
    /// What the guard is to do with the watchdog device while the fence stands there.
    watchdog: Option<WatchdogOrder>,
    guard: Option<Pid>,
    link: Option<Arc<Link>>,
    adopted: bool,
    /// By what the server's processes are known.
    marks: Marks,
}

/// What tells that a guard has ended.
enum Watched {
    /// We started it.
    Child(Child),
    /// An earlier life of the bot did.
    Adopted(Pid),
}

impl Watched {
    /// Kills it if it is our child, whatever it is called by now: one that is slow to begin must not start a server later. Until it is
    /// waited for, its number is nobody else's.
    fn kill(&mut self) {
        if let Self::Child(child) = self {
            let _already_gone = child.start_kill();
        }
    }

    async fn ended(&mut self) -> String {
        match self {
            Self::Child(child) => match child.wait().await {
                Ok(status) => status.to_string(),
                Err(error) => format!("its end could not be observed: {error}"),
            },
            Self::Adopted(pid) => {
                let _gone_or_gone_already = exit_of(pid.as_raw_pid().unsigned_abs()).await;
                String::from("it was started by an earlier life of the bot")
            }
        }
    }
}

impl Postmaster {
    /// A server that we have not started.
    pub fn new(node: &Node) -> Self {
        Self {
            data_dir: node.data_dir.clone(),
            socket_dir: node.run_dir.clone(),
            guard: node.guard.clone(),
            guard_socket: node.guard_socket(),
            guard_lock: node.guard_lock(),
            log_file: node.log_file.clone(),
            device: node.watchdog.clone(),
            life: watch::Sender::new(Life::Down),
            run: Mutex::new(Run {
                wanted: Fence::Open,
                watchdog: None,
                guard: None,
                link: None,
                adopted: false,
                marks: Marks::of_program(&node.binaries.program("postgres")),
            }),
            guard_fences: Counter::default(),
        }
    }

    /// How often a guard has stopped it, as far as was seen.
    pub const fn guard_fences(&self) -> &Counter {
        &self.guard_fences
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

    /// Takes over where the fence of a server that takes writes shall be, and what the watchdog device is for until then; tells
    /// the guard if there is one.
    pub fn set_fence(&self, at: Time, watchdog: Option<WatchdogOrder>) {
        let mut run = self.run();
        (run.wanted, run.watchdog) = (Fence::At(at), watchdog);
        if let Some(link) = &run.link {
            self.tell_fence(link, &run);
        }
    }

    fn tell_fence(&self, link: &Link, run: &Run) {
        let watch = |order: WatchdogOrder| Watch {
            device: self.device.clone(),
            timeout_s: order.timeout_s,
            until: order.until,
        };
        link.move_fence(run.wanted, run.watchdog.map(watch).as_ref());
    }

    /// Waits until the guard says that the fence stands where it shall, and that the watchdog device watches if it must: from then
    /// on the server may take writes.
    ///
    /// # Errors
    /// If there is no fence or no guard, or it does not answer; or if the device is required and cannot be used.
    pub async fn confirm_fence(&self) -> anyhow::Result<()> {
        let (wanted, link) = {
            let run = self.run();
            if let Some(link) = &run.link {
                self.tell_fence(link, &run);
            }
            (run.wanted, run.link.clone())
        };
        if wanted == Fence::Open {
            bail!("no fence is set: a server without one must not take writes");
        }
        let link = link.context("the server has no guard")?;
        link.confirm(wanted).await?;
        self.confirm_watchdog().await
    }

    /// Waits until the guard says that the watchdog device watches, if it must.
    ///
    /// # Errors
    /// If it cannot be used, or there is no guard.
    pub async fn confirm_watchdog(&self) -> anyhow::Result<()> {
        let (order, link) = {
            let run = self.run();
            (run.watchdog.filter(|order| order.required), run.link.clone())
        };
        let Some(order) = order else { return Ok(()) };
        let link = link.context("the server has no guard")?;
        // An order that comes too late is made good by the next renewal, before the device would act.
        let patience = WATCH_PATIENCE + Duration::from_secs(order.timeout_s);
        link.confirm_watch(order.until, patience).await.context("watchdog.mode is required")?;
        Ok(())
    }

    /// Where the guard that was there before this bot says that its fence stands, whether its server can be taken over or not.
    pub fn earlier_fence(&self) -> Option<Fence> {
        let run = self.run();
        run.link.as_ref().filter(|_| run.adopted)?.fence()
    }

    /// The fence of a server that an earlier life of the bot has left in its guard's care; nothing if there is none.
    pub fn adopted(&self) -> Option<Fence> {
        let run = self.run();
        let link = run.link.as_ref().filter(|_| run.adopted)?;
        // An operator's new port needs a new start, and what cannot be asked cannot be adopted.
        // One that is on its way down is not worth it either.
        PidFile::read(&self.data_dir).filter(|file| file.pid == link.postmaster && file.status != "stopping")?;
        link.fence()
    }

    /// Looks for a server in its guard's care.
    pub async fn adopt(self: &Arc<Self>, reporter: &Arc<Reporter>) {
        let link = match Link::open(&self.guard_socket).await {
            Ok(link) => Arc::new(link),
            Err(error) => {
                tracing::debug!(error = format!("{error:#}"), "no guard is there");
                return;
            }
        };
        tracing::info!(postmaster = link.postmaster.as_raw_pid(), "Postgres runs, in the care of its guard");
        self.life.send_replace(Life::Alive { pid: Some(link.postmaster), ready: false });
        let guard = link.guard;
        self.new_run(Some(guard), Some(link), true);
        tokio::spawn(Arc::clone(self).attend(Watched::Adopted(guard), Arc::clone(reporter)));
    }

    /// Starts the postmaster, by starting its guard; a server that will take writes with the fence that was set.
    ///
    /// # Errors
    /// If it already runs or the guard cannot be started.
    pub async fn launch(
        self: &Arc<Self>,
        program: &Path,
        writable: bool,
        reporter: &Arc<Reporter>,
    ) -> anyhow::Result<()> {
        if self.life() != Life::Down {
            bail!("Postgres already runs");
        }
        self.end_old_guard().await.context("end an old guard")?;
        // Of a server whose guard was killed while there was no bot.
        processes::end_strays(&self.data_dir).await;
        processes::clear_dead_locks(&self.marks(), &self.data_dir, &self.socket_dir)
            .context("clear the lock files of a dead server")?;
        let _none_is_there = fs::remove_file(&self.guard_socket);
        let listener = UnixListener::bind(&self.guard_socket)
            .with_context(|| format!("listen at {}", self.guard_socket.display()))?;
        let fence = if writable { self.run().wanted } else { Fence::Open };
        if writable && fence == Fence::Open {
            bail!("no fence is set: a server without one must not take writes");
        }
        let options = guard::Options {
            program: program.to_owned(),
            data_dir: self.data_dir.clone(),
            log_file: self.log_file.clone(),
            lock: self.guard_lock.clone(),
            fence,
        };
        let mut command = super::tool::clean_command(&self.guard);
        command.arg(guard::COMMAND).args(options.to_args()).stdin(OwnedFd::from(listener)).stdout(Stdio::null());
        // How Postgres undoes for its sessions what protects the postmaster from the kernel's choice for memory.
        for name in ["PG_OOM_ADJUST_FILE", "PG_OOM_ADJUST_VALUE"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        // Not in our process group: Ctrl-C on a terminal is for the bot, which hands over first.
        command.process_group(0);
        // From here on there is no waiting: what was started is known.
        let child = command.spawn().with_context(|| format!("start {} {}", self.guard.display(), guard::COMMAND))?;
        let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed())).context("the guard ended at once")?;
        self.new_run(Some(pid), None, false);
        self.life.send_replace(Life::Alive { pid: None, ready: false });
        tokio::spawn(Arc::clone(self).attend(Watched::Child(child), Arc::clone(reporter)));
        Ok(())
    }

    /// A guard that was left behind, frozen perhaps, would take the next server for what is left of its own.
    async fn end_old_guard(&self) -> anyhow::Result<()> {
        let file = match fs::File::options().read(true).write(true).open(&self.guard_lock) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error).context("open its lock"),
        };
        let ended = async {
            loop {
                match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                    Ok(()) => return Ok(()),
                    Err(rustix::io::Errno::WOULDBLOCK) => {}
                    Err(error) => return Err(error),
                }
                // Its number stands in the file for as long as it holds the lock.
                let pid = fs::read_to_string(&self.guard_lock).ok().and_then(|text| Pid::from_raw(text.parse().ok()?));
                if let Some(pid) = pid.filter(|pid| guard::is_guard(*pid)) {
                    tracing::warn!(pid = pid.as_raw_pid(), "an old guard is ended");
                    let _already_gone = kill_process(pid, Signal::KILL);
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        tokio::time::timeout(BURIAL_PATIENCE, ended).await.context("it does not end")?.context("lock its file")
    }

    /// Waits until no process of the server is left.
    pub async fn gone(&self) {
        let mut life = self.life.subscribe();
        let _sender_is_self = life.wait_for(|life| *life == Life::Down).await;
    }

    /// Waits until the postmaster has come so far that it knows what to do with SIGHUP, which would end it before; or is none.
    pub async fn hears(&self) {
        loop {
            match self.life() {
                Life::Down => return,
                // It has read its files and handles signals before it writes this.
                Life::Alive { pid: Some(pid), .. }
                    if processes::PidFile::read(&self.data_dir).is_some_and(|file| file.pid == pid) =>
                {
                    return;
                }
                Life::Alive { .. } => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    }

    /// Sends a signal to the postmaster, if it lives.
    pub fn signal(&self, signal: Signal) {
        if let Life::Alive { pid: Some(pid), .. } = self.life() {
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
            Life::Alive { .. } => self.signal_begun(signal).await,
            Life::Down => self.signal_left_behind(signal),
        }
        match mode {
            StopMode::Fast => self.all_gone().await,
            StopMode::Immediate { kill_after } => {
                if tokio::time::timeout(kill_after.to_std(), self.all_gone()).await.is_err() {
                    self.signal_begun(Signal::KILL).await;
                    // Told to die at once: a look at every process of the machine may take too long.
                    if let Some(guard) = self.run().guard.filter(|pid| guard::is_guard(*pid)) {
                        processes::kill_descendants(guard);
                    }
                    self.marks().kill_all(&[&self.data_dir]).await;
                    self.all_gone().await;
                }
            }
        }
    }

    /// Signals the postmaster; one of which its guard has not told yet has hardly begun, and ends without its guard.
    async fn signal_begun(&self, signal: Signal) {
        // The guard bears its name only after a moment: until then it is not known.
        while matches!(self.life(), Life::Alive { pid: None, .. }) {
            self.kill_guard();
            tokio::time::sleep(LOOK_EVERY).await;
        }
        self.signal(signal);
    }

    fn kill_guard(&self) {
        if let Some(guard) = self.run().guard.filter(|pid| guard::is_guard(*pid)) {
            let _already_gone = kill_process(guard, Signal::KILL);
        }
    }

    fn signal_left_behind(&self, signal: Signal) {
        let left = self.processes().unwrap_or_default();
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
        while !self.processes().is_ok_and(|left| left.is_empty()) {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Waits for the end of the server or of its guard, then makes sure of the other and of every process, then tells the
    /// machine.
    async fn attend(self: Arc<Self>, mut guard: Watched, reporter: Arc<Reporter>) {
        let link = match self.linked(&mut guard, &reporter).await {
            Ok(link) => Some(link),
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "the guard is of no use");
                self.kill_guard();
                guard.kill();
                None
            }
        };
        let (mut segment, mut how) = (None, None);
        if let Some(link) = link {
            let mut link = link;
            segment = self.shared_memory(link.postmaster);
            let postmaster = exit_of(link.postmaster.as_raw_pid().unsigned_abs());
            tokio::pin!(postmaster);
            loop {
                tokio::select! {
                    status = guard.ended() => {
                        how = Some(format!("its guard ended: {status}"));
                        break;
                    }
                    _ended_or_gone_already = &mut postmaster => break,
                    // Known only once the server has written it, and gone again after a clean end.
                    () = tokio::time::sleep(LOOK_EVERY), if segment.is_none() => {
                        segment = self.shared_memory(link.postmaster);
                    }
                    () = link.closed() => match self.call_again(&link, &reporter).await {
                        Some(again) => link = again,
                        None => break,
                    },
                }
            }
            // The guard buries its server, and says how it ended; unless it stands still.
            let patience = if link.answers() { BURIAL_PATIENCE } else { Duration::ZERO };
            let said = tokio::time::timeout(patience, link.last_word()).await;
            how = said.ok().flatten().map(|ended| self.describe(&ended)).or(how);
        }
        self.bury(segment).await;
        if self.run().watchdog.is_some() {
            // A device that is not closed in good order goes on, and resets a machine that is well.
            let _stands_still = tokio::time::timeout(BURIAL_PATIENCE, guard.ended()).await;
        }
        self.kill_guard();
        guard.kill();
        let _unkillable = tokio::time::timeout(BURIAL_PATIENCE, guard.ended()).await;
        processes::end_strays(&self.data_dir).await;
        let how = how.unwrap_or_else(|| self.with_last_words(String::from("it ended, and its guard did not say how")));
        self.new_run(None, None, false);
        self.life.send_replace(Life::Down);
        tracing::info!(how, "every process of Postgres is gone");
        reporter.exited(how).await;
    }

    /// The line to the guard; a new one is opened to a guard that was just started.
    async fn linked(&self, guard: &mut Watched, reporter: &Arc<Reporter>) -> anyhow::Result<Arc<Link>> {
        if let Some(link) = self.run().link.clone() {
            tell_of_link(&link, reporter);
            return Ok(link);
        }
        let link = tokio::select! {
            link = Link::open(&self.guard_socket) => Arc::new(link?),
            status = guard.ended() => bail!("the guard ended: {status}"),
        };
        tell_of_link(&link, reporter);
        let mut run = self.run();
        if link.fence().is_some_and(|fence| fence != Fence::Open) {
            self.tell_fence(&link, &run);
        }
        run.link = Some(Arc::clone(&link));
        drop(run);
        self.life.send_modify(|life| {
            if let Life::Alive { pid, .. } = life {
                *pid = Some(link.postmaster);
            }
        });
        tracing::info!(pid = link.postmaster.as_raw_pid(), guard = link.guard.as_raw_pid(), "postmaster started");
        Ok(link)
    }

    /// The guard has let go of the line. If it lives, another caller took our place: it is called again, and told where the
    /// fence shall be.
    async fn call_again(&self, lost: &Link, reporter: &Arc<Reporter>) -> Option<Arc<Link>> {
        tokio::time::sleep(LOOK_EVERY).await;
        let link = Link::open(&self.guard_socket).await.ok().filter(|link| link.guard == lost.guard)?;
        tracing::warn!("the line to the guard was lost, and is there again");
        let link = Arc::new(link);
        tell_of_link(&link, reporter);
        let mut run = self.run();
        if link.fence().is_some_and(|fence| fence != Fence::Open) && run.wanted != Fence::Open {
            self.tell_fence(&link, &run);
        }
        run.link = Some(Arc::clone(&link));
        Some(link)
    }

    /// The segment of this postmaster: what stands in the file may be an earlier one's, and another server's by now.
    fn shared_memory(&self, postmaster: Pid) -> Option<i64> {
        let segment = PidFile::read(&self.data_dir).filter(|file| file.pid == postmaster)?.shared_memory?;
        // What has come so far is Postgres itself, and no script any more that leads to it.
        self.run().marks.learn(postmaster);
        Some(segment)
    }

    /// The processes of the server that live.
    ///
    /// # Errors
    /// If `/proc` cannot be read: there may be some.
    pub fn processes(&self) -> io::Result<Vec<Pid>> {
        self.marks().find(&[&self.data_dir])
    }

    /// By what the server's processes are known now.
    pub fn marks(&self) -> Marks {
        let run = self.run();
        run.marks.clone().guarded_by(run.guard.filter(|pid| guard::is_guard(*pid)))
    }

    /// Makes sure that nothing of the server is left.
    async fn bury(&self, segment: Option<i64>) {
        // A process that ends lets go of its program before it lets go of the memory: for a moment it is not known as Postgres.
        let mut complains_at = Clock::now() + COMPLAIN_EVERY;
        loop {
            self.marks().kill_all(&[&self.data_dir]).await;
            if segment.is_none_or(|id| processes::attached(id).is_ok_and(|attached| attached == 0)) {
                return;
            }
            if Clock::now() >= complains_at {
                complains_at += COMPLAIN_EVERY;
                tracing::error!(
                    segment,
                    "a process that is not known as Postgres has the shared memory of the server that ended: find it with `ipcs -mp`, and end it"
                );
            }
            tokio::time::sleep(LOOK_EVERY * 10).await;
        }
    }

    fn describe(&self, ended: &Ended) -> String {
        match ended {
            Ended::Cleanly => String::from("shut down"),
            Ended::Fenced => {
                self.guard_fences.inc();
                String::from("stopped by its guard: the lease was not renewed in time")
            }
            Ended::Died(how) => self.with_last_words(how.clone()),
        }
    }

    /// With the last words of the server's log.
    fn with_last_words(&self, how: String) -> String {
        let words = super::files::last_words(&self.log_file);
        if words.is_empty() { how } else { format!("{how}: {words}") }
    }

    fn new_run(&self, guard: Option<Pid>, link: Option<Arc<Link>>, adopted: bool) {
        let mut run = self.run();
        let marks = std::mem::take(&mut run.marks);
        *run = Run { wanted: run.wanted, watchdog: run.watchdog, guard, link, adopted, marks };
    }

    fn run(&self) -> MutexGuard<'_, Run> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the child get `signal` when the thread that starts it ends: no tool that the bot started acts without it.
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
