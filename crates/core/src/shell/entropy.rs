//! The only source of randomness in the workspace: the kernel's. Machines and the simulator never read it.

use rustix::rand::{GetRandomFlags, getrandom};

use crate::machine::Span;

/// What tells this process from any other of the same name: 16 hex digits.
#[must_use]
pub fn instance_id() -> String {
    format!("{:016x}", random_u64())
}

/// `span`, longer or shorter by up to `percent` of it, so that a fleet does not act in step.
#[must_use]
pub fn jitter(span: Span, percent: u8) -> Span {
    let reach = span.as_millis().saturating_mul(u64::from(percent)) / 100;
    if reach == 0 {
        return span;
    }
    let offset = random_u64() % (reach.saturating_mul(2).saturating_add(1));
    Span::from_millis((span.as_millis() - reach.min(span.as_millis())).saturating_add(offset))
}

/// A number below `n`; zero if `n` is zero.
#[must_use]
pub fn below(n: usize) -> usize {
    let n = u64::try_from(n).unwrap_or(u64::MAX);
    usize::try_from(random_u64().checked_rem(n).unwrap_or(0)).unwrap_or(0)
}

#[expect(clippy::disallowed_methods, reason = "this is the one source that the ban points to")]
fn random_u64() -> u64 {
    let mut bytes = [0_u8; 8];
    let filled = getrandom(&mut bytes, GetRandomFlags::empty());
    assert_eq!(filled, Ok(bytes.len()), "the kernel gives randomness once it is seeded, eight bytes at once");
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::{instance_id, jitter};
    use crate::machine::Span;

    #[test]
    fn instances_differ() {
        assert_ne!(instance_id(), instance_id());
        assert_eq!(instance_id().len(), 16);
    }

    #[test]
    fn jitter_stays_within_its_share() {
        for _ in 0..1_000 {
            let ms = jitter(Span::from_millis(1_000), 20).as_millis();
            assert!((800..=1_200).contains(&ms), "{ms}");
        }
        assert_eq!(jitter(Span::from_millis(3), 10), Span::from_millis(3));
    }
}
