//! Configurations as nobody should write them: whatever they say, they are taken, or refused in one line that names a field.

#![cfg(feature = "shell")]

use bots_core::shell::testing::{mutated, refusal};
use content_bot::shell::ContentBot;
use proptest::prelude::{ProptestConfig, any, prop, prop_assert, proptest};
use serde_json::{Value, json};

/// A file that is there.
const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");

/// Every section that there is, of two sites.
fn good() -> Value {
    json!({
        "name": "c1", "namespace": "service", "etcd3": {"hosts": ["127.0.0.1:1"], "username": "u", "password": "p"},
        "restapi": {"listen": "127.0.0.1:8008", "authentication": {"username": "u", "password_file": FILE}},
        "log": {"level": "INFO", "format": "json"}, "data_dir": "/tmp/none", "ttl_s": 5, "prepare_timeout_s": 10,
        "git": {"ref": "main", "poll_interval_s": 10, "depth": 3, "submodules": "shallow", "lfs_pointers": "allow", "size_max_bytes": 1000},
        "sites": [
            {
                "scope": "docs", "web_scopes": ["docs-web"],
                "git": {"url": "https://h/a.git", "username": "u", "password_file": FILE, "proxy": "http://p:1", "ref": "semver:^1"},
                "push": {"secret": "a", "secrets": ["b"], "secret_files": [FILE], "listen": "127.0.0.1:8009"},
                "verify": {"command": ["true"], "command_timeout_s": 5},
                "canary": {"observe_s": 1, "timeout_s": 9, "paths": ["/"], "failures_percent_max": 1},
                "purge": {"again_after_s": 1, "probe": ["https://x/"], "probe_ca_file": FILE, "requests": [
                    {"method": "BAN", "url": "http://x/", "headers": {"x-a": "b"}, "header_files": {"x-k": FILE}, "body": "{sha}"},
                ]},
                "export": {
                    "root": "/tmp/none/out", "link": "current", "grace_s": 1, "touch_file": "/tmp/none/touched",
                    "exec_hook": {"command": ["true"], "timeout_s": 3}, "webhook": {"method": "POST", "url": "http://x/"},
                },
            },
            {"scope": "shop", "web_scopes": ["web"], "git": {"url": "git://h/b.git"}, "data_dir": "/tmp/elsewhere"},
        ],
    })
}

/// A changed document is refused for one of its first few mistakes: many short lists find more than a few long ones.
const CASES: u32 = 1_000;

#[test]
fn the_document_that_is_changed_is_a_good_one() {
    assert_eq!(refusal::<ContentBot>(&good().to_string()), Ok(None));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(CASES))]

    #[test]
    fn whatever_is_changed_is_taken_or_named(choices in prop::collection::vec(any::<u32>(), 1..6)) {
        let changed = mutated(&good(), &choices);
        let said = refusal::<ContentBot>(&changed.to_string());
        prop_assert!(said.is_ok(), "{}: {changed}", said.unwrap_err());
    }

    #[test]
    fn whatever_is_written_is_taken_or_named(text in "[-a-z: \\n{}\\[\\]\"'&*!|>#%@,0-9]{0,80}|.{0,80}") {
        let said = refusal::<ContentBot>(&text);
        prop_assert!(said.is_ok(), "{}: {text:?}", said.unwrap_err());
    }
}
