//! The cluster's settings, from the `config` key: read, applied live, and never ignored in silence.

use std::collections::BTreeMap;

use bots_core::{
    machine::Span,
    wire::{
        config::{SyncMode, is_unlimited, lines, sync_mode, unclear, whole_number},
        tags::yes_or_no,
    },
};
use serde::Serialize;
use serde_json::{Map, Value};

use super::{
    settings::{RemoveData, Rules, Settings, TTL_DEFAULT, TTL_MIN, parameter_text},
    slots::SlotRules,
};

/// How much WAL a replica may lack and still lead, unless told otherwise (Patroni's figure).
const MAXIMUM_LAG_DEFAULT: u64 = 1_048_576;
/// How long a crashed primary may take to come back in place, unless told otherwise (Patroni's figure).
const PRIMARY_START_TIMEOUT_DEFAULT: Span = Span::from_secs(300);
/// The `history` key never has more lines, so that it stays far below etcd's limit of 1.5 MiB a value.
const HISTORY_LINES_MAX: usize = 1_000;

/// The cluster's settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Dynamic {
    /// The length of every member's lease.
    pub ttl: Span,
    /// How much WAL a replica may lack and still lead, in bytes.
    pub maximum_lag_on_failover: u64,
    /// How long a crashed primary may take to come back in place; zero fails over at once.
    pub primary_start_timeout: Span,
    /// How long a primary may take to stop in good order before it is stopped at once; nothing for our own patience.
    pub primary_stop_timeout: Option<Span>,
    /// How long a primary may answer nobody, or have no disk to write to, while another could lead; zero is for ever, and nothing
    /// is what the bot derives from `ttl`.
    pub primary_hung_timeout: Option<Span>,
    /// Who is not on the cluster's newest timeline does not lead.
    pub check_timeline: bool,
    /// The bots keep their hands off: nobody takes the lead, starts or stops a server but on an operator's word.
    pub pause: bool,
    /// Without etcd, the primary leads on while enough members vouch for it.
    pub failsafe_mode: bool,
    /// So many of the youngest lines are kept in the `history` key.
    pub max_timelines_history: usize,
    /// Which standbys a commit waits for.
    pub synchronous_mode: SyncMode,
    /// Rather no commit than one that no standby has.
    pub synchronous_mode_strict: bool,
    /// How many standbys a commit waits for, as far as there are so many; at least one.
    pub synchronous_node_count: usize,
    /// How much WAL a standby may lack and still be waited for, in bytes; no matter how much if there is none.
    pub maximum_lag_on_syncnode: Option<u64>,
    /// In quorum mode, voters take the lock away from a leader that they see gone, before its lease ends.
    pub takeover: bool,
    /// `postgresql.conf` parameters of all members.
    pub parameters: BTreeMap<String, String>,
    /// Who may connect, where a member does not say.
    pub rules: Rules,
    /// Rewind rather than copy anew, where a member does not say.
    pub use_pg_rewind: Option<bool>,
    /// When data that does not follow is deleted, where a member does not say.
    pub remove_data: RemoveData,
    /// Which replication slots there shall be.
    pub slots: SlotRules,
    /// Fields that could not be used, one line each.
    pub complaints: Vec<String>,
    /// The key has been read, and not only what a new cluster would begin with.
    is_known: bool,
}

impl Default for Dynamic {
    fn default() -> Self {
        Self {
            ttl: TTL_DEFAULT,
            maximum_lag_on_failover: MAXIMUM_LAG_DEFAULT,
            primary_start_timeout: PRIMARY_START_TIMEOUT_DEFAULT,
            primary_stop_timeout: None,
            primary_hung_timeout: None,
            check_timeline: false,
            pause: false,
            failsafe_mode: false,
            max_timelines_history: HISTORY_LINES_MAX,
            synchronous_mode: SyncMode::Off,
            synchronous_mode_strict: false,
            synchronous_node_count: 1,
            maximum_lag_on_syncnode: None,
            takeover: false,
            parameters: BTreeMap::new(),
            rules: Rules::default(),
            use_pg_rewind: None,
            remove_data: RemoveData::default(),
            slots: SlotRules::default(),
            complaints: Vec::new(),
            is_known: false,
        }
    }
}

