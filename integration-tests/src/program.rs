//! What every program here has in common: it works until it is done or somebody asks it to stop, and says how it ended.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};

/// What a program's work ends in.
pub trait Outcome {
    /// Whether all was as it should be.
    fn is_good(&self) -> bool;
}

impl Outcome for () {
    fn is_good(&self) -> bool {
        true
    }
}

impl Outcome for bool {
    fn is_good(&self) -> bool {
        *self
    }
}

/// Runs a program's work to its end, or until somebody asks it to stop. What it has started stops when `work` is dropped.
pub async fn run_program<T: Outcome>(name: &str, work: impl Future<Output = Result<T>>) -> ExitCode {
    let good = tokio::select! {
        ended = Box::pin(work) => ended.map(|outcome| outcome.is_good()),
        asked = asked_to_stop() => asked.map(|()| {
            eprintln!("{name}: stopped before its end");
            false
        }),
    };
    match good {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Ends when somebody asks us to: Ctrl-C, SIGTERM, or the terminal goes away.
///
/// # Errors
/// If signals cannot be received.
pub async fn asked_to_stop() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("receive SIGTERM")?;
    let mut hang_up = signal(SignalKind::hangup()).context("receive SIGHUP")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("receive SIGINT")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = hang_up.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Prints, and fails if nobody reads any more.
///
/// # Errors
/// If standard output is gone.
pub fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("print")
}
