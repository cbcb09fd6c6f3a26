//! `botctl config`: edits of a scope's dynamic configuration, as data. Pure; `main.rs` reads, asks and writes.

use serde_json::{Map, Value};

use crate::{
    failure::{Failure, one_line},
    why::{MASK, is_secret, masked},
};

/// Reads the text that an editor left.
pub(crate) fn parse(text: &str) -> Result<Value, Failure> {
    if text.trim().is_empty() {
        return Ok(Value::Object(Map::new()));
    }
    let value: Value = serde_saphyr::from_str(text)
        .map_err(|e| Failure::failed(format!("not valid YAML: {}", one_line(&e.to_string()))))?;
    if value.is_object() {
        Ok(value)
    } else {
        Err(Failure::failed("the configuration must be a mapping, as in `ttl: 5`"))
    }
}

/// Applies `--set` and then `--unset`.
pub(crate) fn apply(mut value: Value, set: &[String], unset: &[String]) -> Result<Value, Failure> {
    for assignment in set {
        let (path, new) = split_assignment(assignment)?;
        // What YAML reads as a number or a truth value becomes one; the rest is text.
        let new = serde_saphyr::from_str(new).unwrap_or_else(|_| Value::from(new));
        put(&mut value, &path, new)
            .map_err(|at| Failure::usage(format!("--set {assignment}: {at} holds a value, not a mapping")))?;
    }
    for path in unset {
        if !remove(&mut value, &split_path(path)?) {
            return Err(Failure::not_found(format!("--unset {path}: there is no such field")));
        }
    }
    Ok(value)
}

/// Puts the secrets of `old` back where `new` still has their mask. Fails where it is not clear whose secret is meant.
pub(crate) fn unmasked(new: Value, old: &Value) -> Result<Value, Failure> {
    match new {
        Value::Object(map) => {
            let keep = |(name, value): (String, Value)| {
                let before = old.get(&name).unwrap_or(&Value::Null);
                let value = match is_secret(&name) && value == MASK {
                    true if before.is_null() => {
                        return Err(Failure::failed(format!(
                            "{name} is {MASK}, and there is no secret to put there: write it"
                        )));
                    }
                    true => before.clone(),
                    false => unmasked(value, before)?,
                };
                Ok((name, value))
            };
            map.into_iter().map(keep).collect::<Result<Map<_, _>, _>>().map(Value::from)
        }
        Value::Array(items) => unmasked_list(items, old.as_array().map_or(&[], Vec::as_slice)).map(Value::from),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Ok(new),
    }
}

/// Items have no names: only in a list that is as it was, but for what stands in its items, is it clear which is which.
fn unmasked_list(items: Vec<Value>, old: &[Value]) -> Result<Vec<Value>, Failure> {
    let before: Vec<Value> = old.iter().map(masked).collect();
    let is_moved = |(at, item): (usize, &Value)| before.get(at) != Some(item) && before.contains(item);
    let is_unclear = items.len() != old.len() || items.iter().enumerate().any(is_moved);
    if is_unclear && items.iter().any(holds_mask) {
        return Err(Failure::failed(format!(
            "items of a list have come, gone or moved, and {MASK} does not say whose secret is meant: write the secrets of that list"
        )));
    }
    items.into_iter().enumerate().map(|(at, item)| unmasked(item, old.get(at).unwrap_or(&Value::Null))).collect()
}

