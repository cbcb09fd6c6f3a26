//! How the web bots follow a publication: how long after the live commit has changed the first and the last of those that serve
//! had it, as their member keys say. It is measured, and decides nothing.

use bots_core::{
    dcs::Revision,
    machine::{Span, Time},
};
use serde::Serialize;

use super::publication::Web;

/// One publication that has reached every serving bot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Flipped {
    /// The change of the live key that it was.
    pub revision: Revision,
    /// From then until the last one served it.
    pub whole: Span,
    /// Between the first and the last.
    pub skew: Span,
}

/// The publication that is being followed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Flip {
    /// The change of the live key, and when etcd had said that it was made; nothing once it has reached everybody.
    began: Option<(Revision, Time)>,
    /// When the first bot was seen to serve it.
    first: Option<Time>,
    last: Option<Flipped>,
}

impl Flip {
    /// This leader has published.
    pub(super) const fn begin(&mut self, now: Time, revision: Revision) {
        (self.began, self.first) = (Some((revision, now)), None);
    }

    /// Takes note of what stands in etcd. One that is overtaken by the next is not measured, nor is one that nobody serves.
    pub(super) fn observe(&mut self, now: Time, live: Option<(Revision, &str)>, webs: impl FnOnce() -> Vec<Web>) {
        let Some((revision, began)) = self.began else { return };
        let Some((_, sha)) = live.filter(|(shown, _)| *shown == revision) else { return };
        let (there, behind): (Vec<_>, Vec<_>) = webs()
            .into_iter()
            .filter(|web| web.holds_slot() && web.serves())
            .partition(|web| web.facts.serving.as_deref() == Some(sha));
        if there.is_empty() {
            return;
        }
        let first = *self.first.get_or_insert(now);
        if behind.is_empty() {
            self.last = Some(Flipped { revision, whole: now.since(began), skew: now.since(first) });
            self.began = None;
        }
    }

    /// The last one that has reached everybody.
    pub(super) const fn last(&self) -> Option<Flipped> {
        self.last
    }
}

#[cfg(test)]
mod tests {
    use bots_core::{
        dcs::Revision,
        machine::{Span, Time},
        wire::WebFacts,
    };

    use super::{super::publication::Web, Flip, Flipped};

    fn webs(serving: &[&str]) -> Vec<Web> {
        let web = |(at, sha): (usize, &&str)| Web {
            scope: String::from("web"),
            name: format!("w{at}"),
            facts: WebFacts { serving: Some((*sha).to_owned()), slot: Some(0), ..WebFacts::default() },
        };
        serving.iter().enumerate().map(web).collect()
    }

    #[test]
    fn the_first_and_the_last_bot_are_measured() {
        let mut flip = Flip::default();
        let at = |flip: &mut Flip, ms, revision, sha, serving: &[&str]| {
            flip.observe(Time::from_millis(ms), Some((Revision(revision), sha)), || webs(serving));
            flip.last()
        };
        assert_eq!(at(&mut flip, 1_000, 5, "a", &["a", "a"]), None, "it was so before");
        flip.begin(Time::from_millis(2_000), Revision(6));
        assert_eq!(at(&mut flip, 2_001, 5, "a", &["a", "a"]), None, "the watch does not show it yet");
        assert_eq!(at(&mut flip, 2_005, 6, "b", &["a", "a"]), None);
        assert_eq!(at(&mut flip, 2_010, 6, "b", &["a", "b"]), None);
        let whole = Flipped { revision: Revision(6), whole: Span::from_millis(25), skew: Span::from_millis(15) };
        assert_eq!(at(&mut flip, 2_025, 6, "b", &["b", "b"]), Some(whole));
        assert_eq!(
            at(&mut flip, 3_000, 6, "b", &["b", "a"]),
            Some(whole),
            "another one that comes later is none of it"
        );
        flip.begin(Time::from_millis(4_000), Revision(7));
        assert_eq!(at(&mut flip, 4_010, 7, "c", &[]), Some(whole), "nobody serves: nothing is measured");
        flip.begin(Time::from_millis(5_000), Revision(8));
        let whole = Flipped { revision: Revision(8), whole: Span::from_millis(7), skew: Span::ZERO };
        assert_eq!(at(&mut flip, 5_007, 8, "d", &["d"]), Some(whole));
    }
}
