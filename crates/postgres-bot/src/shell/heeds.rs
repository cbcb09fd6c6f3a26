//! Whether a commit on this server would wait for the standbys that are named to it. Before a promotion nobody else can know: a server
//! in recovery shows by nothing that it does how it would acknowledge.
//!
//! A commit waits at all only if a flag in shared memory is set, and the checkpointer alone sets it: when it begins, and when it reads
//! the files anew, which it does not in the middle of flushing a restartpoint.

use anyhow::Context;
use bots_core::{machine::Time, shell::Clock};

use super::{hands::Hands, observe::NAMES_SETTLE, server::Connection};
use crate::machine::BLOCKED;

/// Whether commits would wait, as far as it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Heeds {
    /// The server was told to wait for nobody, or nobody knows what.
    #[default]
    Nobody,
    /// It has been told to wait since then, and may not have heard everywhere.
    Told(Time),
    /// They would.
    Waits,
}

impl Heeds {
    /// A server begins with these names, or with none.
    pub(super) const fn begun(waits: bool) -> Self {
        if waits { Self::Waits } else { Self::Nobody }
    }

    /// A server that runs is told to read its files again. From one name to another, the flag stays as it is.
    pub(super) const fn told(self, waits: bool, now: Time) -> Self {
        match (waits, self) {
            (false, _) => Self::Nobody,
            (true, Self::Nobody) => Self::Told(now),
            (true, Self::Told(_) | Self::Waits) => self,
        }
    }
}

/// Whether commits would wait for whom they shall wait for, or for what no standby can give: true if they shall wait for nobody.
///
/// # Errors
/// If the server does not answer.
pub(super) async fn find_out(hands: &Hands, connection: &Connection) -> anyhow::Result<bool> {
    let Some(wanted) = hands.standby_names() else { return Ok(true) };
    let known = *hands.heeds();
    let (names, checkpointer_waits) = connection.heeds().await.context("ask whom commits would wait for")?;
    if names != wanted && names != BLOCKED {
        return Ok(false);
    }
    match known {
        Heeds::Waits => Ok(true),
        Heeds::Told(since) if checkpointer_waits && Clock::now().since(since) >= NAMES_SETTLE => {
            let mut heeds = hands.heeds();
            // Unless it has been told otherwise meanwhile.
            if *heeds == known {
                *heeds = Heeds::Waits;
            }
            Ok(*heeds == Heeds::Waits)
        }
        Heeds::Nobody | Heeds::Told(_) => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::{Heeds, Time};

    #[test]
    fn who_has_waited_for_nobody_does_not_wait_before_that_is_seen() {
        let (early, late) = (Time::ZERO, Time::from_millis(7));
        assert_eq!(Heeds::default().told(true, early).told(true, late), Heeds::Told(early));
        assert_eq!(Heeds::begun(false).told(true, early), Heeds::Told(early));
        assert_eq!(Heeds::begun(true).told(true, early), Heeds::Waits);
        assert_eq!(Heeds::Waits.told(false, early).told(true, late), Heeds::Told(late));
    }
}