/// What is acted on.
const ACTED_ON: &[&str] = &[
    "ttl",
    "maximum_lag_on_failover",
    "primary_start_timeout",
    "master_start_timeout",
    "primary_stop_timeout",
    "master_stop_timeout",
    "primary_hung_timeout",
    "check_timeline",
    "pause",
    "failsafe_mode",
    "max_timelines_history",
    "maximum_lag_on_syncnode",
    "postgresql",
    "slots",
    "ignore_slots",
    "member_slots_ttl",
    "synchronous_mode",
    "synchronous_mode_strict",
    "synchronous_node_count",
    "takeover",
    // The bots react to events: there is no loop to wait for, and every question to etcd has a deadline of its own.
    "loop_wait",
    "retry_timeout",
];
/// What Patroni knows and we do not act on yet.
const LATER: &[&str] = &["primary_race_backoff", "standby_cluster"];
/// The same below `postgresql`.
const POSTGRESQL_ACTED_ON: &[&str] = &[
    "parameters",
    "pg_hba",
    "pg_ident",
    "remove_data_directory_on_diverged_timelines",
    "remove_data_directory_on_rewind_failure",
    "use_pg_rewind",
    "use_slots",
];
/// See [`LATER`]; they may stand here as they may in a member's own configuration.
const POSTGRESQL_LATER: &[&str] = &[
    "basebackup",
    "before_stop",
    "callbacks",
    "create_replica_method",
    "create_replica_methods",
    "pg_ctl_timeout",
    "pre_promote",
    "recovery_conf",
];

impl Dynamic {
    /// Reads what a new cluster's `config` key begins with. A field that cannot be used leaves a complaint.
    #[must_use]
    pub fn from_value(config: &Value) -> Self {
        Self { is_known: false, ..Self::default().changed_to(config) }
    }

