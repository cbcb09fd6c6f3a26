//! `pg_rewind`: bringing data that has left the leader's path back to it.

use std::{fmt, sync::Arc};

use anyhow::{Context, bail};

use super::{
    super::{
        conninfo::Conninfo,
        files::{self, Mode},
        hands::Hands,
        inspect::Control,
        tool::{self, clean_command},
    },
    start,
};
use crate::machine::{JobResult, Upstream};

/// Rewinds the stopped server to follow `source`.
pub(super) async fn run(hands: &Arc<Hands>, source: &Upstream) -> anyhow::Result<JobResult> {
    let node = &hands.node;
    if !hands.postmaster.processes().context("look whether it runs")?.is_empty() {
        bail!("Postgres still runs on {}", node.data_dir.display());
    }
    if node.rewinding().exists() {
        bail!("an earlier rewind was cut off half-way: only a new copy helps");
    }
    let is_standby = node.standby_signal().exists();
    let control = Control::read(hands, &node.data_dir).await?;
    let is_clean = control.is_clean();
    if is_standby && !is_clean {
        start::settle_standby(hands, control.reached).await?;
    }
    let recover = !is_standby && !is_clean;
    hands.on_disk(move |hands| begin(hands, recover)).await?;
    let conninfo = Conninfo::new(source, node.rewinder())?.passfile(&node.passfile()).database("postgres");
    let conninfo = conninfo.application_name(&format!("{}-rewind", node.name));
    let mut command = clean_command(node.binaries.program("pg_rewind"));
    command.arg("--target-pgdata").arg(&node.data_dir).arg("--source-server").arg(conninfo.to_string());
    if is_standby {
        // Single-user mode would end the recovery of a standby, and with a record of its own part it from the leader.
        command.arg("--no-ensure-shutdown");
    }
    // What it says is looked at below: with its progress it says, too, when it begins to change files.
    command.arg("--progress").env("LC_ALL", "C");
    tracing::info!(source = source.name, "pg_rewind starts");
    let ended = hands.tools.run_to_any_end(command).await?;
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    let result = tool::check("pg_rewind", &ended);
    let end = match &result {
        Ok(()) => End::Follower,
        Err(_) if has_begun(&said) => End::HalfWay,
        Err(_) => End::Untouched,
    };
    hands.on_disk(move |hands| end.note(hands)).await?;
    let elsewhere = end == End::Untouched && is_of_the_source(&said);
    result.map_err(|error| if elsewhere { error.context(SourceFailed) } else { error })?;
    Ok(JobResult::Done)
}

/// Prepares for the recovery in single-user mode that `pg_rewind` gives a crashed primary, and marks the data directory.
fn begin(hands: &Hands, recover: bool) -> anyhow::Result<()> {
    if recover {
        hands.prepare_recovery()?;
    }
    files::write_passfile(&hands.node)?;
    // Beside the data directory: a rewind deletes what its source does not have.
    files::replace(&hands.node.rewinding(), "", 0o600)
}

/// What a rewind has made of the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// It is the source's now.
    Follower,
    /// It is what it was before.
    Untouched,
    /// It is neither, and keeps the mark.
    HalfWay,
}

impl End {
    fn note(self, hands: &Hands) -> anyhow::Result<()> {
        match self {
            Self::Follower => files::write_signal(&hands.node, &Mode::Standby(None))?,
            Self::Untouched => {}
            Self::HalfWay => return Ok(()),
        }
        files::remove(&hands.node.rewinding())
    }
}

/// The source went away or could not be reached, before anything was changed.
#[derive(Debug)]
pub(super) struct SourceFailed;

impl fmt::Display for SourceFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the source failed")
    }
}

/// What libpq says of a connection that cannot be made or breaks off; the last two are a server's words as it ends or begins.
const CONNECTION_FAILURES: [&str; 7] = [
    "connection to server",
    "server closed the connection",
    "could not receive data from server",
    "could not send data to server",
    "no connection to the server",
    "terminating connection",
    "the database system is",
];

/// Whether `pg_rewind` failed for its source, and not for the data.
fn is_of_the_source(said: &str) -> bool {
    // What was fatal to PostgreSQL 14 is an error since.
    let error = ["error:", "fatal:"].iter().filter_map(|word| said.rfind(word)).max().map_or("", |at| &said[at..]);
    CONNECTION_FAILURES.iter().any(|failure| error.contains(failure))
}

/// Whether `pg_rewind` came to where it changes files. Before, it reads for long, from the network as well.
fn has_begun(said: &str) -> bool {
    said.contains("need to copy ")
}

#[cfg(test)]
mod tests {
    use super::{has_begun, is_of_the_source};

    #[test]
    fn a_source_that_fails_is_told_from_data_that_cannot_be_rewound() {
        let refused = "pg_rewind: error: connection to server at \"10.0.0.5\", port 5432 failed: timeout expired\n";
        assert!(is_of_the_source(refused));
        let list = "pg_rewind: connected to server\npg_rewind: error: could not fetch file list: ";
        assert!(is_of_the_source(&format!("{list}server closed the connection unexpectedly\n\tThis probably means\n")));
        assert!(!is_of_the_source(&format!("{list}ERROR:  permission denied for function pg_ls_dir\n")));
        let parted = "pg_rewind: connected to server\npg_rewind: error: could not find common ancestor of the source\n";
        assert!(!is_of_the_source(parted));
        assert!(!is_of_the_source("pg_rewind: fatal: could not open file \"pg_wal/000000010000000000000003\"\n"));
    }

    #[test]
    fn a_rewind_that_has_changed_files_is_told_from_one_that_has_not() {
        let diverged = "pg_rewind: servers diverged at WAL location 0/3000000 on timeline 1\n";
        assert!(!has_begun(&format!("{diverged}pg_rewind: no rewind required\n")));
        let reads = format!("{diverged}pg_rewind: rewinding from last common checkpoint at 0/2000060\n");
        let why = "pg_rewind: error: could not fetch file list: could not receive data from server\n";
        assert!(!has_begun(&format!("{reads}pg_rewind: reading source file list\n{why}")));
        assert!(has_begun(&format!("{reads}pg_rewind: need to copy 52 MB (total source directory size is 74 MB)\n")));
    }
}
