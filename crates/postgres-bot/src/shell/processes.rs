//! Which processes are a Postgres server's, found in `/proc`. Looks and kills; does not start anything.
//!
//! Every process of a server stands in its data directory, whoever its parent is: that finds backends whose postmaster
//! is dead, and servers that an earlier life of the bot left behind. An operator's shell may stand there, too: what the
//! process runs, or the shared memory that it has, tells them apart. What a server has started itself, and what stands
//! elsewhere, is found as a descendant of the server's guard; once that is gone, by a mark in its environment. A look that fails has
//! not found that there is nothing.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, pidfd_send_signal, waitpid},
};

/// How often the list of processes is looked at while they die. Short beside any deadline, long beside a look.
const LOOK_EVERY_MS: u64 = 5;

/// Every so often a process that does not die is complained about.
const COMPLAIN_EVERY_MS: u64 = 5_000;

/// No process has so many ancestors; a list that was read while numbers were given out again may have a ring.
const ANCESTORS_MAX: usize = 1_000;

/// What every process of a server has in its environment, and every program that it starts: device and inode of its data directory.
/// Postgres writes over its own; what it starts has it from the first to the last.
pub const MARK: &str = "BOTS_SERVER_OF";

/// What is killed has ended within this time, unless its disk is stuck; it has no part in the server any more.
const STRAYS_END_WITHIN: Duration = Duration::from_secs(1);

/// A file by device and inode, whatever it is called.
type FileId = (u64, u64);

/// The live processes of the servers on `dirs`, as far as they are known without [`Marks`].
///
/// # Errors
/// If `/proc` cannot be read.
pub fn of_server(dirs: &[&Path]) -> io::Result<Vec<Pid>> {
    Marks::default().find(dirs)
}

/// By what else the processes of a server are known: a program of another name, a guard.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Marks {
    programs: Vec<FileId>,
    guard: Option<Pid>,
}

impl Marks {
    /// Known by the program that the server is started with, whatever a link leads to.
    pub fn of_program(program: &Path) -> Self {
        Self { programs: identity(program).into_iter().collect(), guard: None }
    }

    /// Also by what this process runs, which is known to be the server's.
    pub fn learn(&mut self, pid: Pid) {
        if let Some(program) = program_of(pid)
            && !self.programs.contains(&program)
        {
            self.programs.push(program);
        }
    }

    /// Also by being a descendant of this process.
    #[must_use]
    pub fn guarded_by(mut self, guard: Option<Pid>) -> Self {
        self.guard = guard;
        self
    }

    /// The live processes of the servers on `dirs`.
    ///
    /// # Errors
    /// If `/proc` cannot be read: there may be some.
    pub fn find(&self, dirs: &[&Path]) -> io::Result<Vec<Pid>> {
        Ok(self.look(dirs)?.into_iter().map(|process| process.pid).collect())
    }

    /// Tells every process of the servers on `dirs` to die; says which there were.
    ///
    /// # Errors
    /// If `/proc` cannot be read: there may be some.
    pub fn kill(&self, dirs: &[&Path]) -> io::Result<Vec<Pid>> {
        let left = self.look(dirs)?;
        left.iter().for_each(Process::kill);
        Ok(left.into_iter().map(|process| process.pid).collect())
    }

    /// Kills every process of the servers and waits until the last is gone, however long the kernel takes.
    pub async fn kill_all(&self, dirs: &[&Path]) {
        let mut waited_ms = 0;
        loop {
            let left = self.kill(dirs);
            if left.as_ref().is_ok_and(Vec::is_empty) {
                return;
            }
            reap_orphans();
            tokio::time::sleep(Duration::from_millis(LOOK_EVERY_MS)).await;
            waited_ms += LOOK_EVERY_MS;
            if waited_ms % COMPLAIN_EVERY_MS == 0 {
                tracing::error!(?left, waited_ms, "killed processes of Postgres do not die: is their disk stuck?");
            }
        }
    }

    fn look(&self, dirs: &[&Path]) -> io::Result<Vec<Process>> {
        let mut found = self.guard.map_or_else(|| Ok(Vec::new()), descendants)?;
        let homes: Vec<Home> = dirs.iter().filter_map(|dir| Home::of(dir)).collect();
        if homes.is_empty() {
            return Ok(found);
        }
        for pid in all_pids()? {
            let Some(stands_in) = there(fs::metadata(proc(pid, "cwd")))?.map(|dir| (dir.dev(), dir.ino())) else {
                continue;
            };
            let Some(home) = homes.iter().find(|home| home.dir == stands_in) else { continue };
            if !self.runs_postgres(pid) && !home.shares_memory(pid)? {
                continue;
            }
            if let Some(stat) = stat(pid)?
                && found.iter().all(|process| process.pid != pid)
            {
                found.push(Process { pid, started: stat.started });
            }
        }
        Ok(found)
    }

