//! The `config` key: what every reader of a scope's dynamic configuration agrees on.

use serde_json::Value;

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
    "synchronous_node_count",
    "max_timelines_history",
];

/// The whole number that `value` is: as a number, or as text that is one.
#[must_use]
pub fn whole_number(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str().and_then(|text| text.trim().parse().ok()))
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
    numbers.chain(mappings).chain(parameters).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::misfits;

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
    }
}
