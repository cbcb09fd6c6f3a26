//! The bot's end of the line to the guard: moves the fence without waiting, and hears how the server ended.

use std::{io::Write, os::unix::net::UnixStream as StdStream, path::Path, time::Duration};

use anyhow::{Context, bail};
use rustix::process::Pid;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::UnixStream,
    sync::watch,
};

use super::line::{Ended, Fence, FromGuard, ToGuard};

/// A guard that lives answers within a millisecond; one that does not is of no use.
const ANSWER_DEADLINE: Duration = Duration::from_secs(2);

/// What the guard has said so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Heard {
    holds: Option<Fence>,
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

    /// Asks for the fence to be moved; does not wait.
    pub fn move_fence(&self, fence: Fence) {
        let line = ToGuard::Move(fence).to_string();
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
