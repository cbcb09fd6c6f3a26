//! Who may announce a push now: so many at once, so many a second, and a delivery that comes again takes no place of others.
//! Not the decision whether it is news: that is the machine's, which remembers deliveries in etcd. The time is an argument.

use std::collections::{BTreeSet, VecDeque};

use bots_core::machine::{Span, Time};

use super::bucket::Bucket;

/// Announcements that may come at once: a monorepo's hooks fire in bursts.
const BURST: u64 = 20;

/// Announcements after that: two a second. A look that was asked for is not lost, only the asking is refused.
const EVERY: Span = Span::from_millis(500);

/// How many deliveries are remembered: no more are let in within the hour in which the machine knows them again.
const REMEMBERED_MAX: usize = 8_192;

/// What becomes of an announcement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    /// It is handed on.
    Free,
    /// It has come before, and so often that it is not even handed on.
    Known,
    /// Too many have come.
    Full,
}

/// The turnstile.
#[derive(Debug)]
pub(super) struct Turnstile {
    news: Bucket,
    /// Those that came before: handed on too, for after an hour they are news again.
    repeats: Bucket,
    known: BTreeSet<String>,
    /// The same, oldest first.
    order: VecDeque<String>,
}

impl Turnstile {
    /// Nobody has come.
    pub(super) const fn new() -> Self {
        let (news, repeats) = (Bucket::new(BURST, EVERY), Bucket::new(BURST, EVERY));
        Self { news, repeats, known: BTreeSet::new(), order: VecDeque::new() }
    }

    /// Lets an announcement in, or not. `delivery` tells it from any other.
    pub(super) fn enter(&mut self, now: Time, delivery: Option<&str>) -> Entry {
        if delivery.is_some_and(|id| self.known.contains(id)) {
            return if self.repeats.take(now) { Entry::Free } else { Entry::Known };
        }
        if !self.news.take(now) {
            // Not remembered: its sender may try again.
            return Entry::Full;
        }
        if let Some(id) = delivery {
            self.known.insert(id.to_owned());
            self.order.push_back(id.to_owned());
            if self.order.len() > REMEMBERED_MAX
                && let Some(oldest) = self.order.pop_front()
            {
                self.known.remove(&oldest);
            }
        }
        Entry::Free
    }
}

#[cfg(test)]
mod tests {
    use bots_core::machine::Time;

    use super::{Entry, REMEMBERED_MAX, Turnstile};

    #[test]
    fn a_delivery_that_is_played_back_takes_nobodys_place() {
        let (mut gate, mut now) = (Turnstile::new(), 10_000);
        assert_eq!(gate.enter(Time::from_millis(now), Some("recorded")), Entry::Free);
        for round in 0..200 {
            now += 300;
            let again = gate.enter(Time::from_millis(now), Some("recorded"));
            assert_ne!(again, Entry::Full, "its sender has what it asked for");
            if round % 4 == 0 {
                assert_eq!(gate.enter(Time::from_millis(now), Some(&format!("push {round}"))), Entry::Free);
            }
        }
        assert_eq!(gate.enter(Time::from_millis(now), Some("recorded")), Entry::Known);
    }

    #[test]
    fn news_are_limited_and_what_was_refused_is_still_news() {
        let (mut gate, now) = (Turnstile::new(), Time::from_millis(10_000));
        let all: Vec<Entry> = (0..25).map(|n| gate.enter(now, Some(&n.to_string()))).collect();
        assert_eq!(all.iter().filter(|entry| **entry == Entry::Free).count(), 20);
        let later = Time::from_millis(20_000);
        assert_eq!(gate.enter(later, Some("24")), Entry::Free);
        assert_eq!(gate.enter(later, None), Entry::Free);
    }

    #[test]
    fn its_memory_is_bounded() {
        let mut gate = Turnstile::new();
        for n in 0..REMEMBERED_MAX + 10 {
            let now = Time::from_millis(u64::try_from(n).expect("small") * 1_000 + 1_000);
            assert_eq!(gate.enter(now, Some(&n.to_string())), Entry::Free);
        }
        assert_eq!((gate.known.len(), gate.order.len()), (REMEMBERED_MAX, REMEMBERED_MAX));
    }
}
