//! Tests that cannot be done on this machine: each says so, and `make test` lists them at its end. A skip is no pass.

use std::{fs::OpenOptions, io::Write as _};

/// The variable that names the file with the list.
const LIST: &str = "BOTS_SKIPS";

/// Says that `test`, or a part of it, is not done here, and why.
pub fn skipped(test: &str, why: impl std::fmt::Display) {
    // The alternate form of an error has its causes.
    let why = format!("{why:#}").replace('\n', " ");
    eprintln!("\n!!! SKIPPED: {test}: {why}\n");
    let Some(list) = std::env::var_os(LIST) else { return };
    let written = OpenOptions::new().create(true).append(true).open(&list);
    // One write, so that lines of tests that run side by side do not mix.
    if let Err(error) = written.and_then(|mut list| list.write_all(format!("{test}: {why}\n").as_bytes())) {
        eprintln!("cannot write to {}: {error}", list.display());
    }
}
