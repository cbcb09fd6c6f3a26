//! Announcements of pushes: kept until they stand in etcd, where the leader sees them and every bot knows them again.
//!
//! The key says "look", never "publish this", so that a forged or replayed announcement costs one look and no more. What
//! was announced is told from what a look found by itself: those are the announcements that got lost.

use std::collections::BTreeMap;

use bots_core::{
    dcs::{Compare, DcsAction, Outcome, RequestId, Transaction, View, Write},
    machine::{Span, Time},
    membership::{Membership, RETRY_AFTER},
    wire::PushHint,
};
use serde::{Deserialize, Serialize};

/// How many deliveries are remembered: at the rate that is let in, several minutes of nothing but pushes.
pub const DELIVERIES_MAX: usize = 256;

/// How long a delivery is remembered. A signed time may be five minutes off to either side, so twice that is the least; an
/// operator who delivers again by hand after an hour means it.
pub const REPLAY_WINDOW: Span = Span::from_secs(3_600);

/// How many announcements wait for etcd at once; what is more is merged, and one look answers all.
const WAITING_MAX: usize = 32;

/// What is known of a push that was announced.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Announcement {
    /// What tells this delivery from any other; nothing if the sender cannot be recorded and played back.
    pub delivery: Option<String>,
    /// The commit that the branch points at since.
    pub tip: Option<String>,
}

/// The announcements that do not stand in etcd yet.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Push {
    waiting: Vec<Announcement>,
    request: Option<(RequestId, Vec<Announcement>)>,
    retry_at: Option<Time>,
    replayed: u64,
}

impl Push {
    /// Takes in an announcement; says whether it is news.
    pub(super) fn received(&mut self, announcement: Announcement, hint: Option<&PushHint>) -> bool {
        let under_way = self.request.iter().flat_map(|(_, written)| written);
        let known = match &announcement.delivery {
            Some(id) => {
                hint.is_some_and(|h| h.deliveries.contains_key(id))
                    || under_way.chain(&self.waiting).any(|a| a.delivery.as_ref() == Some(id))
            }
            None => false,
        };
        if known {
            self.replayed = self.replayed.saturating_add(1);
            return false;
        }
        if self.waiting.len() >= WAITING_MAX {
            self.waiting.remove(0);
        }
        self.waiting.push(announcement);
        true
    }

    /// The leader looks by itself: what has no number to be known again by need not stand in etcd.
    pub(super) fn look_answers(&mut self) {
        self.waiting.retain(|a| a.delivery.is_some());
    }

    /// Writes what waits, on the condition that nobody has written since: no delivery is forgotten.
    pub(super) fn forward(
        &mut self,
        now: Time,
        now_unix_ms: u64,
        membership: &mut Membership,
        view: &View,
        out: &mut Vec<DcsAction>,
    ) {
        if self.waiting.is_empty() || self.request.is_some() || self.retry_at.is_some_and(|at| at > now) {
            return;
        }
        let key = membership.scope().push();
        let compare = match view.get(&key) {
            Some(kv) => Compare::ModifiedAt(key.clone(), kv.modified),
            None => Compare::Absent(key.clone()),
        };
        let waiting = std::mem::take(&mut self.waiting);
        let known = view.json::<PushHint>(&key).map(|hint| hint.deliveries).unwrap_or_default();
        let hint = PushHint {
            by: membership.name().to_owned(),
            at_unix_ms: now_unix_ms,
            tip: waiting.last().and_then(|a| a.tip.clone()),
            deliveries: remembered(known, &waiting, now_unix_ms),
        };
        let put = Write::put(key, serde_json::to_string(&hint).unwrap_or_default());
        let id = membership.next_request();
        out.push(DcsAction::Transact { id, transaction: Transaction::new(vec![compare], vec![put]) });
        self.request = Some((id, waiting));
        self.retry_at = None;
    }

    pub(super) fn answered(&mut self, now: Time, id: RequestId, outcome: &Outcome) {
        let Some((_, written)) = self.request.take_if(|(request, _)| *request == id) else { return };
        match outcome {
            Outcome::Done(_) => {}
            // Once too often is harmless, once too seldom is not.
            Outcome::Refused { .. } | Outcome::Unknown(_) => {
                self.waiting.splice(0..0, written);
                self.retry_at = Some(now + RETRY_AFTER);
            }
        }
    }

    pub(super) fn is_pending(&self) -> bool {
        !self.waiting.is_empty() || self.request.is_some()
    }

    pub(super) const fn retry_at(&self) -> Option<Time> {
        self.retry_at
    }

    /// How many announcements were played back.
    pub(super) const fn replayed(&self) -> u64 {
        self.replayed
    }
}

/// The deliveries to remember: the young ones, the newest of them if they are many.
fn remembered(known: BTreeMap<String, u64>, new: &[Announcement], now_unix_ms: u64) -> BTreeMap<String, u64> {
    let young = |at: &u64| now_unix_ms.saturating_sub(*at) < REPLAY_WINDOW.as_millis();
    let mut by_age: Vec<(u64, String)> =
        known.into_iter().filter(|(_, at)| young(at)).map(|(id, at)| (at, id)).collect();
    by_age.extend(new.iter().filter_map(|a| a.delivery.clone()).map(|id| (now_unix_ms, id)));
    by_age.sort();
    let surplus = by_age.len().saturating_sub(DELIVERIES_MAX);
    by_age.into_iter().skip(surplus).map(|(at, id)| (id, at)).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{Announcement, DELIVERIES_MAX, REPLAY_WINDOW, remembered};

    #[test]
    fn deliveries_are_remembered_within_bounds() {
        let now = 10 * REPLAY_WINDOW.as_millis();
        let known: BTreeMap<String, u64> = (0..400_u64).map(|n| (format!("{n:04}"), now - n)).collect();
        let new = [Announcement { delivery: Some(String::from("new")), tip: None }, Announcement::default()];
        let kept = remembered(known, &new, now);
        assert_eq!(kept.len(), DELIVERIES_MAX);
        assert!(kept.contains_key("new") && kept.contains_key("0000") && !kept.contains_key("0399"));
        let later = remembered(kept, &[], now + REPLAY_WINDOW.as_millis());
        assert!(later.is_empty(), "{later:?}");
    }
}
