//! The bot's end of the line to the guard: moves the fence without waiting, and hears how the server ended.

use std::{io::Write, os::unix::net::UnixStream as StdStream, path::Path, time::Duration};

use anyhow::{Context, bail};
use rustix::process::Pid;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::UnixStream,
    sync::watch,
};

use bots_core::machine::Time;

use super::{
    line::{Ended, Fence, FromGuard, ToGuard},
    watchdog::Watch,
};

/// A guard that lives answers within a millisecond; one that does not is of no use.
const ANSWER_DEADLINE: Duration = Duration::from_secs(2);

/// What the guard has said so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Heard {
    holds: Option<Fence>,
    watches: Option<(Time, Result<u64, String>)>,
    ended: Option<Ended>,
    closed: bool,
}

/// A connection to a guard.
#[derive(Debug)]
pub struct Link {
    stream: StdStream,
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
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                match FromGuard::parse(&line) {
                    Some(FromGuard::Holds(fence)) => told.send_modify(|heard| heard.holds = Some(fence)),
                    Some(FromGuard::Watches(until, stands)) => {
                        told.send_modify(|heard| heard.watches = Some((until, stands)));
                    }
                    Some(FromGuard::Ended(how)) => told.send_modify(|heard| heard.ended = Some(how)),
                    Some(FromGuard::Hello { .. }) | None => tracing::warn!(line, "the guard says what it should not"),
                }
            }
            told.send_modify(|heard| heard.closed = true);
        });
        let (guard, postmaster) = guard.zip(postmaster).context("the guard does not know its own number")?;
        Ok(Self { stream, heard, guard, postmaster })
    }

    /// Where the fence stands, as far as the guard has said.
    pub fn fence(&self) -> Option<Fence> {
        self.heard.borrow().holds
    }

    /// Asks for the fence to be moved, and what is to be done with the watchdog device while it stands there; does not wait.
    pub fn move_fence(&self, fence: Fence, watch: Option<&Watch>) {
        let watch = watch.map_or_else(String::new, |watch| ToGuard::Watch(watch.clone()).to_string());
        let line = watch + &ToGuard::Move(fence).to_string();
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
        let reaches = |heard: &Heard| match (heard.holds, fence) {
            (Some(Fence::At(holds)), Fence::At(wanted)) => holds >= wanted,
            (holds, wanted) => holds == Some(wanted),
        };
        let holds = heard.wait_for(|heard| reaches(heard) || heard.closed);
        let heard = tokio::time::timeout(ANSWER_DEADLINE, holds).await;
        let stands = heard.context("the guard does not answer")?.is_ok_and(|heard| reaches(&heard));
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
