//! Numbers of timelines that are others'. A server that is promoted takes the number after the last whose history file it
//! finds in its log directory: a file that tells of no parent makes it pass over a number, and is no history that any
//! server would follow. Replicas fetch the file with the rest, and need it there.

use std::{fs, io, ops::Range, path::Path};

use anyhow::Context;

use super::files;

/// What such a file begins with: a comment to Postgres.
const MARK: &str = "# Taken by another member";

/// Makes the server pass over these numbers at its next promotion. Files that are there already stay.
///
/// # Errors
/// If a file cannot be written.
pub(super) fn take(data_dir: &Path, numbers: Range<u32>) -> anyhow::Result<()> {
    for number in numbers {
        let path = data_dir.join(format!("pg_wal/{number:08X}.history"));
        if !path.exists() {
            files::replace(&path, &format!("{MARK}: nothing was written on this timeline here.\n"), 0o600)?;
        }
    }
    Ok(())
}

/// Removes what a promotion has left that did not come about: while the last history is such a file, a server that follows
/// the latest timeline would not start. Below a history of its own they stay, for replicas ask for them.
///
/// # Errors
/// If a file cannot be read or removed.
pub(super) fn give_back(data_dir: &Path) -> anyhow::Result<()> {
    let dir = data_dir.join("pg_wal");
    let entries = match fs::read_dir(&dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        read => read.with_context(|| format!("list {}", dir.display()))?,
    };
    let mut histories: Vec<_> =
        entries.flatten().map(|e| e.path()).filter(|path| path.extension().is_some_and(|e| e == "history")).collect();
    histories.sort_unstable();
    for path in histories.iter().rev() {
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
    use super::{fs, give_back, take};

    #[test]
    fn numbers_are_given_back_down_to_the_last_real_history() {
        let dir = tempfile::tempdir().expect("dir");
        let wal = dir.path().join("pg_wal");
        give_back(dir.path()).expect("nothing there");
        fs::create_dir(&wal).expect("pg_wal");
        take(dir.path(), 2..3).expect("take");
        fs::write(wal.join("00000003.history"), "1\t0/3000000\tno recovery target specified\n").expect("real");
        take(dir.path(), 3..6).expect("take");
        give_back(dir.path()).expect("give back");
        let mut left: Vec<_> = fs::read_dir(&wal).expect("list").flatten().map(|e| e.file_name()).collect();
        left.sort();
        assert_eq!(left, ["00000002.history", "00000003.history"]);
        assert!(fs::read_to_string(wal.join("00000003.history")).expect("read").starts_with("1\t"));
    }
}
