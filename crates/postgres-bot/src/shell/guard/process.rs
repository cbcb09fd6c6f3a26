//! The guard's process: starts the postmaster, waits for its end, its fence or the bot's word, and cleans up.

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    io::{self, Write},
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
    io::Errno,
    net::{RecvFlags, recv},
    process::{
        Pid, PidfdFlags, Resource, Rlimit, Signal, WaitOptions, kill_process, pidfd_open, setpriority_process,
        setrlimit, wait,
    },
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime},
};

use super::{
    line::{Ended, Fence, FromGuard, ToGuard},
    watchdog::{Watch, Watchdog},
};
use crate::shell::processes::{self, Marks};

/// How often the processes of a server that ends are looked at. Short beside any margin, long beside a look.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// What is left after a clean end (the log collector) may end on its own for this long.
const LEFTOVERS_GRACE: Span = Span::from_secs(1);

/// A bot that does not read its lines for this long is not written to.
const WRITE_PATIENCE: Duration = Duration::from_millis(100);

/// The nice value of a guard, which runs for some milliseconds an hour and must not wait for a processor: the least there is.
const FIRST: i32 = -20;

/// As much is read at a time.
const READ_BYTES: usize = 4 * 1024;

/// So much is taken in at once: more than a socket holds of what a bot says while the guard stands still. A line has 256 bytes at most.
const SAID_BYTES_MAX: usize = 256 * 1024;

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
    let log_file = options.log_file.clone();
    match Guard::start(options) {
        Ok(guard) => guard.watch(),
        Err(error) => {
            tell(&format!("{error:#}"));
            // Where the reason is looked for when a server does not start.
            let _nobody_reads =
                append_only(&log_file).and_then(|mut log| writeln!(log, "FATAL:  its guard: {error:#}"));
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
    /// By what the server's processes are known.
    marks: Marks,
    /// See [`Options::lock`].
    _lock: File,
}

/// A connection of the bot, with what it has said of its next line.
struct Bot {
    stream: UnixStream,
    said: Vec<u8>,
}

impl Bot {
    /// All whole lines that it has said and that were not read yet, without waiting for more; and whether it may say more.
    fn read_all(&mut self) -> (String, bool) {
        let mut bytes = [0; READ_BYTES];
        let mut goes_on = true;
        while self.said.len() <= SAID_BYTES_MAX {
            match recv(&self.stream, &mut bytes[..], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => goes_on = false,
                Ok((_, count)) => {
                    self.said.extend(bytes.iter().take(count));
                    continue;
                }
                Err(Errno::INTR) => continue,
                Err(Errno::WOULDBLOCK) => {}
                Err(_) => goes_on = false,
            }
            break;
        }
        let end = self.said.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let lines = self.said.drain(..end).collect::<Vec<u8>>();
        (String::from_utf8_lossy(&lines).into_owned(), goes_on && self.said.len() <= SAID_BYTES_MAX)
    }
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
        let marks = Marks::of_program(&options.program);
        let postmaster = launch(&options)?;
        // Not before the server is started, which shall not have it. Where it is not allowed, the guard waits for its turn.
        let _only_sooner = setpriority_process(None, FIRST);
        // Without an eye on it, or a way to find it, it must not run.
        let end = pidfd_open(postmaster, PidfdFlags::empty()).context("watch the postmaster");
        let end = end.and_then(|end| processes::check_is_found(postmaster, &options.data_dir).map(|()| end));
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
            marks,
            _lock: lock,
        };
        guard.set_alarm(guard.fence).inspect_err(|_| _ = kill_process(postmaster, Signal::KILL))?;
        Ok(guard)
    }

    /// Watches until the server has ended.
    fn watch(mut self) -> ExitCode {
        loop {
            // A process that stood still judges by the last word that was said meanwhile, not by the first.
            if self.fence_is_there() {
                self.hear();
            }
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
                Ok(_) | Err(Errno::INTR) => {}
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
        let fence = self.fence;
        let late = || match fence {
            Fence::At(at) => Clock::now().since(at).as_millis(),
            Fence::Open => 0,
        };
        let woken = late();
        let _already_gone = kill_process(self.postmaster, Signal::KILL);
        // Whoever is told to die runs no code of its own any more, also where it waits long for a processor to end on. The second
        // time is for children of one that ended in the middle of the first.
        for _twice in 0..2 {
            processes::kill_descendants(rustix::process::getpid());
        }
        let told = late();
        self.kill_all();
        let gone = late();
        tell(&format!(
            "stopped Postgres by force: the bot has not renewed the lease; \
             woken {woken} ms after the fence, all told after {told} ms, all gone after {gone} ms"
        ));
        self.say(&FromGuard::Ended(Ended::Fenced));
        ExitCode::from(3)
    }

    /// The postmaster has ended: so does everything of it.
    fn bury(mut self, status: ExitStatus) -> ExitCode {
        if status.success() {
            let until = Clock::now() + LEFTOVERS_GRACE;
            while Clock::now() < until && self.leaves_some() && !self.fence_is_there() {
                self.watchdog.tend(Clock::now());
                thread::sleep(LOOK_EVERY);
            }
        }
        self.kill_all();
        self.say(&FromGuard::Ended(if status.success() { Ended::Cleanly } else { Ended::Died(status.to_string()) }));
        ExitCode::SUCCESS
    }

    /// Whether anything is left of the server itself, as far as can be seen.
    fn leaves_some(&self) -> bool {
        !self.marks.find(&[&self.options.data_dir]).is_ok_and(|left| left.is_empty())
    }

    /// Returns once no process of the server is left, and none that it has started, however long the kernel takes. Only then the
    /// device must not act any more.
    fn kill_all(&mut self) {
        let with_descendants = self.marks.clone().guarded_by(Some(rustix::process::getpid()));
        loop {
            self.watchdog.tend(Clock::now());
            let left = with_descendants.kill(&[&self.options.data_dir]);
            while let Ok(Some(_collected)) = wait(WaitOptions::NOHANG) {}
            if left.is_ok_and(|left| left.is_empty()) {
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

    /// Takes in all that the bot has said so far. Where the fence shall be is its last word.
    fn hear(&mut self) {
        let Some(bot) = &mut self.bot else { return };
        let (lines, goes_on) = bot.read_all();
        if !goes_on {
            self.bot = None;
        }
        let mut wanted = None;
        for line in lines.lines() {
            match ToGuard::parse(line) {
                Some(ToGuard::Watch(watch)) => self.watch = Some(watch),
                Some(ToGuard::Move(fence)) => wanted = Some((fence, self.watch.take())),
                None => tell(&format!("does not understand `{line}`")),
            }
        }
        if let Some((fence, watch)) = wanted {
            self.move_fence(fence, watch);
        }
    }

    /// Moves the fence, and with it what the device is kept alive for.
    fn move_fence(&mut self, fence: Fence, watch: Option<Watch>) {
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
    let program = std::path::absolute(&options.program).context("find the program")?;
    let mut command = Command::new(&program);
    // Where it goes by itself a moment later, so that it is found there from the first moment on.
    command.arg("-D").arg(&options.data_dir).current_dir(&options.data_dir).stdin(Stdio::null());
    command.stdout(log.try_clone().context("share the server's log file")?).stderr(log);
    // By which what it starts is found if this guard is killed.
    command.envs(processes::mark_of(&options.data_dir).map(|mark| (processes::MARK, mark)));
    command.process_group(0);
    let guard = rustix::process::getpid();
    let set = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::QUIT))?;
        // What the guard may, its server may not: go before the guard.
        setrlimit(Resource::Nice, Rlimit { current: Some(0), maximum: Some(0) })?;
        // The guard may have died before the line above.
        if rustix::process::getppid() == Some(guard) { Ok(()) } else { Err(rustix::io::Errno::SRCH.into()) }
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; these are plain system calls that
    // neither allocate nor lock.
    unsafe {
        command.pre_exec(set);
    }
    let child = command.spawn().with_context(|| format!("start {}", program.display()))?;
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
