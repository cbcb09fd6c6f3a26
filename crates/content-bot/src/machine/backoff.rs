//! Back-off after failures, and the jitter that keeps bots from marching in step. Not a source of randomness: the seed
//! is an argument.

use bots_core::machine::{Span, Time};
use serde::Serialize;

/// The first wait after a failure.
pub const BACKOFF_MIN: Span = Span::from_secs(1);

/// The longest wait: an origin that comes back is seen within minutes, and one that is gone costs nothing.
pub const BACKOFF_MAX: Span = Span::from_secs(300);

/// Doublings after which [`BACKOFF_MAX`] is reached in any case.
const DOUBLINGS_MAX: u32 = 9;

/// How far a wait strays to either side.
const JITTER_PERCENT: u64 = 10;

/// Numbers that look random and follow from the seed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub(super) struct Dice(u64);

impl Dice {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// `span`, up to ten per cent shorter or longer.
    pub(super) fn jittered(&mut self, span: Span) -> Span {
        // SplitMix64: one addition and three mixes, good enough to spread bots.
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        let ms = span.as_millis();
        let reach = ms / 100 * JITTER_PERCENT;
        Span::from_millis(ms - reach + z % (2 * reach + 1))
    }
}

/// Failures in a row, and when to try again.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Backoff {
    failures: u32,
    retry_at: Option<Time>,
    why: Option<String>,
}

impl Backoff {
    /// Waits twice as long as after the failure before.
    pub(super) fn failed(&mut self, now: Time, why: String, dice: &mut Dice) {
        let doubled = BACKOFF_MIN.times(1 << self.failures.min(DOUBLINGS_MAX));
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Some(now + dice.jittered(doubled.min(BACKOFF_MAX)));
        self.why = Some(why);
    }

    /// All is well, or the world has changed so much that the old failures say nothing.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    pub(super) const fn retry_at(&self) -> Option<Time> {
        self.retry_at
    }

    pub(super) fn allows(&self, now: Time) -> bool {
        self.retry_at.is_none_or(|at| at <= now)
    }

    pub(super) fn why(&self) -> Option<&str> {
        self.why.as_deref()
    }

    /// What failed and when the next try is, for the report.
    pub(super) fn trouble(&self, now: Time) -> Option<String> {
        let why = self.why.as_deref()?;
        let tries = if self.failures == 1 { String::from("1 try") } else { format!("{} tries", self.failures) };
        let next = match self.retry_at.filter(|at| *at > now) {
            Some(at) => format!("in {}", at.since(now)),
            None => String::from("now"),
        };
        Some(format!("{why} ({tries} failed, next {next})"))
    }
}

#[cfg(test)]
mod tests {
    use bots_core::machine::{Span, Time};

    use super::{BACKOFF_MAX, Backoff, Dice};

    #[test]
    fn waits_double_up_to_the_limit_and_stray_by_a_tenth() {
        let (mut backoff, mut dice) = (Backoff::default(), Dice::new(7));
        for power in 0..20 {
            backoff.failed(Time::ZERO, String::from("no route"), &mut dice);
            let wait = backoff.retry_at().expect("armed").since(Time::ZERO);
            let nominal = Span::from_secs(1 << power.min(9)).min(BACKOFF_MAX).as_millis();
            assert!(wait.as_millis() >= nominal * 9 / 10 && wait.as_millis() <= nominal * 11 / 10, "{wait}");
        }
        backoff.reset();
        assert!(backoff.allows(Time::ZERO) && backoff.trouble(Time::ZERO).is_none());
    }
}
