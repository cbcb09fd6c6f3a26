//! The bot's end of the line to the guard: moves the fence without waiting, and hears how the server ended.

use std::{io::Write, os::unix::net::UnixStream as StdStream, path::Path, time::Duration};

use anyhow::{Context, bail};
use rustix::process::Pid;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::UnixStream,
    sync::watch,
};

use bots_core::{
    machine::{Span, Time},
    shell::clock::Clock,
};

use super::{
    line::{Ended, Fence, FromGuard, ToGuard},
    watchdog::Watch,
};

/// A guard that lives answers within a millisecond; one that does not is of no use.
const ANSWER_DEADLINE: Duration = Duration::from_secs(2);

/// A guard whose answer takes longer than this may act too late, too: it is the guard's margin at the default lease.
const LATE_AFTER: Span = Span::from_millis(500);

/// What the guard has said so far, and has not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Heard {
    holds: Option<Fence>,
    asked: Option<Asked>,
    /// It has not answered for too long.
    late: bool,
    watches: Option<(Time, Result<u64, String>)>,
    ended: Option<Ended>,
    closed: bool,
}

/// The moves of the fence that have not been answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Asked {
    first: Fence,
    last: Fence,
    /// When the first was asked for.
    since: Time,
}

impl Heard {
    fn asks(&mut self, fence: Fence, now: Time) {
        let Some(asked) = &mut self.asked else {
            self.asked = Some(Asked { first: fence, last: fence, since: now });
            return;
        };
        asked.last = fence;
        if now.since(asked.since) >= LATE_AFTER {
            self.late = true;
        }
    }

    /// Several moves that it has heard at once have one answer.
    fn holds(&mut self, fence: Fence) {
        self.holds = Some(fence);
        if self.asked.is_some_and(|asked| reaches(fence, asked.first) || fence == asked.last) {
            (self.asked, self.late) = (None, false);
        }
    }
}

/// Whether the fence stands where it was wanted, or later: a renewal may have moved it on meanwhile.
fn reaches(holds: Fence, wanted: Fence) -> bool {
    match (holds, wanted) {
        (Fence::At(holds), Fence::At(wanted)) => holds >= wanted,
        (holds, wanted) => holds == wanted,
    }
}

/// A connection to a guard.
#[derive(Debug)]
pub struct Link {
    stream: StdStream,
    told: watch::Sender<Heard>,
    heard: watch::Receiver<Heard>,
    /// The guard's process.
    pub guard: Pid,
    /// The postmaster.
    pub postmaster: Pid,
}

impl Link {
    /// Connects to the guard that listens at `socket`.
    ///
    /// # Errors
    /// If none does, or it does not say who it is.
    pub async fn open(socket: &Path) -> anyhow::Result<Self> {
        tokio::time::timeout(ANSWER_DEADLINE, Self::greet(socket)).await.context("the guard does not answer")?
    }

