//! The origin as the leader knows it: what the reference points at, and when to look again. Not the network.

use bots_core::{
    dcs::Revision,
    machine::{Span, Time},
};
use serde::Serialize;

use super::{
    JobId, PollResult,
    backoff::{Backoff, Dice},
};

/// Two looks are never closer than this, however many pushes come in.
pub const LOOK_SPACING: Span = Span::from_millis(250);

/// An announcement that comes this long after the poll found the push was still under way; a later one was lost.
pub const MISSED_GRACE: Span = Span::from_secs(10);

/// How often a commit that was announced and is not shown yet is looked for: replicas of large hosts lag by seconds.
const LAG_LOOKS_MAX: u32 = 4;

/// The first wait for a replica that lags; doubled with every further one.
const LAG_WAIT: Span = Span::from_millis(500);

/// What to publish.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum Reference {
    /// A branch or a tag, by name: it moves.
    Named(String),
    /// The greatest version among the tags that fits a range, as `semver:^1.2`: it moves with every tag.
    Range(String),
    /// One commit, 40 hex digits: it never moves.
    Pinned(String),
}

/// What a range begins with.
const RANGE_PREFIX: &str = "semver:";

impl Reference {
    /// Reads a reference: 40 hex digits are a commit, `semver:` begins a range, everything else is a name.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let hex = text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit());
        if hex {
            Self::Pinned(text.to_ascii_lowercase())
        } else if text.starts_with(RANGE_PREFIX) {
            Self::Range(text.to_owned())
        } else {
            Self::Named(text.to_owned())
        }
    }

    /// The range, if it is one.
    #[must_use]
    pub fn range(&self) -> Option<&str> {
        match self {
            Self::Range(text) => text.strip_prefix(RANGE_PREFIX),
            Self::Named(_) | Self::Pinned(_) => None,
        }
    }

    /// As it stands in the configuration.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Named(name) | Self::Range(name) => name,
            Self::Pinned(sha) => sha,
        }
    }
}

/// What the reference pointed at when the origin last answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Tip {
    pub(super) sha: String,
    pub(super) detected: Time,
}

/// A commit that was announced and that no look has shown yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Lagging {
    tip: String,
    looks: u32,
}

/// What is known of the origin, and the look that is under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Origin {
    tip: Option<Tip>,
    job: Option<JobId>,
    /// When the running or the last look began.
    looked: Option<Time>,
    /// A push asks for a look before `next_look`.
    wanted: bool,
    next_look: Time,
    /// The newest push hint in etcd that a look has answered or will answer.
    heeded: Revision,
    /// The look that is under way was not asked for by any push.
    audits: bool,
    lagging: Option<Lagging>,
    /// When a look found by itself what nobody had announced.
    unannounced: Option<Time>,
    missing: bool,
    /// When it answered last; at first, when this leader began.
    answered: Option<Time>,
    backoff: Backoff,
}

impl Origin {
    pub(super) fn new() -> Self {
        Self {
            tip: None,
            job: None,
            looked: None,
            wanted: false,
            next_look: Time::ZERO,
            heeded: Revision::default(),
            audits: false,
            lagging: None,
            unannounced: None,
            missing: false,
            answered: None,
            backoff: Backoff::default(),
        }
    }

    /// A new leader trusts nothing that it knew before: it looks.
    pub(super) fn begin(&mut self, now: Time, reference: &Reference) {
        *self = Self { wanted: true, next_look: now, answered: Some(now), ..Self::new() };
        if let Reference::Pinned(sha) = reference {
            self.tip = Some(Tip { sha: sha.clone(), detected: now });
        }
    }

    /// There is something to see.
    pub(super) const fn look_soon(&mut self) {
        self.wanted = true;
    }

    /// A push was announced, and with it the commit that the reference points at since.
    pub(super) fn announced(&mut self, tip: Option<String>) {
        self.wanted = true;
        self.unannounced = None;
        if let Some(tip) = tip.filter(|tip| self.tip.as_ref().is_none_or(|known| known.sha != *tip)) {
            self.lagging = Some(Lagging { tip, looks: 0 });
        }
    }

