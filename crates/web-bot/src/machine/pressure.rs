//! Stalls of the processor, as the kernel tells of them. Where work waits for a processor, a bot carries less than it should:
//! its requests count for more. Where nothing is in flight a stall is somebody else's, and none of the site's load.

use bots_core::{
    machine::{Deadline, Span, Time},
    wire::WebFacts,
};
use serde::Serialize;

use super::{Role, State};

/// How long after the kernel's word a stall is taken to go on. A stall that does is told of every two seconds, and one word
/// may come late.
pub const STALL_COUNTS: Span = Span::from_secs(5);

/// How much a request in flight counts under a stall: a processor that makes work wait for half of the time, which is when
/// the kernel tells of it, is shared by twice the work that it can do at once.
pub const STALLED_WEIGHT: u64 = 2;

/// The sub-machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct Pressure {
    until: Option<Time>,
}

impl Pressure {
    /// The kernel tells of a stall.
    pub(super) fn stalled(&mut self, now: Time) {
        self.until = Some(now + STALL_COUNTS);
    }

    fn is_on(&self, now: Time) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    /// When the sub-machine wants a step of its own accord.
    pub(super) fn deadline(&self, now: Time) -> Option<Deadline> {
        let at = self.until.filter(|until| now < *until)?;
        Some(Deadline { at, reason: String::from("the processor's stall is over unless it is told of again") })
    }
}

impl State {
    /// Whether requests of ours wait for a processor.
    pub(super) fn is_stalled(&self) -> bool {
        let in_flight = self.load.is_some_and(|load| load.in_flight_milli > 0);
        self.role == Role::Serving && in_flight && self.pressure.is_on(self.stepped_at)
    }
}

/// The load that a member shares, in thousandths of a request in flight, weighed by what it means there.
pub(super) fn weighed(facts: &WebFacts) -> u64 {
    let in_flight_milli = facts.load.map_or(0, |load| load.in_flight_milli);
    if facts.stalled { in_flight_milli.saturating_mul(STALLED_WEIGHT) } else { in_flight_milli }
}
