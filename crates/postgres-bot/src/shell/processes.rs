//! Which processes are a Postgres server's, found in `/proc`. Looks and kills; does not start anything.
//!
//! Every process of a server stands in its data directory, whoever its parent is: that finds backends whose postmaster
//! is dead, and servers that an earlier life of the bot left behind.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

/// How often the list of processes is looked at while they die. Short beside any deadline, long beside a look.
const LOOK_EVERY_MS: u64 = 5;

/// Every so often a process that does not die is complained about.
const COMPLAIN_EVERY_MS: u64 = 5_000;

/// The live processes whose program is `postgres` and whose working directory is one of `dirs`.
pub fn of_server(dirs: &[&Path]) -> Vec<Pid> {
    let wanted: Vec<(u64, u64)> = dirs.iter().filter_map(|dir| identity(dir)).collect();
    if wanted.is_empty() {
        return Vec::new();
    }
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
            let stands_in = identity(&entry.path().join("cwd"))?;
            (wanted.contains(&stands_in) && runs_postgres(pid)).then_some(pid)
        })
        .collect()
}

/// Kills every process of the server and waits until the last is gone, however long the kernel takes.
pub async fn kill_all(dirs: &[&Path]) {
    let mut waited_ms = 0;
    loop {
        let left = of_server(dirs);
        if left.is_empty() {
            return;
        }
        for pid in &left {
            let _already_gone = kill_process(*pid, Signal::KILL);
        }
        reap_orphans();
        tokio::time::sleep(std::time::Duration::from_millis(LOOK_EVERY_MS)).await;
        waited_ms += LOOK_EVERY_MS;
        if waited_ms % COMPLAIN_EVERY_MS == 0 {
            tracing::error!(?left, waited_ms, "killed processes of Postgres do not die: is their disk stuck?");
        }
    }
}

/// Removes the lock files of a server that is dead though its number is somebody's: the number of a zombie that nobody
/// collects, or one that was given out again after a restart of the machine or container. Postgres takes either for a
/// server that lives, and refuses to start.
///
/// # Errors
/// If such a file cannot be removed.
pub fn clear_dead_locks(data_dir: &Path, socket_dir: &Path) -> io::Result<()> {
    if !of_server(&[data_dir]).is_empty() {
        return Ok(());
    }
    let is_socket_lock = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with(".s.PGSQL.") && name.ends_with(".lock")
    };
    let beside = fs::read_dir(socket_dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let locks = beside.filter(is_socket_lock).chain([path_in(data_dir)]);
    for path in locks {
        let Some(file) = fs::read_to_string(&path).ok().and_then(|text| PidFile::parse(&text)) else { continue };
        // Where nobody has the number, Postgres finds out by itself, and looks at the shared memory, too.
        let somebodys = stat(file.pid).is_some();
        if somebodys && file.shared_memory.is_none_or(|id| attached(id) == 0) {
            tracing::info!(lock = %path.display(), pid = file.pid.as_raw_nonzero(), "removing the lock of a dead server");
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// Collects the exit status of adopted children that have ended: backends of a postmaster that died under them. Our
/// own children are in our session and have a waiter each; a server's processes have sessions of their own.
pub fn reap_orphans() {
    let me = rustix::process::getpid();
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return };
    for task in tasks.flatten() {
        let Ok(children) = fs::read_to_string(task.path().join("children")) else { continue };
        for pid in children.split_ascii_whitespace().filter_map(|word| Pid::from_raw(word.parse().ok()?)) {
            if stat(pid).is_some_and(|s| s.state == 'Z' && s.parent == me.as_raw_pid() && s.session != own_session()) {
                let _raced = waitpid(Some(pid), WaitOptions::NOHANG);
            }
        }
    }
}

/// Whether the process lives: it exists and is not a zombie.
pub fn lives(pid: Pid) -> bool {
    stat(pid).is_some_and(|s| s.state != 'Z')
}

/// How many processes are attached to the shared memory segment `id`.
pub fn attached(id: i64) -> u64 {
    let Ok(table) = fs::read_to_string("/proc/sysvipc/shm") else { return 0 };
    // key shmid perms size cpid lpid nattch ...
    let row = table.lines().skip(1).map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let of_id = |row: &Vec<&str>| row.get(1).and_then(|field| field.parse().ok()) == Some(id);
    row.filter(of_id).filter_map(|row| row.get(6)?.parse::<u64>().ok()).sum()
}

/// What `postmaster.pid` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PidFile {
    /// The postmaster.
    pub pid: Pid,
    /// The TCP port.
    pub port: Option<u16>,
    /// The identity of the System V shared memory segment.
    pub shared_memory: Option<i64>,
    /// `starting`, `ready`, `standby`, `stopping`; empty until the server has said so.
    pub status: String,
}

impl PidFile {
    /// Reads the file in `data_dir`; nothing if there is none, or not a whole one.
    pub fn read(data_dir: &Path) -> Option<Self> {
        Self::parse(&fs::read_to_string(path_in(data_dir)).ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        let shared_memory = lines.get(6).and_then(|line| line.split_ascii_whitespace().nth(1)?.parse().ok());
        Some(Self {
            // A stand-alone backend notes its number below zero.
            pid: Pid::from_raw(lines.first()?.parse::<i32>().ok()?.checked_abs()?)?,
            port: lines.get(3).and_then(|line| line.parse().ok()),
            shared_memory,
            status: (*lines.get(7).unwrap_or(&"")).to_owned(),
        })
    }
}

fn path_in(data_dir: &Path) -> PathBuf {
    data_dir.join("postmaster.pid")
}

struct Stat {
    state: char,
    parent: i32,
    session: i32,
}

fn stat(pid: Pid) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // The name in parentheses may itself hold anything; what follows the last parenthesis is regular.
    let mut rest = text.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = rest.next()?.chars().next()?;
    let parent = rest.next()?.parse().ok()?;
    let session = rest.nth(1)?.parse().ok()?;
    Some(Stat { state, parent, session })
}

/// Read from `/proc` and not asked of `getsid`: in a container whose session began outside it the number is 0, there
/// and for all our children.
fn own_session() -> i32 {
    stat(rustix::process::getpid()).map_or(0, |own| own.session)
}

fn runs_postgres(pid: Pid) -> bool {
    let Ok(exe) = fs::read_link(format!("/proc/{}/exe", pid.as_raw_nonzero())) else { return false };
    // A program that was replaced under a running server reads `postgres (deleted)`.
    exe.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.trim_end_matches(" (deleted)") == "postgres")
}

fn identity(dir: &Path) -> Option<(u64, u64)> {
    let found: io::Result<fs::Metadata> = fs::metadata(dir);
    found.ok().map(|m| (m.dev(), m.ino()))
}

#[cfg(test)]
mod tests {
    use super::PidFile;

    #[test]
    fn the_pid_file_is_read_at_every_stage() {
        let whole = "4711\n/data\n1700000000\n5433\n/run/x\n127.0.0.1\n 54330001 32770\nready   \n";
        let read = PidFile::parse(whole).expect("whole");
        assert_eq!(read.pid.as_raw_nonzero().get(), 4711);
        assert_eq!((read.port, read.shared_memory, read.status.as_str()), (Some(5433), Some(32770), "ready"));
        let young = PidFile::parse("4711\n/data\n").expect("young");
        assert_eq!((young.port, young.status.as_str()), (None, ""));
        assert_eq!(PidFile::parse("-12\n").expect("single").pid.as_raw_nonzero().get(), 12);
        assert_eq!(PidFile::parse(""), None);
    }
}