    /// Reads the `config` key as it has become. A field that cannot be used leaves a complaint. A number keeps its default; what
    /// nobody can make out elsewhere leaves what was in force: a slip of the pen must not make commits wait for nobody, nor open
    /// the server to everybody.
    #[must_use]
    pub fn changed_to(&self, config: &Value) -> Self {
        let mut out = Self { is_known: true, complaints: complaints_of(config), ..Self::default() };
        if let Some(secs) = out.number(config, "ttl") {
            let ttl = Span::from_secs(secs);
            if ttl < TTL_MIN {
                out.complaints.push(format!("config: ttl is {secs}: etcd grants no lease below 2 s, using 2"));
            }
            out.ttl = ttl.max(TTL_MIN);
        }
        if let Some(bytes) = out.number(config, "maximum_lag_on_failover") {
            out.maximum_lag_on_failover = bytes;
        }
        let timeout = ["primary_start_timeout", "master_start_timeout"];
        if let Some(secs) = timeout.iter().find_map(|field| out.number(config, field)) {
            out.primary_start_timeout = Span::from_secs(secs);
        }
        let timeout = ["primary_stop_timeout", "master_stop_timeout"];
        let timeout = timeout.iter().find_map(|field| out.number(config, field)).filter(|secs| *secs > 0);
        out.primary_stop_timeout = timeout.map(Span::from_secs);
        out.primary_hung_timeout = out.number(config, "primary_hung_timeout").map(Span::from_secs);
        out.check_timeline = says_yes(config, "check_timeline", self.check_timeline);
        // Zero keeps all, as far as they fit.
        if let Some(lines) = out.number(config, "max_timelines_history").filter(|lines| *lines > 0) {
            out.max_timelines_history = usize::try_from(lines).unwrap_or(usize::MAX).min(HISTORY_LINES_MAX);
        }
        out.slots = self.slots.changed_to(config, &mut out.complaints);
        out.pause = says_yes(config, "pause", self.pause);
        out.read_synchronous(config, self);
        out.failsafe_mode = says_yes(config, "failsafe_mode", self.failsafe_mode);
        match config.get("postgresql") {
            Some(Value::Object(map)) => out.read_postgresql(map, self),
            None | Some(Value::Null) => {}
            Some(Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_)) => out.keep_postgresql(self),
        }
        if let Value::Object(map) = config {
            out.complain("", map, ACTED_ON, LATER);
        }
        out
    }

    /// Whether the key has been read; before, this is what a new cluster would begin with.
    #[must_use]
    pub const fn is_known(&self) -> bool {
        self.is_known
    }

    fn read_synchronous(&mut self, config: &Value, last: &Self) {
        let mode = config.get("synchronous_mode").unwrap_or(&Value::Null);
        self.synchronous_mode = sync_mode(mode).unwrap_or_else(|| {
            self.complaints.push(format!("config: synchronous_mode is {mode}: use off, on or quorum"));
            last.synchronous_mode
        });
        self.takeover = says_yes(config, "takeover", last.takeover);
        self.synchronous_mode_strict = says_yes(config, "synchronous_mode_strict", last.synchronous_mode_strict);
        if let Some(count) = self.number(config, "synchronous_node_count") {
            self.synchronous_node_count = usize::try_from(count).unwrap_or(usize::MAX).max(1);
        }
        if !config.get("maximum_lag_on_syncnode").is_none_or(is_unlimited) {
            self.maximum_lag_on_syncnode = self.number(config, "maximum_lag_on_syncnode");
        }
    }

    fn read_postgresql(&mut self, map: &Map<String, Value>, last: &Self) {
        match map.get("parameters") {
            Some(Value::Object(parameters)) => self.read_parameters(parameters),
            None | Some(Value::Null) => {}
            Some(Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_)) => {
                self.parameters.clone_from(&last.parameters);
            }
        }
        let given = |field: &str| map.get(field).filter(|value| !value.is_null());
        let hba = given("pg_hba").map_or_else(|| Some(Vec::new()), lines);
        let ident = given("pg_ident").map_or_else(|| Some(Vec::new()), lines);
        self.rules.hba = hba.unwrap_or_else(|| last.rules_in_doubt().hba);
        self.rules.ident = ident.unwrap_or_else(|| last.rules.ident.clone());
        let yes = |field: &str, last: Option<bool>| given(field).and_then(|value| yes_or_no(value).or(last));
        self.use_pg_rewind = yes("use_pg_rewind", last.use_pg_rewind);
        let RemoveData { on_rewind_failure, on_diverged_timelines } = last.remove_data;
        self.remove_data = RemoveData {
            on_rewind_failure: yes("remove_data_directory_on_rewind_failure", on_rewind_failure),
            on_diverged_timelines: yes("remove_data_directory_on_diverged_timelines", on_diverged_timelines),
        };
        self.complain("postgresql.", map, POSTGRESQL_ACTED_ON, POSTGRESQL_LATER);
    }

    fn read_parameters(&mut self, parameters: &Map<String, Value>) {
        for (name, value) in parameters.iter().filter(|(_, value)| !value.is_null()) {
            match parameter_text(value) {
                Some(text) => _ = self.parameters.insert(name.clone(), text),
                None => self.complaints.push(format!(
                    "config: postgresql.parameters.{name} is {value}: use a text, a number, true or false"
                )),
            }
            self.complain_of_parameter(name);
        }
    }

    /// Goes on with all of the section as it was.
    fn keep_postgresql(&mut self, last: &Self) {
        self.parameters.clone_from(&last.parameters);
        self.rules = last.rules_in_doubt();
        self.use_pg_rewind = last.use_pg_rewind;
        self.remove_data = last.remove_data;
    }

    /// What goes on while nobody can make out who may connect. A bot that has just begun does not know what was in force, and
    /// must not let everybody in.
    fn rules_in_doubt(&self) -> Rules {
        let mut rules = self.rules.clone();
        if rules.hba.is_empty() && !self.is_known {
            rules.hba.push(String::from(IN_DOUBT));
        }
        rules
    }

    fn complain_of_parameter(&mut self, name: &str) {
        if name == STANDBY_NAMES && self.synchronous_mode != SyncMode::Off {
            let why = "has no effect: synchronous_mode decides it";
            self.complaints.push(format!("config: postgresql.parameters.{name} {why}"));
        }
        if let Some((_, value)) = ENFORCED.iter().find(|(enforced, _)| *enforced == name) {
            self.complaints.push(format!("config: postgresql.parameters.{name} has no effect: it is always {value}"));
        } else if LOCAL.contains(&name) {
            self.complaints
                .push(format!("config: postgresql.parameters.{name} has no effect: each member's own file decides it"));
        }
    }

    /// Names what has no effect. What is switched off would have none anyway.
    fn complain(&mut self, section: &str, map: &Map<String, Value>, acted_on: &[&str], later: &[&str]) {
        let off = |value: &Value| match value {
            Value::Null => true,
            Value::Object(map) => map.is_empty(),
            Value::Array(list) => list.is_empty(),
            Value::String(text) => matches!(text.as_str(), "off" | "false" | "no" | ""),
            Value::Bool(on) => !on,
            Value::Number(_) => false,
        };
        for (field, _) in map.iter().filter(|(_, value)| !off(value)) {
            if later.contains(&field.as_str()) {
                self.complaints.push(format!("config: {section}{field} is known and has no effect yet"));
            } else if !acted_on.contains(&field.as_str()) {
                self.complaints.push(format!("config: {section}{field} has no effect: nobody knows this field"));
            }
        }
    }

    fn number(&mut self, config: &Value, field: &str) -> Option<u64> {
        let value = config.get(field)?;
        let number = whole_number(value);
        if number.is_none() && !value.is_null() {
            self.complaints.push(format!("config: {field} is {value}: use a whole number that is not negative"));
        }
        number
    }
}

