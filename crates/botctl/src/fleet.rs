//! The fleet as the store shows it: one row a bot. Pure: entries in, rows out.

use std::collections::BTreeMap;

use bots_core::{
    dcs::{KeyValue, Scope},
    wire::{ContentFacts, ContentRevision, EdgeFacts, Kind, Member, PostgresFacts, PostgresStatus, WebFacts},
};
use serde::Serialize;

/// Every scope of a namespace.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fleet {
    pub(crate) scopes: BTreeMap<String, ScopeView>,
}

/// One scope's keys.
#[derive(Debug, Clone, Default)]
pub(crate) struct ScopeView {
    pub(crate) members: BTreeMap<String, Member>,
    /// All keys, by what follows the scope's prefix.
    pub(crate) keys: BTreeMap<String, KeyValue>,
}

/// One bot, as `list` prints it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Row {
    pub(crate) scope: String,
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) role: String,
    pub(crate) state: String,
    /// Whether it holds the scope's leader key.
    pub(crate) leader: bool,
    /// How long it has been in its present state; absent for members that do not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) for_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) timeline: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lag_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) load: Option<Load>,
    /// The commit that it serves or holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) revision: Option<String>,
    /// The commit that is prepared to follow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) preparing: Option<String>,
    pub(crate) pending_restart: bool,
    pub(crate) api_url: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) trouble: Option<String>,
}

/// How busy a bot is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Load {
    pub(crate) in_flight: f64,
    pub(crate) rps: u64,
    pub(crate) p99_ms: f64,
}

impl Fleet {
    /// Sorts the entries below a namespace into scopes. What does not look like a key of ours is left out.
    pub(crate) fn of<'e>(namespace: &str, entries: impl IntoIterator<Item = &'e KeyValue>) -> Self {
        let mut fleet = Self::default();
        let prefix = format!("/{}/", namespace.trim_matches('/'));
        for entry in entries {
            let Some((scope, rest)) = entry.key.strip_prefix(&prefix).and_then(|k| k.split_once('/')) else { continue };
            if Scope::new(namespace, scope).is_err() {
                continue;
            }
            let view = fleet.scopes.entry(scope.to_owned()).or_default();
            view.keys.insert(rest.to_owned(), entry.clone());
            if let (Some(name), Some(member)) = (rest.strip_prefix("members/"), Member::from_json(&entry.value)) {
                view.members.insert(name.to_owned(), member);
            }
        }
        fleet
    }

    /// The rows of all scopes, or of one.
    pub(crate) fn rows(&self, only: Option<&str>, now_unix_ms: u64) -> Vec<Row> {
        let wanted = self.scopes.iter().filter(|(name, _)| only.is_none_or(|o| o == name.as_str()));
        wanted.flat_map(|(name, view)| view.rows(name, now_unix_ms)).collect()
    }

    /// Finds bots by `name` or `scope/name`.
    pub(crate) fn find(&self, bot: &str) -> Vec<(&str, &str, &Member)> {
        let (scope, name) = bot.split_once('/').map_or((None, bot), |(s, n)| (Some(s), n));
        let wanted = self.scopes.iter().filter(|(s, _)| scope.is_none_or(|o| o == s.as_str()));
        wanted.filter_map(|(s, v)| v.members.get_key_value(name).map(|(n, m)| (s.as_str(), n.as_str(), m))).collect()
    }
}

impl ScopeView {
    /// The value of a key, by what follows the scope's prefix.
    pub(crate) fn value(&self, rest: &str) -> Option<&str> {
        self.keys.get(rest).map(|kv| kv.value.as_str())
    }

    /// The value of a key, read as JSON; nothing if it is absent or of another shape.
    pub(crate) fn json<T: serde::de::DeserializeOwned>(&self, rest: &str) -> Option<T> {
        self.value(rest).and_then(|v| serde_json::from_str(v).ok())
    }

    /// Who holds the lock.
    pub(crate) fn leader(&self) -> Option<&str> {
        self.value("leader").filter(|l| !l.is_empty())
    }

