//! Configurations as nobody should write them: whatever they say, they are taken, or refused in one line that names a field.

#![cfg(feature = "shell")]

use bots_core::shell::testing::{mutated, refusal};
use proptest::prelude::{ProptestConfig, any, prop, prop_assert, proptest};
use serde_json::{Value, json};
use web_bot::shell::WebBot;

/// A file that is there.
const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");

/// Every section that there is.
fn good() -> Value {
    json!({
        "scope": "web", "name": "w1", "namespace": "service", "etcd3": {"hosts": "127.0.0.1:1,127.0.0.1:2"},
        "restapi": {"listen": "127.0.0.1:8008", "authentication": {"username": "u", "password_file": FILE}},
        "web": {
            "listen": "127.0.0.1:8080", "connect_url": "http://127.0.0.1:8080", "mode": "app", "command": ["/bin/true"],
            "app_start_timeout_s": 30, "drain_timeout_s": 30, "health_path": "/health", "health_interval_s": 5,
            "app_answer_timeout_s": 9, "hold_timeout_s": 9, "hold_max": 9, "body_max_bytes": 999, "trusted_proxies": ["10.0.0.0/8"],
        },
        "content": {"scope": "site", "path_in_repo": "public", "size_max_bytes": 1000},
        "database": {"scope": "main", "dbname": "d", "username": "u", "password_file": FILE,
                     "connections_per_bot": 2, "share_percent": 50},
        "cdn": {"base_url": "https://cdn.example.org"},
        "scaling": {"min": 1, "max": 4, "target_in_flight": 8, "stable_window_s": 30},
        "data_dir": "/tmp/none", "ttl_s": 5,
    })
}

/// A changed document is refused for one of its first few mistakes: many short lists find more than a few long ones.
const CASES: u32 = 1_000;

#[test]
fn the_document_that_is_changed_is_a_good_one() {
    assert_eq!(refusal::<WebBot>(&good().to_string()), Ok(None));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(CASES))]

    #[test]
    fn whatever_is_changed_is_taken_or_named(choices in prop::collection::vec(any::<u32>(), 1..6)) {
        let changed = mutated(&good(), &choices);
        let said = refusal::<WebBot>(&changed.to_string());
        prop_assert!(said.is_ok(), "{}: {changed}", said.unwrap_err());
    }

    #[test]
    fn whatever_is_written_is_taken_or_named(text in "[-a-z: \\n{}\\[\\]\"'&*!|>#%@,0-9]{0,80}|.{0,80}") {
        let said = refusal::<WebBot>(&text);
        prop_assert!(said.is_ok(), "{}: {text:?}", said.unwrap_err());
    }
}
