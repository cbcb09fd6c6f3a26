//! The watchdog device: what the guard is told of it, and whether this member may lead without it. A device resets a machine that
//! stands still as a whole, guard and all. How long it waits and until when it may be kept alive is decided here.

use bots_core::machine::{Span, Time};
use serde::{Deserialize, Serialize};

use super::{phase::Phase, promise::PROMISE, state::State, turn::Turn};

/// What was refused is not tried again for this long: a device that another program holds is seldom free a moment later.
const REFUSED_FOR: Span = Span::from_secs(60);

/// How much is made of a watchdog device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WatchdogMode {
    /// None is used.
    #[default]
    Off,
    /// One that can be used is.
    Automatic,
    /// Who has none that can be used does not lead.
    Required,
}

/// The member's settings of its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Watchdog {
    /// See [`WatchdogMode`].
    pub mode: WatchdogMode,
    /// Patroni's margin, in seconds: the device waits that much less than a lease; -1 is half of the lease. If none is given, it
    /// waits as long as it safely can.
    pub safety_margin: Option<i64>,
}

/// What the guard does with the device for as long as its fence stands where it was set along with this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchdogOrder {
    /// The device waits so long after it was last kept alive, and not longer.
    pub timeout_s: u64,
    /// The device must have acted by then: it is kept alive only as long as it still would.
    pub until: Time,
    /// Without the device, no server is made writable.
    pub required: bool,
}

/// What is known of the device.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Device {
    /// It is there and may be opened, as far as that can be seen without opening it; nothing before the first look.
    seen: Option<Result<(), String>>,
    /// The guard could not use it, and since when.
    refused: Option<(String, Time)>,
}

/// The longest time-out under which a device is in time and a lease that is renewed never meets it. The last moment to keep the
/// device alive is 19/20 of a lease less the time-out after the renewal was sent; the next renewal is sent after 3/10: at 6/10,
/// 1/20 is left for its answer.
fn longest_s(lease: Span) -> u64 {
    lease.times(6).divided_by(10).as_millis() / 1_000
}

/// The device's time-out in whole seconds, by which devices count.
fn timeout_s(lease: Span, safety_margin: Option<i64>) -> u64 {
    asked_s(lease, safety_margin).min(longest_s(lease)).max(1)
}

/// The time-out that the margin asks for, safe or not.
fn asked_s(lease: Span, safety_margin: Option<i64>) -> u64 {
    let lease_s = lease.as_millis() / 1_000;
    let half = lease_s / 2;
    match safety_margin {
        None => u64::MAX,
        // A margin that leaves no time is no shorter than half, as Patroni's own way out is.
        Some(margin) => u64::try_from(margin).map_or(half, |margin| match lease_s.saturating_sub(margin) {
            0 => half,
            left => left,
        }),
    }
}

/// What is to be said of a margin that is too short to matter.
fn without_effect(lease: Span, safety_margin: Option<i64>) -> Option<String> {
    let (margin, longest) = (safety_margin?, longest_s(lease).max(1));
    let lease_s = lease.as_millis() / 1_000;
    (asked_s(lease, safety_margin) > longest).then(|| {
        format!(
            "watchdog.safety_margin is {margin} and has no effect: at a ttl of {lease_s} s the device waits {longest} s, the longest \
             that is safe; remove it, or make it more than {}",
            lease_s - longest
        )
    })
}

impl State {
    /// What the guard is to do with the device while its fence stands at [`State::guard_at`]; nothing if none is used.
    pub(super) fn watchdog_order(&self) -> Option<WatchdogOrder> {
        let Watchdog { mode, safety_margin } = self.settings.watchdog;
        if mode == WatchdogMode::Off {
            return None;
        }
        let timeout_s = timeout_s(self.watched_lease().min(self.membership.lease_ttl()), safety_margin);
        Some(WatchdogOrder { timeout_s, until: self.device_at(), required: mode == WatchdogMode::Required })
    }

    /// What the device must be in time for. A primary without etcd lives on promises, each as good as a lease of their length.
    fn watched_lease(&self) -> Span {
        let ttl = self.dynamic.ttl;
        if self.dynamic.failsafe_mode { ttl.min(PROMISE) } else { ttl }
    }

    /// A line for an operator whose margin makes no difference, because the device must not wait as long as it asks for.
    #[must_use]
    pub fn margin_without_effect(&self) -> Option<String> {
        let Watchdog { mode, safety_margin } = self.settings.watchdog;
        without_effect(self.watched_lease(), safety_margin).filter(|_| mode != WatchdogMode::Off)
    }

    /// Half-way between the guard's fence and the end of what it stands for: the guard has time to kill first, and the device to be late.
    fn device_at(&self) -> Time {
        let by_lease = self.membership.valid_until().unwrap_or(Time::ZERO) - self.guard_margin().divided_by(2);
        match self.promised_until() {
            None => by_lease,
            Some(until) if self.leadership.is_held() => by_lease.max(until - PROMISE.divided_by(20)),
            Some(until) => until - PROMISE.divided_by(20),
        }
    }

