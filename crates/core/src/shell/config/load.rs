//! Reading: files, then the environment over them, then the caller's type, with the field's path in every error.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{Common, sites};

/// Environment variables, as names and values.
pub type Env = [(String, String)];

/// The largest configuration file. Ten thousand lines fit; a wrong path to a disk image does not.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// Sections that an environment variable may name even if no file mentions them, as paths.
const SECTIONS: &[&str] = &[
    "bootstrap",
    "bootstrap.dcs",
    "bootstrap.dcs.postgresql",
    "cdn",
    "content",
    "database",
    "etcd",
    "etcd3",
    "git",
    "log",
    "postgres",
    "postgresql",
    "postgresql.authentication",
    "postgresql.authentication.replication",
    "postgresql.authentication.rewind",
    "postgresql.authentication.superuser",
    "proxy",
    "push",
    "restapi",
    "restapi.authentication",
    "scaling",
    "tags",
    "web",
];

/// Fields that begin like a section but are none.
const FIELDS: &[&str] = &["web_scopes"];

/// Fields that are text as they stand in a variable, whatever YAML would make of a `#`, a quote or a number.
const SECRETS: &[&str] = &["password", "secret", "token"];

/// Patroni's short names.
const SHORT_NAMES: &[(&str, &str)] = &[
    ("superuser_", "postgresql_authentication_superuser_"),
    ("replication_", "postgresql_authentication_replication_"),
    ("rewind_", "postgresql_authentication_rewind_"),
    ("restapi_username", "restapi_authentication_username"),
    ("restapi_password", "restapi_authentication_password"),
];

/// Why a configuration cannot be used: one line that says what and how to fix it.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file or directory that cannot be read.
    #[error("cannot read the configuration {}: {source}", .path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// What failed.
        source: io::Error,
    },
    /// No YAML.
    #[error("{place} is not valid YAML: {message}")]
    Yaml {
        /// The file or variable.
        place: String,
        /// Where and what.
        message: String,
    },
    /// YAML, but of the wrong shape at the top.
    #[error("{place} must be a mapping of fields such as `scope: main`")]
    Shape {
        /// The file or variable.
        place: String,
    },
    /// A field that is missing, misspelt or of the wrong type.
    #[error("configuration field {field}: {message}: {fix}")]
    Field {
        /// The path of the field.
        field: String,
        /// What is wrong with it.
        message: String,
        /// What to do.
        fix: String,
    },
}

/// The process's environment.
#[must_use]
pub fn process_env() -> Vec<(String, String)> {
    std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))).collect()
}

/// Reads a file or a directory of `*.yml` and `*.yaml`, merged in the order of their names, lays the environment over it
/// and reads the result as `T`.
///
/// Every field can come from the environment as `BOT_` or `PATRONI_` and its path in capitals with underscores
/// (`BOT_ETCD3_HOSTS`), the whole document as `BOT_CONFIGURATION`. The environment wins over files, `BOT_` over `PATRONI_`.
///
/// # Errors
/// One line that names the file or the field, and the fix.
pub fn load<T: DeserializeOwned>(path: Option<&Path>, env: &Env) -> Result<T, ConfigError> {
    load_all(path, env, None).map(|mut all| all.pop().expect("a document without sites is one bot's"))
}

/// The same for a document that may hold several bots, as a list of `sites`.
///
/// # Errors
/// One line that names the file or the field, and the fix.
pub fn load_all<T: DeserializeOwned>(
    path: Option<&Path>,
    env: &Env,
    rules: Option<&sites::SiteRules>,
) -> Result<Vec<T>, ConfigError> {
    let mut document = Value::Object(Map::new());
    for file in path.map(files).transpose()?.unwrap_or_default() {
        let text = read(&file)?;
        merge(&mut document, parse(&file.display().to_string(), &text)?);
    }
    let mut fields = BTreeMap::new();
    for prefix in ["PATRONI_", "BOT_"] {
        for (name, value) in env.iter().filter_map(|(k, v)| Some((k.strip_prefix(prefix)?, v))) {
            if name == "CONFIGURATION" {
                merge(&mut document, parse(&format!("{prefix}CONFIGURATION"), value)?);
            } else {
                fields.insert(name.to_ascii_lowercase(), value.clone());
            }
        }
    }
    let mut overlay: Vec<Overlay> =
        fields.into_iter().map(|(name, text)| Overlay::new(&document, name, text)).collect();
    loop {
        let mut whole = document.clone();
        overlay.iter().for_each(|o| o.apply(&mut whole));
        let parts = sites::parts(&whole, rules)?;
        // `flatten` loses the paths of the common fields, so they are read on their own first.
        let read = |part: &sites::Part| {
            let read = typed::<Common>(&part.document).and_then(|_common| typed::<T>(&part.document));
            read.map_err(|(field, message)| (part.field(&field, rules), field, message))
        };
        let (place, field, message) = match parts.iter().map(read).collect() {
            Ok(configs) => return Ok(configs),
            Err(bad) => bad,
        };
        // A name such as `123` or `no` was meant as text; the type knows better than YAML.
        match overlay.iter_mut().find(|o| !o.as_text && o.path.join(".") == field) {
            Some(misread) => misread.as_text = true,
            None => {
                let fix = fix_for(&field, &message);
                return Err(ConfigError::Field { field: place, message, fix });
            }
        }
    }
}

