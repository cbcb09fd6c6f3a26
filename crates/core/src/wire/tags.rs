//! The tags of a Postgres member, read as Patroni reads them, from its configuration or from its member key.

use serde_json::{Map, Value};

/// The tags that say yes or no; one that says no is left out of the member key.
const YES_OR_NO: &[&str] = &["clonefrom", "nofailover", "noloadbalance", "nosync", "nostream"];

/// The tags that are a whole number.
const WHOLE: &[&str] = &["failover_priority", "sync_priority"];

/// What a value says, in any of the ways in which YAML and Postgres say yes and no; nothing if nobody could know.
#[must_use]
pub fn yes_or_no(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(on) => Some(*on),
        Value::Number(number) => number.as_f64().map(|number| number != 0.0),
        Value::String(text) => match text.trim().to_ascii_lowercase().as_str() {
            "on" | "true" | "yes" | "1" => Some(true),
            "off" | "false" | "no" | "0" | "" => Some(false),
            _neither => None,
        },
        Value::Null => Some(false),
        Value::Array(_) | Value::Object(_) => None,
    }
}

/// Whether a value says yes; one that nobody could make out does not.
#[must_use]
pub fn is_true(value: &Value) -> bool {
    yes_or_no(value) == Some(true)
}

/// The first tag of a member that nobody could make out, and the fix.
#[must_use]
pub fn misfit(tags: &Map<String, Value>) -> Option<String> {
    tags.iter().filter(|(_, value)| !value.is_null()).find_map(|(name, value)| {
        if YES_OR_NO.contains(&name.as_str()) && yes_or_no(value).is_none() {
            return Some(format!("tags.{name} is {value}: use true or false"));
        }
        let unclear = WHOLE.contains(&name.as_str()) && whole(tags, name).is_none();
        unclear.then(|| format!("tags.{name} is {value}: use a whole number"))
    })
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

    use super::{failover_priority, misfit, nofailover, shown, sync_priority, yes_or_no};

    fn tags(value: Value) -> Map<String, Value> {
        value.as_object().expect("an object").clone()
    }

    #[test]
    fn yes_and_no_are_told_from_what_is_neither() {
        for yes in [json!(true), json!("ON"), json!(" true "), json!("yes"), json!("1"), json!(1)] {
            assert_eq!(yes_or_no(&yes), Some(true), "{yes}");
        }
        for no in
            [json!(false), json!("off"), json!("False"), json!("no"), json!("0"), json!(0), json!(""), json!(null)]
        {
            assert_eq!(yes_or_no(&no), Some(false), "{no}");
        }
        for neither in [json!("ture"), json!("y"), json!([true]), json!({})] {
            assert_eq!(yes_or_no(&neither), None, "{neither}");
        }
    }

    #[test]
    fn a_tag_that_nobody_could_make_out_is_named() {
        let told = |given| misfit(&tags(given));
        assert_eq!(
            told(json!({"nofailover": "ture"})).expect("a misfit"),
            r#"tags.nofailover is "ture": use true or false"#
        );
        assert_eq!(
            told(json!({"sync_priority": "high"})).expect("a misfit"),
            r#"tags.sync_priority is "high": use a whole number"#
        );
        let good = json!({"nosync": "off", "clonefrom": null, "failover_priority": "7", "mine": "ture", "nostream": 1});
        assert_eq!(told(good), None);
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
