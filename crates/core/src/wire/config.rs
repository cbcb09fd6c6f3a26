//! The `config` key: what every reader of a scope's dynamic configuration agrees on.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::tags::yes_or_no;

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

/// The fields that say yes or no.
const YES_OR_NO: &[&str] = &["check_timeline", "failsafe_mode", "pause", "synchronous_mode_strict", "takeover"];

/// The same below `postgresql`.
const POSTGRESQL_YES_OR_NO: &[&str] = &[
    "remove_data_directory_on_diverged_timelines",
    "remove_data_directory_on_rewind_failure",
    "use_pg_rewind",
    "use_slots",
];

/// The fields below `postgresql` that are lines of a file.
const POSTGRESQL_LINES: &[&str] = &["pg_hba", "pg_ident"];

/// By what slots may be matched that are left alone.
const MATCHED_BY: &[&str] = &["name", "type", "database", "plugin"];

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
        value => yes_or_no(value).map(|on| if on { SyncMode::On } else { SyncMode::Off }),
    }
}

/// The lines that `value` is, if it is a list of texts. What is null in it says nothing.
#[must_use]
pub fn lines(value: &Value) -> Option<Vec<String>> {
    let said = value.as_array()?.iter().filter(|line| !line.is_null());
    said.map(|line| line.as_str().map(str::to_owned)).collect()
}

/// Whether `value` says which slots it matches: one that says nothing would match everything, and a field that is misspelt
/// makes it match others than are meant.
#[must_use]
pub fn is_slot_matcher(value: &Value) -> bool {
    let fits = |(field, value): (&String, &Value)| MATCHED_BY.contains(&field.as_str()) && value.is_string();
    value.as_object().is_some_and(|fields| !fields.is_empty() && fields.iter().all(fits))
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
        let unlimited = *field == "maximum_lag_on_syncnode" && is_unlimited(value);
        (!unlimited).then(|| format!("{field} is {value}: use a whole number that is not negative"))
    });
    let mappings = ["slots", "standby_cluster"].into_iter().filter_map(|field| {
        let value = config.get(field).filter(|value| !value.is_null() && !value.is_object())?;
        Some(format!("{field} is {value}: it must be a mapping"))
    });
    let mode = config.get("synchronous_mode").filter(|value| sync_mode(value).is_none());
    let mode = mode.map(|value| format!("synchronous_mode is {value}: use off, on or quorum"));
    numbers.chain(mappings).chain(unclear(config)).chain(mode).collect()
}

/// Patroni's way of saying that a lag does not matter is -1.
#[must_use]
pub fn is_unlimited(value: &Value) -> bool {
    value.as_i64().is_some_and(|lag| lag < 0)
}

/// The fields that are neither yes nor no, no mapping, no lines or no matchers where they must be, a line each.
#[must_use]
pub fn unclear(config: &Value) -> Vec<String> {
    let nothing = Value::Null;
    let postgresql = config.get("postgresql").unwrap_or(&nothing);
    let mut out = Vec::new();
    let mut look = |section: &str, map: &Value, fields: &[&str], fits: fn(&Value) -> bool, fix: &str| {
        let found =
            fields.iter().filter_map(|field| Some((field, map.get(*field).filter(|v| !v.is_null() && !fits(v))?)));
        out.extend(found.map(|(field, value)| format!("{section}{field} is {value}: {fix}")));
    };
    let is_clear: fn(&Value) -> bool = |value| yes_or_no(value).is_some();
    look("", config, &["postgresql"], Value::is_object, "it must be a mapping");
    look("postgresql.", postgresql, &["parameters"], Value::is_object, "it must be a mapping");
    look("", config, YES_OR_NO, is_clear, "use true or false");
    look("postgresql.", postgresql, POSTGRESQL_YES_OR_NO, is_clear, "use true or false");
    let are_lines: fn(&Value) -> bool = |value| lines(value).is_some();
    look("postgresql.", postgresql, POSTGRESQL_LINES, are_lines, "use a list of lines, each of them a text");
    let are_matchers: fn(&Value) -> bool =
        |value| value.as_array().is_some_and(|list| list.iter().all(is_slot_matcher));
    let fix = "use a list of mappings, each with name, type, database or plugin, and a text for it";
    look("", config, &["ignore_slots"], are_matchers, fix);
    out
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
        assert_eq!(misfits(&json!({"maximum_lag_on_syncnode": -1})), Vec::<String>::new());
    }

    #[test]
    fn what_is_neither_yes_nor_no_or_no_list_is_named() {
        let bad = json!({
            "synchronous_mode_strict": "ture", "takeover": [], "ignore_slots": [{"nam": "mine"}],
            "postgresql": {"pg_hba": "hostssl all all 10.0.0.0/8 scram-sha-256", "pg_ident": [7], "use_slots": "nein"},
        });
        assert_eq!(
            misfits(&bad),
            [
                r#"synchronous_mode_strict is "ture": use true or false"#,
                "takeover is []: use true or false",
                r#"postgresql.use_slots is "nein": use true or false"#,
                r#"postgresql.pg_hba is "hostssl all all 10.0.0.0/8 scram-sha-256": use a list of lines, each of them a text"#,
                "postgresql.pg_ident is [7]: use a list of lines, each of them a text",
                r#"ignore_slots is [{"nam":"mine"}]: use a list of mappings, each with name, type, database or plugin, and a text for it"#,
            ]
        );
        for empty in [json!({"ignore_slots": [{}]}), json!({"ignore_slots": ["mine"]}), json!({"ignore_slots": {}})] {
            assert_eq!(misfits(&empty).len(), 1, "{empty}");
        }
        let good = json!({
            "pause": "on", "check_timeline": "No", "failsafe_mode": 1, "takeover": null, "synchronous_mode_strict": "0",
            "ignore_slots": [{"type": "logical", "plugin": "wal2json"}, {"name": "mine"}],
            "postgresql": {"use_pg_rewind": "yes", "use_slots": true, "pg_hba": ["local all all peer"], "pg_ident": []},
        });
        assert_eq!(misfits(&good), Vec::<String>::new());
    }
}
