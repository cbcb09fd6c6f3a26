//! Random exploration: several bots on one in-memory store, everything that may happen in any order, from a seed.
//!
//! After every step the invariants of the machine and the safety list hold (S3, S4, S5, S6); over all seeds every
//! declared edge is taken and no other; once all faults are healed the fleet comes to serve what it should.

mod common;
#[path = "exploration/world.rs"]
mod world;

use std::collections::{BTreeSet, VecDeque};

use bots_core::{
    machine::{Machine, Span},
    wire::WebLoad,
};
use common::Bot;
use web_bot::machine::{ACTIONS_PER_HOUR_MAX, ConnectionBudget, Event, Mode, Role, ScalingSettings, WebMachine};
use world::World;

/// How many fleets are explored, and for how many events each. Enough that rare edges are met many times over.
const SEEDS: u64 = 260;
const EVENTS: u32 = 1_000;
const BOTS: usize = 3;
/// How long a leader lives while the load swings, in half seconds.
const LEADER_LIVES: u64 = 600;
/// Until the next one leads and has seen load, in half seconds: a lease, and more.
const LEADER_TAKES: u64 = 40;
/// How many fleets flip within a budget, and for how many quarters of a second each.
const BUDGET_SEEDS: u64 = 8;
const BUDGET_TICKS: u32 = 500;
const MAX: u32 = 2;
const TTL: Span = Span::from_secs(5);

#[test]
fn whatever_happens_the_fleet_is_safe_and_converges() {
    let mut taken: BTreeSet<(Role, Role)> = BTreeSet::new();
    for seed in 0..SEEDS {
        let mode = if seed % 2 == 0 { Mode::Static } else { Mode::App };
        let mut world = World::new(seed, mode);
        for _ in 0..EVENTS {
            world.disturb();
        }
        world.heal();
        taken.extend(world.taken);
    }
    let declared: BTreeSet<(Role, Role)> = WebMachine::TRANSITIONS.edges.iter().map(|e| (e.from, e.to)).collect();
    assert_eq!(taken, declared, "edges taken and edges declared");
}

#[test]
fn the_same_seed_gives_the_same_steps() {
    let run = || {
        let mut world = World::new(7, Mode::App);
        for _ in 0..EVENTS {
            world.disturb();
        }
        (world.log, world.now)
    };
    assert_eq!(run(), run());
}

#[test]
fn an_oscillating_load_stays_within_the_hourly_budget_whoever_leads() {
    let changes = swing(1);
    println!("at most {changes} changes within an hour");
    assert!(changes >= 20, "{changes} changes within an hour");
}

#[test]
fn a_site_that_sleeps_whenever_it_may_is_woken_for_hours() {
    let changes = swing(0);
    println!("at most {changes} changes within an hour");
    assert!(changes >= 20, "{changes} changes within an hour");
}

/// Three hours in which load comes and goes every ten seconds: all bots are asked for whenever it is there. Yields the most changes that
/// fell within one hour.
fn swing(min: u32) -> usize {
    let mut world = World::new(1, Mode::Static);
    world.live.insert(common::sha('f'));
    world.put("site/revision/live", &common::revision(&common::sha('f'), 1));
    world.put("web/config", &format!(r#"{{"scaling":{{"stable_window_s":1,"min":{min}}}}}"#));
    let messages = ["/service/web/load/0000", "/service/web/load/0001"];
    let (mut changes, mut posted, mut most, mut crashed) = (VecDeque::new(), 0, 0, 0);
    for tick in 0..21_600_u64 {
        world.now += Span::from_millis(500);
        world.dcs.expire(world.now);
        if tick % LEADER_LIVES == 0
            && let Some(leader) = world.bots.iter().position(|bot| bot.state().leads(world.now))
        {
            world.crash(leader);
            crashed = tick;
        }
        let loaded = tick % 20 < 10;
        let in_flight_milli = if loaded { 20_000 } else { 0 };
        for n in 0..BOTS {
            let load = WebLoad { in_flight_milli, rps: 1, p99_us: 1, ..WebLoad::default() };
            world.serve_everything(n, load);
            // A site that sleeps holds its requests wherever they come in.
            if world.bots[n].role() == Role::Idle {
                world.step(n, Event::LoadMeasured(load));
            }
        }
        let there = messages.iter().filter(|message| world.dcs.get(message).is_some()).count();
        if there != posted {
            changes.push_back(world.now);
        }
        posted = there;
        let now = world.now;
        changes.retain(|at| now.since(*at) < Span::from_secs(3_600));
        most = most.max(changes.len());
        assert!(most <= ACTIONS_PER_HOUR_MAX, "{most} changes within an hour");
        let settled = tick % 20 == 9 && tick > crashed + LEADER_TAKES;
        assert!(!settled || there == messages.len(), "{there} bots are asked for after {tick} half seconds");
    }
    most
}

/// Two places, each worth two instances of ten connections.
const PRIMARY_WITH_CONNECTIONS: &str = r#"{"state":"running","role":"primary","conn_url":"postgres://pg-1:5432/x",
    "connections":{"max":43,"reserved":3}}"#;
const INSTANCES_MAX: usize = 4;

#[test]
fn flips_never_take_more_connections_than_the_database_has() {
    let mut most = 0;
    for seed in 0..BUDGET_SEEDS {
        let mut world = World::new(seed, Mode::App);
        world.put("main/leader", "pg-1");
        world.put("main/members/pg-1", PRIMARY_WITH_CONNECTIONS);
        for (n, bot) in world.bots.iter_mut().enumerate() {
            let scaling = ScalingSettings { max: 8, stable_window_s: 1, ..ScalingSettings::default() };
            let connections = Some(ConnectionBudget { per_instance: 10, share_percent: 100 });
            let mut settings = common::settings(&format!("web-{n}"), Mode::App, scaling);
            settings.live.connections = connections;
            *bot = Bot::new(settings, "instance");
        }
        for _ in 0..BUDGET_TICKS {
            world.now += Span::from_millis(250);
            match world.dice.roll(40) {
                0 => world.publish(),
                1 => {
                    let restart = world.dice.roll(1_000);
                    world.put("web/config", &format!(r#"{{"scaling":{{"stable_window_s":1}},"restart":{restart}}}"#));
                }
                2 => (0..BOTS).for_each(|n| {
                    let event = world.bots[n].reconfigured(|live| live.configuration += 1);
                    world.step(n, event);
                }),
                _ => {}
            }
            for n in 0..BOTS {
                let in_flight_milli = world.dice.roll(3) * 12_000;
                world.serve_meanwhile(n, WebLoad { in_flight_milli, rps: 1, p99_us: 1, ..WebLoad::default() });
                let instances: usize = world.bots.iter().map(|bot| bot.apps.len()).sum();
                most = most.max(instances);
                if instances > INSTANCES_MAX {
                    world.fail(&format!("{instances} instances of the app"));
                }
            }
        }
    }
    assert_eq!(most, INSTANCES_MAX, "all bots flip at once where there are connections enough");
}