fn holds_mask(value: &Value) -> bool {
    match value {
        Value::Object(map) => map.iter().any(|(name, value)| (is_secret(name) && value == MASK) || holds_mask(value)),
        Value::Array(items) => items.iter().any(holds_mask),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

fn split_assignment(assignment: &str) -> Result<(Vec<String>, &str), Failure> {
    let mut quoted = false;
    let at = assignment.char_indices().find(|(_, c)| {
        quoted ^= *c == '"';
        *c == '=' && !quoted
    });
    let Some((at, _)) = at else {
        return Err(Failure::usage(format!("--set {assignment}: write it as PATH=VALUE, for example ttl=5")));
    };
    Ok((split_path(&assignment[..at])?, &assignment[at + 1..]))
}

/// Splits `a."b.c".d` into its parts.
fn split_path(path: &str) -> Result<Vec<String>, Failure> {
    let (mut parts, mut quoted) = (vec![String::new()], false);
    for c in path.chars() {
        match c {
            '"' => quoted = !quoted,
            '.' if !quoted => parts.push(String::new()),
            c => parts.last_mut().expect("it starts with one part").push(c),
        }
    }
    if quoted || parts.iter().any(String::is_empty) {
        return Err(Failure::usage(format!(
            "`{path}` is no path to a field: write it as a.b.c, with dots inside \"...\""
        )));
    }
    Ok(parts)
}

fn put(value: &mut Value, path: &[String], new: Value) -> Result<(), String> {
    let Some((last, parents)) = path.split_last() else { return Ok(()) };
    let mut at = value;
    for (depth, part) in parents.iter().enumerate() {
        let Value::Object(map) = at else { return Err(path[..depth].join(".")) };
        at = map.entry(part.clone()).or_insert_with(|| Value::Object(Map::new()));
        if at.is_null() {
            *at = Value::Object(Map::new());
        }
    }
    let Value::Object(map) = at else { return Err(parents.join(".")) };
    map.insert(last.clone(), new);
    Ok(())
}

fn remove(value: &mut Value, path: &[String]) -> bool {
    let Some((last, parents)) = path.split_last() else { return false };
    let mut at = value;
    for part in parents {
        let Some(next) = at.get_mut(part) else { return false };
        at = next;
    }
    at.as_object_mut().is_some_and(|map| map.remove(last).is_some())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{apply, parse, unmasked};
    use crate::{failure::Code, why::masked};

    fn edit(set: &[&str], unset: &[&str]) -> Result<serde_json::Value, crate::failure::Failure> {
        let own = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        apply(json!({"ttl": 5, "postgresql": {"parameters": {"work_mem": "4MB"}}}), &own(set), &own(unset))
    }

    #[test]
    fn fields_are_set_and_removed_by_path() {
        let got =
            edit(&["ttl=4", "a.b=true", r#"postgresql.parameters."x.y=z"=8MB"#], &["postgresql.parameters.work_mem"]);
        let want = json!({"ttl": 4, "a": {"b": true}, "postgresql": {"parameters": {"x.y=z": "8MB"}}});
        assert_eq!(got.unwrap(), want);
    }

    #[test]
    fn a_wrong_path_says_what_is_wrong() {
        let message =
            |r: Result<_, crate::failure::Failure>| r.map_or_else(|f| f.message, |_: serde_json::Value| String::new());
        assert_eq!(message(edit(&["ttl"], &[])), "--set ttl: write it as PATH=VALUE, for example ttl=5");
        assert_eq!(message(edit(&["ttl.x=1"], &[])), "--set ttl.x=1: ttl holds a value, not a mapping");
        assert!(message(edit(&["a..b=1"], &[])).starts_with("`a..b` is no path"));
        assert_eq!(edit(&[], &["nope"]).unwrap_err().code, Code::NotFound);
    }

    #[test]
    fn only_mappings_are_configurations() {
        assert_eq!(parse("ttl: 5\nx: [1, a]\n").unwrap(), json!({"ttl": 5, "x": [1, "a"]}));
        assert_eq!(parse(" \n").unwrap(), json!({}));
        assert_eq!(parse("- a\n").unwrap_err().message, "the configuration must be a mapping, as in `ttl: 5`");
        assert!(parse("a: [").unwrap_err().message.starts_with("not valid YAML: "));
    }

    #[test]
    fn a_masked_secret_survives_an_edit() {
        let old = json!({"users": [{"password": "s3cret"}], "ttl": 5});
        let mut shown = masked(&old);
        assert!(!shown.to_string().contains("s3cret"));
        shown["ttl"] = 4.into();
        assert_eq!(unmasked(shown, &old).unwrap(), json!({"users": [{"password": "s3cret"}], "ttl": 4}));
    }

    #[test]
    fn a_mask_is_never_taken_for_a_secret_nor_for_anothers() {
        let old =
            json!({"users": [{"name": "a", "password": "A"}, {"name": "b", "password": "B"}], "x": {"token": "t"}});
        let refused = |change: fn(&mut serde_json::Value)| {
            let mut shown = masked(&old);
            change(&mut shown);
            unmasked(shown, &old).unwrap_err().message
        };
        assert!(
            refused(|shown| shown["users"] = json!([shown["users"][1]])).contains("write the secrets of that list")
        );
        assert!(refused(|shown| shown["users"].as_array_mut().unwrap().reverse()).contains("whose secret"));
        assert!(refused(|shown| shown["y"] = json!({"token": "******"})).starts_with("token is ******"));
        let mut shown = masked(&old);
        shown["users"][1]["name"] = "c".into();
        assert_eq!(unmasked(shown, &old).unwrap()["users"][1], json!({"name": "c", "password": "B"}));
        let written = json!({"users": [{"name": "b", "password": "new"}]});
        assert_eq!(unmasked(written.clone(), &old).unwrap(), written, "without a mask everything is clear");
    }
}
