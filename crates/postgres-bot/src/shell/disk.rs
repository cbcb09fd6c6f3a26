//! The eye on the disks: a small write to the data directory now and then, and to its `pg_wal` if that is on another disk, on a
//! thread of its own, so that a disk that stalls blocks nobody; and how much room is left. Reports what has changed.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use bots_core::{
    machine::{Span, Time},
    shell::{Clock, Events},
};
use tokio::sync::watch;

use super::files::UNFINISHED;
use crate::machine::{Disk, Event};

/// Between two writes. Each costs the disk one flush.
const WRITE_EVERY: Duration = Duration::from_secs(2);

/// A flush that takes longer than this stalls. A busy disk takes a tenth of it.
const STALLED_AFTER: Span = Span::from_secs(2);

/// With less room than this the disk is full: the next page of a table may find none.
const ROOM_BYTES_MIN: u64 = 1024 * 1024;

/// As much as a page of a table.
const PAGE: [u8; 8_192] = [0; 8_192];

/// A copy of the directory leaves out files whose names begin so. It may stand in a directory that is being emptied or was just made, for
/// nobody waits for a write to a disk that stalls: who looks at what a directory has does not count it.
pub(super) const FILE: &str = "pgsql_tmp_disk_watch";

#[derive(Debug, Clone)]
enum Progress {
    /// A write is under way since then.
    Begun(Time),
    /// So the last one ended.
    Ended(Disk),
}

/// Watches the disks of a data directory for as long as the process lives.
///
/// # Errors
/// If there is no thread for it.
pub(super) fn watch(data_dir: PathBuf, events: Events<Event>) -> io::Result<()> {
    let (writer, mut progress) = watch::channel(Progress::Ended(Disk::Good));
    thread::Builder::new().name(String::from("disk")).spawn(move || {
        loop {
            writer.send_replace(Progress::Begun(Clock::now()));
            writer.send_replace(Progress::Ended(try_disks(&data_dir)));
            thread::sleep(WRITE_EVERY);
        }
    })?;
    tokio::spawn(async move {
        let mut told = Disk::Good;
        loop {
            let now = progress.borrow_and_update().clone();
            let found = match now {
                Progress::Ended(found) => found,
                Progress::Begun(at) => {
                    let left = (at + STALLED_AFTER).since(Clock::now());
                    match tokio::time::timeout(left.to_std(), progress.changed()).await {
                        Ok(Ok(())) => continue,
                        Ok(Err(_)) => return,
                        Err(_) => Disk::Stalled,
                    }
                }
            };
            if found != told {
                told = found.clone();
                events.send(Event::DiskObserved(found)).await;
            }
            if progress.changed().await.is_err() {
                return;
            }
        }
    });
    Ok(())
}

/// What a write to each disk shows: the worst of it. A directory without a whole cluster in it is none of ours yet.
fn try_disks(data_dir: &Path) -> Disk {
    if !data_dir.join("PG_VERSION").exists() || data_dir.join(UNFINISHED).exists() {
        return Disk::Good;
    }
    let found = try_disk(data_dir, "the data directory");
    let wal = data_dir.join("pg_wal");
    if are_on_one_disk(data_dir, &wal) { found } else { found.max(try_disk(&wal, "pg_wal")) }
}

/// A directory that cannot be looked at is being renamed or made anew: there is nothing to try.
fn are_on_one_disk(data_dir: &Path, wal: &Path) -> bool {
    match (fs::metadata(data_dir), fs::metadata(wal)) {
        (Ok(data_dir), Ok(wal)) => data_dir.dev() == wal.dev(),
        (Ok(_) | Err(_), Err(_)) | (Err(_), Ok(_)) => true,
    }
}

fn try_disk(dir: &Path, called: &str) -> Disk {
    match (room(dir), write(dir)) {
        (Ok(room), _) if room < ROOM_BYTES_MIN => Disk::Full { dir: called.to_owned(), bytes_free: room },
        (_, Ok(())) => Disk::Good,
        // It is being renamed or made anew.
        (_, Err(error)) if error.kind() == io::ErrorKind::NotFound => Disk::Good,
        (_, Err(error)) => Disk::Failing { why: format!("{called}: {error}") },
    }
}

fn room(dir: &Path) -> io::Result<u64> {
    let found = rustix::fs::statvfs(dir)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Into a file that is empty at first: what has its place already says nothing of a quota that is used up.
fn write(dir: &Path) -> io::Result<()> {
    let path = dir.join(FILE);
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)?;
    file.write_all(&PAGE)?;
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{are_on_one_disk, try_disks};
    use crate::machine::Disk;

    #[test]
    fn a_directory_without_a_cluster_is_left_alone_and_one_with_it_is_written_to() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(try_disks(folder.path()), Disk::Good);
        assert_eq!(fs::read_dir(folder.path()).expect("read it").count(), 0);
        fs::write(folder.path().join("PG_VERSION"), "15\n").expect("write");
        let mark = folder.path().join(super::UNFINISHED);
        fs::write(&mark, "").expect("write");
        assert_eq!(try_disks(folder.path()), Disk::Good);
        assert!(!folder.path().join(super::FILE).exists(), "what is being made or deleted is left alone");
        fs::remove_file(mark).expect("remove");
        assert_eq!(try_disks(folder.path()), Disk::Good);
        assert!(folder.path().join(super::FILE).exists());
    }

    #[test]
    fn a_write_that_fails_is_told_with_its_reason() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("PG_VERSION"), "15\n").expect("write");
        fs::create_dir(folder.path().join(super::FILE)).expect("something in the way");
        assert!(matches!(try_disks(folder.path()), Disk::Failing { .. }));
    }

    #[test]
    fn a_pg_wal_on_another_disk_is_tried_too_and_the_worse_is_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let elsewhere = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
        let wal = folder.path().join("pg_wal");
        fs::write(folder.path().join("PG_VERSION"), "15\n").expect("write");
        std::os::unix::fs::symlink(elsewhere.path(), &wal).expect("a link");
        if are_on_one_disk(folder.path(), &wal) {
            return println!("temporary files are in memory here: there is no other disk");
        }
        assert_eq!(try_disks(folder.path()), Disk::Good);
        fs::remove_file(wal.join(super::FILE)).expect("it was written to");
        fs::create_dir(wal.join(super::FILE)).expect("something in the way");
        let Disk::Failing { why } = try_disks(folder.path()) else { panic!("nobody has tried it") };
        assert!(why.starts_with("pg_wal: "), "{why}");
    }
}
