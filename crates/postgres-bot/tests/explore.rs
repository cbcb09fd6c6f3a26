//! Everything that may happen to a postgres bot, in any order: random walks through a plausible and an implausible world,
//! and the nearest states of a small one, breadth first. That one has no end that a test could wait for: searches that come to theirs
//! are in `fleet`. What holds in every step is watched by [`world`]. A failed walk is named in the output; `EXPLORE_TRACE=1` shows
//! its steps.

#[path = "world/disk.rs"]
mod disk;
#[path = "world/fingerprint.rs"]
mod fingerprint;
#[path = "explore/small.rs"]
mod small;
#[path = "explore/walk.rs"]
mod walk;
mod world;

use std::collections::{BTreeSet, HashSet, VecDeque};

use bots_core::machine::Machine;
use disk::{Data, Disk};
use fingerprint::{Grain, Parsed, fingerprint};
use postgres_bot::machine::{PostgresBot, Role};
use small::{MOVES, make};
use walk::Walk;
use world::{SYSTEM_ID, World, settings};

/// Walks; `EXPLORE_WALKS` sets another number of them.
const WALKS: u64 = 1400;
/// So many states of the small world are looked at, the nearest first; `EXPLORE_STATES` sets another bound.
const STATES: usize = 10_000;
/// No patience of the bot's in the small world is longer than this.
const GRAIN: Grain = Grain { age_step: 500, age_max: 10_000, due_step: 1 };

#[test]
fn random_walks_keep_what_must_hold_and_take_every_edge() {
    let walks = number("EXPLORE_WALKS").unwrap_or(WALKS);
    let first = number("EXPLORE_SEED").unwrap_or(0);
    let mut taken = BTreeSet::new();
    for seed in first..first + walks {
        // The last line before a failure names the walk.
        eprintln!("EXPLORE_WALKS=1 EXPLORE_SEED={seed}");
        taken.extend(Walk::new(seed).run());
    }
    let declared: BTreeSet<(Role, Role)> = PostgresBot::TRANSITIONS.edges.iter().map(|e| (e.from, e.to)).collect();
    let missing: Vec<String> = declared.difference(&taken).map(|(from, to)| format!("{from} -> {to}")).collect();
    assert!(walks < WALKS || missing.is_empty(), "declared, and never taken: {missing:?}");
}

#[test]
fn the_nearest_states_of_a_small_world_keep_what_must_hold() {
    let most = number("EXPLORE_STATES").map_or(STATES, |n| usize::try_from(n).expect("small"));
    let mut seen = HashSet::new();
    let mut open = VecDeque::new();
    for data in [Data::Empty, Data::Standby, Data::Primary] {
        let mut world = World::new(settings("pg1"));
        if data != Data::Empty {
            world.put("initialize", SYSTEM_ID);
        }
        world.list();
        open.push_back((world, Disk { data, timeline: 1, position: 0x300 }));
    }
    while let Some((world, disk)) = open.pop_front() {
        for &a_move in MOVES {
            let (mut world, mut disk) = (world.clone(), disk.clone());
            if !make(a_move, &mut world, &mut disk) || world.exited {
                continue;
            }
            world.log.clear();
            world.dcs.compact(world.shown);
            let parsed = Parsed::new(&text(&world, &disk));
            if seen.insert(fingerprint(&[&parsed], world.now.as_millis(), GRAIN)) && seen.len() < most {
                open.push_back((world, disk));
            }
        }
    }
    assert!(seen.len() >= most, "the small world has come to its end after {} states: say so", seen.len());
}

/// All that decides what can happen from here on.
fn text(world: &World, disk: &Disk) -> String {
    format!(
        "{:?} {:?} {disk:?} {} {} {:?} {} {:?}",
        world.state,
        world.asked,
        world.renewing,
        world.running,
        world.kept,
        world.shown == world.dcs.revision(),
        world.dcs.list("/"),
    )
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}
