//! The view: what a bot knows of the store, kept by list and watch events. It may be old; it never runs backwards.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Change, DcsEvent, KeyValue, Revision};

/// What is known of the watched prefixes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct View {
    entries: BTreeMap<String, KeyValue>,
    prefixes: BTreeMap<String, PrefixView>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
struct PrefixView {
    /// The newest revision that was seen under this prefix.
    revision: Revision,
    /// The last event was not a broken watch.
    watched: bool,
}

impl View {
    /// A view that waits for the first list of each of `prefixes`.
    #[must_use]
    pub fn of(prefixes: impl IntoIterator<Item = String>) -> Self {
        Self { entries: BTreeMap::new(), prefixes: prefixes.into_iter().map(|p| (p, PrefixView::default())).collect() }
    }

    /// The prefixes to watch.
    pub fn prefixes(&self) -> impl Iterator<Item = &str> {
        self.prefixes.keys().map(String::as_str)
    }

    /// Takes in an event; says whether anything known has changed. A list or change older than what is known is left
    /// out: a member of the store that lags must not make us forget.
    pub fn apply(&mut self, event: &DcsEvent) -> bool {
        match event {
            DcsEvent::Listed { prefix, revision, entries } => self.listed(prefix, *revision, entries),
            DcsEvent::Changed { prefix, revision, changes } => self.changed(prefix, *revision, changes),
            DcsEvent::WatchLost { prefix, why: _ } => {
                self.prefixes.get_mut(prefix).is_some_and(|p| std::mem::replace(&mut p.watched, false))
            }
            DcsEvent::LeaseGranted { .. }
            | DcsEvent::LeaseRenewed { .. }
            | DcsEvent::LeaseLost { .. }
            | DcsEvent::Answered { .. } => false,
        }
    }

    fn listed(&mut self, prefix: &str, revision: Revision, entries: &[KeyValue]) -> bool {
        let Some(known) = self.prefixes.get_mut(prefix) else { return false };
        if revision < known.revision {
            return false;
        }
        let first = known.revision == Revision(0);
        let resumed = !std::mem::replace(&mut known.watched, true);
        known.revision = revision;
        let fresh: BTreeMap<String, KeyValue> = entries.iter().map(|kv| (kv.key.clone(), kv.clone())).collect();
        let before = self.entries.len();
        let mut changed = false;
        self.entries.retain(|k, _| !k.starts_with(prefix) || fresh.contains_key(k));
        changed |= self.entries.len() != before;
        for (k, kv) in fresh {
            changed |= self.entries.insert(k, kv.clone()).as_ref() != Some(&kv);
        }
        changed || resumed || first
    }

    fn changed(&mut self, prefix: &str, revision: Revision, changes: &[Change]) -> bool {
        let Some(known) = self.prefixes.get_mut(prefix) else { return false };
        let seen = known.revision;
        known.revision = seen.max(revision);
        let mut changed = false;
        for change in changes {
            match change {
                Change::Put(kv) if kv.modified > seen => {
                    self.entries.insert(kv.key.clone(), kv.clone());
                    changed = true;
                }
                Change::Deleted { key, revision } if *revision > seen => {
                    changed |= self.entries.remove(key).is_some();
                }
                Change::Put(_) | Change::Deleted { .. } => {}
            }
        }
        changed
    }

    /// Whether every watched prefix has been listed at least once.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.prefixes.values().all(|p| p.revision > Revision(0))
    }

    /// Whether every watched prefix has been listed and its watch is not known to be broken.
    #[must_use]
    pub fn is_watched(&self) -> bool {
        self.prefixes.values().all(|p| p.watched)
    }

    /// The newest revision seen under `prefix`.
    #[must_use]
    pub fn revision(&self, prefix: &str) -> Revision {
        self.prefixes.get(prefix).map_or(Revision(0), |p| p.revision)
    }

    /// What stands at `key`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&KeyValue> {
        self.entries.get(key)
    }

    /// The value at `key`.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&str> {
        self.entries.get(key).map(|kv| kv.value.as_str())
    }

    /// The value at `key` read as JSON; nothing if it is absent or of another shape.
    #[must_use]
    pub fn json<T: serde::de::DeserializeOwned>(&self, key: &str) -> Option<T> {
        self.value(key).and_then(|v| serde_json::from_str(v).ok())
    }

    /// All keys right below `prefix`, each with its last part: the members, the load messages.
    #[must_use]
    pub fn entries_below<'v>(&'v self, prefix: &str) -> Vec<(&'v str, &'v KeyValue)> {
        let range = self.entries.range(prefix.to_owned()..).take_while(|(k, _)| k.starts_with(prefix));
        let last_part = |k: &'v String| k.get(prefix.len()..).filter(|rest| !rest.contains('/'));
        range.filter_map(|(k, kv)| Some((last_part(k)?, kv))).collect()
    }

    /// All keys below `prefix`, in order.
    pub fn below<'v>(&'v self, prefix: &'v str) -> impl Iterator<Item = &'v KeyValue> {
        self.entries.range(prefix.to_owned()..).take_while(move |(k, _)| k.starts_with(prefix)).map(|(_, kv)| kv)
    }
}
