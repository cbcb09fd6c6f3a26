//! Configuration: YAML files and environment variables, read into a bot's own types, with errors that name the field.

mod load;
mod secret;
mod sites;

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use serde::{Deserialize, Deserializer, de};
use serde_json::{Map, Value};

pub use load::{ConfigError, Env, load, load_all, process_env};
pub use secret::Secret;
pub use sites::{SITES_MAX, SiteRules};

use crate::dcs::{DEFAULT_NAMESPACE, Scope, check_name};

/// What the configuration of every bot has. A bot's own type takes it in with `#[serde(flatten)]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Common {
    /// The cluster, site or fleet that the bot belongs to.
    #[serde(deserialize_with = "scope_name")]
    pub scope: String,
    /// The bot's name, unique in its scope.
    #[serde(deserialize_with = "bot_name")]
    pub name: String,
    /// Where all scopes stand in etcd.
    #[serde(default = "default_namespace", deserialize_with = "namespace")]
    pub namespace: String,
    /// The way to etcd.
    #[serde(alias = "etcd")]
    pub etcd3: Etcd,
    /// The bot's own API.
    #[serde(default)]
    pub restapi: RestApi,
    /// What is written down and how.
    #[serde(default)]
    pub log: Log,
    /// It is an entry of `sites`, be it the only one: set by the reader, and by nobody else.
    #[serde(default, skip_serializing)]
    pub among_sites: bool,
    /// Fields at the top that neither the core nor the bot knows: warned of, then ignored, so that a Patroni file works.
    #[serde(flatten)]
    pub unknown: Map<String, Value>,
}

impl Common {
    /// The scope's keys.
    #[must_use]
    pub fn scope(&self) -> Scope {
        self.other_scope(&self.scope).expect("checked when the configuration was read")
    }

    /// The keys of another scope in the same namespace.
    ///
    /// # Errors
    /// If the name has characters that a key cannot hold.
    pub fn other_scope(&self, name: &str) -> Result<Scope, crate::dcs::NameError> {
        Scope::new(&self.namespace, name)
    }

    /// Where others reach the bot's API: `http://host:port`, without a path.
    #[must_use]
    pub fn api_url(&self) -> String {
        format!("http://{}", self.restapi.connect_address())
    }
}

/// The way to etcd.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Etcd {
    /// All members: `a:2379,b:2379`, or a list. `http://` in front is accepted.
    #[serde(deserialize_with = "hosts")]
    pub hosts: Vec<String>,
    /// One member, if there is only one.
    pub host: Option<String>,
    /// The user, if etcd asks for one.
    pub username: Option<String>,
    /// The user's password.
    pub password: Option<Secret>,
    /// The file that holds the user's password.
    pub password_file: Option<PathBuf>,
    /// `http`; nothing else yet.
    pub protocol: Option<String>,
}

impl Etcd {
    /// The members in `hosts`, separated by commas; no password.
    #[must_use]
    pub fn from_hosts(hosts: &str) -> Self {
        Self { hosts: split_hosts(hosts), ..Self::default() }
    }

    /// The members as `host:port`.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn endpoints(&self) -> Result<Vec<String>, String> {
        if self.protocol.as_deref().is_some_and(|p| p != "http") {
            return Err(String::from("etcd3.protocol: only `http` works so far: reach etcd through a local proxy"));
        }
        let all: Vec<&String> = self.hosts.iter().chain(&self.host).collect();
        if all.is_empty() {
            return Err(String::from("etcd3.hosts is empty: list the etcd members, for example hosts: 127.0.0.1:2379"));
        }
        all.into_iter().map(|host| endpoint(host)).collect()
    }

    /// The user and the password, if there is a user.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn user(&self) -> Result<Option<(String, Secret)>, String> {
        let Some(username) = &self.username else { return Ok(None) };
        let password = one_secret("etcd3.password", self.password.as_ref(), self.password_file.as_ref())?;
        Ok(Some((username.clone(), password)))
    }
}

/// The bot's own API.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct RestApi {
    /// Where to listen.
    #[serde(deserialize_with = "socket_address")]
    pub listen: SocketAddr,
    /// Where others reach it, if that differs.
    pub connect_address: Option<String>,
    /// Who may use the verbs that change something.
    pub authentication: Option<Credentials>,
}

impl Default for RestApi {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 8_008)), connect_address: None, authentication: None }
    }
}

impl RestApi {
    /// Where others reach the API, as `host:port`.
    #[must_use]
    pub fn connect_address(&self) -> String {
        self.connect_address.clone().unwrap_or_else(|| self.listen.to_string())
    }

    /// Checks what the types cannot: others must find us where we say that we are, and not themselves.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn check(&self) -> Result<(), String> {
        let address = self.connect_address();
        let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _port)| host);
        let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        if ip.is_ok_and(|ip| ip.is_unspecified()) {
            return Err(format!(
                "restapi.connect_address: nobody can connect to {address}: give the address at which others reach this bot, \
                 such as 10.0.0.11:{}",
                self.listen.port()
            ));
        }
        Ok(())
    }
}