/// What cannot be made out, and is not complained of where it is read.
fn complaints_of(config: &Value) -> Vec<String> {
    unclear(config).into_iter().map(|misfit| format!("config: {misfit}")).collect()
}

/// Whether a field says yes; `last` if nobody can make it out.
fn says_yes(config: &Value, field: &str, last: bool) -> bool {
    config.get(field).is_some_and(|value| yes_or_no(value).unwrap_or(last))
}

/// The one line of rules that cannot be made out: nobody but the bots connects until they can.
pub const IN_DOUBT: &str = "# nobody else: the cluster's rules cannot be made out";

/// What only a member's own configuration may say.
const LOCAL: &[&str] =
    &["cluster_name", "config_file", "data_directory", "hba_file", "ident_file", "listen_addresses", "port"];

/// The parameters that replication, rewinding and failing over rest on; neither the cluster nor a member may change them.
const ENFORCED: &[(&str, &str)] = &[("wal_log_hints", "on"), ("hot_standby", "on"), ("full_page_writes", "on")];

/// Which standbys commits wait for; ours in the synchronous modes.
pub const STANDBY_NAMES: &str = "synchronous_standby_names";

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

/// Where voters take the lock of a leader that is gone, one that falls silent is to be seen soon. Its bot is asked as well before anything
/// is done, so that a stream that is cut for nothing costs no more than a new connection; and what a sender owes within this time needs
/// no disk.
const SILENCE_OF_A_LEADER: (&str, &str) = ("wal_receiver_timeout", "1s");

/// The lines of `pg_hba.conf` and `pg_ident.conf`: the member's, or else the cluster's.
#[must_use]
pub(super) fn effective_rules(settings: &Settings, dynamic: &Dynamic) -> Rules {
    let first = |own: &Vec<String>, all: &Vec<String>| if own.is_empty() { all.clone() } else { own.clone() };
    let (own, all) = (&settings.rules, &dynamic.rules);
    Rules { hba: first(&own.hba, &all.hba), ident: first(&own.ident, &all.ident) }
}

