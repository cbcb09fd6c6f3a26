//! Who must say yes so that a primary may lead on without etcd, and so that a candidate may be elected: two groups that always
//! have a member in common, who says yes to one of them only.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

/// The members in the `failsafe` key, each with where its bot answers. Only these are counted.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[serde(transparent)]
pub(super) struct Roll(pub(super) BTreeMap<String, String>);

impl Roll {
    /// Reads the key's value, which is Patroni's: `{"name": "http://host:8008/patroni"}`.
    pub(super) fn from_json(text: &str) -> Option<Self> {
        let roll: BTreeMap<String, String> = serde_json::from_str(text).ok()?;
        // A roll of nobody would let nobody lead, ever.
        (!roll.is_empty()).then_some(Self(roll))
    }

    pub(super) fn to_json(&self) -> String {
        serde_json::to_string(&self.0).unwrap_or_default()
    }

    /// So many members must vouch for a primary, itself included: a majority.
    pub(super) fn to_lead(&self) -> usize {
        self.0.len() / 2 + 1
    }

    /// So many must support a candidate, itself included: the fewest that leave no majority without one of them.
    pub(super) fn to_elect(&self) -> usize {
        self.0.len() + 1 - self.to_lead()
    }

    /// Whether these members let a primary lead on.
    pub(super) fn lets_lead(&self, members: &BTreeSet<String>) -> bool {
        self.count(members) >= self.to_lead()
    }

    /// Whether these members let a candidate be elected.
    pub(super) fn lets_elect(&self, members: &BTreeSet<String>) -> bool {
        self.count(members) >= self.to_elect()
    }

    fn count(&self, members: &BTreeSet<String>) -> usize {
        members.iter().filter(|name| self.0.contains_key(*name)).count()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::Roll;

    fn roll(names: &[&str]) -> Roll {
        Roll(names.iter().map(|name| ((*name).to_owned(), format!("http://{name}:8008/patroni"))).collect())
    }

    #[test]
    fn the_two_groups_always_have_a_member_in_common() {
        let names = ["a", "b", "c", "d", "e", "f", "g"];
        for size in 1..=names.len() {
            let roll = roll(&names[..size]);
            let groups: Vec<BTreeSet<String>> = (0_u32..1 << size)
                .map(|bits| (0..size).filter(|at| bits >> at & 1 == 1).map(|at| names[at].to_owned()).collect())
                .collect();
            for lead in groups.iter().filter(|group| roll.lets_lead(group)) {
                assert!(groups.iter().filter(|g| roll.lets_elect(g)).all(|elect| !lead.is_disjoint(elect)), "{size}");
            }
        }
    }

    #[test]
    fn of_three_two_are_needed_either_way_and_of_two_a_candidate_needs_itself() {
        let needed = |names: &[&str]| (roll(names).to_lead(), roll(names).to_elect());
        assert_eq!([needed(&["a"]), needed(&["a", "b"]), needed(&["a", "b", "c"])], [(1, 1), (2, 1), (2, 2)]);
        assert_eq!([needed(&["a", "b", "c", "d"]), needed(&["a", "b", "c", "d", "e"])], [(3, 2), (3, 3)]);
    }

    #[test]
    fn the_value_is_patronis() {
        let read = Roll::from_json(r#"{"a": "http://a:8008/patroni"}"#).expect("a roll");
        assert_eq!((read.clone(), read.to_json().as_str()), (roll(&["a"]), r#"{"a":"http://a:8008/patroni"}"#));
        for nonsense in ["", "{}", "[]", r#"{"a": 1}"#] {
            assert_eq!(Roll::from_json(nonsense), None, "{nonsense}");
        }
    }
}
