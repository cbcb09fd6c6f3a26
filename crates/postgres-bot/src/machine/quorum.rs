//! The argument that no acknowledged commit is lost, as arithmetic on sets, and the order of changes that keeps it true.
//!
//! Two things say where a commit is. Postgres acknowledges it once `needed` of the standbys `of` have flushed it ([`Acks`]).
//! The `sync` key lets a voter lead if so many voters, itself included, say that they are not ahead of it ([`Voters`]). The
//! two are safe together if whoever wins such a vote has asked a holder of every commit. Each changes alone, and an answer
//! about either can be lost: so every single change must be safe with all that may be in force on the other side.

use std::collections::{BTreeMap, BTreeSet};

use bots_core::wire::Lsn;
use serde::{Deserialize, Serialize};

/// Who may lead after the key's leader, and whom he must ask.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Voters {
    /// The members that may lead.
    pub members: BTreeSet<String>,
    /// So many of them, besides the one that leads, must say that they are not ahead.
    pub quorum: usize,
}

/// Which standbys a commit waits for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acks {
    /// So many must have flushed it. None: it is acknowledged by the primary alone. More than there are: never.
    pub needed: usize,
    /// Any of these.
    pub of: BTreeSet<String>,
}

/// Nothing is acknowledged until something else is known to be right.
impl Default for Acks {
    fn default() -> Self {
        Self { needed: 1, of: BTreeSet::new() }
    }
}

impl Acks {
    /// The primary acknowledges by itself.
    #[must_use]
    pub const fn alone() -> Self {
        Self { needed: 0, of: BTreeSet::new() }
    }

    /// Whether nothing can be acknowledged.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.needed > self.of.len()
    }
}

impl Voters {
    /// Nobody but the key's leader may lead.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.quorum >= self.members.len()
    }

    /// The weakest waiting that is safe with these voters; nothing is waited for if there are none.
    #[must_use]
    pub fn acks(&self) -> Acks {
        if self.members.is_empty() {
            return Acks::alone();
        }
        Acks { needed: self.members.len().saturating_sub(self.quorum).max(1), of: self.members.clone() }
    }
}

/// Whether any `quorum + 1` of the voters have among them one of any `needed` of the standbys that a commit waited for.
#[must_use]
pub(super) fn is_safe(voters: &Voters, acks: &Acks) -> bool {
    if voters.is_closed() {
        return true;
    }
    let strangers = voters.members.difference(&acks.of).count();
    let asked_at_least = (voters.quorum + 1).saturating_sub(strangers);
    acks.needed + asked_at_least > acks.of.len()
}

/// What was in force before, and up to where commits were acknowledged under it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Past {
    /// What was in force; nothing if nobody knows.
    pub(super) acks: Option<Acks>,
    /// No later commit was acknowledged under it; nothing while it may still be in force.
    pub(super) until: Option<Lsn>,
}

/// All that the next change must be safe with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known<'a> {
    /// The keys that may be in force, the newest last; at least one.
    pub(super) keys: &'a [Voters],
    /// What Postgres was told last.
    pub(super) acks: &'a Acks,
    /// What it was told before, the newest last.
    pub(super) past: &'a [Past],
    /// How far each standby has flushed, as the primary sees it now.
    pub(super) flushed: &'a BTreeMap<String, Lsn>,
}

/// The next change on the way to what is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    /// All is as wanted.
    None,
    /// Nothing can be changed safely before more is known.
    Wait,
    /// The key.
    Key(Voters),
    /// What Postgres waits for.
    Acks(Acks),
}