/// All parameters for `postgresql.conf`: defaults, then the cluster's, then the member's, then what is enforced, with the
/// standbys that commits wait for if that is ours to say.
#[must_use]
pub(super) fn effective_parameters(
    settings: &Settings,
    dynamic: &Dynamic,
    standby_names: Option<String>,
) -> BTreeMap<String, String> {
    let mut all = parameters_of_the_cluster(dynamic);
    all.extend(settings.parameters.clone());
    all.extend(owned(ENFORCED));
    all.extend(standby_names.map(|names| (STANDBY_NAMES.to_owned(), names)));
    all.insert(String::from("cluster_name"), settings.scope.name().to_owned());
    all
}

/// The defaults, and over them what the dynamic configuration says.
fn parameters_of_the_cluster(dynamic: &Dynamic) -> BTreeMap<String, String> {
    let mut all: BTreeMap<String, String> = owned(DEFAULTS).collect();
    if dynamic.takeover && dynamic.synchronous_mode == SyncMode::Quorum {
        all.extend(owned(&[SILENCE_OF_A_LEADER]));
    }
    all.extend(dynamic.parameters.clone());
    all
}

fn owned(list: &[(&str, &str)]) -> impl Iterator<Item = (String, String)> {
    list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
}

#[cfg(test)]
mod tests {
    use bots_core::machine::Span;
    use serde_json::json;

    use super::{Dynamic, RemoveData, SyncMode};

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
    fn a_silent_leader_is_missed_sooner_where_voters_take_over() {
        let timeout =
            |config| super::parameters_of_the_cluster(&Dynamic::from_value(&config))["wal_receiver_timeout"].clone();
        assert_eq!(timeout(json!({"synchronous_mode": "quorum"})), "5s");
        assert_eq!(timeout(json!({"synchronous_mode": "quorum", "takeover": true})), "1s");
        let own = json!({"wal_receiver_timeout": "3s"});
        let config = json!({"synchronous_mode": "quorum", "takeover": true, "postgresql": {"parameters": own}});
        assert_eq!(timeout(config), "3s");
    }

    #[test]
    fn nothing_is_ignored_in_silence() {
        let read = Dynamic::from_value(&json!({
            "ttl": 5, "loop_wait": 10, "retry_timeout": 10, "pause": true, "synchronous_mode": false, "slots": null,
            "failsafe_mode": true, "mine": 1,
            "postgresql": {"callbacks": {"on_start": "x"}, "use_pg_rewind": "on", "typo": 1,
                "parameters": {"wal_log_hints": "off", "port": 1, "work_mem": [4]}},
        }));
        assert!(read.pause && read.failsafe_mode && read.use_pg_rewind == Some(true));
        assert_eq!(
            read.complaints,
            [
                "config: postgresql.parameters.port has no effect: each member's own file decides it",
                "config: postgresql.parameters.wal_log_hints has no effect: it is always on",
                "config: postgresql.parameters.work_mem is [4]: use a text, a number, true or false",
                "config: postgresql.callbacks is known and has no effect yet",
                "config: postgresql.typo has no effect: nobody knows this field",
                "config: mine has no effect: nobody knows this field",
            ]
        );
    }

