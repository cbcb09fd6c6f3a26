//! What the operator decided: the bot's own settings, fixed at start, and the cluster's, which live in etcd.

use std::collections::BTreeMap;

use bots_core::{dcs::Scope, machine::Span};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The shortest lease: etcd rounds shorter ones up to it.
pub const TTL_MIN: Span = Span::from_secs(2);
/// The lease unless told otherwise: three renewals fit, and a lost node costs a client five seconds.
pub const TTL_DEFAULT: Span = Span::from_secs(5);
/// How much WAL a replica may lack and still lead, unless told otherwise (Patroni's figure).
pub(super) const MAXIMUM_LAG_DEFAULT: u64 = 1_048_576;
/// How long a crashed primary may take to come back in place, unless told otherwise (Patroni's figure).
pub(super) const PRIMARY_START_TIMEOUT_DEFAULT: Span = Span::from_secs(300);

/// Tags of a member.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Tags {
    /// It never leads.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub nofailover: bool,
    /// All others, passed on as they are.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

/// The bot's own settings.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Settings {
    /// The cluster.
    pub scope: Scope,
    /// The member.
    pub name: String,
    /// Tells this process from any other of the same name.
    pub instance: String,
    /// The version of the bot.
    pub version: String,
    /// Where the bot's API answers.
    pub api_url: String,
    /// Where the server takes connections, without a password.
    pub conn_url: String,
    /// Wall-clock milliseconds at the machine's time zero; for people to read.
    pub epoch_unix_ms: u64,
    /// The member's tags.
    pub tags: Tags,
    /// `postgresql.conf` parameters of this member alone; they win over the cluster's.
    pub parameters: BTreeMap<String, String>,
    /// What a new cluster's `config` key begins with.
    pub bootstrap_config: Value,
    /// Rewind a diverged data directory rather than cloning it anew.
    pub use_pg_rewind: bool,
    /// Delete a data directory that cannot be rewound instead of keeping it beside the new one.
    pub remove_data_directory_on_rewind_failure: bool,
}

/// The cluster's settings, from the `config` key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Dynamic {
    /// The length of every member's lease.
    pub ttl: Span,
    /// How much WAL a replica may lack and still lead, in bytes.
    pub maximum_lag_on_failover: u64,
    /// How long a crashed primary may take to come back in place; zero fails over at once.
    pub primary_start_timeout: Span,
    /// `postgresql.conf` parameters of all members.
    pub parameters: BTreeMap<String, String>,
    /// Fields that could not be used, one line each.
    pub complaints: Vec<String>,
}

impl Default for Dynamic {
    fn default() -> Self {
        Self {
            ttl: TTL_DEFAULT,
            maximum_lag_on_failover: MAXIMUM_LAG_DEFAULT,
            primary_start_timeout: PRIMARY_START_TIMEOUT_DEFAULT,
            parameters: BTreeMap::new(),
            complaints: Vec::new(),
        }
    }
}

impl Dynamic {
    /// Reads the `config` key. A field that cannot be used keeps its default and leaves a complaint.
    #[must_use]
    pub fn from_value(config: &Value) -> Self {
        let mut out = Self::default();
        if let Some(secs) = out.whole_number(config, "ttl") {
            let ttl = Span::from_secs(secs);
            if ttl < TTL_MIN {
                out.complaints.push(format!("config: ttl is {secs}: etcd grants no lease below 2 s, using 2"));
            }
            out.ttl = ttl.max(TTL_MIN);
        }
        if let Some(bytes) = out.whole_number(config, "maximum_lag_on_failover") {
            out.maximum_lag_on_failover = bytes;
        }
        let timeout = ["primary_start_timeout", "master_start_timeout"];
        if let Some(secs) = timeout.iter().find_map(|field| out.whole_number(config, field)) {
            out.primary_start_timeout = Span::from_secs(secs);
        }
        if let Some(Value::Object(map)) = config.pointer("/postgresql/parameters") {
            out.parameters = map.iter().filter_map(|(k, v)| Some((k.clone(), parameter_text(v)?))).collect();
        }
        out
    }

    fn whole_number(&mut self, config: &Value, field: &str) -> Option<u64> {
        let value = config.get(field)?;
        let number = bots_core::wire::config::whole_number(value);
        if number.is_none() && !value.is_null() {
            self.complaints.push(format!("config: {field} is {value}: use a whole number that is not negative"));
        }
        number
    }
}

/// A parameter's value as `postgresql.conf` wants it, unquoted; nothing for what has no such form.
#[must_use]
pub fn parameter_text(value: &Value) -> Option<String> {
    match value {
        Value::Bool(on) => Some(String::from(if *on { "on" } else { "off" })),
        Value::Number(n) => Some(n.to_string()),
        Value::String(s) => Some(s.clone()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// The parameters that replication, rewinding and failing over rest on; neither the cluster nor a member may change them.
const ENFORCED: &[(&str, &str)] = &[("wal_log_hints", "on"), ("hot_standby", "on"), ("full_page_writes", "on")];

/// The parameters that a cluster has unless it says otherwise.
const DEFAULTS: &[(&str, &str)] = &[
    ("wal_level", "replica"),
    ("max_connections", "100"),
    ("max_wal_senders", "10"),
    ("max_replication_slots", "10"),
    ("wal_keep_size", "128MB"),
    // A standby notices a dead primary by the closed connection; a silent one, by this.
    ("wal_receiver_timeout", "5s"),
    ("wal_sender_timeout", "5s"),
    // How soon a replica asks again for the stream of a new primary.
    ("wal_retrieve_retry_interval", "100ms"),
];

/// All parameters for `postgresql.conf`: defaults, then the cluster's, then the member's, then what is enforced.
#[must_use]
pub(super) fn effective_parameters(settings: &Settings, dynamic: &Dynamic) -> BTreeMap<String, String> {
    let own = |list: &[(&str, &str)]| -> Vec<(String, String)> {
        list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    };
    let mut all: BTreeMap<String, String> = own(DEFAULTS).into_iter().collect();
    all.extend(dynamic.parameters.clone());
    all.extend(settings.parameters.clone());
    all.extend(own(ENFORCED));
    all.insert(String::from("cluster_name"), settings.scope.name().to_owned());
    all
}

#[cfg(test)]
mod tests {
    use bots_core::machine::Span;
    use serde_json::json;

    use super::Dynamic;

    #[test]
    fn a_field_that_cannot_be_used_is_named_and_keeps_its_default() {
        let read =
            Dynamic::from_value(&json!({"ttl": 1, "maximum_lag_on_failover": "much", "primary_start_timeout": "7"}));
        assert_eq!(read.ttl, Span::from_secs(2));
        assert_eq!(read.maximum_lag_on_failover, super::MAXIMUM_LAG_DEFAULT);
        assert_eq!(read.primary_start_timeout, Span::from_secs(7));
        assert_eq!(read.complaints.len(), 2);
        assert!(read.complaints.iter().any(|c| c.contains("maximum_lag_on_failover")));
    }

    #[test]
    fn parameters_are_read_as_postgres_writes_them() {
        let read =
            Dynamic::from_value(&json!({"postgresql": {"parameters": {"fsync": true, "work_mem": "4MB", "x": 3}}}));
        let pairs: Vec<(&str, &str)> = read.parameters.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(pairs, [("fsync", "on"), ("work_mem", "4MB"), ("x", "3")]);
    }
}
