//! The `config` key: what every reader of a scope's dynamic configuration agrees on.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::tags::is_true;

/// The fields of a Postgres scope's configuration that count something: seconds, bytes or members.
pub const WHOLE_NUMBERS: &[&str] = &[
    "ttl",
    "loop_wait",
    "retry_timeout",
    "maximum_lag_on_failover",
    "maximum_lag_on_syncnode",
    "primary_start_timeout",
    "master_start_timeout",
    "primary_stop_timeout",
    "master_stop_timeout",
    "primary_hung_timeout",
    "synchronous_node_count",
    "max_timelines_history",
];

/// Which standbys a commit waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SyncMode {
    /// None.
    #[default]
    Off,
    /// Every one of a few, chosen by the primary.
    On,
    /// Any few of all.
    Quorum,
}

/// What `synchronous_mode` says, in any of the ways that Patroni understands; nothing if nobody could know.
#[must_use]
pub fn sync_mode(value: &Value) -> Option<SyncMode> {
    match value {
        Value::String(text) if text.trim().eq_ignore_ascii_case("quorum") => Some(SyncMode::Quorum),
        value if is_true(value) => Some(SyncMode::On),
        Value::String(text) => {
            let no = matches!(text.trim().to_ascii_lowercase().as_str(), "off" | "false" | "no" | "0" | "");
            no.then_some(SyncMode::Off)
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => Some(SyncMode::Off),
        Value::Array(_) | Value::Object(_) => None,
    }
}

/// The whole number that `value` is: as a number, or as text that is one.
#[must_use]
pub fn whole_number(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str().and_then(|text| text.trim().parse().ok()))
}

/// The seconds that `value` is: a whole number of them, or a time as Postgres writes it, such as `30min`.
#[must_use]
pub fn seconds(value: &Value) -> Option<u64> {
    if let Some(secs) = whole_number(value) {
        return Some(secs);
    }
    let text = value.as_str()?.trim();
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let number: u64 = number.parse().ok()?;
    match unit.trim() {
        "ms" => Some(number.div_ceil(1_000)),
        "s" => Some(number),
        "min" => number.checked_mul(60),
        "h" => number.checked_mul(3_600),
        "d" => number.checked_mul(86_400),
        _no_unit => None,
    }
}

/// What no bot could go by, a line a field; empty if all is well.
#[must_use]
pub fn misfits(config: &Value) -> Vec<String> {
    let numbers = WHOLE_NUMBERS.iter().filter_map(|field| {
        let value = config.get(*field).filter(|value| !value.is_null() && whole_number(value).is_none())?;
        Some(format!("{field} is {value}: use a whole number that is not negative"))
    });
    let mappings = ["postgresql", "slots", "standby_cluster"].into_iter().filter_map(|field| {
        let value = config.get(field).filter(|value| !value.is_null() && !value.is_object())?;
        Some(format!("{field} is {value}: it must be a mapping"))
    });
    let parameters = config.pointer("/postgresql/parameters").filter(|value| !value.is_null() && !value.is_object());
    let parameters = parameters.map(|value| format!("postgresql.parameters is {value}: it must be a mapping"));
    let mode = config.get("synchronous_mode").filter(|value| sync_mode(value).is_none());
    let mode = mode.map(|value| format!("synchronous_mode is {value}: use off, on or quorum"));
    numbers.chain(mappings).chain(parameters).chain(mode).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{misfits, seconds};

    #[test]
    fn times_are_read_as_postgres_writes_them() {
        let read = |text: &str| seconds(&json!(text));
        assert_eq!(
            [read("30min"), read("1 h"), read("1500ms"), read("7")],
            [Some(1_800), Some(3_600), Some(2), Some(7)]
        );
        assert_eq!([read("soon"), read("-1"), read("3x"), seconds(&json!(1.5))], [None; 4]);
        assert_eq!(seconds(&json!(5)), Some(5));
    }

    #[test]
    fn what_no_bot_could_go_by_is_named() {
        let good =
            json!({"ttl": 5, "maximum_lag_on_failover": "1048576", "mine": [1], "postgresql": {"parameters": {}}});
        assert_eq!(misfits(&good), Vec::<String>::new());
        let bad = json!({"ttl": "soon", "loop_wait": -1, "postgresql": [], "primary_start_timeout": null});
        let told = misfits(&bad);
        assert_eq!(told.len(), 3, "{told:?}");
        assert_eq!(told[0], r#"ttl is "soon": use a whole number that is not negative"#);
        assert_eq!(misfits(&json!({"postgresql": {"parameters": 3}})).len(), 1);
        assert_eq!(misfits(&json!({"synchronous_mode": "qorum"})).len(), 1);
        assert_eq!(misfits(&json!({"synchronous_mode": "Quorum"})), Vec::<String>::new());
    }
}
