//! The data directory as a whole: mark, complete, discard, set aside. Nothing is deleted without our mark in it, or the
//! operator's leave.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

use super::super::{
    files::{self, STAGING, UNFINISHED},
    hands::Hands,
    inspect::OF_NO_MATTER,
};
use crate::machine::JobResult;

/// Marks an empty data directory as unfinished, and makes room in it for a program that wants an empty place.
///
/// # Errors
/// If it is not empty, or cannot be written.
pub(super) fn stage(hands: &Hands, mark: &str) -> anyhow::Result<PathBuf> {
    let dir = &hands.node.data_dir;
    files::private_dir(&hands.node.run_dir)?;
    files::private_dir(dir)?;
    let strict = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    fs::set_permissions(dir, strict).with_context(|| format!("make {} private", dir.display()))?;
    let found = entries(dir)?.into_iter().find(|path| !OF_NO_MATTER.iter().any(|name| path.ends_with(name)));
    if let Some(found) = found {
        bail!("{} is not empty: it has {}", dir.display(), found.display());
    }
    // What an earlier life was about, before it was cut off.
    files::remove(&hands.node.initdb_password())?;
    files::remove(&hands.node.rewinding())?;
    files::replace(&hands.node.unfinished(), mark, 0o600)?;
    let staging = hands.node.staging();
    files::private_dir(&staging)?;
    Ok(staging)
}

/// Moves what a program made in the staging place to where it belongs. The mark still stands.
///
/// # Errors
/// If it cannot be moved.
pub(super) fn unstage(hands: &Hands) -> anyhow::Result<()> {
    let (dir, staging) = (&hands.node.data_dir, hands.node.staging());
    for path in entries(&staging)? {
        let name = path.file_name().context("an entry of a directory has a name")?;
        fs::rename(&path, dir.join(name)).with_context(|| format!("move {} up", path.display()))?;
    }
    fs::remove_dir(&staging).with_context(|| format!("remove {}", staging.display()))?;
    files::sync_dir_of(&staging).with_context(|| format!("make {} durable", dir.display()))
}

/// Takes the mark off.
pub(super) fn complete(hands: &Hands) -> anyhow::Result<JobResult> {
    files::remove(&hands.node.unfinished())?;
    Ok(JobResult::Done)
}

/// Empties a data directory that bears our mark; the mark goes last.
pub(super) fn discard_unfinished(hands: &Hands) -> anyhow::Result<JobResult> {
    let (mark, rewinding) = (hands.node.unfinished(), hands.node.rewinding());
    if !mark.exists() && !rewinding.exists() {
        bail!(
            "{} bears no mark of an unfinished bootstrap or clone: nothing was deleted",
            hands.node.data_dir.display()
        );
    }
    empty(&hands.node.data_dir)?;
    files::remove(&mark)?;
    files::remove(&hands.node.rewinding())?;
    Ok(JobResult::Done)
}

/// Renames the data directory out of the way, or empties it. There is one place beside it, and what is there stays there: what a
/// rewind has left half done, of which no server can be made any more, is deleted when that is taken.
pub(super) fn set_aside(hands: &Hands, remove: bool) -> anyhow::Result<JobResult> {
    let dir = &hands.node.data_dir;
    let mut aside = dir.as_os_str().to_owned();
    aside.push(".diverged");
    let aside = PathBuf::from(aside);
    let is_worthless = aside.exists() && hands.node.rewinding().exists();
    if remove || is_worthless {
        // Marked first: what is half deleted must never be started.
        files::replace(&hands.node.unfinished(), files::COPYING, 0o600)?;
        let why = if remove { "as configured or asked for" } else { "for a rewind has left it half done" };
        tracing::warn!(data_dir = %dir.display(), "the data directory is deleted, {why}");
        return discard_unfinished(hands);
    }
    if aside.exists() {
        bail!(
            "{} exists already: look whether it holds anything that you need, and delete it; or set \
             postgresql.remove_data_directory_on_rewind_failure",
            aside.display()
        );
    }
    fs::rename(dir, &aside).with_context(|| format!("rename {} to {}", dir.display(), aside.display()))?;
    files::sync_dir_of(dir).context("make the renaming durable")?;
    files::remove(&hands.node.rewinding())?;
    tracing::warn!(kept = %aside.display(), "the diverged data directory is kept beside the new one");
    Ok(JobResult::Done)
}

/// Deletes everything in `dir` but the mark.
fn empty(dir: &Path) -> anyhow::Result<()> {
    for path in entries(dir)? {
        if path.ends_with(UNFINISHED) || path.ends_with("lost+found") {
            continue;
        }
        let kind = fs::symlink_metadata(&path).with_context(|| format!("look at {}", path.display()))?;
        let removed = if kind.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.with_context(|| format!("delete {}", path.display()))?;
    }
    Ok(())
}

fn entries(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let read = || fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<PathBuf>>>();
    match read() {
        Ok(found) => Ok(found),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !dir.ends_with(STAGING) => Ok(Vec::new()),
        Err(e) => Err(e).with_context(|| format!("list {}", dir.display())),
    }
}
