//! A watchdog device for machines whose kernel has none: a file that is served through FUSE by this very process. The program that
//! opens it makes the same system calls as to `/dev/watchdog`, and the kernel carries them here: opening arms it, a write keeps
//! it alive, the `ioctl`s tell and set its time-out, a `V` before the close disarms it. What it does when its time is over
//! is to kill the processes that stand for the machine.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use fleet::process::{run_now, signal_pid};
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::Signal,
    time::Timespec,
};

/// The time-out of a device that nobody has set one for, as drivers have it.
const TIMEOUT_S: u32 = 60;

/// The kernel's questions, as `linux/fuse.h` numbers them.
mod question {
    pub(super) const FORGET: u32 = 2;
    pub(super) const GETATTR: u32 = 3;
    pub(super) const OPEN: u32 = 14;
    pub(super) const WRITE: u32 = 16;
    pub(super) const RELEASE: u32 = 18;
    pub(super) const FLUSH: u32 = 25;
    pub(super) const INIT: u32 = 26;
    pub(super) const INTERRUPT: u32 = 36;
    pub(super) const IOCTL: u32 = 39;
    pub(super) const BATCH_FORGET: u32 = 42;
}

/// `WDIOC_GETSUPPORT`, `WDIOC_SETTIMEOUT` and `WDIOC_GETTIMEOUT`, as `linux/watchdog.h` makes them.
const GET_SUPPORT: u32 = 0x8028_5700;
const SET_TIMEOUT: u32 = 0xC004_5706;
const GET_TIMEOUT: u32 = 0x8004_5707;
/// `WDIOF_SETTIMEOUT`, `WDIOF_MAGICCLOSE` and `WDIOF_KEEPALIVEPING`.
const OPTIONS: u32 = 0x0080 | 0x0100 | 0x8000;

const EBUSY: i32 = 16;
const ENOTTY: i32 = 25;
const ENOSYS: i32 = 38;

/// What has become of the device so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    /// Somebody has it open.
    pub(crate) open: bool,
    /// Its time-out, once it was set.
    pub(crate) timeout_s: Option<u32>,
    /// How often it was kept alive.
    pub(crate) kept: u64,
    /// How often it was closed with a `V` before.
    pub(crate) disarmed: u64,
    /// When it reset the machine.
    pub(crate) reset: Option<Instant>,
    acts_at: Option<Instant>,
    magic: bool,
    /// The time-out that it insists on.
    insists: Option<u32>,
    machine: Vec<u32>,
}

/// The device; it is gone when dropped.
#[derive(Debug)]
pub(crate) struct Device {
    path: PathBuf,
    seen: Arc<Mutex<Seen>>,
}