/// A value from the environment and its place in the document.
struct Overlay {
    path: Vec<String>,
    text: String,
    as_text: bool,
}

impl Overlay {
    fn new(document: &Value, name: String, text: String) -> Self {
        let name = SHORT_NAMES
            .iter()
            .find_map(|(short, long)| Some(format!("{long}{}", name.strip_prefix(short)?)))
            .unwrap_or(name);
        let path = place(document, &name);
        let as_text = path.last().is_some_and(|field| SECRETS.contains(&field.as_str()));
        Self { path, text, as_text }
    }

    fn apply(&self, document: &mut Value) {
        let text = || Value::String(self.text.clone());
        let value = if self.as_text { text() } else { serde_saphyr::from_str(&self.text).unwrap_or_else(|_| text()) };
        let Some((last, sections)) = self.path.split_last() else { return };
        let mut at = document;
        for section in sections {
            at = object(at).entry(section.clone()).or_insert_with(|| Value::Object(Map::new()));
        }
        object(at).insert(last.clone(), value);
    }
}

/// The value as an object; whatever else stood there gives way.
fn object(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut().expect("made one above")
}

/// The path that a variable's name means: as deep into known sections as it fits, the rest is the field.
fn place(document: &Value, name: &str) -> Vec<String> {
    let mut path: Vec<String> = Vec::new();
    let mut rest = name;
    let mut here = Some(document);
    while !(path.is_empty() && FIELDS.contains(&rest)) {
        let section = rest.match_indices('_').map(|(i, _)| &rest[..i]).rev().find(|candidate| {
            let known = path.iter().map(String::as_str).chain([*candidate]).collect::<Vec<_>>().join(".");
            SECTIONS.contains(&known.as_str()) || here.and_then(|h| h.get(candidate)).is_some_and(Value::is_object)
        });
        let Some(section) = section else { break };
        here = here.and_then(|h| h.get(section));
        path.push(section.to_owned());
        rest = &rest[section.len() + 1..];
    }
    path.push(rest.to_owned());
    path
}

fn typed<T: DeserializeOwned>(value: &Value) -> Result<T, (String, String)> {
    serde_path_to_error::deserialize(value).map_err(|e| (e.path().to_string(), e.inner().to_string()))
}

fn fix_for(field: &str, message: &str) -> String {
    if let Some(missing) = message.strip_prefix("missing field `").and_then(|m| m.strip_suffix('`')) {
        let path = if field == "." { missing.to_owned() } else { format!("{field}.{missing}") };
        return format!("add it to the file or set BOT_{}", path.replace('.', "_").to_ascii_uppercase());
    }
    if message.contains("expected a string") {
        return String::from("put the value in quotes");
    }
    String::from("correct the value")
}

fn files(path: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    if !fs::metadata(path).map_err(failed)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(path).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        if file.extension().is_some_and(|e| e == "yml" || e == "yaml") {
            found.push(file);
        }
    }
    found.sort();
    if found.is_empty() {
        return Err(failed(io::Error::other("the directory has no *.yml or *.yaml")));
    }
    Ok(found)
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    let len = fs::metadata(path).map_err(failed)?.len();
    if len > FILE_BYTES_MAX {
        return Err(failed(io::Error::other(format!(
            "{len} bytes are more than {FILE_BYTES_MAX}: is it the right file?"
        ))));
    }
    fs::read_to_string(path).map_err(failed)
}

fn parse(place: &str, text: &str) -> Result<Value, ConfigError> {
    let parsed = serde_saphyr::from_str::<Value>(text).map_err(|error| {
        let message = error.without_snippet().to_string();
        ConfigError::Yaml { place: place.to_owned(), message: message.lines().collect::<Vec<_>>().join(" ") }
    })?;
    match parsed {
        Value::Object(_) => Ok(parsed),
        Value::Null => Ok(Value::Object(Map::new())),
        _ => Err(ConfigError::Shape { place: place.to_owned() }),
    }
}

/// Lays `over` on `base`: mappings are merged, anything else is replaced.
pub(super) fn merge(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                merge(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (base, over) => *base = over,
    }
}
