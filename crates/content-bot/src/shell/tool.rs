//! Programs that judge a commit: run to their end within a deadline, with what they said last. Not part of the event loop:
//! called where blocking is allowed.

use std::{fs, path::Path, time::Duration};

use bots_core::{
    machine::Span,
    shell::{
        Clock,
        process::{Ended, Output, Program, Running},
    },
};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::runtime::Handle;

use super::{fault::Fault, guard::Guard};

/// What children get of our environment; the rest may hold the configuration with its passwords.
const ENVIRONMENT: [&str; 4] = ["PATH", "LANG", "TZ", "LD_LIBRARY_PATH"];

/// So much of what a program said is read, from its end.
const WORDS_LEN_MAX: usize = 4 * 1024;

/// How often a bot that wants to end is noticed while a program runs.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Outcome {
    /// Nothing if it was killed at its deadline.
    pub(super) ended: Option<Ended>,
    /// The end of what it wrote to its output and its error output.
    pub(super) words: String,
}

impl Outcome {
    pub(super) fn is_success(&self) -> bool {
        self.ended.is_some_and(Ended::is_success)
    }

    /// What it said last.
    pub(super) fn last_words(&self) -> &str {
        self.words.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("it said nothing")
    }
}

/// Runs a program; its words go through a file in `scratch`.
///
/// # Errors
/// If it cannot be run, or the bot ends meanwhile.
pub(super) fn run(program: Program, deadline: Duration, scratch: &Path, guard: &Guard) -> Result<Outcome, Fault> {
    let name = program.path.display().to_string();
    let failed = |what: &str, error: &dyn std::fmt::Display| Fault::Failed(format!("cannot {what} {name}: {error}"));
    let words = scratch.join("words");
    let _absent = fs::remove_file(&words);
    let known = ENVIRONMENT.into_iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
    let program = known.fold(program.clear_env(), |program, (name, value)| program.env(name, value));
    let program = program.output(Output::File(words.clone())).dies_with_us();
    let runtime = Handle::try_current().map_err(|e| failed("run", &e))?;
    let ended = runtime.block_on(async {
        let mut running = program.spawn().map_err(|e| failed("run", &e))?;
        let ended = wait(&mut running, deadline, guard).await.map_err(|e| failed("wait for", &e))?;
        if ended.is_none() {
            kill_group(running.pid());
            let _reaped = running.ended().await;
        }
        Ok(ended)
    })?;
    if ended.is_none()
        && let Some(breach) = guard.breach()
    {
        return Err(breach);
    }
    let said = fs::read(&words).unwrap_or_default();
    let end = said.get(said.len().saturating_sub(WORDS_LEN_MAX)..).unwrap_or_default();
    Ok(Outcome { ended, words: String::from_utf8_lossy(end).into_owned() })
}

/// Its end, or nothing at the deadline.
async fn wait(running: &mut Running, deadline: Duration, guard: &Guard) -> std::io::Result<Option<Ended>> {
    let until = Clock::now() + Span::from_millis(u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX));
    while Clock::now() < until && guard.allows() {
        if let Ok(ended) = tokio::time::timeout(LOOK_EVERY.min(deadline), running.ended()).await {
            return ended.map(Some);
        }
    }
    Ok(None)
}

/// Kills the program and what it has started: it leads a group of its own.
fn kill_group(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().filter(|pid| *pid > 1).and_then(Pid::from_raw) {
        let _gone = kill_process_group(pid, Signal::KILL);
    }
}
