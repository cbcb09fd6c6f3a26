//! What the bot and the guard say to each other: one line of words each, so that a bot of another version understands it.

use std::fmt;

use bots_core::machine::Time;

use super::watchdog::Watch;

/// When the guard stops the server unless told otherwise before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fence {
    /// Never: the server takes no writes.
    Open,
    /// At this time on the clock that counts suspend.
    At(Time),
}

/// How the server ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// Of its own accord, or because it was asked to.
    Cleanly,
    /// It died: the exit status or signal.
    Died(String),
    /// The guard stopped it, for the fence was there.
    Fenced,
}

/// From the bot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ToGuard {
    /// What to do with a watchdog device from the next fence on. A fence that has none ahead of it wants no device.
    Watch(Watch),
    /// Move the fence. Answered by [`FromGuard::Holds`], and by [`FromGuard::Watches`] if a device is wanted with it.
    Move(Fence),
}

/// From the guard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum FromGuard {
    /// The first line of every connection.
    Hello {
        /// The guard's process.
        guard: i32,
        /// The postmaster.
        postmaster: i32,
        /// The fence as it stands.
        fence: Fence,
    },
    /// The fence stands there.
    Holds(Fence),
    /// How the device stands for the order with this end: its time-out in seconds, or why it cannot be used.
    Watches(Time, Result<u64, String>),
    /// Every process of the server is gone; the last line.
    Ended(Ended),
}

impl fmt::Display for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open => f.write_str("open"),
            Self::At(at) => write!(f, "{}", at.as_millis()),
        }
    }
}

impl Fence {
    /// Reads what [`fmt::Display`] writes.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        match word {
            "open" => Some(Self::Open),
            number => Some(Self::At(Time::from_millis(number.parse().ok()?))),
        }
    }
}

impl fmt::Display for ToGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Watch(Watch { device, timeout_s, until }) => {
                writeln!(f, "watch {timeout_s} {} {}", until.as_millis(), device.display())
            }
            Self::Move(fence) => writeln!(f, "fence {fence}"),
        }
    }
}

impl ToGuard {
    /// Reads a line; nothing if it is none of ours.
    pub(super) fn parse(line: &str) -> Option<Self> {
        let (word, rest) = line.trim_end().split_once(' ')?;
        match word {
            "fence" => Some(Self::Move(Fence::parse(rest)?)),
            "watch" => {
                let mut words = rest.splitn(3, ' ');
                let timeout_s = words.next()?.parse().ok()?;
                let until = Time::from_millis(words.next()?.parse().ok()?);
                Some(Self::Watch(Watch { timeout_s, until, device: words.next()?.into() }))
            }
            _ => None,
        }
    }
}

impl fmt::Display for FromGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hello { guard, postmaster, fence } => writeln!(f, "hello {guard} {postmaster} {fence}"),
            Self::Holds(fence) => writeln!(f, "holds {fence}"),
            Self::Watches(until, Ok(timeout_s)) => writeln!(f, "watches {} {timeout_s}", until.as_millis()),
            Self::Watches(until, Err(why)) => writeln!(f, "unwatched {} {why}", until.as_millis()),
            Self::Ended(Ended::Cleanly) => writeln!(f, "ended"),
            Self::Ended(Ended::Fenced) => writeln!(f, "fenced"),
            Self::Ended(Ended::Died(how)) => writeln!(f, "died {how}"),
        }
    }
}

impl FromGuard {
    /// Reads a line; nothing if it is none of ours.
    pub(super) fn parse(line: &str) -> Option<Self> {
        let line = line.trim_end();
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "hello" => {
                let mut words = rest.split(' ');
                let (guard, postmaster) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
                Some(Self::Hello { guard, postmaster, fence: Fence::parse(words.next()?)? })
            }
            "holds" => Some(Self::Holds(Fence::parse(rest)?)),
            "watches" | "unwatched" => {
                let (until, rest) = rest.split_once(' ')?;
                let until = Time::from_millis(until.parse().ok()?);
                let stands = if word == "watches" { Ok(rest.parse().ok()?) } else { Err(rest.to_owned()) };
                Some(Self::Watches(until, stands))
            }
            "ended" => Some(Self::Ended(Ended::Cleanly)),
            "fenced" => Some(Self::Ended(Ended::Fenced)),
            "died" => Some(Self::Ended(Ended::Died(rest.to_owned()))),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use bots_core::machine::Time;

    use super::{Ended, Fence, FromGuard, ToGuard, Watch};

    #[test]
    fn what_is_written_is_read() {
        let at = Fence::At(Time::from_millis(4_711));
        let until = Time::from_millis(4_961);
        let watch = ToGuard::Watch(Watch { device: "/dev/watch dog".into(), timeout_s: 3, until });
        for said in [ToGuard::Move(Fence::Open), ToGuard::Move(at), watch] {
            assert_eq!(ToGuard::parse(&said.to_string()), Some(said));
        }
        let all = [
            FromGuard::Hello { guard: 12, postmaster: 13, fence: at },
            FromGuard::Hello { guard: 12, postmaster: 13, fence: Fence::Open },
            FromGuard::Holds(at),
            FromGuard::Watches(until, Ok(3)),
            FromGuard::Watches(until, Err(String::from("/dev/watchdog cannot be opened: it is busy"))),
            FromGuard::Ended(Ended::Cleanly),
            FromGuard::Ended(Ended::Fenced),
            FromGuard::Ended(Ended::Died(String::from("signal: 9 (SIGKILL)"))),
        ];
        for said in all {
            let line = said.to_string();
            assert!(line.ends_with('\n') && line.matches('\n').count() == 1, "{line:?}");
            assert_eq!(FromGuard::parse(&line), Some(said));
        }
        for nonsense in [
            "",
            "watch",
            "watch 1 2",
            "watch x 2 /dev/watchdog",
            "watches 1 x",
            "unwatched",
            "fence",
            "fence soon",
            "fence -1",
            "hello 1 2",
            "holds",
            "x",
        ] {
            assert_eq!((ToGuard::parse(nonsense), FromGuard::parse(nonsense)), (None, None), "{nonsense:?}");
        }
    }
}