    async fn greet(socket: &Path) -> anyhow::Result<Self> {
        let stream = StdStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
        stream.set_nonblocking(true).context("prepare the connection to the guard")?;
        let reader = UnixStream::from_std(stream.try_clone().context("share the connection to the guard")?)?;
        let mut lines = BufReader::new(reader).lines();
        let hello = lines.next_line().await.context("hear the guard")?.unwrap_or_default();
        let Some(FromGuard::Hello { guard, postmaster, fence }) = FromGuard::parse(&hello) else {
            bail!("the guard says `{hello}`, and not who it is");
        };
        let (guard, postmaster) = (Pid::from_raw(guard), Pid::from_raw(postmaster));
        let (told, heard) = watch::channel(Heard { holds: Some(fence), ..Heard::default() });
        let hears = told.clone();
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                match FromGuard::parse(&line) {
                    Some(FromGuard::Holds(fence)) => hears.send_modify(|heard| heard.holds(fence)),
                    Some(FromGuard::Watches(until, stands)) => {
                        hears.send_modify(|heard| heard.watches = Some((until, stands)));
                    }
                    Some(FromGuard::Ended(how)) => hears.send_modify(|heard| heard.ended = Some(how)),
                    Some(FromGuard::Hello { .. }) | None => tracing::warn!(line, "the guard says what it should not"),
                }
            }
            hears.send_modify(|heard| heard.closed = true);
        });
        let (guard, postmaster) = guard.zip(postmaster).context("the guard does not know its own number")?;
        Ok(Self { stream, told, heard, guard, postmaster })
    }

    /// Where the fence stands, as far as the guard has said.
    pub fn fence(&self) -> Option<Fence> {
        self.heard.borrow().holds
    }

    /// Asks for the fence to be moved, and what is to be done with the watchdog device while it stands there; does not wait.
    pub fn move_fence(&self, fence: Fence, watch: Option<&Watch>) {
        let watch = watch.map_or_else(String::new, |watch| ToGuard::Watch(watch.clone()).to_string());
        let line = watch + &ToGuard::Move(fence).to_string();
        self.told.send_modify(|heard| heard.asks(fence, Clock::now()));
        // It takes a hundred lines that nobody reads before this would have to wait.
        if let Err(error) = (&self.stream).write_all(line.as_bytes()) {
            tracing::warn!(%error, "the guard cannot be told to move the fence");
        }
    }

    /// Waits until the guard says that the fence stands there, or later: a renewal may have moved it on meanwhile.
    ///
    /// # Errors
    /// If it does not in time.
    pub async fn confirm(&self, fence: Fence) -> anyhow::Result<()> {
        let mut heard = self.heard.clone();
        let stands = |heard: &Heard| heard.holds.is_some_and(|holds| reaches(holds, fence));
        let holds = heard.wait_for(|heard| stands(heard) || heard.closed);
        let heard = tokio::time::timeout(ANSWER_DEADLINE, holds).await;
        let stands = heard.context("the guard does not answer")?.is_ok_and(|heard| stands(&heard));
        if stands { Ok(()) } else { bail!("the guard is gone") }
    }

    /// Waits until the guard says how the device stands for an order that ends at `until` or later.
    ///
    /// # Errors
    /// Why the device cannot be used, or that the guard does not say within `patience`.
    pub async fn confirm_watch(&self, until: Time, patience: Duration) -> anyhow::Result<u64> {
        let mut heard = self.heard.clone();
        let says = |heard: &Heard| heard.watches.as_ref().is_some_and(|(stands_until, _)| *stands_until >= until);
        let heard = tokio::time::timeout(patience, heard.wait_for(|heard| says(heard) || heard.closed)).await;
        let heard = heard.context("the guard does not say whether the watchdog device watches")?;
        let stands = heard.ok().filter(|heard| says(heard)).and_then(|heard| heard.watches.clone());
        let (_, stands) = stands.context("the guard is gone")?;
        stands.map_err(anyhow::Error::msg)
    }

    /// Waits until the guard says that the device stands otherwise than `before`; nothing once the line is closed.
    pub async fn watch_changed(&self, before: Option<&Result<u64, String>>) -> Option<Result<u64, String>> {
        let mut heard = self.heard.clone();
        let news = |heard: &Heard| heard.watches.as_ref().is_some_and(|(_, stands)| Some(stands) != before);
        let heard = heard.wait_for(|heard| news(heard) || heard.closed).await.ok()?;
        heard.watches.clone().map(|(_, stands)| stands).filter(|stands| Some(stands) != before)
    }

    /// Whether the guard answers, as far as was seen: not if an answer has not come for too long.
    pub fn answers(&self) -> bool {
        !self.heard.borrow().late
    }

    /// Waits until that is otherwise than `before`; nothing once the line is closed.
    pub async fn answers_changed(&self, before: bool) -> Option<bool> {
        let mut heard = self.heard.clone();
        let heard = heard.wait_for(|heard| heard.late == before || heard.closed).await.ok()?;
        (heard.late == before).then_some(!before)
    }

    /// Waits until the guard has let go of the line: it has ended, or somebody else has called it.
    pub async fn closed(&self) {
        let mut heard = self.heard.clone();
        let _its_reader_is_gone = heard.wait_for(|heard| heard.closed).await;
    }

    /// Waits for the guard's last word: how the server ended; nothing if it ended without one.
    pub async fn last_word(&self) -> Option<Ended> {
        let mut heard = self.heard.clone();
        let heard = heard.wait_for(|heard| heard.ended.is_some() || heard.closed).await;
        heard.ok().and_then(|heard| heard.ended.clone())
    }
}

#[cfg(test)]
mod tests {
    use bots_core::machine::Time;

    use super::{Fence, Heard};

    const fn at(ms: u64) -> Fence {
        Fence::At(Time::from_millis(ms))
    }

    #[test]
    fn a_guard_is_late_once_a_move_has_no_answer_when_another_is_made_and_no_more_once_it_has() {
        let mut heard = Heard::default();
        heard.asks(at(5_000), Time::from_millis(1_000));
        heard.holds(at(5_000));
        heard.asks(at(6_500), Time::from_millis(2_500));
        heard.asks(at(6_600), Time::from_millis(2_600));
        assert!(!heard.late, "a tenth of a second");
        heard.asks(at(8_000), Time::from_millis(4_000));
        assert!(heard.late);
        // It answers the last of several, which may be before the first: a promise is shorter than a lease.
        heard.asks(at(6_000), Time::from_millis(4_500));
        heard.holds(at(6_000));
        assert_eq!((heard.late, heard.asked), (false, None));
    }
}