    /// Why this member must not lead for want of its device; nothing if it may.
    #[must_use]
    pub fn bar_by_watchdog(&self, now: Time) -> Option<String> {
        if self.settings.watchdog.mode != WatchdogMode::Required {
            return None;
        }
        let refused = self.device.refused.as_ref().filter(|(_, at)| now.since(*at) < REFUSED_FOR);
        let why = match (&self.device.seen, refused) {
            (_, Some((why, _))) => why,
            (Some(Err(why)), None) => why,
            (None, None) => "it has not been looked at yet",
            (Some(Ok(())), None) => return None,
        };
        Some(format!("watchdog.mode is required, and its device is of no use: {why}"))
    }

    /// When a bar for want of the device ends by itself.
    pub(super) fn watchdog_barred_until(&self, now: Time) -> Option<Time> {
        let (_, at) = self.device.refused.as_ref().filter(|_| self.settings.watchdog.mode == WatchdogMode::Required)?;
        Some(*at + REFUSED_FOR).filter(|until| *until > now)
    }

    /// What is wrong with a device that is not required, for the report.
    pub(super) fn watchdog_trouble(&self) -> Option<String> {
        let (why, _) =
            self.device.refused.as_ref().filter(|_| self.settings.watchdog.mode == WatchdogMode::Automatic)?;
        Some(format!("no watchdog device would reset this machine if it stood still: {why}"))
    }
}

impl Turn {
    /// The device was looked at, without opening it.
    pub(super) fn watchdog_seen(&mut self, seen: Result<(), String>) {
        self.s.device.seen = Some(seen);
    }

    /// The guard has said whether the device watches.
    pub(super) fn watchdog_used(&mut self, used: Result<u64, String>) {
        self.s.device.refused = used.err().map(|why| (why, self.now));
    }

    /// A primary that has lost a device that it must have gives the lock up; says whether it did.
    pub(super) fn lacks_watchdog(&mut self) -> bool {
        let lost =
            matches!(self.s.phase, Phase::Primary(_)) && self.s.device.refused.is_some() && !self.s.dynamic.pause;
        let Some(why) = self.s.bar_by_watchdog(self.now).filter(|_| lost) else { return false };
        self.unfit(&format!("another shall lead: {why}"));
        true
    }
}

#[cfg(test)]
mod tests {
    use bots_core::machine::Span;

    use super::{longest_s, timeout_s, without_effect};

    #[test]
    fn a_device_waits_as_long_as_is_safe_or_less_by_the_margin() {
        for (lease, margin, expected) in [
            (2, None, 1),
            (3, None, 1),
            (4, None, 2),
            (5, None, 3),
            (10, None, 6),
            (30, None, 18),
            // Half.
            (5, Some(-1), 2),
            (30, Some(-1), 15),
            (2, Some(-1), 1),
            (3, Some(-1), 1),
            // Patroni's default.
            (30, Some(5), 18),
            (10, Some(5), 5),
            (7, Some(5), 2),
            // It leaves nothing: half.
            (5, Some(5), 2),
            (2, Some(5), 1),
            (5, Some(i64::MAX), 2),
            (5, Some(0), 3),
        ] {
            assert_eq!(timeout_s(Span::from_secs(lease), margin), expected, "ttl {lease}, margin {margin:?}");
        }
    }

    #[test]
    fn a_margin_that_makes_no_difference_is_told_with_one_that_would() {
        let told = |lease, margin| without_effect(Span::from_secs(lease), margin);
        let said = told(30, Some(5)).expect("Patroni's default is above the longest");
        assert!(said.contains("is 5 and has no effect: at a ttl of 30 s the device waits 18 s"), "{said}");
        assert!(said.ends_with("make it more than 12"), "{said}");
        assert_eq!((told(30, Some(13)), timeout_s(Span::from_secs(30), Some(13))), (None, 17));
        for (lease, margin) in [(30, None), (30, Some(-1)), (30, Some(12)), (5, Some(5)), (5, Some(2)), (2, Some(1))] {
            assert_eq!(told(lease, margin), None, "ttl {lease}, margin {margin:?}");
        }
        assert!(told(5, Some(0)).is_some());
    }

    /// With the renewals of a lease at 0, 3/10, 6/10 ... and the device's last moment at 19/20, the device that was kept alive at the
    /// last moment of one renewal outlives the answer to the next; and it is past the guard's fence, and before the end.
    #[test]
    fn a_lease_that_is_renewed_in_time_never_meets_the_device() {
        for lease_s in 2..=120 {
            let lease = Span::from_secs(lease_s).as_millis();
            let timeout = longest_s(Span::from_secs(lease_s)) * 1_000;
            assert!(timeout >= 1_000, "ttl {lease_s}: shorter than any device counts");
            let last_moment = lease * 19 / 20 - timeout;
            assert!(
                last_moment >= lease * 3 / 10 + lease / 20,
                "ttl {lease_s}: the next renewal is not answered by then"
            );
            let acts = last_moment + timeout;
            assert!(lease * 9 / 10 < acts && acts < lease, "ttl {lease_s}: acts {acts} ms after the renewal");
        }
    }
}
