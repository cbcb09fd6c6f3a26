//! `botctl why`: a bot's own report, laid out for a person.

use bots_core::{machine::Report, wire::Member};
use serde::Deserialize;
use serde_json::Value;

use crate::text;

/// What stands in place of a secret.
pub(crate) const MASK: &str = "******";

/// The part of `/status` that is printed.
#[derive(Debug, Deserialize)]
pub(crate) struct Status {
    pub(crate) report: Report,
    #[serde(default)]
    pub(crate) version: String,
}

/// The status address of the bot behind `api_url`: its origin and `/status`, or the address itself if it is one. A bot that
/// shares its API with others has a path of its own there.
pub(crate) fn status_url(api_url: &str) -> Option<String> {
    let (scheme, rest) = api_url.split_once("://")?;
    let (host, path) = rest.find(['/', '?', '#']).map_or((rest, ""), |at| rest.split_at(at));
    let path = if path.ends_with("/status") { path } else { "/status" };
    (!host.is_empty()).then(|| format!("{scheme}://{host}{path}"))
}

/// The report of a bot that answers.
pub(crate) fn answered(scope: &str, name: &str, member: &Member, status: &Status) -> String {
    let Report { role, doing, for_ms, waiting_for, next_deadline, why_not, troubles } = &status.report;
    let version = if status.version.is_empty() { &member.head.version } else { &status.version };
    let mut lines = vec![format!("{scope}/{name}  {} bot {version}", member.head.kind)];
    let mut line = |label: &str, text: &str| lines.push(format!("  {label:<9}{text}"));
    line("is", &format!("{role}, for {}", text::duration(*for_ms)));
    line("does", doing);
    line("waits", &format!("for {waiting_for}"));
    if let Some((in_ms, reason)) = next_deadline {
        line("next", &format!("in {}: {reason}", text::duration(*in_ms)));
    }
    for why_not in why_not {
        line("does not", &format!("{}: {}", why_not.alternative, why_not.because));
    }
    for trouble in troubles {
        line("trouble", trouble);
    }
    lines.join("\n") + "\n"
}

/// What the member key says of a bot that does not answer.
pub(crate) fn unanswered(scope: &str, name: &str, member: &Member, now_unix_ms: u64) -> String {
    let head = &member.head;
    let age = match head.since_unix_ms {
        0 => String::new(),
        since => format!(", for {}", text::duration(now_unix_ms.saturating_sub(since))),
    };
    format!(
        "{scope}/{name}  {} bot {}\n  says     in its member key: {}, {}{age}\n",
        head.kind, head.version, head.role, head.state
    )
}

/// The same as data: there is no answer, and this is what its key holds.
pub(crate) fn silent(scope: &str, name: &str, member: &Member) -> Value {
    let key = serde_json::to_value(member).unwrap_or_default();
    serde_json::json!({ "scope": scope, "name": name, "answers": false, "member": masked(&key) })
}

/// The same document with every secret replaced.
pub(crate) fn masked(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            map.iter().map(|(k, v)| (k.clone(), masked_field(k, v))).collect::<serde_json::Map<_, _>>().into()
        }
        Value::Array(items) => items.iter().map(masked).collect::<Vec<_>>().into(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.clone(),
    }
}

fn masked_field(name: &str, value: &Value) -> Value {
    if is_secret(name) && !value.is_object() && !value.is_null() { MASK.into() } else { masked(value) }
}

/// Whether a field of this name holds a secret: file names of secrets are none.
pub(crate) fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let secret = ["password", "passwd", "secret", "token", "passphrase"].iter().any(|word| name.contains(word));
    secret && !name.ends_with("_file") && name != "password_encryption"
}

#[cfg(test)]
mod tests {
    use bots_core::machine::{Report, Time};
    use serde_json::json;

    use super::{Status, answered, masked, status_url, unanswered};
    use crate::fleet::{Fleet, samples};

    #[test]
    fn a_report_is_laid_out_for_people() {
        let entries = samples::fleet();
        let fleet = Fleet::of("service", &entries);
        let report = Report::new("replica", Time::ZERO, Time::from_millis(61_000))
            .doing("streams from pg-1")
            .waiting_for("the leader key to become free")
            .why_not("promote", "pg-1 holds the leader key")
            .trouble("etcd does not answer: 127.0.0.1:2379 refused");
        let status = Status { report, version: String::from("0.1.0") };
        let got = answered("main", "pg-2", fleet.find("pg-2")[0].2, &status);
        let want = "main/pg-2  postgres bot 0.1.0\n  is       replica, for 1 min 1 s\n  does     streams from pg-1\n  \
                    waits    for the leader key to become free\n  does not promote: pg-1 holds the leader key\n  \
                    trouble  etcd does not answer: 127.0.0.1:2379 refused\n";
        assert_eq!(got, want);
    }

    #[test]
    fn a_silent_bot_is_told_by_its_key() {
        let entries = samples::fleet();
        let fleet = Fleet::of("service", &entries);
        let got = unanswered("web", "web-2", fleet.find("web-2")[0].2, samples::NOW + 53);
        assert_eq!(got, "web/web-2  web bot \n  says     in its member key: member, idle, for 60 ms\n");
    }

    #[test]
    fn the_status_stands_at_the_origin() {
        assert_eq!(status_url("http://127.0.0.1:8008/patroni").as_deref(), Some("http://127.0.0.1:8008/status"));
        assert_eq!(status_url("http://[::1]:8008").as_deref(), Some("http://[::1]:8008/status"));
        let of_a_site = "http://127.0.0.1:8008/sites/docs/status";
        assert_eq!(status_url(of_a_site).as_deref(), Some(of_a_site));
        assert_eq!(status_url("127.0.0.1:8008"), None);
        assert_eq!(status_url("http:///patroni"), None);
    }

    #[test]
    fn secrets_are_masked_wherever_they_stand() {
        let got = masked(&json!({"a": [{"password": "x", "password_file": "/f"}], "api_token": "t", "ttl": 5}));
        assert_eq!(got, json!({"a": [{"password": "******", "password_file": "/f"}], "api_token": "******", "ttl": 5}));
    }
}
