//! The guard's hand on the watchdog device, which resets the machine unless it is kept alive. It is open exactly as long as the
//! server may take writes.
//!
//! A bot gives an order along with each fence: how long the device waits, and by when it must have acted if no other order comes.
//! It is kept alive as long as that still holds afterwards, and not a moment longer. So a machine that stands still is reset in
//! time, wherever it stopped; and a guard that runs has killed the server before, and closed the device.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

use bots_core::machine::{Span, Time};

use super::ioctl;

/// The last time that the device is kept alive comes this long before the last moment: a process that is woken is late by less.
const WAKES_WITHIN: Span = Span::from_millis(20);

/// What could not be used is not opened again for this long: opening a device arms it.
const TRIED_AGAIN_AFTER: Span = Span::from_secs(60);

/// What disarms a device that is closed next.
const MAGIC_CLOSE: &[u8] = b"V";

/// Any other byte keeps it alive.
const KEEP_ALIVE: &[u8] = b"\0";

/// What a bot wants of the device for as long as the fence stands where it was set along with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watch {
    /// The device.
    pub device: PathBuf,
    /// The longest time-out that it may have.
    pub timeout_s: u64,
    /// It must have acted by then.
    pub until: Time,
}

/// The device of a guard, opened or not.
#[derive(Debug, Default)]
pub(super) struct Watchdog {
    armed: Option<Armed>,
    until: Time,
    refused: Option<(String, Time)>,
}

#[derive(Debug)]
struct Armed {
    path: PathBuf,
    file: File,
    magic_close: bool,
    /// The longest time-out that was asked for, and the one that the device has.
    asked_s: u64,
    timeout_s: u64,
    /// When it was kept alive last.
    kept: Time,
}

impl Watchdog {
    /// Takes an order, or that there is none. Says how the device stands now, for the bot: nothing if it is too late for this order
    /// to arm it, and the next will.
    pub(super) fn follow(&mut self, now: Time, watch: Option<&Watch>) -> Option<Result<u64, String>> {
        let Some(watch) = watch else {
            self.disarm();
            return None;
        };
        self.until = watch.until;
        let same = |armed: &Armed| armed.path == watch.device && armed.asked_s == watch.timeout_s;
        if !self.armed.as_ref().is_some_and(same) {
            if let Some((why, at)) = &self.refused
                && now.since(*at) < TRIED_AGAIN_AFTER
            {
                return Some(Err(why.clone()));
            }
            if !may_keep_alive(now, watch.timeout_s, watch.until) {
                return None;
            }
            if self.armed.as_ref().is_some_and(|armed| armed.path != watch.device) {
                self.disarm();
            }
            if let Err(why) = self.arm(now, watch) {
                self.refused = Some((why, now));
                self.disarm();
            }
        }
        self.tend(now);
        match (&self.armed, &self.refused) {
            (Some(armed), _) => Some(Ok(armed.timeout_s)),
            (None, Some((why, _))) => Some(Err(why.clone())),
            (None, None) => None,
        }
    }

    /// Opens the device, unless it is open, and sets its time-out.
    fn arm(&mut self, now: Time, watch: &Watch) -> Result<(), String> {
        let path = watch.device.display();
        let (file, magic_close) = match self.armed.take() {
            Some(Armed { file, magic_close, .. }) => (file, magic_close),
            None => {
                let file = open(&watch.device).map_err(|error| format!("{path} cannot be opened: {error}"))?;
                let support = ioctl::support(file.as_fd());
                let options = support.map_err(|error| format!("{path} is no watchdog device: {error}"))?.options;
                (file, options & ioctl::MAGIC_CLOSE != 0)
            }
        };
        // It is armed from here on, whatever becomes of the rest: who refuses it disarms it.
        let armed = Armed {
            path: watch.device.clone(),
            file,
            magic_close,
            asked_s: watch.timeout_s,
            timeout_s: watch.timeout_s,
            kept: now,
        };
        let armed = self.armed.insert(armed);
        let asked = i32::try_from(watch.timeout_s).unwrap_or(i32::MAX);
        // What a driver without the call grants is what it has.
        let granted = ioctl::set_timeout(armed.file.as_fd(), asked).or_else(|_| ioctl::timeout(armed.file.as_fd()));
        let granted = granted.map_err(|error| format!("{path} does not tell its time-out: {error}"))?;
        match u64::try_from(granted) {
            Ok(granted) if (1..=watch.timeout_s).contains(&granted) => armed.timeout_s = granted,
            Ok(_) | Err(_) => {
                return Err(format!("{path} waits {granted} s; at most {} s are safe", watch.timeout_s));
            }
        }
        self.keep_alive(now);
        Ok(())
    }

    /// Keeps the device alive if that is due and still allowed.
    pub(super) fn tend(&mut self, now: Time) {
        if self.due(now).is_some_and(|due| due <= now) {
            self.keep_alive(now);
        }
    }

    fn keep_alive(&mut self, now: Time) {
        let Some(armed) = &mut self.armed else { return };
        if !may_keep_alive(now, armed.timeout_s, self.until) {
            return;
        }
        match armed.file.write_all(KEEP_ALIVE) {
            Ok(()) => armed.kept = now,
            Err(error) => {
                self.refused = Some((format!("{} cannot be kept alive: {error}", armed.path.display()), now));
                self.disarm();
            }
        }
    }

