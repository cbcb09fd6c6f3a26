//! When two states of a world are one: they do the same from here on. Moments count from now, numbers by their order, and what is only
//! counted does not count.

use std::hash::{DefaultHasher, Hash, Hasher};

/// Numbers that only their order matters of.
const RANKED: [&str; 6] = ["Revision(", "RequestId(", "JobId(", "ProbeId(", "LeaseId(", "AskId("];
/// Numbers that do not matter.
const COUNTED: [&str; 5] = ["jobs: ", "probes: ", "requests: ", "asks: ", "since_unix_ms\\\":"];
/// How closely moments are looked at, in milliseconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grain {
    /// What is past.
    pub(crate) age_step: u64,
    /// All that is longer past is equally old.
    pub(crate) age_max: u64,
    /// What is to come.
    pub(crate) due_step: u64,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Ranked(usize),
    Counted,
    Moment,
    Other,
}

/// A part of a world in words, taken apart: all that decides what it does.
#[derive(Debug)]
pub(crate) struct Parsed {
    /// Of all but the numbers.
    words: u64,
    numbers: Vec<(Kind, u64)>,
}

impl Parsed {
    pub(crate) fn new(text: &str) -> Self {
        let mut words = DefaultHasher::new();
        let mut numbers = Vec::new();
        let mut rest = text;
        while let Some(at) = rest.find(|c: char| c.is_ascii_digit()) {
            let (before, tail) = rest.split_at(at);
            let digits = tail.find(|c: char| !c.is_ascii_digit()).unwrap_or(tail.len());
            before.hash(&mut words);
            numbers.push((kind(before), tail[..digits].parse().unwrap_or(u64::MAX)));
            rest = &tail[digits..];
        }
        rest.hash(&mut words);
        Self { words: words.finish(), numbers }
    }
}

fn kind(before: &str) -> Kind {
    match RANKED.iter().position(|kind| before.ends_with(kind)) {
        Some(kind) => Kind::Ranked(kind),
        None if before.ends_with("Time(") => Kind::Moment,
        None if COUNTED.iter().any(|counter| before.ends_with(counter)) => Kind::Counted,
        None => Kind::Other,
    }
}

/// The fingerprint of a world of these parts, at this moment.
pub(crate) fn fingerprint(parts: &[&Parsed], now: u64, grain: Grain) -> u64 {
    let mut ranks: [Vec<u64>; RANKED.len()] = Default::default();
    let all = || parts.iter().flat_map(|part| &part.numbers);
    for (kind, number) in all() {
        if let Kind::Ranked(kind) = kind {
            ranks[*kind].push(*number);
        }
    }
    for known in &mut ranks {
        known.sort_unstable();
        known.dedup();
    }
    let mut hasher = DefaultHasher::new();
    parts.iter().for_each(|part| part.words.hash(&mut hasher));
    for (kind, number) in all() {
        let (tag, value) = match kind {
            Kind::Ranked(kind) => (0, u64::try_from(ranks[*kind].partition_point(|n| n < number)).expect("few")),
            Kind::Counted => (1, 0),
            Kind::Moment if *number <= now => (2, (now - number).min(grain.age_max) / grain.age_step),
            Kind::Moment => (3, (number - now).div_ceil(grain.due_step)),
            Kind::Other => (4, *number),
        };
        (tag, value).hash(&mut hasher);
    }
    hasher.finish()
}
