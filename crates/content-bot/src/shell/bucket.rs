//! A token bucket: so many at once, so many a second. The time is an argument.

use bots_core::machine::{Span, Time};

/// A bucket.
#[derive(Debug, Clone)]
pub(super) struct Bucket {
    size: u64,
    every: Span,
    tokens: u64,
    filled: Time,
}

impl Bucket {
    /// A full bucket of `size` tokens that gets a new one `every` so often.
    #[must_use]
    pub(super) const fn new(size: u64, every: Span) -> Self {
        Self { size, every, tokens: size, filled: Time::ZERO }
    }

    /// Takes a token if there is one.
    pub(super) fn take(&mut self, now: Time) -> bool {
        let fresh = now.since(self.filled).as_millis() / self.every.as_millis().max(1);
        if fresh > 0 {
            self.tokens = self.tokens.saturating_add(fresh).min(self.size);
            self.filled += self.every.times(fresh);
        }
        let taken = self.tokens > 0;
        self.tokens = self.tokens.saturating_sub(1);
        taken
    }
}

#[cfg(test)]
mod tests {
    use bots_core::machine::{Span, Time};

    use super::Bucket;

    #[test]
    fn a_burst_passes_and_then_a_steady_trickle() {
        let mut bucket = Bucket::new(3, Span::from_millis(500));
        let mut passed = |ms: u64| bucket.take(Time::from_millis(ms));
        assert!(passed(10_000) && passed(10_000) && passed(10_000) && !passed(10_000));
        assert!(!passed(10_499) && passed(10_500) && !passed(10_501));
        assert!(passed(11_000) && !passed(11_000));
    }
}
