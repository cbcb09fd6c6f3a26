//! What the forges send when something was pushed, and whether it is theirs. A function of the request, the secrets and the
//! time; not the route.
//!
//! The payload is only trusted to be a hint: what it names saves a look, and is never published by its word.

use axum::http::HeaderMap;
use bots_core::shell::Secret;
use serde::Deserialize;

use super::{
    base64,
    signature::{delivery_id, hex_signature, is_hmac, is_token},
};
use crate::machine::{Announcement, Reference};

/// How far a signed time may be from ours, in seconds. Standard Webhooks asks for some tolerance; five minutes is usual.
const TIME_TOLERANCE_S: u64 = 300;

/// The signatures in one header that are looked at: a sender that rotates its keys has two.
const SIGNATURES_MAX: usize = 8;

/// Who has sent an announcement, told by its headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    /// `X-Hub-Signature-256`; also whoever signs a body like GitHub.
    GitHub,
    /// `X-Gitlab-Token`.
    GitLab,
    /// `X-Gitea-Signature`, `X-Forgejo-Signature`.
    Gitea,
    /// `X-Hub-Signature`, by Bitbucket Cloud and Data Center.
    Bitbucket,
    /// `webhook-id`, `webhook-timestamp`, `webhook-signature`, as <https://www.standardwebhooks.com> says.
    Standard,
}

impl Sender {
    /// As it stands in a path.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "github" => Some(Self::GitHub),
            "gitlab" => Some(Self::GitLab),
            "gitea" | "forgejo" => Some(Self::Gitea),
            "bitbucket" => Some(Self::Bitbucket),
            "standard" => Some(Self::Standard),
            _ => None,
        }
    }

    /// Who has sent these headers. Gitea sends GitHub's beside its own, so the order counts.
    fn of(headers: &HeaderMap) -> Option<Self> {
        let has = |name: &str| headers.contains_key(name);
        if has("webhook-signature") {
            Some(Self::Standard)
        } else if has("x-gitea-signature") || has("x-forgejo-signature") {
            Some(Self::Gitea)
        } else if has("x-gitlab-token") {
            Some(Self::GitLab)
        } else if has("x-hub-signature-256") {
            Some(Self::GitHub)
        } else if has("x-hub-signature") {
            Some(Self::Bitbucket)
        } else {
            None
        }
    }

    /// The header that says what has happened.
    const fn event_header(self) -> Option<&'static str> {
        match self {
            Self::GitHub => Some("x-github-event"),
            Self::GitLab => Some("x-gitlab-event"),
            Self::Gitea => Some("x-gitea-event"),
            Self::Bitbucket => Some("x-event-key"),
            Self::Standard => None,
        }
    }
}

/// What a request comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Something was pushed that may be ours.
    Push(Announcement),
    /// The sender tries whether it reaches us.
    Ping,
    /// It is the sender's, and of no interest: another branch, another event.
    Other(String),
    /// It is not the sender's, or too old: one line that says what would be right.
    Refused(&'static str),
}

/// Judges a request that must be signed with one of the secrets.
#[must_use]
pub fn judge(
    headers: &HeaderMap,
    body: &[u8],
    secrets: &[Secret],
    only: Option<Sender>,
    reference: &Reference,
    now_s: u64,
) -> Verdict {
    let sender = match (Sender::of(headers), only) {
        (Some(found), Some(only)) if found != only => {
            return Verdict::Refused("the signature is another sender's than the path says");
        }
        (Some(found), _) => found,
        (None, _) => {
            return Verdict::Refused(
                "a signature is missing: X-Hub-Signature-256 (GitHub), X-Gitlab-Token, X-Gitea-Signature, \
                 X-Hub-Signature (Bitbucket) or webhook-signature (Standard Webhooks), made with push.secret",
            );
        }
    };
    match authenticate(sender, headers, body, secrets, now_s) {
        Ok(delivery) => read(Some(sender), headers, body, Some(delivery), reference),
        Err(why) => Verdict::Refused(why),
    }
}

/// Reads a request that need not be signed, for only this machine can have sent it.
#[must_use]
pub fn trust(headers: &HeaderMap, body: &[u8], reference: &Reference) -> Verdict {
    read(Sender::of(headers), headers, body, None, reference)
}

/// What tells the delivery from any other, if it is the sender's.
fn authenticate(
    sender: Sender,
    headers: &HeaderMap,
    body: &[u8],
    secrets: &[Secret],
    now_s: u64,
) -> Result<String, &'static str> {
    let by_body = |header: &str| {
        let signature = hex_signature(text(headers, header))?;
        is_hmac(secrets, &[body], &signature).then(|| delivery_id(&[&signature]))
    };
    match sender {
        Sender::GitHub => by_body("x-hub-signature-256")
            .ok_or("X-Hub-Signature-256 must be sha256=<HMAC-SHA256 of the body with push.secret>"),
        Sender::Bitbucket => by_body("x-hub-signature")
            .ok_or("X-Hub-Signature must be sha256=<HMAC-SHA256 of the body with push.secret>"),
        Sender::Gitea => by_body("x-gitea-signature")
            .or_else(|| by_body("x-forgejo-signature"))
            .ok_or("X-Gitea-Signature must be the HMAC-SHA256 of the body with push.secret"),
        Sender::GitLab => {
            let given = text(headers, "x-gitlab-token");
            // Who has seen one such request knows the token: its number only tells a delivery that is sent again.
            let number = text(headers, "x-gitlab-event-uuid");
            let id = || delivery_id(&[number.as_bytes(), body]);
            is_token(secrets, given).then(id).ok_or("X-Gitlab-Token must be push.secret")
        }
        Sender::Standard => standard(headers, body, secrets, now_s),
    }
}