    fn runs_postgres(&self, pid: Pid) -> bool {
        is_called_postgres(pid) || program_of(pid).is_some_and(|program| self.programs.contains(&program))
    }
}

/// Kills what `ancestor` has started, and what those have, as the kernel lists it: in a moment, also where a look at every process of the
/// machine takes long, for lack of a processor. What is not listed, because it was begun or has changed its parent at this very
/// moment, is left for such a look.
pub fn kill_descendants(ancestor: Pid) {
    let mut parents = vec![ancestor];
    while let Some(parent) = parents.pop() {
        // A number is not given out again before its parent has collected it, and neither a guard nor a killed parent does so meanwhile.
        for child in children(parent) {
            let _already_gone = kill_process(child, Signal::KILL);
            parents.push(child);
        }
    }
}

/// What the server on `data_dir` is marked with.
pub fn mark_of(data_dir: &Path) -> Option<String> {
    identity(data_dir).map(|(dev, inode)| format!("{dev}:{inode}"))
}

/// Ends the programs that a server has started and that outlive it and its guard, wherever they stand: they are known by the server's
/// [`MARK`]. Only once every process of the server itself is gone. It reads what the memory of others holds, and that can take as long
/// as a disk that is stuck: it is given up in time.
pub async fn end_strays(data_dir: &Path) {
    let Some(mark) = mark_of(data_dir) else { return };
    let entry = format!("{MARK}={mark}").into_bytes();
    let end = async {
        loop {
            let entry = entry.clone();
            let found = tokio::task::spawn_blocking(move || kill_strays(&entry)).await;
            match found {
                Ok(Ok(0)) => return,
                Ok(Ok(count)) => tracing::info!(count, "programs that the server had started were ended"),
                Ok(Err(error)) => return tracing::warn!(%error, "what the server has started cannot be looked for"),
                Err(_panicked) => return,
            }
            tokio::time::sleep(Duration::from_millis(LOOK_EVERY_MS)).await;
        }
    };
    if tokio::time::timeout(STRAYS_END_WITHIN, end).await.is_err() {
        tracing::warn!("programs that the server had started do not end");
    }
}

/// Kills every process with `entry` in its environment; says how many there were.
fn kill_strays(entry: &[u8]) -> io::Result<usize> {
    let mut count = 0;
    for pid in all_pids()? {
        let Some(began) = stat(pid)?.map(|stat| stat.started) else { continue };
        let environment = there(fs::read(proc(pid, "environ")))?.unwrap_or_default();
        if environment.split(|byte| *byte == 0).any(|found| found == entry) {
            Process { pid, started: began }.kill();
            count += 1;
        }
    }
    Ok(count)
}

