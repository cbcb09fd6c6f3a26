//! What the operator decided for this member: the bot's own settings. The cluster's are in [`super::dynamic`].

use std::collections::BTreeMap;

use bots_core::{dcs::Scope, machine::Span, wire::tags};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::watchdog::Watchdog;

/// The shortest lease: etcd rounds shorter ones up to it.
pub const TTL_MIN: Span = Span::from_secs(2);
/// The lease unless told otherwise: three renewals fit, and a lost node costs a client five seconds.
pub const TTL_DEFAULT: Span = Span::from_secs(5);

/// Tags of a member, as its configuration has them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Tags(pub Map<String, Value>);

impl Tags {
    /// It never leads.
    #[must_use]
    pub fn nofailover(&self) -> bool {
        tags::nofailover(&self.0)
    }

    /// Who of several members that hold the same goes first: the greater.
    #[must_use]
    pub fn failover_priority(&self) -> u32 {
        tags::failover_priority(&self.0)
    }

    /// Whether a tag is there and says yes.
    #[must_use]
    pub fn is_set(&self, name: &str) -> bool {
        tags::is_set(&self.0, name)
    }
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
    /// Who may connect, as this member's own configuration has it; it wins over the cluster's.
    pub rules: Rules,
    /// What a new cluster's `config` key begins with.
    pub bootstrap_config: Value,
    /// Rewind a diverged data directory rather than cloning it anew, if this member's own configuration says.
    pub use_pg_rewind: Option<bool>,
    /// When a data directory that does not follow is deleted instead of being kept beside the new one, likewise.
    pub remove_data: RemoveData,
    /// What resets the machine if it stands still.
    pub watchdog: Watchdog,
}

/// The settings that can change in a bot that runs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Live {
    /// See [`Settings::tags`].
    pub tags: Tags,
    /// See [`Settings::parameters`].
    pub parameters: BTreeMap<String, String>,
    /// See [`Settings::rules`].
    pub rules: Rules,
    /// See [`Settings::use_pg_rewind`].
    pub use_pg_rewind: Option<bool>,
    /// See [`Settings::remove_data`].
    pub remove_data: RemoveData,
}

impl Settings {
    /// What of them can change in a bot that runs.
    #[must_use]
    pub fn live(self) -> Live {
        Live {
            tags: self.tags,
            parameters: self.parameters,
            rules: self.rules,
            use_pg_rewind: self.use_pg_rewind,
            remove_data: self.remove_data,
        }
    }

    /// Takes over what can change in a bot that runs.
    pub(super) fn go_by(&mut self, live: Live) {
        self.tags = live.tags;
        self.parameters = live.parameters;
        self.rules = live.rules;
        self.use_pg_rewind = live.use_pg_rewind;
        self.remove_data = live.remove_data;
    }
}

/// The two leaves to delete data, by Patroni's names. Who has given neither keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RemoveData {
    /// `remove_data_directory_on_rewind_failure`: what a rewind has failed on.
    pub on_rewind_failure: Option<bool>,
    /// `remove_data_directory_on_diverged_timelines`: what would have to be rewound, where rewinding is off.
    pub on_diverged_timelines: Option<bool>,
}

impl RemoveData {
    /// Each leave as it is said here, or else there.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            on_rewind_failure: self.on_rewind_failure.or(other.on_rewind_failure),
            on_diverged_timelines: self.on_diverged_timelines.or(other.on_diverged_timelines),
        }
    }

    /// Whether data may be deleted after a rewind that failed, or else where none is tried.
    #[must_use]
    pub fn allows(self, rewind_failed: bool) -> bool {
        let leave = if rewind_failed { self.on_rewind_failure } else { self.on_diverged_timelines };
        leave.unwrap_or(false)
    }
}

/// Lines of `pg_hba.conf` and `pg_ident.conf`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Rules {
    /// Who may connect.
    pub hba: Vec<String>,
    /// Who is whom.
    pub ident: Vec<String>,
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

#[cfg(test)]
mod tests {
    use super::RemoveData;

    #[test]
    fn each_leave_to_delete_data_counts_for_its_own_case_alone() {
        for (on_rewind_failure, on_diverged_timelines) in
            [(None, None), (Some(true), None), (None, Some(true)), (Some(true), Some(true))]
        {
            let leave = RemoveData { on_rewind_failure, on_diverged_timelines };
            assert_eq!(leave.allows(true), on_rewind_failure.is_some(), "after a rewind that failed: {leave:?}");
            assert_eq!(leave.allows(false), on_diverged_timelines.is_some(), "without a rewind: {leave:?}");
        }
    }

    #[test]
    fn a_member_that_forbids_one_deletion_still_goes_by_the_cluster_in_the_other() {
        let own = RemoveData { on_rewind_failure: Some(false), on_diverged_timelines: None };
        let all = RemoveData { on_rewind_failure: Some(true), on_diverged_timelines: Some(true) };
        assert_eq!(own.or(all), RemoveData { on_rewind_failure: Some(false), on_diverged_timelines: Some(true) });
    }
}