    fn rows(&self, scope: &str, now_unix_ms: u64) -> Vec<Row> {
        self.members.iter().map(|(name, member)| self.row(scope, name, member, now_unix_ms)).collect()
    }

    fn row(&self, scope: &str, name: &str, member: &Member, now_unix_ms: u64) -> Row {
        let head = &member.head;
        let since = Some(head.since_unix_ms).filter(|ms| *ms > 0);
        let mut row = Row {
            scope: scope.to_owned(),
            name: name.to_owned(),
            kind: head.kind,
            role: head.role.clone(),
            state: head.state.clone(),
            leader: self.leader() == Some(name),
            for_ms: since.map(|ms| now_unix_ms.saturating_sub(ms)),
            timeline: None,
            lag_bytes: None,
            load: None,
            revision: None,
            preparing: None,
            pending_restart: false,
            api_url: head.api_url.clone(),
            trouble: None,
        };
        match head.kind {
            Kind::Postgres => self.add_postgres(&mut row, member),
            Kind::Content => self.add_content(&mut row, member),
            Kind::Web => add_web(&mut row, member),
            Kind::Edge => row.trouble = member.facts::<EdgeFacts>().and_then(|facts| facts.trouble),
        }
        row
    }

    fn add_postgres(&self, row: &mut Row, member: &Member) {
        let Some(facts) = member.facts::<PostgresFacts>() else { return };
        row.timeline = facts.timeline.map(|t| t.0);
        row.pending_restart = facts.pending_restart;
        row.state = crate::member::progress(member);
        if row.leader {
            return;
        }
        if let Some(replication) = facts.replication_state {
            row.state = replication;
        }
        let leader = self.leader().and_then(|l| self.members.get(l)).and_then(Member::facts::<PostgresFacts>);
        let written = leader.and_then(|l| l.xlog_location).map(|lsn| lsn.0);
        let written = written.or_else(|| self.json::<PostgresStatus>("status").map(|s| s.optime.0));
        row.lag_bytes = written.zip(facts.xlog_location).map(|(written, own)| written.saturating_sub(own.0));
    }

    fn add_content(&self, row: &mut Row, member: &Member) {
        let Some(facts) = member.facts::<ContentFacts>() else { return };
        row.trouble = facts.trouble;
        row.revision = facts.holds;
        if row.leader {
            let live = self.json::<ContentRevision>("revision/live").map(|r| r.sha);
            let candidate = self.json::<ContentRevision>("revision/candidate").map(|r| r.sha);
            row.preparing = candidate.filter(|c| Some(c) != live.as_ref());
            row.revision = live.or_else(|| row.revision.take());
        }
    }
}

fn add_web(row: &mut Row, member: &Member) {
    let Some(facts) = member.facts::<WebFacts>() else { return };
    row.trouble = facts.trouble;
    // Milli-requests and microseconds are far below what a float holds exactly.
    #[expect(clippy::cast_precision_loss, reason = "figures for people, rounded when printed")]
    let load = facts.load.map(|l| Load {
        in_flight: l.in_flight_milli as f64 / 1_000.0,
        rps: l.rps,
        p99_ms: l.p99_us as f64 / 1_000.0,
    });
    row.load = load;
    row.preparing = facts.prepared.clone().filter(|p| facts.serving.as_ref().is_some_and(|s| s != p));
    row.revision = facts.serving.or(facts.prepared);
}

#[cfg(test)]
pub(crate) mod samples {
    //! A small fleet, as the keys would hold it.

    use bots_core::dcs::{KeyValue, Revision};

    /// The moment at which the samples are looked at.
    pub(crate) const NOW: u64 = 1_800_000_100_000;

    pub(crate) fn entry(key: &str, value: &str) -> KeyValue {
        let (created, modified) = (Revision(2), Revision(7));
        KeyValue { key: format!("/service/{key}"), value: value.to_owned(), created, modified, lease: None }
    }

