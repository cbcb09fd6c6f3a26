//! Keys as nobody should write them: whatever stands in etcd, a content bot goes on, and comes to rest.

#![cfg(feature = "shell")]

mod world;

use bots_core::{
    machine::Span,
    shell::testing::{in_etcd, spoilt},
};
use proptest::prelude::{ProptestConfig, Strategy, any, prop, proptest};
use serde_json::{Value, json};
use world::{World, sha, site, web};

/// Every key that is read, with a good value.
fn good() -> Vec<(String, Value)> {
    let (site, web) = (site(), web());
    let revision = |letter: &str, generation: u64| json!({"sha": sha(letter), "generation": generation, "ref": "main", "origin": "https://git.example/site.git"});
    let head = |kind: &str| json!({"kind": kind, "state": "serving", "role": "member", "version": "0.1.0", "api_url": "http://w1", "instance": "i"});
    let mut member = head("web");
    for (fact, value) in
        [("url", json!("http://w1")), ("serving", json!(sha("a"))), ("prepared", json!(sha("b"))), ("slot", json!(0))]
    {
        member[fact] = value;
    }
    vec![
        (site.leader(), json!("two")),
        (site.config(), json!({"ttl": 5})),
        (site.member("two"), head("content")),
        (site.revision_live(), revision("a", 3)),
        (site.revision_candidate(), revision("b", 4)),
        (site.revision_canary(), json!({"sha": sha("b"), "member": "web/w1", "since_unix_ms": 1})),
        (site.revision_purged(), json!({"generation": 3, "rounds": 2})),
        (site.revision_pin(), json!({"sha": sha("a"), "since_unix_ms": 1})),
        (site.revision_promote(), json!({"sha": sha("b")})),
        (site.revision_history(), json!([{"sha": sha("a"), "generation": 3, "subject": "s", "since_unix_ms": 1}])),
        (site.push(), json!({"by": "two", "at_unix_ms": 1, "tip": sha("c"), "deliveries": {"d-1": 1}})),
        (site.quarantine(&sha("d")), json!({"reason": "it is bad", "since_unix_ms": 1})),
        (web.leader(), json!("w1")),
        (web.member("w1"), member),
    ]
}

/// Which key, and what becomes of it: its value with changes, text that is no JSON, or nothing.
fn writes() -> impl Strategy<Value = Vec<(usize, Vec<u32>, Option<String>)>> {
    let text = prop::option::weighted(0.2, ".{0,40}");
    prop::collection::vec((any::<usize>(), prop::collection::vec(any::<u32>(), 0..4), text), 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn whatever_stands_in_a_key_the_bot_goes_on(writes in writes(), leads in any::<bool>()) {
        let (mut world, good) = (World::new(), good());
        for (key, value) in &good {
            world.put(key, &in_etcd(value));
        }
        if leads {
            world.delete(&site().leader());
        }
        world.start("one", "main", Vec::new());
        world.settle();
        for (which, choices, junk) in &writes {
            let (key, value) = &good[which % good.len()];
            match spoilt(value, choices, junk.as_deref()) {
                Some(text) => world.put(key, &text),
                None => world.delete(key),
            }
            world.advance(Span::from_millis(1_500));
        }
    }
}