/// The children of each thread of `parent`, those that have ended and were not collected too.
fn children(parent: Pid) -> Vec<Pid> {
    let tasks = fs::read_dir(proc(parent, "task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let words = |list: String| list.split_ascii_whitespace().map(str::to_owned).collect::<Vec<_>>();
    lists.flat_map(words).filter_map(|word| Pid::from_raw(word.parse().ok()?)).collect()
}

/// Whether all that this postmaster still has is an archiver, with or without the collector of its log. It reads what the memory of others
/// holds, which can take long; and one look alone may miss a child, while others end.
pub fn only_archives(postmaster: Pid) -> bool {
    let mut left = children(postmaster);
    left.retain(|pid| stat(*pid).map_or(true, |stat| stat.is_some_and(|stat| stat.state != 'Z')));
    // More than a server in this state has: a busy one is not looked at any closer.
    if left.len() > 2 {
        return false;
    }
    let title = |pid: &Pid| fs::read_to_string(proc(*pid, "cmdline")).unwrap_or_default();
    says_only_archives(&left.iter().map(title).collect::<Vec<_>>())
}

/// By what servers call their processes, after the name of their cluster.
fn says_only_archives(titles: &[String]) -> bool {
    let is = |title: &str, kind: &str| {
        let what = title.strip_prefix("postgres: ").map(|rest| rest.rsplit(": ").next().unwrap_or(rest));
        what.is_some_and(|what| what.trim_end_matches(['\0', ' ']).split(' ').next() == Some(kind))
    };
    // A role may be called anything.
    let sends = titles.iter().any(|title| title.contains("walsender"));
    !sends
        && titles.iter().any(|title| is(title, "archiver"))
        && titles.iter().all(|title| is(title, "archiver") || is(title, "logger"))
}

/// Makes sure that a postmaster, which was started in its data directory, is one that would be found there after the death of its
/// guard.
///
/// # Errors
/// If it is not: what cannot be found cannot be stopped.
pub fn check_is_found(postmaster: Pid, data_dir: &Path) -> anyhow::Result<()> {
    let number = postmaster.as_raw_pid();
    let advice = "let the bot's user read its program, and mount `/proc` without `hidepid`";
    let shown = |what: &str| {
        let read = fs::metadata(proc(postmaster, what));
        read.with_context(|| format!("`{what}` of the new server's process {number} cannot be read: {advice}"))
    };
    shown("exe")?;
    let stands_in = shown("cwd")?;
    if identity(data_dir) != Some((stands_in.dev(), stands_in.ino())) {
        bail!("the new server's process {number} does not stand in {}: {advice}", data_dir.display());
    }
    if !descendants(rustix::process::getpid()).context("read `/proc`")?.iter().any(|process| process.pid == postmaster)
    {
        bail!("the new server's process {number} is not in `/proc`: {advice}");
    }
    Ok(())
}

/// A process that lives: its number, and when it began, for numbers are given out again.
#[derive(Debug, Clone, Copy)]
struct Process {
    pid: Pid,
    started: u64,
}

impl Process {
    /// The number is somebody else's if the process has ended since it was found: it is held, and looked at again.
    fn kill(&self) {
        let Ok(held) = pidfd_open(self.pid, PidfdFlags::empty()) else { return };
        if stat(self.pid).is_ok_and(|stat| stat.is_some_and(|stat| stat.started == self.started)) {
            let _already_gone = pidfd_send_signal(held, Signal::KILL);
        }
    }
}

/// The data directory of a server.
struct Home {
    dir: FileId,
    /// The shared memory of the server that runs there or ran last.
    segment: Option<i64>,
}

impl Home {
    fn of(dir: &Path) -> Option<Self> {
        let segment = PidFile::read(dir).and_then(|file| file.shared_memory);
        Some(Self { dir: identity(dir)?, segment })
    }

    /// Whether a process has the server's shared memory mapped, as each that can take or acknowledge a write has.
    fn shares_memory(&self, pid: Pid) -> io::Result<bool> {
        let Some(segment) = self.segment else { return Ok(false) };
        let maps = there(fs::read_to_string(proc(pid, "maps")))?.unwrap_or_default();
        // address perms offset dev inode path; the segment's number stands for the inode.
        let mut fields = maps.lines().map(|line| line.split_ascii_whitespace().skip(4));
        Ok(fields.any(|mut fields| {
            let number = fields.next().and_then(|inode| inode.parse::<i64>().ok());
            number == Some(segment) && fields.next().is_some_and(|path| path.starts_with("/SYSV"))
        }))
    }
}

/// The live processes that `ancestor` has started, or that those have.
fn descendants(ancestor: Pid) -> io::Result<Vec<Process>> {
    let mut all = BTreeMap::new();
    for pid in all_pids()? {
        if let Some(stat) = stat(pid)? {
            all.insert(pid.as_raw_pid(), stat);
        }
    }
    let descends = |stat: &Stat| {
        let mut child = stat;
        for _ in 0..ANCESTORS_MAX {
            if child.parent == ancestor.as_raw_pid() {
                return true;
            }
            // A parent that is younger than its child is another process, with the number of one that has ended.
            match all.get(&child.parent) {
                Some(parent) if parent.started <= child.started => child = parent,
                Some(_) | None => return false,
            }
        }
        false
    };
    let living = all.iter().filter(|(_, stat)| stat.state != 'Z' && descends(stat));
    let known = |(pid, stat): (&i32, &Stat)| Some(Process { pid: Pid::from_raw(*pid)?, started: stat.started });
    Ok(living.filter_map(known).collect())
}

fn all_pids() -> io::Result<Vec<Pid>> {
    let names = fs::read_dir("/proc")?.map(|entry| entry.map(|entry| entry.file_name()));
    let names = names.collect::<io::Result<Vec<OsString>>>()?;
    Ok(names.into_iter().filter_map(|name| Pid::from_raw(name.to_str()?.parse().ok()?)).collect())
}

/// What was read of a process; nothing if it has ended, is another user's, or stands in a directory that does not answer. What could
/// not be read for want of memory or of open files may be there all the same.
fn there<T>(read: io::Result<T>) -> io::Result<Option<T>> {
    match read {
        Ok(read) => Ok(Some(read)),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::AGAIN | Errno::INTR) => Err(error),
            Some(_) | None => Ok(None),
        },
    }
}

fn proc(pid: Pid, file: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{}/{file}", pid.as_raw_nonzero()))
}

