//! Looking at the data directory without touching it: what is there, whose is it, does anything run on it.

use std::{fs, io, os::unix::fs::MetadataExt, path::Path, time::Duration};

use anyhow::{Context, bail};
use bots_core::{
    shell::Clock,
    wire::{Lsn, Timeline},
};

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

/// So often the control file is read until it counts as unreadable.
const CONTROL_TRIES: u32 = 5;
/// Between two of those.
const CONTROL_AGAIN: Duration = Duration::from_millis(300);

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
    /// It began as a copy or by a rewind, and has not replayed to the end of that.
    pub incomplete: bool,
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
            incomplete: field("Backup start location")? != "0/0",
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
        let cloning = rewinding || marked.is_some_and(|mark| mark == files::COPYING);
        let system_id = match control_of(hands, dir).await {
            Ok(control) => control.map(|control| control.system_id),
            Err(_) if cloning => None,
            // It may be the cluster's only data: nobody may take it for another's.
            Err(error) => return Err(unusable(unreadable(&error))),
        };
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
    let control = control_of(hands, dir).await.and_then(|control| control.context("there is none"));
    let control = control.map_err(|error| unusable(unreadable(&error)))?;
    let rewound = is_rewound(dir, &control);
    Ok(DataDir::Present {
        system_id: control.system_id,
        timeline: control.timeline,
        was_primary: !hands.node.standby_signal().exists(),
        rewound,
        running: running(hands),
    })
}

/// What the control file says, if there is one. A program that fails once may have found no memory, or no process to be.
async fn control_of(hands: &Hands, dir: &Path) -> anyhow::Result<Option<Control>> {
    let mut tries = 0;
    loop {
        let read = Control::read(hands, dir).await;
        tries += 1;
        match (read, dir.join("global/pg_control").try_exists()) {
            (Ok(control), _) => return Ok(Some(control)),
            (Err(_), Ok(false)) => return Ok(None),
            (Err(error), _) if tries == CONTROL_TRIES => return Err(error),
            (Err(_), _) => tokio::time::sleep(CONTROL_AGAIN).await,
        }
    }
}

/// Whether the data was rewound and has not come to where its source was: a rewind leaves a label, which is renamed by the start that
/// goes by it.
fn is_rewound(dir: &Path, control: &Control) -> bool {
    let is_of_a_rewind =
        |name: &str| fs::read_to_string(dir.join(name)).ok().map(|label| label.contains("BACKUP METHOD: pg_rewind"));
    is_of_a_rewind("backup_label")
        .unwrap_or_else(|| control.incomplete && is_of_a_rewind("backup_label.old") == Some(true))
}

fn unreadable(error: &anyhow::Error) -> String {
    format!("its control file cannot be read: {error:#}: restore a backup, or empty it")
}

/// Whether a server runs on the data, and in whose care.
fn running(hands: &Hands) -> Running {
    if hands.postmaster.processes().is_ok_and(|running| running.is_empty()) {
        return Running::No;
    }
    let asked_there = PidFile::read(&hands.node.data_dir).is_some_and(|file| file.port == Some(hands.node.listen.port));
    match hands.postmaster.adopted() {
        Some(Fence::Open) if asked_there => Running::Guarded { fence: None },
        Some(Fence::At(at)) if asked_there => Running::Guarded { fence: Some(at) },
        Some(_) | None => {
            let fence = match hands.postmaster.earlier_fence() {
                Some(Fence::At(at)) => Some(at),
                Some(Fence::Open) => None,
                // Nobody can say: it may be there already, and the server is to be stopped in any case.
                None => Some(Clock::now()),
            };
            Running::LeftBehind { fence }
        }
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
    use std::fs;

    use super::{Control, Lsn, Timeline, is_rewound};

    #[test]
    fn control_data_is_read() {
        let said = "pg_control version number:            1300\n\
                    Database system identifier:           7268616322854375442\n\
                    Database cluster state:               shut down in recovery\n\
                    Latest checkpoint location:           0/3000060\n\
                    Latest checkpoint's REDO location:    0/3000028\n\
                    Latest checkpoint's TimeLineID:       2\n\
                    Min recovery ending loc's timeline:   3\n\
                    Latest checkpoint's PrevTimeLineID:   1\n\
                    Backup start location:                0/2000028\n";
        let read = Control::parse(said).expect("whole");
        assert_eq!((read.timeline, read.checkpoint), (Timeline(2), Lsn(0x0300_0060)));
        assert!(read.incomplete && read.is_clean() && read.system_id == "7268616322854375442");
        assert!(Control::parse("nonsense").is_err());
    }

    #[test]
    fn rewound_data_is_told_from_a_copy_and_from_what_has_come_to_its_end() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path();
        let control = |incomplete| Control {
            system_id: String::from("7"),
            timeline: Timeline(1),
            reached: Timeline(2),
            checkpoint: Lsn(1),
            state: String::from("in archive recovery"),
            incomplete,
        };
        assert!(!is_rewound(dir, &control(true)), "no label");
        fs::write(dir.join("backup_label"), "BACKUP METHOD: streamed\n").expect("write");
        assert!(!is_rewound(dir, &control(false)), "a copy");
        fs::write(dir.join("backup_label"), "BACKUP METHOD: pg_rewind\nBACKUP FROM: standby\n").expect("write");
        assert!(is_rewound(dir, &control(false)), "not started yet");
        fs::rename(dir.join("backup_label"), dir.join("backup_label.old")).expect("rename");
        assert!(is_rewound(dir, &control(true)), "started, and not at its end");
        assert!(!is_rewound(dir, &control(false)), "at its end");
    }
}
