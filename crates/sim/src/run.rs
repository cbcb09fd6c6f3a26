//! Runs seeds: one at a time or many on several threads, and says how each ended.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicU64, Ordering},
};

use bots_core::machine::Time;

use crate::{
    check::{Class, Violation},
    coverage::Coverage,
    world::{Options, World},
};

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// All was well.
    Well,
    /// A requirement was not met.
    Broken(Violation),
    /// A machine panicked: an undeclared edge or a broken assertion.
    Crashed(String),
}

impl Ending {
    /// The exit code that tells it apart.
    #[must_use]
    pub const fn code(&self) -> u8 {
        match self {
            Self::Well => 0,
            Self::Broken(Violation { class: Class::Safety, .. }) => 10,
            Self::Broken(Violation { class: Class::Liveness, .. }) => 11,
            Self::Crashed(_) => 12,
        }
    }
}

/// What is left of a run.
#[derive(Debug)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// How it ended.
    pub ending: Ending,
    /// The simulated time at which it did.
    pub at: Time,
    /// How many things happened.
    pub things: u64,
    /// The fingerprint of the run.
    pub hash: u64,
    /// The record, if it was kept.
    pub lines: Vec<String>,
    /// The edges that were taken.
    pub coverage: Coverage,
}

/// Runs one seed.
#[must_use]
pub fn run(seed: u64, options: Options) -> Outcome {
    let mut world = World::new(seed, options);
    let ended = catch_unwind(AssertUnwindSafe(|| world.run()));
    let ending = match ended {
        Ok(Ok(())) => Ending::Well,
        Ok(Err(violation)) => Ending::Broken(violation),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Ending::Crashed(text.unwrap_or_else(|| String::from("a panic without a word")))
        }
    };
    Outcome {
        seed,
        ending,
        at: world.now,
        things: world.things(),
        hash: world.trace.hash(),
        lines: world.trace.lines().to_vec(),
        coverage: world.coverage,
    }
}

/// Runs `count` seeds from `from` on, on `threads` threads. `each` hears of every one, in no order; it says whether to go
/// on.
pub fn run_many(from: u64, count: u64, threads: usize, options: Options, each: impl Fn(Outcome) -> bool + Sync) {
    let next = AtomicU64::new(from);
    let end = from.saturating_add(count);
    let (next, each) = (&next, &each);
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(move || {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end || !each(run(seed, options)) {
                        next.store(end, Ordering::Relaxed);
                        return;
                    }
                }
            });
        }
    });
}
