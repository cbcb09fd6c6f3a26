//! The limits of one piece of work with git: time, size, and the wish to end. Asked from libgit2's callbacks.

use std::{
    cell::Cell,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bots_core::{
    machine::{Span, Time},
    shell::Clock,
};

use super::fault::Fault;

/// Tells all work of a bot to end. Clones share.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Ends all work at its next callback.
    pub fn now(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Breach {
    Late,
    Large,
    Stopped,
}

/// The limits of one piece of work.
#[derive(Debug)]
pub struct Guard {
    stop: Stop,
    until: Time,
    patience: Duration,
    bytes_max: u64,
    breach: Cell<Option<Breach>>,
}

impl Guard {
    /// Limits that begin to count now.
    #[must_use]
    pub fn new(stop: Stop, patience: Duration, bytes_max: u64) -> Self {
        let span = Span::from_millis(u64::try_from(patience.as_millis()).unwrap_or(u64::MAX));
        Self { stop, until: Clock::now() + span, patience, bytes_max, breach: Cell::new(None) }
    }

    /// Whether the work may go on.
    pub fn allows(&self) -> bool {
        if self.stop.0.load(Ordering::Relaxed) {
            self.breach.set(Some(Breach::Stopped));
        } else if Clock::now() >= self.until {
            self.breach.set(Some(Breach::Late));
        }
        self.breach.get().is_none()
    }

    /// Whether the work may go on after `bytes` have come in.
    pub fn allows_bytes(&self, bytes: usize) -> bool {
        if u64::try_from(bytes).unwrap_or(u64::MAX) > self.bytes_max {
            self.breach.set(Some(Breach::Large));
        }
        self.allows()
    }

    /// The limit that ended the work, if one did.
    #[must_use]
    pub fn breach(&self) -> Option<Fault> {
        self.breach.get().map(|breach| match breach {
            Breach::Late => Fault::Failed(format!("not done within {:?}", self.patience)),
            Breach::Stopped => Fault::Failed(String::from("the bot ends")),
            // A transfer has the history with it, and what else is missing here: it says nothing of the commit's size.
            Breach::Large => Fault::Failed(format!(
                "fetching it takes more than {} bytes: shrink the repository or raise git.size_max_bytes",
                self.bytes_max
            )),
        })
    }
}
