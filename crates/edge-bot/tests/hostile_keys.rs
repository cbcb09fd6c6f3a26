//! Keys as nobody should write them: whatever stands in etcd, an edge bot goes on, and no route to the primary is made up.

#![cfg(feature = "shell")]

mod world;

use bots_core::{machine::Span, shell::testing::spoilt};
use proptest::prelude::{ProptestConfig, Strategy, any, prop, prop_assert, proptest};
use serde_json::{Value, json};
use world::{World, scope};

/// Every key that is read, with a good value.
fn good(world: &mut World) -> Vec<(String, Value)> {
    let (main, web) = (scope("main"), scope("web"));
    world.postgres("pg-1", "primary", "running", None);
    world.postgres("pg-2", "replica", "running", None);
    world.web("w-1", "serving", 4_000);
    let members = [main.member("pg-1"), main.member("pg-2"), web.member("w-1")];
    let value = |key: &String| world.dcs.get(key).and_then(|kv| serde_json::from_str(&kv.value).ok());
    let members = members.iter().map(|key| (key.clone(), value(key).expect("a member")));
    let mut good: Vec<(String, Value)> = members.collect();
    good.push((main.leader(), json!("pg-1")));
    good.push((main.config(), json!({"ttl": 5})));
    good.push((main.edge(&scope("edge"), "edge-1"), json!({"holds": 3, "drained": 3})));
    good.push((web.leader(), json!("w-1")));
    good.push((web.load(0), json!({"reason": "busy", "posted_by": "w-1", "posted_unix_ms": 1})));
    good.push((web.load_claim(0), json!("w-1")));
    good.push((scope("edge").member("edge-2"), json!({"kind": "edge", "state": "routing", "role": "member"})));
    good
}

/// Which key, and what becomes of it: its value with changes, text that is no JSON, or nothing.
fn writes() -> impl Strategy<Value = Vec<(usize, Vec<u32>, Option<String>)>> {
    let text = prop::option::weighted(0.2, ".{0,40}");
    prop::collection::vec((any::<usize>(), prop::collection::vec(any::<u32>(), 0..4), text), 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn whatever_stands_in_a_key_the_bot_goes_on(writes in writes()) {
        let mut world = World::new();
        let good = good(&mut world);
        world.put(&good[3].0, "pg-1");
        world.start(true, true);
        world.settle();
        world.pass(Span::from_secs(2));
        for (which, choices, junk) in &writes {
            let (key, value) = &good[which % good.len()];
            match spoilt(value, choices, junk.as_deref()) {
                Some(text) => world.put(key, &text),
                None => world.delete(key),
            }
            world.settle();
            world.pass(Span::from_millis(700));
            prop_assert!(world.open_primaries().len() <= 1, "clients reach {:?} as the primary", world.open_primaries());
        }
    }
}