/// Removes the lock files of a server that is dead though its number is somebody's: the number of a zombie that nobody
/// collects, or one that was given out again after a restart of the machine or container. Postgres takes either for a
/// server that lives, and refuses to start.
///
/// # Errors
/// If such a file cannot be removed, or `/proc` cannot be read.
pub fn clear_dead_locks(marks: &Marks, data_dir: &Path, socket_dir: &Path) -> io::Result<()> {
    if !marks.find(&[data_dir])?.is_empty() {
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
        let somebodys = stat(file.pid)?.is_some();
        let attached = file.shared_memory.map_or(Ok(0), attached)?;
        if somebodys && attached == 0 {
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
    for pid in children(me) {
        let stat = stat(pid).ok().flatten();
        if stat.is_some_and(|s| s.state == 'Z' && s.parent == me.as_raw_pid() && s.session != own_session()) {
            let _raced = waitpid(Some(pid), WaitOptions::NOHANG);
        }
    }
}

/// Whether the process lives: it exists and is not a zombie.
pub fn lives(pid: Pid) -> bool {
    stat(pid).ok().flatten().is_some_and(|s| s.state != 'Z')
}

/// How many processes are attached to the shared memory segment `id`.
///
/// # Errors
/// If the kernel's table cannot be read: there may be some.
pub fn attached(id: i64) -> io::Result<u64> {
    let Some(table) = there(fs::read_to_string("/proc/sysvipc/shm"))? else { return Ok(0) };
    // key shmid perms size cpid lpid nattch ...
    let row = table.lines().skip(1).map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let of_id = |row: &Vec<&str>| row.get(1).and_then(|field| field.parse().ok()) == Some(id);
    Ok(row.filter(of_id).filter_map(|row| row.get(6)?.parse::<u64>().ok()).sum())
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
    /// In ticks since the machine started.
    started: u64,
}

fn stat(pid: Pid) -> io::Result<Option<Stat>> {
    Ok(there(fs::read_to_string(proc(pid, "stat")))?.and_then(|text| Stat::parse(&text)))
}

impl Stat {
    fn parse(text: &str) -> Option<Self> {
        // The name in parentheses may itself hold anything; what follows the last parenthesis is regular.
        let mut rest = text.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = rest.next()?.chars().next()?;
        let parent = rest.next()?.parse().ok()?;
        let session = rest.nth(1)?.parse().ok()?;
        let started = rest.nth(15)?.parse().ok()?;
        Some(Self { state, parent, session, started })
    }
}

/// Read from `/proc` and not asked of `getsid`: in a container whose session began outside it the number is 0, there
/// and for all our children.
fn own_session() -> i32 {
    stat(rustix::process::getpid()).ok().flatten().map_or(0, |own| own.session)
}

fn is_called_postgres(pid: Pid) -> bool {
    let Ok(exe) = fs::read_link(proc(pid, "exe")) else { return false };
    // A program that was replaced under a running server reads `postgres (deleted)`.
    exe.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.trim_end_matches(" (deleted)") == "postgres")
}

/// What a process runs, also if the file was replaced or has gone.
fn program_of(pid: Pid) -> Option<FileId> {
    identity(&proc(pid, "exe"))
}

fn identity(path: &Path) -> Option<FileId> {
    fs::metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

#[cfg(test)]
mod tests {
    use super::{PidFile, says_only_archives};

    #[test]
    fn a_server_of_which_only_the_archiver_is_left_is_told_by_its_titles() {
        let check = |titles: &[&str], expected| {
            let titles: Vec<String> = titles.iter().map(ToString::to_string).collect();
            assert_eq!(says_only_archives(&titles), expected, "{titles:?}");
        };
        check(&["postgres: main: archiver archiving 000000010000000000000003\0\0"], true);
        check(&["postgres: archiver \0", "postgres: logger \0"], true);
        check(&["postgres: main: archiver failed on 000000010000000000000003", "postgres: main: logger "], true);
        check(&["postgres: main: logger "], false);
        check(&[], false);
        check(&["postgres: main: archiver ", "postgres: main: checkpointer "], false);
        check(
            &["postgres: main: archiver ", "postgres: main: walsender archiver 10.0.0.1(1) streaming 0/3000000"],
            false,
        );
        check(&["postgres: main: archiver ", "postgres: archiver: walsender replicator"], false);
        check(
            &["postgres: main: archiver ", "postgres: main: walsender x: archiver 10.0.0.1(1) streaming 0/3000000"],
            false,
        );
        check(&["postgres: main: archiver ", "sh\0-c\0cp"], false);
        check(&["postgres: main: archiver ", ""], false);
    }

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