/// A user name and a password, given as such or as the name of a file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Credentials {
    /// The user.
    pub username: String,
    /// The password.
    #[serde(default)]
    pub password: Option<Secret>,
    /// The file that holds the password.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
}

impl Credentials {
    /// The password, wherever it stands. `field` is the path of these credentials, for the error.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn secret(&self, field: &str) -> Result<Secret, String> {
        one_secret(&format!("{field}.password"), self.password.as_ref(), self.password_file.as_ref())
    }
}

/// What is written down and how.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Log {
    /// The least level that is written.
    pub level: LogLevel,
    /// The form of a line.
    #[serde(alias = "type")]
    pub format: LogFormat,
    /// Where to write the step log, if anywhere.
    pub step_log: Option<PathBuf>,
}

/// How much is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogLevel {
    /// What a human must look at.
    Error,
    /// What a human may want to look at.
    Warn,
    /// Changes that an operator cares about.
    #[default]
    Info,
    /// What happens inside.
    Debug,
    /// Everything.
    Trace,
}

impl<'de> Deserialize<'de> for LogLevel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let word = String::deserialize(deserializer)?;
        Ok(match word.to_ascii_uppercase().as_str() {
            "CRITICAL" | "ERROR" => Self::Error,
            "WARNING" | "WARN" => Self::Warn,
            "INFO" => Self::Info,
            "DEBUG" => Self::Debug,
            "TRACE" => Self::Trace,
            _ => return Err(de::Error::custom(format!("`{word}` is not one of ERROR, WARNING, INFO, DEBUG, TRACE"))),
        })
    }
}

impl From<LogLevel> for tracing::level_filters::LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => Self::ERROR,
            LogLevel::Warn => Self::WARN,
            LogLevel::Info => Self::INFO,
            LogLevel::Debug => Self::DEBUG,
            LogLevel::Trace => Self::TRACE,
        }
    }
}

/// The form of a log line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Plain,
    /// For machines.
    Json,
}

/// The one secret of two fields, of which exactly one must be given. `field` is the path of the first, for the error.
///
/// # Errors
/// One line that names the field and the fix.
pub fn one_secret(field: &str, secret: Option<&Secret>, file: Option<&PathBuf>) -> Result<Secret, String> {
    match (secret, file) {
        (Some(secret), None) => Ok(secret.clone()),
        (None, Some(path)) => Secret::from_file(path).map_err(|e| format!("{field}_file: {e}")),
        (None, None) => Err(format!("{field} is missing: give it, or {field}_file with the name of a file")),
        (Some(_), Some(_)) => Err(format!("{field} and {field}_file are both given: remove one")),
    }
}

fn default_namespace() -> String {
    String::from(DEFAULT_NAMESPACE)
}

fn scope_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    checked(deserializer, "scope")
}

fn bot_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    checked(deserializer, "name")
}

fn checked<'de, D: Deserializer<'de>>(deserializer: D, field: &'static str) -> Result<String, D::Error> {
    let name = String::deserialize(deserializer)?;
    check_name(field, &name).map_err(de::Error::custom)?;
    Ok(name)
}

fn namespace<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let namespace = String::deserialize(deserializer)?;
    Scope::new(&namespace, "any").map_err(de::Error::custom)?;
    Ok(namespace.trim_matches('/').to_owned())
}

/// Reads an address to listen on.
///
/// # Errors
/// If it is none.
pub fn socket_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(deserializer)?;
    let parsed = match text.strip_prefix('*') {
        Some(port) => format!("0.0.0.0{port}").parse(),
        None => text.replace("localhost", "127.0.0.1").parse(),
    };
    parsed.map_err(|_unparsed| {
        de::Error::custom(format!("`{text}` is not an IP address with a port: write it like 127.0.0.1:8008"))
    })
}

fn hosts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected `host:port,host:port` or a list of `host:port`")]
    enum Hosts {
        Line(String),
        List(Vec<String>),
    }
    Ok(match Hosts::deserialize(deserializer)? {
        Hosts::Line(line) => split_hosts(&line),
        Hosts::List(list) => list,
    })
}

fn split_hosts(line: &str) -> Vec<String> {
    line.split(',').map(str::trim).filter(|h| !h.is_empty()).map(str::to_owned).collect()
}

/// One member as `host:port`; etcd's own port if there is none.
fn endpoint(host: &str) -> Result<String, String> {
    let bad = || format!("etcd3.hosts: `{host}` is not host:port: write it like 10.0.0.1:2379");
    if host.starts_with("https://") {
        return Err(String::from("etcd3.hosts: https does not work yet: reach etcd through a local proxy"));
    }
    let bare = host.strip_prefix("http://").unwrap_or(host).trim_end_matches('/');
    let with_port = if bare.rsplit_once(':').is_some_and(|(h, _)| !h.is_empty() && !bare.ends_with(']')) {
        bare.to_owned()
    } else {
        format!("{bare}:2379")
    };
    let uri: hyper::Uri = with_port.parse().map_err(|_invalid| bad())?;
    match (uri.host(), uri.port_u16()) {
        (Some(host), Some(_)) if !host.is_empty() => Ok(with_port),
        _ => Err(bad()),
    }
}