    /// Whether the push hint that stands in etcd at this revision is news.
    pub(super) fn is_news(&mut self, hint: Revision) -> bool {
        let news = hint > self.heeded;
        self.heeded = self.heeded.max(hint);
        news
    }

    /// When an announcement that has not come must be taken for lost.
    pub(super) fn missed_at(&self) -> Option<Time> {
        self.unannounced.map(|found| found + MISSED_GRACE)
    }

    /// Takes note that an announcement was lost.
    pub(super) fn missed(&mut self, now: Time) -> bool {
        let lost = self.missed_at().is_some_and(|at| at <= now);
        if lost {
            self.unannounced = None;
        }
        lost
    }

    /// When the next look is due; nothing while one is under way.
    pub(super) fn due(&self) -> Option<Time> {
        if self.job.is_some() {
            return None;
        }
        let spaced = self.looked.map_or(Time::ZERO, |at| at + LOOK_SPACING);
        Some(if self.wanted { spaced } else { self.next_look.max(spaced) })
    }

    pub(super) fn look(&mut self, now: Time, job: JobId) {
        self.job = Some(job);
        self.looked = Some(now);
        self.audits = !self.wanted && self.lagging.is_none();
        self.wanted = false;
    }

    /// Takes in the end of a look; says whether the reference points elsewhere than before, if the origin answered.
    pub(super) fn polled(
        &mut self,
        now: Time,
        job: JobId,
        result: PollResult,
        interval: Span,
        dice: &mut Dice,
    ) -> Option<bool> {
        self.job.take_if(|looking| *looking == job)?;
        let before = self.tip.as_ref().map(|t| t.sha.clone());
        match result {
            PollResult::Found { sha } if before.as_ref() == Some(&sha) => {}
            PollResult::Found { sha } => self.tip = Some(Tip { sha, detected: now }),
            PollResult::Missing => self.tip = None,
            PollResult::Failed { why } => {
                self.backoff.failed(now, why, dice);
                self.next_look = self.backoff.retry_at().unwrap_or(now);
                return None;
            }
        }
        self.missing = self.tip.is_none();
        self.answered = Some(now);
        self.backoff.reset();
        self.next_look = now + dice.jittered(interval);
        let moved = self.tip.as_ref().map(|t| &t.sha) != before.as_ref();
        if moved && self.audits && before.is_some() && !self.wanted {
            self.unannounced = self.unannounced.or(Some(now));
        }
        self.wait_for_replica(now, moved);
        Some(moved)
    }

    /// The origin does not show what was announced: its replica lags, or the announcement was old. A few looks tell.
    fn wait_for_replica(&mut self, now: Time, moved: bool) {
        let Some(mut lagging) = self.lagging.take().filter(|_| !moved) else { return };
        let shown = self.tip.as_ref().is_some_and(|tip| tip.sha == lagging.tip);
        if !shown && lagging.looks < LAG_LOOKS_MAX {
            self.next_look = self.next_look.min(now + LAG_WAIT.times(1 << lagging.looks));
            lagging.looks += 1;
            self.lagging = Some(lagging);
        }
    }

    pub(super) const fn tip(&self) -> Option<&Tip> {
        self.tip.as_ref()
    }

    pub(super) const fn is_looking(&self) -> bool {
        self.job.is_some()
    }

    pub(super) const fn answered(&self) -> Option<Time> {
        self.answered
    }

    pub(super) const fn is_missing(&self) -> bool {
        self.missing
    }

    pub(super) const fn backoff(&self) -> &Backoff {
        &self.backoff
    }
}

#[cfg(test)]
mod tests {
    use super::Reference;

    #[test]
    fn forty_hex_digits_are_a_commit() {
        let sha = "0123456789ABCDEF0123456789abcdef01234567";
        assert_eq!(Reference::parse(sha), Reference::Pinned(sha.to_ascii_lowercase()));
        assert_eq!(Reference::parse("semver:^1.2").range(), Some("^1.2"));
        assert_eq!(Reference::parse("main"), Reference::Named(String::from("main")));
        assert_eq!(Reference::parse(&sha[1..]), Reference::Named(sha[1..].to_owned()));
    }
}
