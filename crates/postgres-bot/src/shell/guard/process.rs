//! The guard's process: starts the postmaster, waits for its end, its fence or the bot's word, and cleans up.

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::OpenOptionsExt,
            net::{UnixListener, UnixStream},
            process::{CommandExt, ExitStatusExt},
        },
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, bail};
use bots_core::{
    machine::{Span, Time},
    shell::clock::Clock,
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{FlockOperation, flock},
    process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, wait},
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime},
};

use super::{
    line::{Ended, Fence, FromGuard, ToGuard},
    watchdog::{Watch, Watchdog},
};
use crate::shell::processes;

/// How often the processes of a server that ends are looked at. Short beside any margin, long beside a look.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// What is left after a clean end (the log collector) may end on its own for this long.
const LEFTOVERS_GRACE: Span = Span::from_secs(1);

/// A bot that does not read its lines for this long is not written to.
const WRITE_PATIENCE: Duration = Duration::from_millis(100);

/// The longest line that a bot may say.
const LINE_BYTES_MAX: usize = 256;

/// What a guard is started with. The listening socket is its standard input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The program `postgres`.
    pub program: PathBuf,
    /// The data directory.
    pub data_dir: PathBuf,
    /// What the server says goes there.
    pub log_file: PathBuf,
    /// A file that the guard keeps locked for as long as it lives, with its number in it.
    pub lock: PathBuf,
    /// The fence to begin with.
    pub fence: Fence,
}

impl Options {
    /// The arguments that [`run`] reads.
    #[must_use]
    pub fn to_args(&self) -> [OsString; 5] {
        let [program, data_dir, log_file, lock] =
            [&self.program, &self.data_dir, &self.log_file, &self.lock].map(|path| path.clone().into());
        [program, data_dir, log_file, lock, self.fence.to_string().into()]
    }

    fn from_args(mut args: impl Iterator<Item = OsString>) -> Option<Self> {
        let mut next = || args.next();
        let (program, data_dir) = (next()?.into(), next()?.into());
        let (log_file, lock) = (next()?.into(), next()?.into());
        let fence = Fence::parse(next()?.to_str()?)?;
        next().is_none().then_some(Self { program, data_dir, log_file, lock, fence })
    }
}

