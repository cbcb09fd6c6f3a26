//! Keys as nobody should write them: whatever stands in etcd, a Postgres bot goes on. What holds in every step is watched by
//! [`world`]: no data is changed for nobody, no server takes writes without a lease.

#![cfg(feature = "shell")]

#[path = "world/disk.rs"]
mod disk;
#[allow(dead_code, reason = "other tests use the rest")]
mod world;

use std::collections::BTreeMap;

use bots_core::{
    machine::Span,
    shell::testing::{in_etcd, spoilt},
    wire::{PostgresFacts, Timeline},
};
use disk::{Data, Disk};
use postgres_bot::machine::{Event, Postgres};
use proptest::prelude::{ProptestConfig, Strategy, any, prop, proptest};
use serde_json::{Value, json};
use world::{Fate, SYSTEM_ID, World, member, server, settings};

/// So many questions are not asked of etcd at one moment, unless each answer leads to the next question without end.
const ANSWERS_MAX: usize = 200;

/// Every key that is read, below the scope, with a good value.
fn good() -> Vec<(&'static str, Value)> {
    let facts = PostgresFacts { timeline: Some(Timeline(1)), ..PostgresFacts::default() };
    let pg2 = serde_json::from_str(&member("pg2", "primary", "running", facts).to_json()).expect("JSON");
    vec![
        ("initialize", json!(SYSTEM_ID)),
        ("leader", json!("pg2")),
        ("members/pg2", pg2),
        (
            "config",
            json!({"ttl": 5, "synchronous_mode": "quorum", "failsafe_mode": true, "slots": {"s": {"type": "physical"}}, "postgresql": {"parameters": {"work_mem": "5MB"}}}),
        ),
        ("status", json!({"optime": 768, "slots": {"pg1": 768}, "retain_slots": ["pg1"]})),
        ("sync", json!({"leader": "pg2", "sync_standby": "pg1", "quorum": 1})),
        ("failover", json!({"leader": "pg2", "member": "pg1", "scheduled_at": "2026-01-01T00:00:10Z"})),
        ("history", json!([[1, 512, "no recovery target specified", "2026-01-01T00:00:00+00:00", "pg2"]])),
        ("timelines", json!({"current": 1, "reserved": 1})),
        ("failsafe", json!({"pg1": "http://pg1:8008/patroni", "pg2": "http://pg2:8008/patroni"})),
        ("promises/pg2", json!({"leader": 3})),
        ("edges/edge/e1", json!({"holds": 3, "drained": 3})),
    ]
}

/// Which key, and what becomes of it: its value with changes, text that is no JSON, or nothing.
fn writes() -> impl Strategy<Value = Vec<(usize, Vec<u32>, Option<String>)>> {
    let text = prop::option::weighted(0.2, ".{0,40}");
    prop::collection::vec((any::<usize>(), prop::collection::vec(any::<u32>(), 0..4), text), 1..14)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn whatever_stands_in_a_key_the_bot_goes_on(writes in writes(), led in any::<bool>(), standby in any::<bool>()) {
        let good = good();
        let mut world = World::new(settings("pg1"));
        world.renewing = true;
        for (key, value) in &good {
            world.put(key, &in_etcd(value));
        }
        if !led {
            world.delete("leader");
            world.delete("members/pg2");
        }
        let data = if standby { Data::Standby } else { Data::Primary };
        let mut disk = Disk { data, timeline: 1, position: 0x300 };
        world.list();
        go_on(&mut world, &mut disk);
        for (which, choices, junk) in &writes {
            let (key, value) = &good[which % good.len()];
            match spoilt(value, choices, junk.as_deref()) {
                Some(text) => world.put(key, &text),
                None => world.delete(key),
            }
            go_on(&mut world, &mut disk);
        }
    }
}

/// Everything goes well for three seconds.
fn go_on(world: &mut World, disk: &mut Disk) {
    for _ in 0..6 {
        if world.exited {
            world.restart(settings("pg1"));
            world.list();
        }
        world.watch();
        world.grant();
        let answers = std::iter::from_fn(|| if world.exited { None } else { world.answer(Fate::Answered) });
        assert!(answers.take(ANSWERS_MAX).count() < ANSWERS_MAX, "it asks etcd again and again without a pause");
        if std::mem::take(&mut world.naming) {
            world.step(Event::NameProbed { instance: None });
        }
        if std::mem::take(&mut world.inspecting) {
            world.step(Event::DataInspected(disk.inspected(world.shown_running())));
        }
        if world.running {
            world.observe(Postgres::Up(server(!world.takes_writes(), disk.timeline, disk.position)));
        }
        if let Some(id) = world.probe.take() {
            world.step(Event::PeersProbed { id, answers: BTreeMap::new() });
        }
        if let Some((_, job)) = world.job.clone() {
            let good = world.may_end_well();
            disk.after(&job, good);
            if good {
                world.job_done(disk.timeline, disk.position, true);
            } else {
                world.job_failed("the server is gone");
            }
        }
        world.watch();
        world.log.clear();
        world.pass(Span::from_millis(500));
    }
}
