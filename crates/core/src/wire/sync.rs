//! The `sync` key of a Postgres scope, in Patroni's shape: who may lead because he holds every acknowledged commit.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// The `sync` key: `{"leader":"a","sync_standby":"b,c","quorum":1}`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SyncRecord {
    /// Who led when it was written: it has acknowledged every commit, and has it.
    #[serde(default)]
    pub leader: Option<String>,
    /// The other members that may lead, by name, with commas between.
    #[serde(default)]
    pub sync_standby: Option<String>,
    /// So many others of them must say that the candidate is not behind; zero if each of them has everything.
    #[serde(default)]
    pub quorum: usize,
}

impl SyncRecord {
    /// The value for a leader and its voters.
    #[must_use]
    pub fn new(leader: &str, voters: &BTreeSet<String>, quorum: usize) -> Self {
        let names: Vec<&str> = voters.iter().map(String::as_str).collect();
        let sync_standby = (!names.is_empty()).then(|| names.join(","));
        Self { leader: Some(leader.to_owned()), sync_standby, quorum }
    }

    /// The voters.
    #[must_use]
    pub fn voters(&self) -> BTreeSet<String> {
        let names = self.sync_standby.as_deref().unwrap_or_default();
        names.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect()
    }

    /// Whether anybody has written it: one without a leader binds nobody.
    #[must_use]
    pub const fn binds(&self) -> bool {
        self.leader.is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::SyncRecord;

    #[test]
    fn patronis_values_are_read_and_written() {
        let read: SyncRecord =
            serde_json::from_str(r#"{"leader":"a","sync_standby":"c,b","quorum":1}"#).expect("a record");
        assert_eq!(read.voters(), BTreeSet::from([String::from("b"), String::from("c")]));
        let none: SyncRecord = serde_json::from_str(r#"{"leader":null,"sync_standby":null}"#).expect("a record");
        assert!(!none.binds() && none.voters().is_empty());
        let written = serde_json::to_string(&SyncRecord::new("a", &read.voters(), 1)).expect("JSON");
        assert_eq!(written, r#"{"leader":"a","sync_standby":"b,c","quorum":1}"#);
        let alone = serde_json::to_string(&SyncRecord::new("a", &BTreeSet::new(), 0)).expect("JSON");
        assert_eq!(alone, r#"{"leader":"a","sync_standby":null,"quorum":0}"#);
    }
}
