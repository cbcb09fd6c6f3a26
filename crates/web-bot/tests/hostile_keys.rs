//! Keys as nobody should write them: whatever stands in etcd, a web bot goes on.

#![cfg(feature = "shell")]

mod common;

use bots_core::{
    dcs::{MemoryDcs, Scope, Transaction, Write},
    machine::{Machine, Span, Time},
    shell::testing::{in_etcd, spoilt},
};
use common::{Bot, revision, settings, sha};
use proptest::prelude::{ProptestConfig, Strategy, any, prop, proptest};
use serde_json::{Value, json};
use web_bot::machine::{ConnectionBudget, Event, Mode, ScalingSettings, WebMachine};

/// More than a bot has to do at one moment.
const STEPS_MAX: usize = 300;

fn scope(name: &str) -> Scope {
    Scope::new("service", name).expect("a valid name")
}

/// Every key that is read, with a good value.
fn good() -> Vec<(String, Value)> {
    let (web, site, main) = (scope("web"), scope("site"), scope("main"));
    let live = |digit: char, generation: u64| serde_json::from_str(&revision(&sha(digit), generation)).expect("JSON");
    let head = |kind: &str, role: &str| json!({"kind": kind, "state": "running", "role": role, "api_url": "http://x:1", "instance": "i"});
    let mut web_member = head("web", "member");
    web_member["state"] = json!("serving");
    web_member["url"] = json!("http://w2:8080");
    web_member["serving"] = json!(sha('1'));
    web_member["slot"] = json!(0);
    web_member["load"] = json!({"in_flight_milli": 9_000, "rps": 100, "p99_us": 5_000});
    let mut primary = head("postgres", "primary");
    primary["conn_url"] = json!("postgres://10.0.0.1:5432/postgres");
    primary["connections"] = json!({"max": 100, "reserved": 3});
    vec![
        (web.leader(), json!("w2")),
        (
            web.config(),
            json!({"scaling": {"min": 1, "max": 3, "target_in_flight": 8}, "cdn_url": "https://cdn.example"}),
        ),
        (web.member("w2"), web_member),
        (web.load(0), json!({"reason": "busy", "posted_by": "w2", "posted_unix_ms": 1})),
        (web.load_claim(0), json!("w2")),
        (web.load(1), json!({"reason": "busy", "posted_by": "w2", "posted_unix_ms": 1})),
        (site.revision_live(), live('1', 3)),
        (site.revision_candidate(), live('2', 4)),
        (site.revision_canary(), json!({"sha": sha('2'), "member": "web/w1", "since_unix_ms": 1})),
        (site.member("c1"), head("content", "leader")),
        (main.leader(), json!("pg-1")),
        (main.member("pg-1"), primary),
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
    fn whatever_stands_in_a_key_the_bot_goes_on(writes in writes(), app in any::<bool>(), budget in any::<bool>()) {
        let good = good();
        let (mut dcs, mut now) = (MemoryDcs::new(), Time::from_millis(1_000));
        for (key, value) in &good {
            put(&mut dcs, now, key, &in_etcd(value));
        }
        let mut settings = settings("w1", if app { Mode::App } else { Mode::Static }, ScalingSettings::default());
        settings.live.connections = (app && budget).then_some(ConnectionBudget { per_instance: 5, share_percent: 100 });
        let mut bot = Bot::new(settings, "i1");
        now = run(&mut bot, &mut dcs, now);
        for (which, choices, junk) in &writes {
            let (key, value) = &good[which % good.len()];
            match spoilt(value, choices, junk.as_deref()) {
                Some(text) => put(&mut dcs, now, key, &text),
                None => drop(dcs.transact(now, &Transaction::new(Vec::new(), vec![Write::delete(key)]))),
            }
            now = run(&mut bot, &mut dcs, now) + Span::from_millis(900);
        }
    }
}

fn put(dcs: &mut MemoryDcs, now: Time, key: &str, value: &str) {
    dcs.transact(now, &Transaction::new(Vec::new(), vec![Write::put(key, value)]));
}

/// Lets the bot do all that it has to do, and see that it was done.
fn run(bot: &mut Bot, dcs: &mut MemoryDcs, now: Time) -> Time {
    for _ in 0..STEPS_MAX {
        if bot.exit.is_some() {
            return now;
        }
        let Some(event) = next(bot, dcs, now) else { return now };
        bot.step(now, event, dcs);
        WebMachine::invariants(bot.state()).unwrap_or_else(|broken| panic!("{broken}"));
        let _report = WebMachine::report(bot.state(), now);
    }
    panic!("the bot never comes to rest: {:?}", bot.state());
}

fn next(bot: &mut Bot, dcs: &mut MemoryDcs, now: Time) -> Option<Event> {
    if let Some(event) = bot.granted(now, dcs).or_else(|| bot.watched(dcs)).or_else(|| bot.answered(now, dcs)) {
        return Some(event);
    }
    if bot.probed.take().is_some() {
        return Some(Event::NameProbed { instance: None });
    }
    if let Some((id, sha)) = bot.preparing.pop_front() {
        return Some(Event::ContentPrepared { id, sha });
    }
    WebMachine::deadline(bot.state()).filter(|due| due.at <= now).map(|_due| Event::TimerFired)
}
