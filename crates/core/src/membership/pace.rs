//! How long leases are, and how often they are renewed.

use crate::machine::Span;

/// How often a lease is renewed on which only our own place among the members hangs. The least that leaves time for a
/// second try: an idle fleet should cost etcd little.
#[must_use]
pub const fn renewal(ttl: Span) -> Span {
    ttl.divided_by(2)
}

/// The length of a lease on which only a place among the members hangs that nobody waits for. Its renewals are what an idle
/// fleet costs etcd; its length is how long a dead member is still shown.
#[must_use]
pub fn resting_ttl(ttl: Span) -> Span {
    ttl.times(3).max(RESTING_TTL_MIN)
}

/// Below this, a shorter lease would save etcd less than a fleet of short leases costs it anyway.
const RESTING_TTL_MIN: Span = Span::from_secs(15);

/// How often the lease of a member that rests is renewed. At the least length that leaves 5 s for other tries, more than etcd needs
/// for choosing its next leader.
#[must_use]
pub const fn renewal_at_rest(ttl: Span) -> Span {
    ttl.times(2).divided_by(3)
}

/// How often a lease is renewed on which a lock hangs. When etcd loses its own leader it renews nothing until it has the
/// next one, which by its defaults takes up to two seconds and a little: at a `ttl` of 5 s, of which the holder keeps a
/// fifth for stopping its service, this leaves 2.5 s.
#[must_use]
pub const fn renewal_under_lock(ttl: Span) -> Span {
    ttl.times(3).divided_by(10)
}

/// Whether a lease that is renewed this often is one with a lock on it: no other has so short a pace.
#[must_use]
pub fn is_paced_for_lock(every: Span, ttl: Span) -> bool {
    every < renewal(ttl)
}

/// The pace of a lease that shall run out: longer than any lease is.
pub(super) const NOT_RENEWED: Span = Span::from_secs(86_400);