/// The `main` of a guard, with the arguments that follow its name.
#[must_use]
pub fn run(args: impl Iterator<Item = OsString>) -> ExitCode {
    let Some(options) = Options::from_args(args) else {
        tell("started by postgres-bot for each run of its server, and by nobody else");
        return ExitCode::from(2);
    };
    match Guard::start(options) {
        Ok(guard) => guard.watch(),
        Err(error) => {
            tell(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

struct Guard {
    options: Options,
    listener: UnixListener,
    bot: Option<Bot>,
    postmaster: Pid,
    /// Readable once the postmaster has ended.
    end: OwnedFd,
    timer: OwnedFd,
    fence: Fence,
    watchdog: Watchdog,
    /// What the bot wants of the device with the next fence.
    watch: Option<Watch>,
    /// See [`Options::lock`].
    _lock: File,
}

/// A connection of the bot, with what it has said of its next line.
struct Bot {
    stream: UnixStream,
    said: Vec<u8>,
}

impl Guard {
    fn start(options: Options) -> anyhow::Result<Self> {
        let _only_for_people = rustix::thread::set_name(super::NAME);
        // So that no backend of a dead postmaster becomes an orphan of somebody who does not collect it.
        let own = rustix::process::getpid();
        rustix::process::set_child_subreaper(Some(own)).context("become a child subreaper")?;
        let lock = lock(&options.lock)?;
        let listener = UnixListener::from(io::stdin().as_fd().try_clone_to_owned().context("take the socket")?);
        listener.set_nonblocking(true).context("prepare the socket")?;
        let timer = timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC).context("make a timer")?;
        // A fence that is there already must not see a server start.
        if let Fence::At(at) = options.fence
            && at <= Clock::now()
        {
            bail!("the lease has run out: the server was not started");
        }
        let postmaster = launch(&options)?;
        let end = pidfd_open(postmaster, PidfdFlags::empty()).context("watch the postmaster");
        // Without an eye on it, it must not run.
        let end = end.inspect_err(|_| _ = kill_process(postmaster, Signal::KILL))?;
        let mut guard = Self {
            fence: options.fence,
            options,
            listener,
            bot: None,
            postmaster,
            end,
            timer,
            watchdog: Watchdog::default(),
            watch: None,
            _lock: lock,
        };
        guard.set_alarm(guard.fence).inspect_err(|_| _ = kill_process(postmaster, Signal::KILL))?;
        Ok(guard)
    }

    /// Watches until the server has ended.
    fn watch(mut self) -> ExitCode {
        loop {
            if self.fence_is_there() {
                return self.fall();
            }
            self.watchdog.tend(Clock::now());
            if let Some(status) = self.reap() {
                return self.bury(status);
            }
            let mut fds = vec![
                PollFd::new(&self.end, PollFlags::IN),
                PollFd::new(&self.timer, PollFlags::IN),
                PollFd::new(&self.listener, PollFlags::IN),
            ];
            fds.extend(self.bot.as_ref().map(|bot| PollFd::new(&bot.stream, PollFlags::IN)));
            let polled = poll(&mut fds, self.watchdog.due(Clock::now()).map(from_now).as_ref());
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            match polled {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    // Blind, it cannot keep the promise that it stands for.
                    tell(&format!("cannot wait any more, so the server is stopped: {error}"));
                    return self.fall();
                }
            }
            if ready.get(3) == Some(&true) {
                self.hear();
            }
            if ready.get(2) == Some(&true) {
                self.accept();
            }
        }
    }

    fn fence_is_there(&self) -> bool {
        matches!(self.fence, Fence::At(at) if at <= Clock::now())
    }

    /// The fence falls: every process of the server is killed, the postmaster first, so that it starts no others.
    fn fall(mut self) -> ExitCode {
        let _already_gone = kill_process(self.postmaster, Signal::KILL);
        self.kill_all();
        let late = match self.fence {
            Fence::At(at) => Clock::now().since(at),
            Fence::Open => Span::ZERO,
        };
        tell(&format!("stopped Postgres by force: the bot has not renewed the lease; all gone {late} after the fence"));
        self.say(&FromGuard::Ended(Ended::Fenced));
        ExitCode::from(3)
    }

    /// The postmaster has ended: so does everything of it.
    fn bury(mut self, status: ExitStatus) -> ExitCode {
        if status.success() {
            let until = Clock::now() + LEFTOVERS_GRACE;
            while Clock::now() < until && !self.left().is_empty() && !self.fence_is_there() {
                self.watchdog.tend(Clock::now());
                thread::sleep(LOOK_EVERY);
            }
        }
        self.kill_all();
        self.say(&FromGuard::Ended(if status.success() { Ended::Cleanly } else { Ended::Died(status.to_string()) }));
        ExitCode::SUCCESS
    }

    fn left(&self) -> Vec<Pid> {
        processes::of_server(&[&self.options.data_dir])
    }

    /// Returns once no process of the server is left, however long the kernel takes. Only then the device must not act any more.
    fn kill_all(&mut self) {
        loop {
            self.watchdog.tend(Clock::now());
            let left = self.left();
            for pid in &left {
                let _already_gone = kill_process(*pid, Signal::KILL);
            }
            while let Ok(Some(_collected)) = wait(WaitOptions::NOHANG) {}
            if left.is_empty() {
                return self.watchdog.disarm();
            }
            thread::sleep(LOOK_EVERY);
        }
    }

    /// Collects children that have ended; the postmaster's status if it is among them.
    fn reap(&self) -> Option<ExitStatus> {
        let mut ended = None;
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if pid == self.postmaster {
                ended = Some(ExitStatus::from_raw(status.as_raw()));
            }
        }
        ended
    }

    /// A bot that was started again, or the one that started us.
    fn accept(&mut self) {
        let Ok((stream, _unnamed)) = self.listener.accept() else { return };
        if stream.set_nonblocking(false).is_err() || stream.set_write_timeout(Some(WRITE_PATIENCE)).is_err() {
            return;
        }
        self.bot = Some(Bot { stream, said: Vec::new() });
        let (guard, postmaster) = (rustix::process::getpid().as_raw_pid(), self.postmaster.as_raw_pid());
        self.say(&FromGuard::Hello { guard, postmaster, fence: self.fence });
    }

    fn hear(&mut self) {
        let Some(bot) = &mut self.bot else { return };
        let mut bytes = [0; LINE_BYTES_MAX];
        // Readable, so this does not wait.
        match bot.stream.read(&mut bytes) {
            Ok(0) => self.bot = None,
            Ok(count) => {
                bot.said.extend_from_slice(&bytes[..count]);
                if bot.said.len() > 16 * LINE_BYTES_MAX {
                    self.bot = None;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => self.bot = None,
        }
        let mut lines = Vec::new();
        if let Some(bot) = &mut self.bot
            && let Some(end) = bot.said.iter().rposition(|byte| *byte == b'\n')
        {
            lines = bot.said.drain(..=end).collect();
        }
        for line in String::from_utf8_lossy(&lines).lines() {
            match ToGuard::parse(line) {
                Some(ToGuard::Watch(watch)) => self.watch = Some(watch),
                Some(ToGuard::Move(fence)) => self.move_fence(fence),
                None => tell(&format!("does not understand `{line}`")),
            }
        }
    }

    /// Moves the fence, and with it what the device is kept alive for.
    fn move_fence(&mut self, fence: Fence) {
        let watch = self.watch.take();
        if let Err(error) = self.set_alarm(fence) {
            return tell(&format!("the fence could not be moved: {error:#}"));
        }
        self.say(&FromGuard::Holds(fence));
        // A fence that is there is followed by no more.
        if self.fence_is_there() {
            return;
        }
        let stands = self.watchdog.follow(Clock::now(), watch.as_ref());
        if let Some((watch, stands)) = watch.zip(stands) {
            self.say(&FromGuard::Watches(watch.until, stands));
        }
    }

    /// The alarm first: the word that it stands is true only then.
    fn set_alarm(&mut self, fence: Fence) -> anyhow::Result<()> {
        let at = match fence {
            // A time of zero disarms.
            Fence::Open => Time::ZERO,
            Fence::At(at) => at.max(Time::from_millis(1)),
        };
        timerfd_settime(self.timer.as_fd(), TimerfdTimerFlags::ABSTIME, &once_at(at)).context("set the alarm")?;
        self.fence = fence;
        Ok(())
    }

    fn say(&mut self, line: &FromGuard) {
        if let Some(bot) = &mut self.bot
            && bot.stream.write_all(line.to_string().as_bytes()).is_err()
        {
            self.bot = None;
        }
    }
}

/// Starts the postmaster, which gets an immediate shutdown from the kernel when this process ends.
#[expect(unsafe_code, reason = "the parent-death signal can only be set between fork and exec, where std wants unsafe")]
fn launch(options: &Options) -> anyhow::Result<Pid> {
    let log = append_only(&options.log_file).with_context(|| format!("open {}", options.log_file.display()))?;
    let mut command = Command::new(&options.program);
    command.arg("-D").arg(&options.data_dir).stdin(Stdio::null());
    command.stdout(log.try_clone().context("share the server's log file")?).stderr(log);
    command.process_group(0);
    let guard = rustix::process::getpid();
    let set = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::QUIT))?;
        // The guard may have died before the line above.
        if rustix::process::getppid() == Some(guard) { Ok(()) } else { Err(rustix::io::Errno::SRCH.into()) }
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; these are two plain system calls that
    // neither allocate nor lock.
    unsafe {
        command.pre_exec(set);
    }
    let child = command.spawn().with_context(|| format!("start {}", options.program.display()))?;
    Pid::from_raw(child.id().cast_signed()).context("the postmaster has no process id")
}

/// One guard a data directory: an old one that lived on would take a new server for what is left of its own.
fn lock(path: &Path) -> anyhow::Result<File> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path);
    let mut file = file.with_context(|| format!("open {}", path.display()))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).context("another guard lives")?;
    file.set_len(0).context("note the guard's number")?;
    write!(file, "{}", rustix::process::getpid().as_raw_pid()).context("note the guard's number")?;
    Ok(file)
}

fn append_only(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

fn once_at(at: Time) -> Itimerspec {
    let millis = at.as_millis();
    let secs = i64::try_from(millis / 1_000).unwrap_or(i64::MAX);
    let nanos = i64::try_from(millis % 1_000 * 1_000_000).unwrap_or(0);
    Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: Timespec { tv_sec: secs, tv_nsec: nanos } }
}

fn from_now(at: Time) -> Timespec {
    once_at(Time::ZERO + at.since(Clock::now())).it_value
}

/// For people; whoever should read it may be gone.
fn tell(text: &str) {
    let _nobody_reads = writeln!(io::stderr(), "postgres-bot guard: {text}");
}
