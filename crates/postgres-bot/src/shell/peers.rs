//! Asking every other member at once how far it is, through its API. Speaks to Patroni's members, too.

use std::{collections::BTreeMap, time::Duration};

use bots_core::{
    shell::http,
    wire::{Lsn, Timeline, tags},
};
use futures_util::future::join_all;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::machine::PeerAnswer;

/// What we read of `GET /patroni`.
#[derive(Debug, Deserialize)]
struct Patroni {
    state: String,
    role: String,
    #[serde(default)]
    timeline: Timeline,
    #[serde(default)]
    xlog: Xlog,
    #[serde(default)]
    tags: Map<String, Value>,
    #[serde(default)]
    watchdog_failed: bool,
    /// Patroni's members say nothing, and ask their server before each answer.
    #[serde(default)]
    position_may_grow: bool,
    /// Our own word for a server or a disk that is not well.
    #[serde(default)]
    unfit: bool,
    #[serde(default)]
    patroni: Who,
}

/// Who answers: an address may have come to be another's.
#[derive(Debug, Default, Deserialize)]
struct Who {
    name: Option<String>,
    scope: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Xlog {
    location: Option<Lsn>,
    received_location: Option<Lsn>,
    replayed_location: Option<Lsn>,
}

/// Asks all peers in parallel; who does not answer in time, or not as that member of `scope` does, is missing from the answers.
pub(super) async fn probe(
    scope: &str,
    peers: BTreeMap<String, String>,
    deadline: Duration,
) -> BTreeMap<String, PeerAnswer> {
    let asked = peers.into_iter().map(|(name, api_url)| async move {
        let answer = ask(scope, &name, &api_url, deadline).await?;
        Some((name, answer))
    });
    join_all(asked).await.into_iter().flatten().collect()
}

async fn ask(scope: &str, name: &str, api_url: &str, deadline: Duration) -> Option<PeerAnswer> {
    let url = format!("{}/patroni", origin(api_url)?);
    let (_status, body) = http::get(&url, deadline).await.ok()?;
    read(&body, scope, name)
}

/// What the member `name` of `scope` says; nothing if it is another who speaks. One that does not say who it is, as members of
/// old versions of Patroni, gives no vote.
fn read(body: &[u8], scope: &str, name: &str) -> Option<PeerAnswer> {
    let said: Patroni = serde_json::from_slice(body).ok()?;
    let another = |told: &Option<String>, asked: &str| told.as_ref().is_some_and(|told| told != asked);
    if another(&said.patroni.name, name) || another(&said.patroni.scope, scope) {
        tracing::warn!(asked = name, answered = ?said.patroni, "another answers at the address of a member");
        return None;
    }
    let known = said.patroni.name.is_some();
    let running = said.state == "running";
    let writable = matches!(said.role.as_str(), "primary" | "master");
    let position = [said.xlog.location, said.xlog.received_location, said.xlog.replayed_location];
    Some(PeerAnswer {
        is_primary: writable && running,
        timeline: said.timeline,
        position: position.into_iter().flatten().max().unwrap_or_default(),
        may_lead: running && !tags::nofailover(&said.tags) && !said.watchdog_failed && !said.unfit,
        priority: tags::failover_priority(&said.tags),
        sure: running && known && !said.position_may_grow,
    })
}

/// `http://host:port` of a URL.
pub(super) fn origin(url: &str) -> Option<String> {
    let rest = url.strip_prefix("http://")?;
    let authority = rest.split(['/', '?', '#']).next().filter(|a| !a.is_empty())?;
    Some(format!("http://{authority}"))
}

#[cfg(test)]
mod tests {
    use super::{Lsn, Timeline, origin, read};

    #[test]
    fn answers_of_patroni_are_read() {
        let replica = br#"{"state":"running","role":"replica","server_version":150004,
            "xlog":{"received_location":67419744,"replayed_location":67419740,"paused":false},"timeline":2,
            "tags":{"nofailover":true},"patroni":{"version":"4.1.4","scope":"a","name":"b"}}"#;
        let answer = read(replica, "a", "b").expect("a member");
        assert!(answer.sure);
        assert_eq!((answer.timeline, answer.position), (Timeline(2), Lsn(67_419_744)));
        assert!(!answer.is_primary && !answer.may_lead);
        assert_eq!([read(replica, "a", "c"), read(replica, "other", "b")], [None, None], "another one answers");
        let down = read(br#"{"state":"stopped","role":"primary"}"#, "a", "b").expect("a member");
        assert!(!down.is_primary && !down.may_lead);
        let nameless = read(br#"{"state":"running","role":"replica"}"#, "a", "b").expect("a member");
        assert!(!nameless.sure && nameless.may_lead);
        assert_eq!(read(b"<html>", "a", "b"), None);
    }

    #[test]
    fn the_origin_of_an_api_url_is_asked() {
        assert_eq!(origin("http://10.0.0.1:8008/patroni").as_deref(), Some("http://10.0.0.1:8008"));
        assert_eq!(origin("ftp://x/"), None);
    }
}