    #[test]
    fn what_nobody_can_make_out_leaves_what_was_in_force() {
        let rules = json!({"pg_hba": ["hostssl all all 10.0.0.0/8 scram-sha-256"], "use_pg_rewind": false});
        let good = json!({"synchronous_mode_strict": true, "check_timeline": "on", "postgresql": rules});
        let before = Dynamic::from_value(&good);
        assert_eq!(before.complaints, Vec::<String>::new());
        let rules = json!({"pg_hba": "hostssl all all 10.0.0.0/8 scram-sha-256", "use_pg_rewind": "nein"});
        let bad = json!({"synchronous_mode_strict": "ture", "check_timeline": "", "postgresql": rules});
        let read = before.changed_to(&bad);
        assert!(read.synchronous_mode_strict && !read.check_timeline);
        assert_eq!((&read.rules, read.use_pg_rewind), (&before.rules, Some(false)));
        assert_eq!(read.complaints.len(), 3, "{:?}", read.complaints);
        assert_eq!(read.complaints[0], r#"config: synchronous_mode_strict is "ture": use true or false"#);
        let no_section = before.changed_to(&json!({"postgresql": []}));
        assert_eq!((no_section.rules, no_section.complaints.len()), (before.rules, 1));
    }

    #[test]
    fn the_two_leaves_to_delete_data_are_read_apart() {
        let (first, second) =
            ("remove_data_directory_on_rewind_failure", "remove_data_directory_on_diverged_timelines");
        for (on_rewind_failure, on_diverged_timelines) in
            [(None, None), (Some(true), None), (None, Some(true)), (Some(true), Some(true)), (Some(false), Some(true))]
        {
            let config = json!({"postgresql": {first: on_rewind_failure, second: on_diverged_timelines}});
            let read = Dynamic::from_value(&config);
            assert_eq!(read.remove_data, RemoveData { on_rewind_failure, on_diverged_timelines }, "{config}");
            assert_eq!(read.complaints, Vec::<String>::new());
        }
        let before = Dynamic::from_value(&json!({"postgresql": {second: true}}));
        let unclear = before.changed_to(&json!({"postgresql": {first: "ja", second: "ja"}}));
        assert_eq!((unclear.remove_data, unclear.complaints.len()), (before.remove_data, 2), "what was in force stays");
    }

    #[test]
    fn rules_that_a_new_bot_cannot_make_out_let_nobody_in() {
        for bad in [json!({"pg_hba": "hostssl all all 10.0.0.0/8 scram-sha-256"}), json!({"pg_hba": [7]}), json!([])] {
            let read = Dynamic::from_value(&json!({"postgresql": bad}));
            assert_eq!((read.rules.hba, read.complaints.len()), (vec![super::IN_DOUBT.to_owned()], 1), "{bad}");
        }
        let mended = Dynamic::from_value(&json!({"postgresql": []})).changed_to(&json!({"postgresql": {}}));
        assert!(mended.rules.hba.is_empty());
        assert!(mended.changed_to(&json!({"postgresql": []})).rules.hba.is_empty(), "what was in force goes on");
    }

    #[test]
    fn the_synchronous_modes_are_read_as_patroni_reads_them() {
        let mode = |value: serde_json::Value| Dynamic::from_value(&json!({"synchronous_mode": value}));
        for (value, wanted) in [
            (json!(true), SyncMode::On),
            (json!("on"), SyncMode::On),
            (json!("Quorum"), SyncMode::Quorum),
            (json!("off"), SyncMode::Off),
            (json!(false), SyncMode::Off),
            (json!(null), SyncMode::Off),
        ] {
            let read = mode(value.clone());
            assert_eq!((read.synchronous_mode, read.complaints), (wanted, vec![]), "{value}");
        }
        assert_eq!(mode(json!("qorum")).complaints.len(), 1);
        let kept = mode(json!("quorum")).changed_to(&json!({"synchronous_mode": "qorum"}));
        assert_eq!((kept.synchronous_mode, kept.complaints.len()), (SyncMode::Quorum, 1));
        let lag = |lag: i64| Dynamic::from_value(&json!({"maximum_lag_on_syncnode": lag, "synchronous_node_count": 0}));
        assert_eq!((lag(-1).maximum_lag_on_syncnode, lag(0).maximum_lag_on_syncnode), (None, Some(0)));
        assert_eq!(lag(-1).synchronous_node_count, 1);
    }

    #[test]
    fn parameters_are_read_as_postgres_writes_them() {
        let read =
            Dynamic::from_value(&json!({"postgresql": {"parameters": {"fsync": true, "work_mem": "4MB", "x": 3}}}));
        let pairs: Vec<(&str, &str)> = read.parameters.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(pairs, [("fsync", "on"), ("work_mem", "4MB"), ("x", "3")]);
    }
}
