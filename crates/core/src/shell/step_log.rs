//! The step log: one JSON line a step, which the same machine can be taken through again.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, Write},
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::machine::{Machine, Step, Time};

/// A log longer than this begins anew; the one before stays beside it as `<name>.1`. Days of an idle bot, and never a
/// full disk.
const STEP_LOG_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// A log that is written while the machine runs.
pub(super) struct StepLog {
    path: PathBuf,
    file: File,
    bytes: u64,
}

#[derive(Serialize)]
struct Start<'s, S> {
    start: &'s S,
}

#[derive(Serialize)]
struct Line<'s, M: Machine> {
    at: Time,
    event: &'s M::Event,
    role: M::Role,
    actions: &'s [M::Action],
    state: &'s M::State,
}

impl StepLog {
    /// Begins a new log with the state before the first event; one that exists is kept as `<name>.1`.
    pub(super) fn create<S: Serialize>(path: &Path, start: &S) -> io::Result<Self> {
        let mut log = Self { path: path.to_owned(), file: begin(path)?, bytes: 0 };
        log.write(&json(&Start { start }));
        Ok(log)
    }

    pub(super) fn line<M: Machine>(at: Time, event: &M::Event, state: &M::State, actions: &[M::Action]) -> String {
        json(&Line::<M> { at, event, role: M::role(state), actions, state })
    }

    /// Appends a line. A log that cannot be written does not stop the bot.
    pub(super) fn write(&mut self, line: &str) {
        if self.bytes > STEP_LOG_BYTES_MAX {
            match begin(&self.path) {
                Ok(file) => (self.file, self.bytes) = (file, 0),
                Err(error) => tracing::warn!(%error, path = %self.path.display(), "the step log cannot be rotated"),
            }
        }
        let mut bytes = Vec::with_capacity(line.len() + 1);
        bytes.extend_from_slice(line.as_bytes());
        bytes.push(b'\n');
        self.bytes += u64::try_from(bytes.len()).unwrap_or(0);
        if let Err(error) = self.file.write_all(&bytes) {
            tracing::warn!(%error, path = %self.path.display(), "the step log cannot be written");
        }
    }
}

/// A line. What has no form in JSON is a mistake in a machine's types; the line stays empty, and a replay stops at it.
fn json(line: &impl Serialize) -> String {
    serde_json::to_string(line).unwrap_or_else(|error| {
        tracing::error!(%error, "a step cannot be written as JSON: the step log has an empty line");
        String::new()
    })
}

fn begin(path: &Path) -> io::Result<File> {
    if path.exists() {
        let mut old = path.as_os_str().to_owned();
        old.push(".1");
        std::fs::rename(path, PathBuf::from(old))?;
    }
    OpenOptions::new().create(true).append(true).open(path)
}

/// What came of a replay in which every step went as recorded.
#[derive(Debug, Clone, PartialEq)]
pub struct Replayed<S> {
    /// The state after the last step.
    pub state: S,
    /// How many steps there were.
    pub steps: usize,
}

/// Why a log cannot be replayed, or where the machine goes another way than it did.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The log cannot be read.
    #[error("read line {line}")]
    Read {
        /// The line, from 1.
        line: usize,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// Not a line that the runtime wrote for this machine.
    #[error("line {line} is not a step of this machine")]
    Parse {
        /// The line, from 1.
        line: usize,
        /// What failed.
        #[source]
        source: serde_json::Error,
    },
    /// The machine did something else this time: it is another machine, or it is not deterministic.
    #[error("line {line}: {what} recorded as {recorded}, now {now}")]
    Diverged {
        /// The line, from 1.
        line: usize,
        /// `start`, `actions` or `state`.
        what: &'static str,
        /// As it stands in the log.
        recorded: Value,
        /// As it came out this time.
        now: Value,
    },
}

/// Takes the machine through a recorded run again, from the same first state, and compares every step.
///
/// # Errors
/// The first line that cannot be read or at which the machine goes another way.
pub fn replay<M>(initial: M::State, log: impl BufRead) -> Result<Replayed<M::State>, ReplayError>
where
    M: Machine<Event: DeserializeOwned>,
{
    let mut replayed = Replayed { state: initial, steps: 0 };
    for (index, text) in log.lines().enumerate() {
        let line = index + 1;
        let text = text.map_err(|source| ReplayError::Read { line, source })?;
        let parse = |source| ReplayError::Parse { line, source };
        let mut recorded: Value = serde_json::from_str(&text).map_err(parse)?;
        if let Some(start) = recorded.get_mut("start") {
            same(line, "start", start.take(), &replayed.state)?;
            continue;
        }
        let at: Time = serde_json::from_value(recorded["at"].take()).map_err(parse)?;
        let event: M::Event = serde_json::from_value(recorded["event"].take()).map_err(parse)?;
        let Step { state, actions } = M::step(replayed.state, at, event);
        same(line, "actions", recorded["actions"].take(), &actions)?;
        same(line, "state", recorded["state"].take(), &state)?;
        replayed = Replayed { state, steps: replayed.steps + 1 };
    }
    Ok(replayed)
}

fn same(line: usize, what: &'static str, recorded: Value, now: &impl Serialize) -> Result<(), ReplayError> {
    let now = serde_json::to_value(now).map_err(|source| ReplayError::Parse { line, source })?;
    if recorded == now { Ok(()) } else { Err(ReplayError::Diverged { line, what, recorded, now }) }
}
