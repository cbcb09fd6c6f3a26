//! A machine's clock: what the bot on it takes for the time. It starts anywhere and runs a little fast or slow.

use bots_core::machine::{Span, Time};

use crate::rng::Rng;

/// How far a clock may run wrong, in parts per million. Crystals stay below 100.
pub const DRIFT_PPM_MAX: i64 = 500;

/// A clock that counts suspend, with an origin and a rate of its own.
#[derive(Debug, Clone, Copy)]
pub struct NodeClock {
    offset: u64,
    /// So much it was set back, if that mistake is made.
    back: u64,
    drift_ppm: i64,
}

impl NodeClock {
    /// Some machine's clock.
    pub fn draw(rng: &mut Rng, drifts: bool) -> Self {
        let ppm = i64::try_from(rng.between(0, 2 * DRIFT_PPM_MAX.unsigned_abs())).unwrap_or(0) - DRIFT_PPM_MAX;
        Self { offset: rng.between(1_000, 100_000_000), back: 0, drift_ppm: if drifts { ppm } else { 0 } }
    }

    /// What it shows at the true time `now`.
    #[must_use]
    pub fn local(&self, now: Time) -> Time {
        let true_ms = i64::try_from(now.as_millis()).unwrap_or(i64::MAX);
        let shown = true_ms + true_ms * self.drift_ppm / 1_000_000;
        Time::from_millis((self.offset + u64::try_from(shown).unwrap_or(0)).saturating_sub(self.back))
    }

    /// Sets it back, as nobody can set a clock that counts from the machine's start.
    pub fn set_back(&mut self, by: Span) {
        self.back += by.as_millis();
    }

    /// The first true time at which it shows `local` or later; the origin for what lies before it.
    #[must_use]
    pub fn global(&self, local: Time) -> Time {
        let shown =
            i64::try_from((local.as_millis() + self.back).saturating_sub(self.offset)).unwrap_or(i64::MAX / 1_000_000);
        let guess = shown.saturating_mul(1_000_000) / (1_000_000 + self.drift_ppm);
        let mut at = Time::from_millis(u64::try_from(guess.saturating_sub(2)).unwrap_or(0));
        while self.local(at) < local {
            at += Span::from_millis(1);
        }
        at
    }

    /// Wall-clock milliseconds at the origin of the clock: all walls show the same time.
    #[must_use]
    pub const fn epoch_unix_ms(&self) -> u64 {
        1_785_000_000_000 - self.offset
    }
}

#[cfg(test)]
mod tests {
    use bots_core::machine::Time;

    use super::NodeClock;
    use crate::rng::Rng;

    #[test]
    fn there_and_back_is_never_early() {
        let mut rng = Rng::new(7);
        for _ in 0..1_000 {
            let clock = NodeClock::draw(&mut rng, true);
            let at = Time::from_millis(rng.below(300_000));
            let back = clock.global(clock.local(at));
            assert!(clock.local(back) >= clock.local(at) && back <= at);
        }
    }
}
