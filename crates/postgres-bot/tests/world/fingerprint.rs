//! When two states of a world are one.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash, Hasher},
};

/// Two states with one fingerprint do the same from here on: moments count from now, numbers by their order. `text` is all that decides
/// what a world does.
pub(crate) fn fingerprint(text: &str, now: u64) -> u64 {
    let mut hasher = DefaultHasher::new();
    for part in normal(text, now) {
        part.hash(&mut hasher);
    }
    hasher.finish()
}

#[derive(Hash)]
enum Part<'t> {
    Text(&'t str),
    Age(u64),
    Due(u64),
    Rank(usize),
    Counter,
}

fn normal(text: &str, now: u64) -> Vec<Part<'_>> {
    const RANKED: &[&str] = &["Revision(", "RequestId(", "JobId(", "ProbeId(", "LeaseId(", "AskId("];
    const COUNTED: &[&str] = &["jobs: ", "probes: ", "requests: ", "asks: ", "since_unix_ms\\\":"];
    let mut numbers: BTreeMap<&str, BTreeSet<u64>> = BTreeMap::new();
    let mut pieces = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(|c: char| c.is_ascii_digit()) {
        let (before, tail) = rest.split_at(at);
        let digits = tail.find(|c: char| !c.is_ascii_digit()).unwrap_or(tail.len());
        let number = tail[..digits].parse().unwrap_or(u64::MAX);
        if let Some(kind) = RANKED.iter().find(|kind| before.ends_with(**kind)) {
            numbers.entry(kind).or_default().insert(number);
        }
        pieces.push((before, number));
        rest = &tail[digits..];
    }
    let mut parts = Vec::new();
    for (before, number) in pieces {
        parts.push(Part::Text(before));
        let ranked = RANKED.iter().find(|kind| before.ends_with(**kind));
        parts.push(match ranked {
            Some(kind) => Part::Rank(numbers[kind].iter().position(|n| *n == number).unwrap_or_default()),
            None if COUNTED.iter().any(|counter| before.ends_with(counter)) => Part::Counter,
            // What is long past does not matter to the millisecond.
            None if before.ends_with("Time(") && number <= now => Part::Age(((now - number) / 500).min(20)),
            None if before.ends_with("Time(") => Part::Due(number - now),
            None => Part::Due(number),
        });
    }
    parts.push(Part::Text(rest));
    parts
}
