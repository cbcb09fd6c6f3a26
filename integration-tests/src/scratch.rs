//! The scratch folder: everything that a fleet writes is below it, and goes with it.

use std::{
    env, fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use rustix::process::Signal;

use crate::process::signal_pid;

/// A killed process is gone within milliseconds, unless the disk holds it up: look for it this often, two seconds in all.
const KILL_LOOK_INTERVAL: Duration = Duration::from_millis(10);
const KILL_LOOKS_MAX: usize = 200;

/// The account that servers run under when we are root: Postgres refuses to run as root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account {
    /// The user's number.
    pub uid: u32,
    /// Its group's number.
    pub gid: u32,
}

impl Account {
    /// The account for Postgres: nothing if we are an ordinary user, who runs it under his own.
    ///
    /// # Errors
    /// If we are root and there is no user `postgres`.
    pub fn for_postgres() -> Result<Option<Self>> {
        if !rustix::process::getuid().is_root() {
            return Ok(None);
        }
        let users = fs::read_to_string("/etc/passwd").context("read /etc/passwd")?;
        let account = users.lines().find_map(|line| {
            let mut fields = line.strip_prefix("postgres:")?.split(':').skip(1);
            Some(Self { uid: fields.next()?.parse().ok()?, gid: fields.next()?.parse().ok()? })
        });
        account
            .map(Some)
            .context("there is no user `postgres`, and Postgres refuses to run as root: install postgresql")
    }
}

/// A folder below `$BOTS_SCRATCH` or the system's temporary folder, removed when dropped.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    keep: bool,
}

impl Scratch {
    /// A new, empty folder that every user may enter. It is left behind if `BOTS_KEEP` is set.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn new() -> Result<Self> {
        let base = env::var_os("BOTS_SCRATCH").map_or_else(env::temp_dir, PathBuf::from);
        fs::create_dir_all(&base).with_context(|| format!("make {}", base.display()))?;
        let path = tempfile::Builder::new().prefix("bots-").tempdir_in(&base).context("make a scratch folder")?.keep();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
            .context("open the scratch folder to all users")?;
        Ok(Self { path, keep: env::var_os("BOTS_KEEP").is_some() })
    }

    /// Leaves the folder behind when dropped.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a folder in it, for `owner` alone if there is one.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn dir(&self, name: &str, owner: Option<Account>) -> Result<PathBuf> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        give(&path, owner)?;
        Ok(path)
    }

    /// Writes a file that only its owner may read: configurations hold passwords.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn file(&self, name: &str, text: &str, owner: Option<Account>) -> Result<PathBuf> {
        let path = self.path.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).context("close a file to other users")?;
        give(&path, owner)?;
        Ok(path)
    }
}

/// Lets every user read the files in a folder.
///
/// # Errors
/// If they cannot be changed.
pub fn open_to_all(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).context("list a folder")? {
        let path = entry.context("list a folder")?.path();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).context("open a file to all users")?;
    }
    Ok(())
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("could not remove {}: {error}", self.path.display());
        }
    }
}

/// Gives `path` to `owner`.
fn give(path: &Path, owner: Option<Account>) -> Result<()> {
    match owner {
        Some(Account { uid, gid }) => {
            chown(path, Some(uid), Some(gid)).with_context(|| format!("give {} to user {uid}", path.display()))
        }
        None => Ok(()),
    }
}

/// The processes that work below `folder`: by their command line or by their working folder. Ours is not counted.
#[must_use]
pub fn processes_below(folder: &Path) -> Vec<String> {
    let own = std::process::id().to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        if pid == own || !pid.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let cwd = fs::read_link(entry.path().join("cwd")).unwrap_or_default();
        if cwd.starts_with(folder) || command.contains(&*folder.to_string_lossy()) {
            found.push(format!("{pid} {command}"));
        }
    }
    found
}

/// Kills what works below `folder`, by its ids, until nothing does: also what a killed supervisor has left running.
pub fn kill_processes_below(folder: &Path) {
    for _ in 0..KILL_LOOKS_MAX {
        let left = processes_below(folder);
        if left.is_empty() {
            return;
        }
        let pids = left.iter().filter_map(|line| line.split(' ').next()?.parse().ok());
        pids.for_each(|pid| signal_pid(pid, Signal::KILL));
        thread::sleep(KILL_LOOK_INTERVAL);
    }
}

/// Who owns a path.
///
/// # Errors
/// If it does not exist.
pub fn owner_of(path: &Path) -> Result<u32> {
    Ok(fs::metadata(path).with_context(|| format!("look at {}", path.display()))?.uid())
}
