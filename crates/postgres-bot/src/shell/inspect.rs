//! Looking at the data directory without touching it: what is there, whose is it, does anything run on it.

use std::{fs, io, os::unix::fs::MetadataExt, path::Path};

use anyhow::{Context, bail};
use bots_core::wire::{Lsn, Timeline};

use super::{
    binaries, files,
    guard::Fence,
    hands::Hands,
    processes::PidFile,
    tool::{Tools, clean_command},
};
use crate::machine::{DataDir, Event, Running};

/// Not ours to use; the operator must decide.
const FOREIGN: u8 = 3;
/// The programs do not fit.
const PROGRAMS: u8 = 4;

/// What a file system of its own may hold from the first day on, and what the eye on the disk may have written to a directory that was
/// emptied meanwhile.
pub(super) const OF_NO_MATTER: [&str; 2] = ["lost+found", super::disk::FILE];

/// What `pg_controldata` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Control {
    /// The system identifier.
    pub system_id: String,
    /// The timeline of the last checkpoint.
    pub timeline: Timeline,
    /// The timeline that a standby has come to: that of the last checkpoint, or a later one that it has written pages of.
    pub reached: Timeline,
    /// Where the last checkpoint stands.
    pub checkpoint: Lsn,
    /// `in production`, `shut down`, `shut down in recovery`, ...
    pub state: String,
}

impl Control {
    /// Reads the control file of `data_dir`.
    ///
    /// # Errors
    /// If the program fails or says less than it should.
    pub async fn read(hands: &Hands, data_dir: &Path) -> anyhow::Result<Self> {
        Self::with(&hands.tools, &hands.node.binaries.program("pg_controldata"), data_dir).await
    }

    async fn with(tools: &Tools, program: &Path, data_dir: &Path) -> anyhow::Result<Self> {
        let mut command = clean_command(program);
        command.arg("-D").arg(data_dir).env("LC_ALL", "C");
        let output = tools.run(command).await?;
        Self::parse(&String::from_utf8_lossy(&output.stdout))
    }

    fn parse(said: &str) -> anyhow::Result<Self> {
        let field = |name: &str| {
            let value = said.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            value.map(str::trim).with_context(|| format!("pg_controldata does not tell the {name}"))
        };
        let system_id = field("Database system identifier")?;
        if system_id.is_empty() || system_id == "0" {
            bail!("the control file has no system identifier");
        }
        let timeline = Timeline(field("Latest checkpoint's TimeLineID")?.parse().context("the timeline")?);
        let written = field("Min recovery ending loc's timeline")?.parse().context("the timeline of a standby")?;
        Ok(Self {
            system_id: system_id.to_owned(),
            timeline,
            reached: timeline.max(Timeline(written)),
            checkpoint: field("Latest checkpoint location")?.parse()?,
            state: field("Database cluster state")?.to_owned(),
        })
    }

    /// Whether the server ended in good order.
    pub fn is_clean(&self) -> bool {
        matches!(self.state.as_str(), "shut down" | "shut down in recovery")
    }
}

/// Looks at the data directory.
pub async fn inspect(hands: &Hands) -> Event {
    match look(hands).await {
        Ok(found) => Event::DataInspected(found),
        Err((code, why)) => Event::DataUnusable { why, code },
    }
}

async fn look(hands: &Hands) -> Result<DataDir, (u8, String)> {
    let dir = hands.node.data_dir.as_path();
    let unusable = |why: String| (FOREIGN, format!("postgresql.data_dir: {}: {why}", dir.display()));
    let names = match names_in(dir) {
        Ok(names) => names,
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(e) => {
            return Err(unusable(format!("cannot be read: {e}: make it a directory of the user that runs the bot")));
        }
    };
    // The mark of a rewind is about data that is gone if there is none.
    if names.is_empty() {
        return Ok(DataDir::Empty);
    }
    let owner = fs::metadata(dir).map_err(|e| unusable(e.to_string()))?.uid();
    let me = rustix::process::geteuid().as_raw();
    if owner != me {
        return Err(unusable(format!("belongs to user {owner}, and the bot runs as user {me}: run it as the owner")));
    }
    let marked = fs::read_to_string(hands.node.unfinished()).ok();
    let rewinding = hands.node.rewinding().exists();
    if marked.is_some() || rewinding {
        let system_id = Control::read(hands, dir).await.ok().map(|control| control.system_id);
        let cloning = rewinding || marked.is_some_and(|mark| mark == files::COPYING);
        return Ok(DataDir::Unfinished { system_id, cloning, running: running(hands) });
    }
    let Some(major) = binaries::major_of(dir) else {
        return Err(unusable(String::from(
            "is not empty and not a data directory of PostgreSQL: nothing was touched; give the bot an empty directory",
        )));
    };
    let ours = hands.node.binaries.version().major;
    if major != ours {
        let why = format!(
            "postgresql.bin_dir: {} was made by PostgreSQL {major}, the programs are of {ours}: set the directory of \
             PostgreSQL {major}",
            dir.display()
        );
        return Err((PROGRAMS, why));
    }
    let control = Control::read(hands, dir).await;
    let control = control
        .map_err(|e| unusable(format!("its control file cannot be read: {e:#}: restore a backup, or empty it")))?;
    Ok(DataDir::Present {
        system_id: control.system_id,
        timeline: control.timeline,
        was_primary: !hands.node.standby_signal().exists(),
        running: running(hands),
    })
}

/// Whether a server runs on the data, and in whose care.
fn running(hands: &Hands) -> Running {
    if hands.postmaster.processes().is_ok_and(|running| running.is_empty()) {
        return Running::No;
    }
    let asked_there = PidFile::read(&hands.node.data_dir).is_some_and(|file| file.port == Some(hands.node.listen.port));
    match hands.postmaster.adopted() {
        Some(fence) if asked_there => Running::Guarded { fenced: fence != Fence::Open },
        Some(_) | None => Running::LeftBehind,
    }
}

/// The names in a directory that matter.
fn names_in(dir: &Path) -> io::Result<Vec<String>> {
    let mut out = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !OF_NO_MATTER.contains(&name.as_str()) {
            out.push(name);
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::{Control, Lsn, Timeline};

    #[test]
    fn control_data_is_read() {
        let said = "pg_control version number:            1300\n\
                    Database system identifier:           7268616322854375442\n\
                    Database cluster state:               shut down in recovery\n\
                    Latest checkpoint location:           0/3000060\n\
                    Latest checkpoint's REDO location:    0/3000028\n\
                    Latest checkpoint's TimeLineID:       2\n\
                    Min recovery ending loc's timeline:   3\n\
                    Latest checkpoint's PrevTimeLineID:   1\n";
        let read = Control::parse(said).expect("whole");
        assert_eq!((read.timeline, read.checkpoint), (Timeline(2), Lsn(0x0300_0060)));
        assert!(read.is_clean() && read.system_id == "7268616322854375442");
        assert!(Control::parse("nonsense").is_err());
    }
}
