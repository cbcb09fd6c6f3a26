//! Configurations as nobody should write them: a good one with a few things changed, and what a bot must say to it. Pure: the
//! test that asks has the dice.

use serde_json::{Map, Value, json};

use crate::shell::boot::{self, Bot};

/// Changes a document once for each choice: something is replaced, taken out, added or put in another's place.
#[must_use]
pub fn mutated(document: &Value, choices: &[u32]) -> Value {
    let mut changed = document.clone();
    for choice in choices {
        let (what, whereto) = (choice % 64, choice / 64);
        let places = places(&changed);
        let place = usize::try_from(whereto).ok().and_then(|n| places.get(n % places.len().max(1)));
        let Some(at) = place.and_then(|path| changed.pointer_mut(path)) else { continue };
        change(at, what, choice.to_string());
    }
    changed
}

/// What is put into a key of etcd in the place of a good value: the value with changes, or the junk that is given; nothing if that is
/// empty, and the key is to go.
#[must_use]
pub fn spoilt(value: &Value, choices: &[u32], junk: Option<&str>) -> Option<String> {
    match junk {
        Some("") => None,
        Some(junk) => Some(junk.to_owned()),
        None => Some(in_etcd(&mutated(value, choices))),
    }
}

/// A value as it stands in etcd: names stand there bare.
#[must_use]
pub fn in_etcd(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// What is wrong with how a bot takes this document: nothing, if it takes it or refuses it in one line that begins with the
/// name of a field.
///
/// # Errors
/// The complaint.
pub fn refusal<B: Bot>(text: &str) -> Result<Option<String>, String> {
    let env = [(String::from("BOT_CONFIGURATION"), text.to_owned())];
    let Err(exit) = boot::read::<B>(None, &env) else { return Ok(None) };
    let message = exit.message;
    if exit.code != 2 || message.contains('\n') || message.is_empty() {
        return Err(format!("code {}, on one line? {message:?}", exit.code));
    }
    let named = message.strip_prefix("configuration field ").unwrap_or(&message);
    let word = named.split([' ', ':']).next().unwrap_or_default();
    let is_field = word.starts_with(|c: char| c.is_ascii_lowercase())
        && word.chars().all(|c| c.is_ascii_alphanumeric() || "._-[]".contains(c))
        // Of what is no mapping at all, there is no field to name.
        || word == "BOT_CONFIGURATION"
        || word == "." && named.contains("missing field `");
    if is_field { Ok(Some(message)) } else { Err(format!("no field is named first: {message}")) }
}

/// All places of a document.
fn places(document: &Value) -> Vec<String> {
    let (mut found, mut open) = (Vec::new(), vec![(String::new(), document)]);
    while let Some((path, value)) = open.pop() {
        match value {
            Value::Object(map) => {
                open.extend(map.iter().map(|(key, value)| (format!("{path}/{}", escaped(key)), value)));
            }
            Value::Array(list) => {
                open.extend(list.iter().enumerate().map(|(index, value)| (format!("{path}/{index}"), value)));
            }
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
        found.push(path);
    }
    found
}

/// A key as it is written in a pointer.
fn escaped(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}

fn change(at: &mut Value, what: u32, word: String) {
    const WORDS: [&str; 16] = [
        "",
        " ",
        "/",
        "..",
        "a/b",
        "\u{0}",
        "é\n\"",
        "-1",
        "http://",
        "https://[::1",
        "*:1",
        "0.0.0.0:0",
        "[::]:70000",
        "semver:",
        ":",
        "a@b:c",
    ];
    let word_at = |n: u32| usize::try_from(n).ok().and_then(|n| WORDS.get(n)).map_or("", |word| *word);
    match what {
        0..16 => *at = Value::from(word_at(what)),
        16 => *at = Value::Null,
        17 => *at = json!(true),
        18 => *at = json!(0),
        19 => *at = json!(-1),
        20 => *at = json!(u64::MAX),
        21 => *at = json!(0.5),
        22 => *at = json!([]),
        23 => *at = json!({}),
        24 => *at = json!([at.clone()]),
        25 => *at = json!({ "a": at.clone() }),
        26 => *at = Value::from("x".repeat(5_000)),
        27 => *at = Value::from(word),
        // Of a mapping or a list, one is taken out, one comes twice, or one is somebody else's.
        28..40 => take_out(at, what - 28),
        40..52 => {
            let copy = at.clone();
            put_in(at, format!("field_{word}"), copy);
        }
        _ => put_in(at, word, Value::from(word_at(what - 52))),
    }
}

fn take_out(at: &mut Value, which: u32) {
    let which = usize::try_from(which).unwrap_or_default();
    match at {
        Value::Object(map) => {
            let key = map.keys().nth(which % map.len().max(1)).cloned();
            key.and_then(|key| map.remove(&key));
        }
        Value::Array(list) if !list.is_empty() => {
            list.remove(which % list.len());
        }
        Value::Array(_) | Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => *at = Value::Null,
    }
}

fn put_in(at: &mut Value, key: String, value: Value) {
    match at {
        Value::Object(map) => {
            map.insert(key, value);
        }
        Value::Array(list) => list.push(value),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            *at = Value::Object(Map::from_iter([(key, value)]));
        }
    }
}
