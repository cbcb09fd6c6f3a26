//! `sim`: runs seeds, and says how to run the one again that failed.

use std::{
    io::Write,
    process::ExitCode,
    sync::{Mutex, PoisonError},
};

use bots_core::machine::Span;
use bots_sim::{
    coverage::Coverage,
    plant::{PLANTS, Plant},
    run::{Ending, Outcome, run, run_many},
    world::Options,
};
use clap::Parser;
use content_bot::machine::ContentMachine;
use postgres_bot::machine::PostgresBot;
use web_bot::machine::WebMachine;

/// So many of the last lines are shown of a run that failed.
const LAST_LINES: usize = 60;
/// Runs that fail are shown up to this number.
const FAILURES_SHOWN: usize = 5;

/// The whole fleet in one thread, on simulated time, from one seed.
///
/// Exit codes: 0 all seeds held; 10 something happened that must never happen; 11 a fleet did not come to rest after the
/// last fault; 12 a machine panicked; 2 bad usage.
#[derive(Debug, Parser)]
#[command(name = "sim", version)]
struct Arguments {
    /// How many seeds to run.
    #[arg(long, default_value_t = 500)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Run this seed alone.
    #[arg(long)]
    seed: Option<u64>,
    /// Print everything that happens (with --seed).
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Make this mistake on purpose.
    #[arg(long, value_parser = plant)]
    plant: Option<Plant>,
    /// Synchronous Postgres clusters alone, whatever the seed says.
    #[arg(long)]
    synchronous: bool,
    /// The same, and an operator changes the mode all the time.
    #[arg(long)]
    changing: bool,
    /// Postgres clusters alone, whose guards stand still when their bots come back.
    #[arg(long)]
    tired_guards: bool,
    /// Sites alone, of which an operator pins one commit after the other.
    #[arg(long)]
    pins: bool,
    /// Print the mistakes that can be made on purpose.
    #[arg(long)]
    list_plants: bool,
    /// Go on after the first failures, and print every seed that fails.
    #[arg(long)]
    keep_going: bool,
    /// How many threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

fn plant(name: &str) -> Result<Plant, String> {
    Plant::named(name).ok_or_else(|| String::from("no such mistake: see --list-plants"))
}

#[derive(Default)]
struct Tally {
    well: u64,
    simulated: Span,
    things: u64,
    failed: Vec<(u64, Ending)>,
    coverage: Coverage,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.list_plants {
        for (_, name) in PLANTS {
            println!("{name}");
        }
        return ExitCode::SUCCESS;
    }
    // A panic is an ending that is reported like any other.
    std::panic::set_hook(Box::new(|_| {}));
    let options = Options {
        plant: arguments.plant,
        synchronous: arguments.synchronous,
        changing: arguments.changing,
        tired_guards: arguments.tired_guards,
        pins: arguments.pins,
        ..Options::default()
    };
    match arguments.seed {
        Some(seed) => one(seed, options, arguments.trace),
        None => many(&arguments, options),
    }
}

fn one(seed: u64, options: Options, trace: bool) -> ExitCode {
    let outcome = run(seed, Options { trace: true, ..options });
    let skip = if trace { 0 } else { outcome.lines.len().saturating_sub(LAST_LINES) };
    let mut out = std::io::stdout().lock();
    if trace || outcome.ending != Ending::Well {
        for line in outcome.lines.iter().skip(skip) {
            if writeln!(out, "{line}").is_err() {
                break;
            }
        }
    }
    let _closed =
        writeln!(out, "seed {seed}: {} after {} [{:016x}]", say(&outcome.ending), since(&outcome), outcome.hash);
    ExitCode::from(outcome.ending.code())
}

fn many(arguments: &Arguments, options: Options) -> ExitCode {
    let tally = Mutex::new(Tally::default());
    run_many(arguments.from, arguments.seeds, arguments.threads, options, |outcome| {
        let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
        tally.simulated = tally.simulated + since(&outcome);
        tally.things += outcome.things;
        tally.coverage.merge(&outcome.coverage);
        if outcome.ending == Ending::Well {
            tally.well += 1;
        } else {
            if arguments.keep_going {
                println!("seed {}: {}", outcome.seed, say(&outcome.ending));
            }
            tally.failed.push((outcome.seed, outcome.ending));
        }
        arguments.keep_going || tally.failed.len() < FAILURES_SHOWN
    });
    let mut tally = tally.into_inner().unwrap_or_else(PoisonError::into_inner);
    tally.failed.sort_by_key(|(seed, _)| *seed);
    report(&tally, arguments, options)
}

fn report(tally: &Tally, arguments: &Arguments, options: Options) -> ExitCode {
    println!(
        "{} seeds held, {} failed; {} simulated, {} things happened",
        tally.well,
        tally.failed.len(),
        tally.simulated,
        tally.things
    );
    let coverage = &tally.coverage;
    let missing =
        [coverage.missing::<PostgresBot>(), coverage.missing::<ContentMachine>(), coverage.missing::<WebMachine>()];
    for edge in missing.iter().flatten() {
        println!("edge never taken: {edge}");
    }
    let Some((seed, ending)) = tally.failed.first() else { return ExitCode::SUCCESS };
    if !arguments.keep_going {
        for (seed, ending) in &tally.failed {
            println!("seed {seed}: {}", say(ending));
        }
        let shown = run(*seed, Options { trace: true, ..options });
        println!("the last of seed {seed}:");
        for line in shown.lines.iter().skip(shown.lines.len().saturating_sub(LAST_LINES)) {
            println!("{line}");
        }
    }
    let plant = arguments.plant.and_then(|plant| PLANTS.iter().find(|(p, _)| *p == plant));
    let plant = plant.map_or_else(String::new, |(_, name)| format!(" --plant {name}"));
    let synchronous = if arguments.synchronous { " --synchronous" } else { "" };
    let changing = if arguments.changing { " --changing" } else { "" };
    let tired = if arguments.tired_guards { " --tired-guards" } else { "" };
    let pins = if arguments.pins { " --pins" } else { "" };
    println!("again: sim --seed {seed} --trace{plant}{synchronous}{changing}{tired}{pins}");
    ExitCode::from(ending.code())
}

fn since(outcome: &Outcome) -> Span {
    outcome.at.since(bots_core::machine::Time::ZERO)
}

fn say(ending: &Ending) -> String {
    match ending {
        Ending::Well => String::from("all is well"),
        Ending::Broken(violation) => violation.to_string(),
        Ending::Crashed(text) => format!("a machine panicked: {text}"),
    }
}
