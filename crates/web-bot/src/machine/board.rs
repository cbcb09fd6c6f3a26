//! The board of load messages: which places want a bot, and who has taken them. A reading of the view, no memory.

use std::collections::BTreeMap;

use bots_core::dcs::{LeaseId, Revision, Scope, View};

use super::settings::SLOTS_MAX;

/// One slot as the view shows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Place {
    /// When the load message was written; nothing if there is none.
    pub(super) message: Option<Revision>,
    /// Who has claimed it.
    pub(super) claim: Option<Claim>,
}

/// A claim as the view shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) name: String,
    pub(super) lease: Option<LeaseId>,
    pub(super) created: Revision,
}

/// All slots that have a message, a claim or both.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Board {
    places: BTreeMap<u32, Place>,
}

impl Board {
    pub(super) fn read(view: &View, scope: &Scope) -> Self {
        let mut places: BTreeMap<u32, Place> = BTreeMap::new();
        let prefix = scope.load_prefix();
        for kv in view.below(&prefix) {
            let Some(rest) = kv.key.strip_prefix(&prefix) else { continue };
            let (number, part) = rest.split_once('/').map_or((rest, None), |(n, p)| (n, Some(p)));
            let Some(slot) = number.parse().ok().filter(|s| *s < SLOTS_MAX) else { continue };
            match part {
                None => places.entry(slot).or_default().message = Some(kv.modified),
                Some("claim") => {
                    let claim = Claim { name: kv.value.clone(), lease: kv.lease, created: kv.created };
                    places.entry(slot).or_default().claim = Some(claim);
                }
                Some(_) => {}
            }
        }
        Self { places }
    }

    /// When the message of `slot` was written; nothing if there is none.
    pub(super) fn message(&self, slot: u32) -> Option<Revision> {
        self.places.get(&slot).and_then(|p| p.message)
    }

    /// Who has claimed `slot`.
    pub(super) fn claim(&self, slot: u32) -> Option<&Claim> {
        self.places.get(&slot).and_then(|p| p.claim.as_ref())
    }

    /// The slots that want a bot, lowest first.
    pub(super) fn unclaimed(&self) -> impl Iterator<Item = (u32, Revision)> {
        self.places.iter().filter(|(_, p)| p.claim.is_none()).filter_map(|(slot, p)| Some((*slot, p.message?)))
    }

    /// Whether nobody has taken a place.
    pub(super) fn is_unclaimed_but_by(&self, name: &str) -> bool {
        self.places.values().filter_map(|p| p.claim.as_ref()).all(|claim| claim.name == name)
    }

    /// The slots that have a message, lowest first.
    pub(super) fn posted(&self) -> impl DoubleEndedIterator<Item = u32> {
        self.places.iter().filter(|(_, p)| p.message.is_some()).map(|(slot, _)| *slot)
    }

    /// The slots whose message is gone while the claimant still drains.
    pub(super) fn leaving(&self) -> impl Iterator<Item = u32> {
        self.places.iter().filter(|(_, p)| p.message.is_none() && p.claim.is_some()).map(|(slot, _)| *slot)
    }

    /// The slots claimed under `lease`.
    pub(super) fn claimed_under(&self, lease: LeaseId) -> impl Iterator<Item = (u32, Revision)> {
        let ours = move |p: &Place| p.claim.as_ref().filter(|c| c.lease == Some(lease)).map(|c| c.created);
        self.places.iter().filter_map(move |(slot, p)| Some((*slot, ours(p)?)))
    }
}