impl Known<'_> {
    /// Whether a key loses nothing that was acknowledged, or may yet be.
    #[must_use]
    pub(super) fn allows_key(&self, key: &Voters) -> bool {
        if key.is_closed() {
            return true;
        }
        if !is_safe(key, self.acks) {
            return false;
        }
        for era in self.past.iter().rev() {
            if era.until.is_some_and(|until| self.asks_somebody_past(key, until)) {
                // Whoever has all of this era has all of those before it.
                return true;
            }
            if !era.acks.as_ref().is_some_and(|acks| is_safe(key, acks)) {
                return false;
            }
        }
        true
    }

    /// Whether whoever wins the vote has asked somebody who has everything up to `until`.
    fn asks_somebody_past(&self, key: &Voters, until: Lsn) -> bool {
        let behind = |name: &&String| self.flushed.get(*name).is_none_or(|flushed| *flushed < until);
        key.members.iter().filter(behind).count() <= key.quorum
    }

    /// Whether Postgres may be told so.
    #[must_use]
    pub(super) fn allows_acks(&self, acks: &Acks) -> bool {
        self.keys.iter().all(|key| is_safe(key, acks))
    }

    /// Whether those who shall lead have all that there is to wait for.
    fn has_caught_up(&self, key: &Voters) -> bool {
        let until = self.past.iter().try_fold(Lsn(0), |most, era| Some(most.max(era.until?)));
        let has_all = |name: &String, until: Lsn| self.flushed.get(name).is_some_and(|flushed| *flushed >= until);
        until.is_some_and(|until| key.members.iter().all(|name| has_all(name, until)))
    }

    /// The next single step to `key` and `acks`, which must be safe together.
    #[must_use]
    pub(super) fn towards(&self, key: &Voters, acks: &Acks) -> Change {
        debug_assert!(is_safe(key, acks), "{key:?} and {acks:?} are not safe together");
        let key_is_there = self.keys.iter().all(|known| known == key);
        if key_is_there && self.acks == acks {
            return Change::None;
        }
        if !key_is_there && self.allows_key(key) {
            return Change::Key(key.clone());
        }
        if self.acks != acks && self.allows_acks(acks) {
            return Change::Acks(acks.clone());
        }
        // A key between the two: it asks more, for as long as both ways of acknowledging may be met.
        let (Some(now), true) = (self.keys.last(), self.acks != acks) else { return Change::Wait };
        let both = |other: &Voters| now.members.union(&other.members).cloned().collect::<BTreeSet<_>>();
        let bridges = [now.members.clone(), both(key), key.members.clone()].into_iter().flat_map(|members| {
            let quorums = 0..members.len();
            quorums.map(move |quorum| Voters { members: members.clone(), quorum })
        });
        let mut fit = bridges.filter(|bridge| self.allows_key(bridge) && is_safe(bridge, acks));
        let Some(bridge) = fit.next().or_else(|| self.has_caught_up(key).then(Voters::default)) else {
            return Change::Wait;
        };
        if self.keys.iter().all(|known| *known == bridge) { Change::Wait } else { Change::Key(bridge) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use bots_core::wire::Lsn;

    use super::{Acks, Change, Known, Past, Voters, is_safe};

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn voters(names: &[&str], quorum: usize) -> Voters {
        Voters { members: set(names), quorum }
    }

    fn acks(needed: usize, names: &[&str]) -> Acks {
        Acks { needed, of: set(names) }
    }

    fn subsets(of: &[&'static str]) -> Vec<Vec<&'static str>> {
        let picks = 0_u32..1 << of.len();
        picks
            .map(|bits| of.iter().enumerate().filter(|(n, _)| bits >> n & 1 == 1).map(|(_, name)| *name).collect())
            .collect()
    }

    /// As the sentence says it: every set that may win a vote meets every set that may acknowledge.
    fn meets(voters: &Voters, acks: &Acks) -> bool {
        let names = ["a", "b", "c", "d"];
        let sets = subsets(&names);
        let wins =
            |set: &&Vec<&str>| set.len() == voters.quorum + 1 && set.iter().all(|name| voters.members.contains(*name));
        let holds = |set: &&Vec<&str>| set.len() == acks.needed && set.iter().all(|name| acks.of.contains(*name));
        sets.iter()
            .filter(wins)
            .all(|won| sets.iter().filter(holds).all(|held| won.iter().any(|name| held.contains(name))))
    }

    fn worlds() -> (Vec<Voters>, Vec<Acks>) {
        let names = subsets(&["a", "b", "c", "d"]);
        let with = |most: usize| names.iter().flat_map(move |set| (0..=most).map(move |n| (set, n)));
        let keys = with(4).map(|(set, quorum)| voters(set, quorum)).collect();
        (keys, with(5).map(|(set, needed)| acks(needed, set)).collect())
    }

    #[test]
    fn the_arithmetic_is_the_sentence() {
        let (keys, ways) = worlds();
        for key in &keys {
            for way in &ways {
                assert_eq!(is_safe(key, way), meets(key, way), "{key:?} {way:?}");
            }
            assert!(is_safe(key, &key.acks()), "{key:?}");
        }
    }

    /// From everything safe to everything wanted: each step is safe with both sides, and the way has an end.
    #[test]
    fn every_way_is_safe_and_ends() {
        let (keys, ways) = worlds();
        let flushed: BTreeMap<String, Lsn> = ["a", "b", "c", "d"].map(|name| (name.to_owned(), Lsn(9))).into();
        let wanted: Vec<(Voters, Acks)> = (0..4)
            .flat_map(|many| subsets(&["a", "b", "c"]).into_iter().map(move |set| (many, set)))
            .filter(|(quorum, set)| *quorum < set.len() || set.is_empty() && *quorum == 0)
            .map(|(quorum, set)| (voters(&set, quorum), voters(&set, quorum).acks()))
            .collect();
        for key in keys.iter().filter(|key| key.members.len() < 4 && key.quorum < 4) {
            for way in ways.iter().filter(|way| way.of.len() < 4 && way.needed < 4 && is_safe(key, way)) {
                for (to, by) in &wanted {
                    walk(key, way, to, by, &flushed);
                }
            }
        }
    }

    fn walk(key: &Voters, way: &Acks, to: &Voters, by: &Acks, flushed: &BTreeMap<String, Lsn>) {
        let (mut key, mut way, mut past) = (key.clone(), way.clone(), Vec::new());
        for _ in 0..6 {
            let keys = [key.clone()];
            match (Known { keys: &keys, acks: &way, past: &past, flushed }).towards(to, by) {
                Change::None => {
                    assert_eq!((&key, &way), (to, by));
                    return;
                }
                Change::Wait => panic!("{key:?} {way:?} stays on its way to {to:?}"),
                Change::Key(next) => {
                    assert!(is_safe(&next, &way), "{next:?} beside {way:?}");
                    key = next;
                }
                Change::Acks(next) => {
                    assert!(is_safe(&key, &next) && is_safe(&key, &way), "{key:?} beside {next:?}");
                    past.push(Past { acks: Some(std::mem::replace(&mut way, next)), until: Some(Lsn(5)) });
                }
            }
        }
        panic!("no end on the way to {to:?} {by:?}");
    }

    fn next(key: &Voters, now: &Acks, past: &[Past], flushed: &[(&str, u64)], to: &Voters) -> Change {
        let flushed = flushed.iter().map(|(name, at)| ((*name).to_owned(), Lsn(*at))).collect();
        let keys = [key.clone()];
        Known { keys: &keys, acks: now, past, flushed: &flushed }.towards(to, &to.acks())
    }

    #[test]
    fn who_is_added_counts_once_it_has_caught_up() {
        let (one, two) = (voters(&["a"], 0), voters(&["a", "b"], 0));
        assert_eq!(next(&one, &one.acks(), &[], &[], &two), Change::Acks(two.acks()), "Postgres first");
        let unseen = [Past { acks: Some(one.acks()), until: None }];
        assert_eq!(next(&one, &two.acks(), &unseen, &[("a", 9), ("b", 9)], &two), Change::Wait, "not in force yet");
        let seen = [Past { acks: Some(one.acks()), until: Some(Lsn(7)) }];
        assert_eq!(next(&one, &two.acks(), &seen, &[("a", 9), ("b", 6)], &two), Change::Wait, "behind");
        assert_eq!(next(&one, &two.acks(), &seen, &[("a", 9), ("b", 7)], &two), Change::Key(two), "caught up");
    }

    #[test]
    fn who_is_removed_leaves_the_key_first() {
        let (one, two) = (voters(&["a"], 0), voters(&["a", "b"], 0));
        assert_eq!(next(&two, &two.acks(), &[], &[], &one), Change::Key(one.clone()));
        assert_eq!(next(&one, &two.acks(), &[], &[], &one), Change::Acks(one.acks()));
        let none = Voters::default();
        assert_eq!(next(&one, &one.acks(), &[], &[], &none), Change::Key(none.clone()));
        assert_eq!(next(&none, &one.acks(), &[], &[], &none), Change::Acks(Acks::alone()));
    }

    #[test]
    fn a_dead_one_is_replaced_without_a_moment_of_waiting_for_it() {
        let (dead, live) = (voters(&["a"], 0), voters(&["b"], 0));
        let bridge = voters(&["a", "b"], 1);
        assert_eq!(next(&dead, &dead.acks(), &[], &[("b", 9)], &live), Change::Key(bridge.clone()));
        assert_eq!(next(&bridge, &dead.acks(), &[], &[("b", 9)], &live), Change::Acks(live.acks()));
        let seen = [Past { acks: Some(dead.acks()), until: Some(Lsn(7)) }];
        assert_eq!(next(&bridge, &live.acks(), &seen, &[("b", 9)], &live), Change::Key(live));
    }

    #[test]
    fn both_sides_of_a_lost_answer_are_heeded() {
        let (one, two) = (voters(&["a"], 0), voters(&["a", "b"], 1));
        let keys = [one.clone(), two.clone()];
        let known = |acks| Known { keys: &keys, acks, past: &[], flushed: &BTreeMap::new() }.towards(&two, &two.acks());
        // With the first of them in force, a commit that only `b` has would be lost.
        assert_eq!(known(&one.acks()), Change::Key(two.clone()));
    }

    #[test]
    fn what_nobody_knows_of_the_past_is_caught_up_with() {
        let (one, two) = (voters(&["a"], 0), voters(&["a", "b"], 1));
        let past = [Past { acks: None, until: Some(Lsn(5)) }];
        assert_eq!(next(&one, &one.acks(), &past, &[("a", 4), ("b", 4)], &two), Change::Wait);
        assert_eq!(next(&one, &one.acks(), &past, &[("a", 5), ("b", 4)], &two), Change::Key(two));
    }
}
