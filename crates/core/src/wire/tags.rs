//! The tags of a Postgres member, read as Patroni reads them, from its configuration or from its member key.

use serde_json::{Map, Value};

/// The tags that say yes or no; one that says no is left out of the member key.
const YES_OR_NO: &[&str] = &["clonefrom", "nofailover", "noloadbalance", "nosync", "nostream"];

/// Whether a value says yes, in any of the ways in which YAML and Postgres do.
#[must_use]
pub fn is_true(value: &Value) -> bool {
    match value {
        Value::Bool(on) => *on,
        Value::Number(number) => number.as_f64().is_some_and(|number| number != 0.0),
        Value::String(text) => matches!(text.trim().to_ascii_lowercase().as_str(), "on" | "true" | "yes" | "1"),
        Value::Null | Value::Array(_) | Value::Object(_) => false,
    }
}

/// Whether a tag is there and says yes.
#[must_use]
pub fn is_set(tags: &Map<String, Value>, name: &str) -> bool {
    tags.get(name).is_some_and(is_true)
}

/// The member never leads: it says so itself, or by a priority that is not positive.
#[must_use]
pub fn nofailover(tags: &Map<String, Value>) -> bool {
    tags.get("nofailover").map_or_else(|| number(tags).is_some_and(|priority| priority <= 0), is_true)
}

/// Who of several members that hold the same goes first: the greater; one if it does not say.
#[must_use]
pub fn failover_priority(tags: &Map<String, Value>) -> u32 {
    if nofailover(tags) { 0 } else { u32::try_from(number(tags).unwrap_or(1)).unwrap_or(0) }
}

/// How much rather than others a standby is waited for: the greater, the rather; one if it does not say. Nothing if it must
/// not be waited for at all.
#[must_use]
pub fn sync_priority(tags: &Map<String, Value>) -> Option<i64> {
    let priority = whole(tags, "sync_priority").unwrap_or(1);
    let never = tags.get("nosync").map_or(priority <= 0, is_true);
    (!never).then_some(priority)
}

fn number(tags: &Map<String, Value>) -> Option<i64> {
    whole(tags, "failover_priority")
}

fn whole(tags: &Map<String, Value>, name: &str) -> Option<i64> {
    let value = tags.get(name)?;
    value.as_i64().or_else(|| value.as_str()?.trim().parse().ok())
}

/// The tags as the member key has them.
#[must_use]
pub fn shown(tags: &Map<String, Value>) -> Map<String, Value> {
    let contradicted = tags.contains_key("failover_priority");
    let keeps = |name: &str, value: &Value| {
        !YES_OR_NO.contains(&name) || is_true(value) || name == "nofailover" && contradicted
    };
    tags.iter().filter(|(name, value)| keeps(name, value)).map(|(name, value)| (name.clone(), value.clone())).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, Value, json};

    use super::{failover_priority, nofailover, shown, sync_priority};

    fn tags(value: Value) -> Map<String, Value> {
        value.as_object().expect("an object").clone()
    }

    #[test]
    fn a_yes_or_no_beats_a_priority() {
        for (given, never, priority) in [
            (json!({}), false, 1),
            (json!({"failover_priority": 0}), true, 0),
            (json!({"failover_priority": "7"}), false, 7),
            (json!({"nofailover": true, "failover_priority": 7}), true, 0),
            (json!({"nofailover": false, "failover_priority": -1}), false, 0),
        ] {
            let read = tags(given.clone());
            assert_eq!((nofailover(&read), failover_priority(&read)), (never, priority), "{given}");
        }
    }

    #[test]
    fn who_must_not_be_waited_for_says_so() {
        for (given, priority) in [
            (json!({}), Some(1)),
            (json!({"sync_priority": 3}), Some(3)),
            (json!({"sync_priority": 0}), None),
            (json!({"nosync": true, "sync_priority": 3}), None),
            (json!({"nosync": false, "sync_priority": 0}), Some(0)),
        ] {
            assert_eq!(sync_priority(&tags(given.clone())), priority, "{given}");
        }
    }

    #[test]
    fn what_says_no_is_not_shown() {
        let all = tags(json!({"noloadbalance": false, "clonefrom": true, "mine": false, "nofailover": false}));
        assert_eq!(Value::Object(shown(&all)), json!({"clonefrom": true, "mine": false}));
        let both = tags(json!({"nofailover": false, "failover_priority": 0}));
        assert_eq!(shown(&both), both);
    }
}