impl Device {
    /// Makes a device at `path`, in a folder that the bot's user can look into; nothing if this user may not mount.
    pub(crate) fn new(path: &Path) -> Result<Option<Self>> {
        if !rustix::process::getuid().is_root() {
            return Ok(None);
        }
        let channel = OpenOptions::new().read(true).write(true).open("/dev/fuse").context("open /dev/fuse")?;
        fs::write(path, "").context("make a file for the device")?;
        fs::set_permissions(path, Permissions::from_mode(0o666)).context("open the file to all")?;
        let serves = channel.try_clone().context("share the channel")?;
        // By the number of its standard input, the mounting program has the channel.
        let options = "fd=0,rootmode=100666,user_id=0,group_id=0,allow_other";
        let mounted = Command::new("mount")
            .args(["-i", "-t", "fuse", "-o", options, "watchdog"])
            .arg(path)
            .stdin(Stdio::from(channel))
            .output()
            .context("run mount")?;
        ensure!(mounted.status.success(), "mount: {}", String::from_utf8_lossy(&mounted.stderr).trim());
        let seen = Arc::new(Mutex::new(Seen::default()));
        let device = Self { path: path.to_owned(), seen: Arc::clone(&seen) };
        thread::spawn(move || Server { channel: serves, seen }.run());
        Ok(Some(device))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn seen(&self) -> Seen {
        lock(&self.seen).clone()
    }

    /// Whatever is asked of it, this is the time-out that it grants.
    pub(crate) fn insist(&self, timeout_s: u32) {
        lock(&self.seen).insists = Some(timeout_s);
    }

    /// These processes stand for the machine: they are killed when the time is over.
    pub(crate) fn stands_for(&self, machine: Vec<u32>) {
        lock(&self.seen).machine = machine;
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _gone_already = run_now("umount", &["-l", &self.path.to_string_lossy()]);
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers the kernel, and watches the time.
struct Server {
    channel: File,
    seen: Arc<Mutex<Seen>>,
}

impl Server {
    fn run(mut self) {
        let mut question = vec![0; 64 * 1024];
        loop {
            let left = lock(&self.seen).acts_at.map(|at| at.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                self.reset();
                continue;
            }
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            if !matches!(poll(&mut [PollFd::new(&self.channel, PollFlags::IN)], left.as_ref()), Ok(1)) {
                continue;
            }
            // Unmounted.
            let Ok(count) = self.channel.read(&mut question) else { return };
            if self.answer(&question[..count]).is_err() {
                return;
            }
        }
    }

    fn reset(&self) {
        let mut seen = lock(&self.seen);
        (seen.acts_at, seen.reset) = (None, Some(Instant::now()));
        seen.machine.iter().for_each(|pid| signal_pid(*pid, Signal::KILL));
    }

    fn answer(&mut self, question: &[u8]) -> std::io::Result<()> {
        let (asked, unique) = (word(question, 4), &question[8..16]);
        let said = &question[40..];
        let body = match asked {
            question::FORGET | question::BATCH_FORGET | question::INTERRUPT => return Ok(()),
            // The version that is spoken, and how much is written at once.
            question::INIT => Ok(words(&[7, 31, 0, 0, 0, 4_096, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
            question::GETATTR => {
                // Valid for no time; inode 1, one link, a regular file that all may read and write.
                let mut attributes = [0; 26];
                (attributes[4], attributes[19], attributes[20], attributes[24]) = (1, 0o100_666, 1, 4_096);
                Ok(words(&attributes))
            }
            question::OPEN => self.open(),
            question::WRITE => {
                let size = word(said, 16);
                self.written(&said[40..40 + size as usize]);
                Ok(words(&[size, 0]))
            }
            question::IOCTL => self.called(word(said, 12), &said[32..]),
            question::FLUSH => Ok(Vec::new()),
            question::RELEASE => {
                self.closed();
                Ok(Vec::new())
            }
            _any_other => Err(ENOSYS),
        };
        let (error, body) = body.map_or_else(|error| (-error, Vec::new()), |body| (0, body));
        let length = u32::try_from(16 + body.len()).unwrap_or(u32::MAX);
        let head = [&length.to_le_bytes(), &error.to_le_bytes(), unique].concat();
        self.channel.write_all(&[head, body].concat())
    }

    /// One at a time, as all drivers have it; armed from here on.
    fn open(&self) -> Result<Vec<u8>, i32> {
        let mut seen = lock(&self.seen);
        if seen.open {
            return Err(EBUSY);
        }
        (seen.open, seen.magic, seen.timeout_s) = (true, false, None);
        kept_alive(&mut seen);
        // Nothing of it is kept in the kernel's cache.
        Ok(words(&[1, 0, 1, 0]))
    }

    fn written(&self, bytes: &[u8]) {
        let mut seen = lock(&self.seen);
        seen.magic = bytes.contains(&b'V');
        seen.kept += 1;
        kept_alive(&mut seen);
    }

    fn called(&self, call: u32, given: &[u8]) -> Result<Vec<u8>, i32> {
        let mut seen = lock(&self.seen);
        let mut answer = words(&[0, 0, 0, 0]);
        match call {
            GET_SUPPORT => {
                answer.extend(words(&[OPTIONS, 1]));
                answer.extend(b"a device of the tests\0\0\0\0\0\0\0\0\0\0\0");
            }
            SET_TIMEOUT => {
                let granted = seen.insists.unwrap_or_else(|| word(given, 0));
                seen.timeout_s = Some(granted);
                kept_alive(&mut seen);
                answer.extend(granted.to_le_bytes());
            }
            GET_TIMEOUT => answer.extend(seen.timeout_s.unwrap_or(TIMEOUT_S).to_le_bytes()),
            _any_other => return Err(ENOTTY),
        }
        Ok(answer)
    }

    fn closed(&self) {
        let mut seen = lock(&self.seen);
        seen.open = false;
        if seen.magic {
            seen.disarmed += 1;
            seen.acts_at = None;
        }
    }
}

fn kept_alive(seen: &mut Seen) {
    if seen.reset.is_none() {
        seen.acts_at = Some(Instant::now() + Duration::from_secs(seen.timeout_s.unwrap_or(TIMEOUT_S).into()));
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
