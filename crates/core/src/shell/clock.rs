//! The only reader of clocks in the workspace. Machines get the time as an argument.

use rustix::time::{ClockId, clock_gettime};

use crate::machine::Time;

/// The machine's clocks.
#[derive(Debug, Clone, Copy)]
pub struct Clock;

impl Clock {
    /// Milliseconds since boot, suspend included: leases run out while a laptop sleeps.
    #[must_use]
    pub fn now() -> Time {
        Time::from_millis(millis(ClockId::Boottime))
    }

    /// Microseconds on the same clock: to measure how long a short thing took, never to decide by.
    #[must_use]
    pub fn micros() -> u64 {
        let now = clock_gettime(ClockId::Boottime);
        let secs = u64::try_from(now.tv_sec).unwrap_or(0);
        secs.saturating_mul(1_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000)
    }

    /// Milliseconds since 1970 on the wall clock: for people to read, never to decide by.
    #[must_use]
    pub fn unix_ms() -> u64 {
        millis(ClockId::Realtime)
    }

    /// The wall time at [`Time::ZERO`], so that machines can show their times to people.
    #[must_use]
    pub fn epoch_unix_ms() -> u64 {
        Self::unix_ms().saturating_sub(Self::now().as_millis())
    }
}

fn millis(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    let secs = u64::try_from(now.tv_sec).unwrap_or(0);
    secs.saturating_mul(1_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::Clock;

    #[test]
    fn time_does_not_run_backwards_and_the_year_is_plausible() {
        let before = Clock::now();
        assert!(Clock::now() >= before);
        assert!(Clock::unix_ms() > 1_700_000_000_000);
        assert!(Clock::epoch_unix_ms() <= Clock::unix_ms());
    }
}
