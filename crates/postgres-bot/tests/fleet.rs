//! Every path through a small fleet: the real machines of two or three members, breadth first, with a budget of faults that may
//! strike at any point. Where `explore` has one member in a world that does what it likes, here each
//! hears what the others do.
//!
//! A search ends when there is nothing left that was not seen; one that does not is a failure. Two states are one if they differ only
//! in how long ago things were, beyond what matters, and in numbers that are only counted.

#[path = "fleet/check.rs"]
mod check;
#[path = "fleet/cluster.rs"]
mod cluster;
#[path = "world/fingerprint.rs"]
mod fingerprint;
#[path = "fleet/jobs.rs"]
mod jobs;
#[path = "fleet/perform.rs"]
mod perform;
#[path = "fleet/plant.rs"]
mod plant;
#[path = "fleet/server.rs"]
mod server;

use std::collections::{HashSet, VecDeque};

use bots_core::machine::{Machine, Span};
use cluster::{Budget, Fleet, Options, Way};
use plant::Plant;
use postgres_bot::machine::{PostgresBot, Role};

/// A search that is not at its end by then would take too long; `FLEET_STATES` sets another bound.
const STATES_MAX: usize = 60_000;
/// So many states are looked at, the nearest first, where all would be too many.
const NEAREST: usize = 6_000;

/// How long a fleet gets to come to rest before the search begins.
const SETTLES_WITHIN: Span = Span::from_secs(30);

const ASYNCHRONOUS: Options = Options { members: 2, synchronous: "off", takeover: false, failsafe: false, plant: None };
const SYNCHRONOUS: Options = Options { synchronous: "on", ..ASYNCHRONOUS };
const TAKEOVER: Options = Options { members: 3, synchronous: "quorum", takeover: true, ..ASYNCHRONOUS };
const FAILSAFE: Options = Options { members: 3, failsafe: true, ..ASYNCHRONOUS };

const NO_FAULTS: Budget = Budget { crashes: 0, lost: 0, cuts: 0, writes: 0 };

/// What a search has come to.
struct Found {
    states: usize,
    ran_dry: bool,
    /// What is broken, with the moves that lead there.
    broken: Option<(String, Vec<Way>)>,
}

/// Looks at everything that can come of `fleet`, up to `most` states.
fn search(mut fleet: Fleet, most: usize) -> Found {
    let most = std::env::var("FLEET_STATES").ok().and_then(|text| text.parse().ok()).unwrap_or(most);
    let mut seen = HashSet::from([fleet.fingerprint()]);
    // How each state was come to: from which one, by which move.
    let mut ways: Vec<(usize, Option<Way>)> = vec![(0, None)];
    let mut open = VecDeque::from([(0, fleet)]);
    while let Some((at, fleet)) = open.pop_front() {
        let mut todo: VecDeque<Way> = fleet.moves().into_iter().map(|a_move| (a_move, None)).collect();
        while let Some(way) = todo.pop_front() {
            let mut next = fleet.clone();
            if let Err(what) = next.make(way) {
                let broken = Some((what, path_to(&ways, at, way)));
                return Found { states: seen.len(), ran_dry: false, broken };
            }
            if let (a_move, None) = way
                && fleet.budget.crashes > 0
            {
                todo.extend((0..next.actions.unwrap_or(0)).map(|done| (a_move, Some(done))));
            }
            if seen.insert(next.fingerprint()) {
                if seen.len() > most {
                    return Found { states: seen.len(), ran_dry: false, broken: None };
                }
                ways.push((at, Some(way)));
                open.push_back((ways.len() - 1, next));
            }
        }
    }
    Found { states: seen.len(), ran_dry: true, broken: None }
}

fn path_to(ways: &[(usize, Option<Way>)], mut at: usize, last: Way) -> Vec<Way> {
    let mut path = vec![last];
    while let (before, Some(way)) = ways[at] {
        path.push(way);
        at = before;
    }
    path.reverse();
    path
}

