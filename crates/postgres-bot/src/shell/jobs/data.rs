//! The data directory as a whole: mark, complete, discard, set aside. Nothing is deleted without our mark in it, or the
//! operator's leave.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};

use super::super::{
    conninfo::Conninfo,
    files::{self, STAGING, UNFINISHED},
    hands::Hands,
    inspect::OF_NO_MATTER,
    tool::clean_command,
};
use crate::machine::{JobResult, Upstream};

/// A leader that has not answered a short question by then is asked again later.
const ASK_DEADLINE: Duration = Duration::from_secs(10);

/// So many data directories are kept beside the present one. Each takes the room of a whole copy, and a member that loses its data
/// time and again must not fill the disk with them.
const ASIDE_MAX: usize = 3;

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

/// Empties a data directory that bears our mark; the mark goes last. What a rewind has left half done was somebody's data: it is set
/// aside, unless it may be deleted.
pub(super) fn discard_unfinished(hands: &Hands, remove_rewound: bool) -> anyhow::Result<JobResult> {
    let (mark, rewinding) = (hands.node.unfinished(), hands.node.rewinding());
    if rewinding.exists() && !mark.exists() {
        return set_aside(hands, remove_rewound);
    }
    if !mark.exists() {
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

/// Sets the data aside or deletes it, if `leader` would send its log to whom has a new copy.
pub(super) async fn give_up(hands: &Arc<Hands>, remove: bool, leader: Option<&Upstream>) -> anyhow::Result<JobResult> {
    if let Some(leader) = leader {
        sends_log(hands, leader).await.with_context(|| {
            format!(
                "{} sends no log, so that a new copy would not follow either; the data is kept as it is",
                leader.name
            )
        })?;
    }
    hands.on_disk(move |hands| set_aside(hands, remove)).await
}

/// Asks for a connection as replicas have it, by `psql`; where there is none, it is taken for granted.
async fn sends_log(hands: &Arc<Hands>, leader: &Upstream) -> anyhow::Result<()> {
    let node = &hands.node;
    let psql = node.binaries.program("psql");
    if !psql.exists() {
        return Ok(());
    }
    hands.on_disk(|hands| files::write_passfile(&hands.node)).await?;
    let conninfo = Conninfo::new(leader, &node.replication)?.passfile(&node.passfile()).for_replication();
    let mut command = clean_command(psql);
    command.args(["--no-psqlrc", "--no-password", "--command", "IDENTIFY_SYSTEM"]).arg(conninfo.to_string());
    command.env("LC_ALL", "C");
    tokio::time::timeout(ASK_DEADLINE, hands.tools.run(command)).await.context("it does not answer")??;
    Ok(())
}

/// Renames the data directory out of the way, or empties it. What was set aside before stays where it is.
pub(super) fn set_aside(hands: &Hands, remove: bool) -> anyhow::Result<JobResult> {
    let dir = &hands.node.data_dir;
    if remove {
        // Marked first: what is half deleted must never be started.
        files::replace(&hands.node.unfinished(), files::COPYING, 0o600)?;
        tracing::warn!(data_dir = %dir.display(), "the data directory is deleted, as configured or asked for");
        return discard_unfinished(hands, remove);
    }
    let Some(aside) = free_place(dir) else {
        bail!(
            "{}.diverged and {} more beside it exist already: look whether they hold anything that you need, and delete them; or \
             set postgresql.remove_data_directory_on_rewind_failure, and \
             postgresql.remove_data_directory_on_diverged_timelines where use_pg_rewind is off",
            dir.display(),
            ASIDE_MAX - 1
        );
    };
    fs::rename(dir, &aside).with_context(|| format!("rename {} to {}", dir.display(), aside.display()))?;
    files::sync_dir_of(dir).context("make the renaming durable")?;
    files::remove(&hands.node.rewinding())?;
    tracing::warn!(kept = %aside.display(), "the diverged data directory is kept beside the new one");
    Ok(JobResult::Done)
}

/// The first place beside the data directory where nothing is: `.diverged`, `.diverged.2`, ...
fn free_place(dir: &Path) -> Option<PathBuf> {
    let place = |n: usize| {
        let mut path = dir.as_os_str().to_owned();
        path.push(if n == 1 { String::from(".diverged") } else { format!(".diverged.{n}") });
        PathBuf::from(path)
    };
    // A link that leads nowhere is something, too.
    (1..=ASIDE_MAX).map(place).find(|path| fs::symlink_metadata(path).is_err())
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
