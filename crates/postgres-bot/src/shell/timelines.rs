//! Numbers of timelines that are others'. A server that is promoted takes the number after the last whose history file it
//! finds in its log directory: a file that tells of no parent makes it pass over a number, and is no history that any
//! server would follow. Replicas fetch the file with the rest, and need it there.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use bots_core::wire::{Lsn, Timeline};

use super::files;

/// What such a file begins with: a comment to Postgres.
const MARK: &str = "# Taken by another member";

/// Makes the server pass over every number below `timeline` at its next promotion: those that it has no history of. Old ones
/// are among them, for a server that was cloned lacks them, and replicas further behind will ask for them.
///
/// # Errors
/// If a file cannot be written, or a history of that number or a higher one is here already: it is somebody's, and another
/// number is to be taken.
pub(super) fn take(data_dir: &Path, timeline: u32) -> anyhow::Result<()> {
    if let Some(newest) = newest(data_dir).filter(|newest| newest.0 >= timeline) {
        bail!("the log has a history of timeline {newest} already: timeline {timeline} cannot be begun");
    }
    // Timeline 1 has none.
    for number in 2..timeline {
        let path = history_file(data_dir, number);
        if !path.exists() {
            files::replace(&path, &format!("{MARK}: nothing was written on this timeline here.\n"), 0o600)?;
        }
    }
    Ok(())
}

/// The highest number that there is a history of.
pub(super) fn newest(data_dir: &Path) -> Option<Timeline> {
    let real = |path: &PathBuf| fs::read(path).is_ok_and(|text| !text.starts_with(MARK.as_bytes()));
    let path = histories(data_dir).ok()?.into_iter().rfind(real)?;
    u32::from_str_radix(path.file_stem()?.to_str()?, 16).ok().map(Timeline)
}

/// What `timeline` comes from, as its history file tells: each earlier one with where it was left, the oldest first.
pub(super) fn ancestry(data_dir: &Path, timeline: Timeline) -> Vec<(Timeline, Lsn)> {
    let text = fs::read_to_string(history_file(data_dir, timeline.0)).unwrap_or_default();
    let line = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        Some((Timeline(fields.next()?.parse().ok()?), fields.next()?.parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

fn history_file(data_dir: &Path, number: u32) -> PathBuf {
    data_dir.join(format!("pg_wal/{number:08X}.history"))
}

/// All history files, the lowest number first.
fn histories(data_dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let dir = data_dir.join("pg_wal");
    let entries = match fs::read_dir(&dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        read => read.with_context(|| format!("list {}", dir.display()))?,
    };
    let is_history = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "history");
    let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(is_history).collect();
    found.sort_unstable();
    Ok(found)
}

/// Removes what a promotion has left that did not come about: while the last history is such a file, a server that follows
/// the latest timeline would not start. Below a history of its own they stay, for replicas ask for them.
///
/// # Errors
/// If a file cannot be read or removed.
pub(super) fn give_back(data_dir: &Path) -> anyhow::Result<()> {
    for path in histories(data_dir)?.iter().rev() {
        let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        if !text.starts_with(MARK.as_bytes()) {
            break;
        }
        files::remove(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Lsn, Timeline, ancestry, fs, give_back, newest, take};

    #[test]
    fn numbers_are_given_back_down_to_the_last_real_history() {
        let dir = tempfile::tempdir().expect("dir");
        let wal = dir.path().join("pg_wal");
        give_back(dir.path()).expect("nothing there");
        fs::create_dir(&wal).expect("pg_wal");
        take(dir.path(), 3).expect("take");
        assert_eq!(newest(dir.path()), None);
        let real = "1\t0/3000000\tno recovery target specified\n";
        fs::write(wal.join("00000003.history"), real).expect("real");
        assert!(take(dir.path(), 3).is_err(), "the number is somebody's");
        take(dir.path(), 6).expect("take");
        give_back(dir.path()).expect("give back");
        let mut left: Vec<_> = fs::read_dir(&wal).expect("list").flatten().map(|e| e.file_name()).collect();
        left.sort();
        assert_eq!(left, ["00000002.history", "00000003.history"]);
        assert_eq!(fs::read_to_string(wal.join("00000003.history")).expect("read"), real);
        assert_eq!(newest(dir.path()), Some(Timeline(3)));
        assert_eq!(ancestry(dir.path(), Timeline(3)), [(Timeline(1), Lsn(0x0300_0000))]);
        assert_eq!(ancestry(dir.path(), Timeline(2)), []);
    }
}