/// A fleet that has come to rest by itself; only then mistakes are made.
fn at_rest(options: Options, budget: Budget) -> Fleet {
    let mut fleet = Fleet::new(Options { plant: None, ..options }, NO_FAULTS);
    let until = fleet.now + SETTLES_WITHIN;
    while fleet.now < until {
        let a_move = fleet.next_due().expect("time goes on");
        fleet.make((a_move, None)).expect("nothing goes wrong");
    }
    let roles: Vec<Role> = fleet.members.iter().filter_map(|m| m.state.as_ref().map(PostgresBot::role)).collect();
    let leaders = roles.iter().filter(|role| **role == Role::Primary).count();
    let replicas = roles.iter().filter(|role| **role == Role::Replica).count();
    assert_eq!((leaders, replicas), (1, options.members - 1), "the fleet does not come to rest: {roles:?}");
    (fleet.options, fleet.budget) = (options, budget);
    fleet
}

/// Nothing that can come of a fleet breaks anything.
fn holds(fleet: Fleet) {
    let found = holds_up_to(fleet, STATES_MAX);
    assert!(found.ran_dry, "not at its end after {} states", found.states);
}

/// The same of the nearest states.
fn holds_up_to(fleet: Fleet, most: usize) -> Found {
    let (options, budget) = (fleet.options, fleet.budget);
    let found = search(fleet, most);
    if let Some((what, path)) = &found.broken {
        panic!("{options:?}: {what} after {path:#?}");
    }
    eprintln!("{options:?} {budget:?}: {} states, to its end: {}", found.states, found.ran_dry);
    found
}

/// A mistake is seen, as a breach of this requirement.
fn is_caught(fleet: Fleet, requirement: &str) {
    let options = fleet.options;
    let found = search(fleet, STATES_MAX);
    let (what, path) = found.broken.unwrap_or_else(|| panic!("{options:?}: not caught in {} states", found.states));
    eprintln!("{options:?}: {what} after {} moves", path.len());
    assert!(what.starts_with(requirement), "{options:?}: {what}");
}

/// The same fleet with a mistake.
const fn with(plant: Plant, options: Options) -> Options {
    Options { plant: Some(plant), ..options }
}

#[test]
fn a_pair_holds_whatever_one_crash_or_one_lost_lease_brings_about() {
    holds(at_rest(ASYNCHRONOUS, Budget { crashes: 1, ..NO_FAULTS }));
    holds(at_rest(ASYNCHRONOUS, Budget { cuts: 1, ..NO_FAULTS }));
}

#[test]
fn a_synchronous_pair_holds_whatever_one_crash_brings_about() {
    holds(at_rest(SYNCHRONOUS, Budget { crashes: 1, ..NO_FAULTS }));
}

#[test]
fn a_synchronous_pair_loses_no_write_whatever_one_crash_beside_it_brings_about() {
    holds(at_rest(SYNCHRONOUS, Budget { crashes: 1, writes: 1, ..NO_FAULTS }));
}

#[test]
fn a_pair_is_made_once_in_whatever_order() {
    holds(Fleet::new(ASYNCHRONOUS, NO_FAULTS));
}

#[test]
fn a_trio_without_etcd_has_one_primary() {
    holds(at_rest(FAILSAFE, Budget { cuts: 1, ..NO_FAULTS }));
}

/// All that can come of several faults would be too much to wait for.
#[test]
fn the_nearest_states_hold_where_faults_come_together() {
    let one_of_each = Budget { crashes: 1, lost: 1, cuts: 1, writes: 1 };
    for options in [ASYNCHRONOUS, SYNCHRONOUS, TAKEOVER] {
        let found = holds_up_to(at_rest(options, one_of_each), NEAREST);
        assert!(!found.ran_dry, "it has come to its end: say so");
    }
    let making = holds_up_to(Fleet::new(ASYNCHRONOUS, Budget { writes: 0, ..one_of_each }), NEAREST);
    assert!(!making.ran_dry, "it has come to its end: say so");
}

#[test]
fn mistakes_are_seen() {
    let (crash, cut) = (Budget { crashes: 1, ..NO_FAULTS }, Budget { cuts: 1, ..NO_FAULTS });
    is_caught(at_rest(with(Plant::UnguardedWrites, ASYNCHRONOUS), cut), "S3");
    is_caught(at_rest(with(Plant::GuardSleeps, ASYNCHRONOUS), crash), "S6");
    is_caught(at_rest(with(Plant::UnknownIsDone, ASYNCHRONOUS), Budget { crashes: 1, lost: 1, ..cut }), "S6");
    is_caught(at_rest(with(Plant::WaitsForNobody, SYNCHRONOUS), Budget { writes: 1, ..crash }), "S2");
}