    pub(crate) fn fleet() -> Vec<KeyValue> {
        vec![
            entry("main/leader", "pg-1"),
            entry("main/status", r#"{"optime":67110000}"#),
            entry(
                "main/history",
                r#"[[1,67110576,"no recovery target specified","2026-07-24T12:00:00+00:00","pg-1"]]"#,
            ),
            entry(
                "main/members/pg-1",
                r#"{"kind":"postgres","state":"running","role":"primary","version":"0.1.0","api_url":"http://127.0.0.1:8008/patroni","since_unix_ms":1800000000000,"conn_url":"postgres://127.0.0.1:5432/postgres","timeline":2,"xlog_location":67112624,"pending_restart":true}"#,
            ),
            entry(
                "main/members/pg-2",
                r#"{"kind":"postgres","state":"running","role":"replica","api_url":"http://127.0.0.1:8009/patroni","since_unix_ms":1800000039000,"timeline":2,"xlog_location":67110576,"replication_state":"streaming"}"#,
            ),
            entry(
                "main/members/pg-3",
                r#"{"conn_url":"postgres://127.0.0.1:5434/postgres","api_url":"http://127.0.0.1:8010/patroni","state":"creating replica","role":"replica","version":"4.1.4"}"#,
            ),
            entry(
                "main/members/pg-4",
                r#"{"kind":"postgres","state":"creating replica","role":"replica","api_url":"http://127.0.0.1:8011/patroni","since_unix_ms":1800000088000,"copying":{"bytes_done":1288490188,"bytes_total":4294967296,"percent":30}}"#,
            ),
            entry("site/leader", "content-1"),
            entry(
                "site/revision/live",
                r#"{"sha":"aaaaaaaabbbbbbbbccccccccddddddddeeeeeeee","generation":3,"ref":"main","origin":"file:///site.git","subject":"New header"}"#,
            ),
            entry(
                "site/revision/candidate",
                r#"{"sha":"1111111122222222333333334444444455555555","generation":4,"ref":"main","origin":"file:///site.git"}"#,
            ),
            entry(
                "site/members/content-1",
                r#"{"kind":"content","state":"publishing","role":"leader","api_url":"http://127.0.0.1:8020/","since_unix_ms":1800000099500,"pack_url":"http://127.0.0.1:8020","holds":"1111111122222222333333334444444455555555"}"#,
            ),
            entry("web/leader", "web-1"),
            entry(
                "web/members/web-1",
                r#"{"kind":"web","state":"serving","role":"leader","api_url":"http://127.0.0.1:8031/","since_unix_ms":1799996500000,"url":"http://127.0.0.1:8081","serving":"aaaaaaaabbbbbbbbccccccccddddddddeeeeeeee","prepared":"1111111122222222333333334444444455555555","slot":0,"load":{"in_flight_milli":3250,"rps":120,"p99_us":4100}}"#,
            ),
            entry(
                "web/members/web-2",
                r#"{"kind":"web","state":"idle","role":"member","api_url":"http://127.0.0.1:8032/","since_unix_ms":1800000099993,"prepared":"1111111122222222333333334444444455555555","trouble":"the app does not start: guestbook: not found"}"#,
            ),
            entry("gone/config", "{}"),
            entry("stray", "not a scope"),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::{Fleet, samples};

    #[test]
    fn lag_counts_from_the_leader_or_else_from_the_status_key() {
        let rows = Fleet::of("service", &samples::fleet()).rows(Some("main"), samples::NOW);
        assert_eq!(rows[1].lag_bytes, Some(2_048));
        assert_eq!(rows[0].lag_bytes, None, "the leader lags behind nobody");
        let without = samples::fleet().into_iter().filter(|kv| !kv.key.ends_with("members/pg-1")).collect::<Vec<_>>();
        let rows = Fleet::of("service", &without).rows(Some("main"), samples::NOW);
        assert_eq!(rows[0].lag_bytes, Some(0), "a status key older than the replica is no negative lag");
    }

    #[test]
    fn a_bot_is_found_by_name_and_by_scope_and_name() {
        let entries = samples::fleet();
        let fleet = Fleet::of("service", &entries);
        assert_eq!(fleet.find("web-2").len(), 1);
        assert_eq!(fleet.find("web/web-2").len(), 1);
        assert_eq!(fleet.find("main/web-2").len(), 0);
    }
}