/// Standard Webhooks: the number and the time are signed with the body.
fn standard(headers: &HeaderMap, body: &[u8], secrets: &[Secret], now_s: u64) -> Result<String, &'static str> {
    let (id, time) = (text(headers, "webhook-id"), text(headers, "webhook-timestamp"));
    let sent: u64 = time.parse().map_err(|_| "webhook-timestamp must be the seconds since 1970")?;
    if id.is_empty() {
        return Err("webhook-id is missing: it tells one delivery from another");
    }
    let signed: [&[u8]; 5] = [id.as_bytes(), b".", time.as_bytes(), b".", body];
    let signatures = text(headers, "webhook-signature").split(' ').take(SIGNATURES_MAX);
    let mut versioned = signatures.filter_map(|s| s.strip_prefix("v1,").and_then(base64::decode));
    if !versioned.any(|signature| is_hmac(secrets, &signed, &signature)) {
        return Err("webhook-signature must be v1,<base64 of the HMAC-SHA256 of ID.TIMESTAMP.BODY with push.secret>");
    }
    // Only now: a stranger must not learn what our clock shows.
    if now_s.abs_diff(sent) > TIME_TOLERANCE_S {
        return Err("webhook-timestamp is more than five minutes off: it is old, or a clock is wrong");
    }
    Ok(delivery_id(&[id.as_bytes()]))
}

/// What of a payload is of interest. Everything else, and every part that is otherwise than expected, is passed over.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Payload {
    r#ref: Option<String>,
    after: Option<String>,
    push: Option<BitbucketPush>,
    changes: Vec<ServerChange>,
}

/// Bitbucket Cloud.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct BitbucketPush {
    changes: Vec<CloudChange>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CloudChange {
    new: Option<CloudRef>,
    old: Option<CloudRef>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CloudRef {
    r#type: String,
    name: String,
    target: CloudTarget,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CloudTarget {
    hash: String,
}

/// Bitbucket Data Center.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ServerChange {
    ref_id: String,
    to_hash: String,
}

fn read(
    sender: Option<Sender>,
    headers: &HeaderMap,
    body: &[u8],
    delivery: Option<String>,
    reference: &Reference,
) -> Verdict {
    let event = sender.and_then(Sender::event_header).map(|header| text(headers, header)).unwrap_or_default();
    match event {
        "ping" | "diagnostics:ping" => return Verdict::Ping,
        "" | "push" | "create" | "delete" | "Push Hook" | "Tag Push Hook" | "System Hook" | "repo:push"
        | "repo:refs_changed" => {}
        other => return Verdict::Other(format!("the event `{}` says nothing of a push", shown(other))),
    }
    let named = changes(serde_json::from_slice(body).unwrap_or_default());
    if named.is_empty() {
        return Verdict::Push(Announcement { delivery, tip: None });
    }
    match named.iter().find(|(name, _)| may_move(reference, name)) {
        Some((name, tip)) => {
            // A tag may be annotated, and then what it points at is no commit.
            let tip = tip.clone().filter(|tip| name.starts_with("refs/heads/") && is_commit(tip));
            Verdict::Push(Announcement { delivery, tip: tip.map(|tip| tip.to_ascii_lowercase()) })
        }
        None => {
            let (name, _) = &named[0];
            Verdict::Other(format!("{} is not what is published: {}", shown(name), reference.as_str()))
        }
    }
}

/// The full names of what has moved, and where to.
fn changes(payload: Payload) -> Vec<(String, Option<String>)> {
    let cloud = payload.push.into_iter().flat_map(|push| push.changes).filter_map(|change| {
        let found = change.new.or(change.old)?;
        let kind = if found.r#type == "tag" { "tags" } else { "heads" };
        Some((format!("refs/{kind}/{}", found.name), Some(found.target.hash)))
    });
    let server = payload.changes.into_iter().map(|change| (change.ref_id, Some(change.to_hash)));
    let own = payload.r#ref.map(|name| (name, payload.after));
    // GitHub's `create` and `delete` give the short name, which may be a branch's or a tag's.
    own.into_iter().chain(cloud).chain(server).filter(|(name, _)| name.starts_with("refs/")).collect()
}

/// Whether the reference may point elsewhere after `name` has moved.
fn may_move(reference: &Reference, name: &str) -> bool {
    match reference {
        Reference::Pinned(_) => true,
        Reference::Range(_) => name.starts_with("refs/tags/"),
        Reference::Named(own) if own == "HEAD" => true,
        Reference::Named(own) => {
            name == own || name.strip_prefix("refs/heads/").or(name.strip_prefix("refs/tags/")) == Some(own)
        }
    }
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit()) && text.bytes().any(|b| b != b'0')
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> &'h str {
    headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default()
}

/// A stranger's word, short enough for an answer.
fn shown(word: &str) -> String {
    word.chars().filter(|c| !c.is_control()).take(80).collect()
}

#[cfg(test)]
mod tests;