    /// When the device is to be kept alive next; nothing if it is closed, or another order must come first.
    pub(super) fn due(&self, now: Time) -> Option<Time> {
        let armed = self.armed.as_ref().filter(|armed| may_keep_alive(now, armed.timeout_s, self.until))?;
        next_keep_alive(armed.kept, armed.timeout_s, self.until)
    }

    /// Closes the device so that it does not act.
    pub(super) fn disarm(&mut self) {
        let Some(mut armed) = self.armed.take() else { return };
        if armed.magic_close {
            // A driver that is told not to stop goes on all the same; nothing more can be done about it.
            let _goes_on = armed.file.write_all(MAGIC_CLOSE);
        }
    }
}

/// Not waiting for whoever is at the other end of what is no device.
fn open(path: &Path) -> io::Result<File> {
    let nonblocking = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or_default();
    OpenOptions::new().write(true).custom_flags(nonblocking).open(path)
}

/// The device that is kept alive `now` still acts by `until` if nobody does so again.
fn may_keep_alive(now: Time, timeout_s: u64, until: Time) -> bool {
    now + Span::from_secs(timeout_s) <= until
}

/// Each time half of what is left: few times on the way, and close together at the end, where a late one costs least.
fn next_keep_alive(kept: Time, timeout_s: u64, until: Time) -> Option<Time> {
    let timeout = Span::from_secs(timeout_s);
    let last = until - timeout - WAKES_WITHIN;
    let left = last.since(kept);
    // Never more than a third of what it waits.
    (last > kept).then(|| kept + left.divided_by(2).min(timeout.divided_by(3)).max(WAKES_WITHIN.min(left)))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::FileTypeExt, process::Command};

    use bots_core::machine::{Span, Time};

    use super::{Watch, Watchdog, may_keep_alive, next_keep_alive};

    const NOW: Time = Time::from_millis(100_000);

    /// Every lease from the shortest on, with a fence that is moved on once: the device acts after the fence and before the end,
    /// and is never left alone for longer than it waits.
    #[test]
    fn the_device_acts_between_the_fence_and_the_end_wherever_the_machine_stops() {
        for lease_s in 2..=60 {
            let (lease, timeout_s) = (Span::from_secs(lease_s), (lease_s * 6 / 10).max(1));
            let at = |twentieths: u64| NOW + lease.times(twentieths).divided_by(20);
            let (fence, until, end) = (at(18), at(19), at(20));
            let mut kept = NOW + Span::from_millis(5);
            assert!(may_keep_alive(kept, timeout_s, until), "ttl {lease_s}: a new order can be followed at once");
            let mut times = 0;
            while let Some(next) = next_keep_alive(kept, timeout_s, until) {
                let acts = kept + Span::from_secs(timeout_s);
                assert!(next > kept && next < acts, "ttl {lease_s}: kept alive at {next}, and it acts at {acts}");
                assert!(may_keep_alive(next, timeout_s, until), "ttl {lease_s}: kept alive beyond its time");
                assert!(acts <= until, "ttl {lease_s}");
                (kept, times) = (next, times + 1);
            }
            let acts = kept + Span::from_secs(timeout_s);
            assert!(fence < acts && acts < end, "ttl {lease_s}: acts {} before the end", end.since(acts));
            assert!(times <= 20, "ttl {lease_s}: {times} times for one renewal");
        }
    }

    fn watch(device: &std::path::Path) -> Watch {
        Watch { device: device.to_owned(), timeout_s: 2, until: NOW + Span::from_secs(5) }
    }

    #[test]
    fn what_does_not_answer_as_a_device_is_none_and_is_left_as_it_was() {
        let folder = tempfile::tempdir().expect("a folder");
        let (file, pipe) = (folder.path().join("file"), folder.path().join("pipe"));
        fs::write(&file, "").expect("a file");
        assert!(Command::new("mkfifo").arg(&pipe).status().expect("mkfifo").success());
        assert!(fs::metadata(&pipe).expect("a pipe").file_type().is_fifo());
        for (path, says) in [
            (folder.path().join("nothing"), "cannot be opened"),
            (file.clone(), "is no watchdog device"),
            // Nobody reads it: it must not be waited for.
            (pipe, "cannot be opened"),
            ("/dev/null".into(), "is no watchdog device"),
        ] {
            let mut watchdog = Watchdog::default();
            let said = watchdog.follow(NOW, Some(&watch(&path)));
            let why = said.expect("an answer").expect_err("no device");
            assert!(why.contains(says), "{}: {why}", path.display());
            assert_eq!(watchdog.due(NOW), None);
            assert_eq!(watchdog.follow(NOW, None), None);
        }
        assert_eq!(fs::read(&file).expect("the file"), b"", "it was written to");
    }

    #[test]
    fn a_device_is_not_opened_too_late() {
        let mut watchdog = Watchdog::default();
        let late = Watch { until: NOW + Span::from_millis(1_999), ..watch(std::path::Path::new("/dev/null")) };
        assert_eq!(watchdog.follow(NOW, Some(&late)), None);
    }
}
