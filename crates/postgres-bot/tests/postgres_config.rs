//! Configurations as nobody should write them: whatever they say, they are taken, or refused in one line that names a field.

#![cfg(feature = "shell")]

use bots_core::shell::testing::{mutated, refusal};
use postgres_bot::shell::Program;
use proptest::prelude::{ProptestConfig, any, prop, prop_assert, proptest};
use serde_json::{Value, json};

/// A file that is there.
const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");

/// What the sample has, and a little more.
fn good() -> Value {
    json!({
        "scope": "main", "name": "pg-1", "namespace": "service", "etcd3": {"hosts": "127.0.0.1:1"},
        "restapi": {"listen": "127.0.0.1:8008", "authentication": {"username": "u", "password_file": FILE}},
        "bootstrap": {
            "dcs": {"ttl": 5, "maximum_lag_on_failover": 1000, "postgresql": {
                "use_pg_rewind": true, "parameters": {"max_connections": 100},
            }},
            "initdb": [{"encoding": "UTF8"}, "data-checksums"],
        },
        "postgresql": {
            "listen": "127.0.0.1:5432", "connect_address": "127.0.0.1:5432", "data_dir": "/tmp/none/data",
            "parameters": {"unix_socket_directories": "/tmp/none"},
            "authentication": {
                "superuser": {"username": "postgres", "password": "a"},
                "replication": {"username": "replicator", "password": "b"},
                "rewind": {"username": "rewinder", "password": "c"},
            },
            "pg_hba": ["local all postgres peer"],
        },
        "tags": {"nofailover": false, "failover_priority": 2}, "watchdog": {"mode": "off"},
    })
}

/// A changed document is refused for one of its first few mistakes: many short lists find more than a few long ones.
const CASES: u32 = 1_000;

#[test]
fn the_document_that_is_changed_is_a_good_one() {
    assert_eq!(refusal::<Program>(&good().to_string()), Ok(None));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(CASES))]

    #[test]
    fn whatever_is_changed_is_taken_or_named(choices in prop::collection::vec(any::<u32>(), 1..6)) {
        let changed = mutated(&good(), &choices);
        let said = refusal::<Program>(&changed.to_string());
        prop_assert!(said.is_ok(), "{}: {changed}", said.unwrap_err());
    }

    #[test]
    fn whatever_is_written_is_taken_or_named(text in "[-a-z: \\n{}\\[\\]\"'&*!|>#%@,0-9]{0,80}|.{0,80}") {
        let said = refusal::<Program>(&text);
        prop_assert!(said.is_ok(), "{}: {text:?}", said.unwrap_err());
    }
}
