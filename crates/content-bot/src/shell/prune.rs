//! Pruning the mirror: what a force-push has left behind is dropped by copying what is still kept, in one pack, into another
//! repository. When, and how. Not the change of places, which is the mirror's.

use std::{collections::BTreeSet, fs, io, path::Path};

use git2::{ObjectType, Oid, Repository};

use super::{fault::Fault, guard::Guard, tidy};

/// Below this size a mirror is left as it is: a second's work would save nothing that a disk notices.
const SIZE_MIN: u64 = 16 * 1024 * 1024;

/// A mirror is pruned when it has become so many times as large as after the last time: of all that comes in, each byte is
/// copied about once, and the disk holds about twice what is kept.
const GROWTH: u64 = 2;

/// The file in the repository that says how large it was after the last time, in bytes.
const NOTE: &str = "bots-size";

/// What git and libgit2 call the file that says which commits stand without their parents.
const SHALLOW: &str = "shallow";

/// How much libgit2 may hold of what it compares, and of what it found; files above the latter it packs as they are (1.9.7 reads
/// that limit from this name).
const SETTINGS: [(&str, i64); 2] = [("pack.windowMemory", 64 * 1024 * 1024), ("pack.deltaCacheSize", 16 * 1024 * 1024)];

/// Whether it is time, for a repository that keeps so many commits. One that is new is noted.
pub(super) fn is_due(repository: &Path, commits: usize) -> bool {
    let noted = fs::read_to_string(repository.join(NOTE)).ok().and_then(|text| text.trim().parse::<u64>().ok());
    let size = size(repository);
    if noted.is_none() && commits <= 1 {
        // Nothing has been left behind yet.
        note(repository);
        return false;
    }
    size > SIZE_MIN.max(noted.unwrap_or(0).saturating_mul(GROWTH))
}

/// Writes down how large the repository is.
pub(super) fn note(repository: &Path) {
    if let Err(error) = fs::write(repository.join(NOTE), size(repository).to_string()) {
        tracing::warn!(%error, "the size of the mirror cannot be noted; it is pruned again sooner than need be");
    }
}

/// Copies all that these commits lead to, their history included.
///
/// # Errors
/// If something of it cannot be read, or not be written within the limits.
pub(super) fn copy(from: &Repository, commits: &[Oid], into: &Repository, guard: &Guard) -> Result<(), Fault> {
    let local = |e: git2::Error| guard.breach().unwrap_or_else(|| Fault::local(&e));
    let mut settings = from.config().map_err(local)?;
    for (name, value) in SETTINGS {
        settings.set_i64(name, value).map_err(local)?;
    }
    match fs::copy(from.path().join(SHALLOW), into.path().join(SHALLOW)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(Fault::Failed(format!("cannot copy the file `{SHALLOW}` of the mirror: {e}")));
        }
        Ok(_) | Err(_) => {}
    }
    let mut builder = from.packbuilder().map_err(local)?;
    builder.set_progress_callback(|_stage, _done, _all| guard.allows()).map_err(local)?;
    // By hand: libgit2's own way goes into trees as deep as they are, and only those of kept commits have passed a check.
    let (mut seen, mut trees, mut commits) = (BTreeSet::new(), Vec::new(), commits.to_vec());
    while let Some(id) = commits.pop() {
        if !seen.insert(id) {
            continue;
        }
        let commit = from.find_commit(id).map_err(local)?;
        builder.insert_object(id, None).map_err(local)?;
        commits.extend(commit.parent_ids());
        trees.push((commit.tree_id(), String::new()));
        while let Some((id, name)) = trees.pop() {
            if !guard.allows() {
                return Err(guard.breach().unwrap_or(Fault::Vanished));
            }
            if !seen.insert(id) {
                continue;
            }
            builder.insert_object(id, Some(&name)).map_err(local)?;
            for entry in &from.find_tree(id).map_err(local)? {
                let name = String::from_utf8_lossy(entry.name_bytes()).into_owned();
                match entry.kind() {
                    Some(ObjectType::Tree) => trees.push((entry.id(), name)),
                    Some(ObjectType::Blob) if seen.insert(entry.id()) => {
                        builder.insert_object(entry.id(), Some(&name)).map_err(local)?;
                    }
                    Some(ObjectType::Blob | ObjectType::Commit | ObjectType::Any | ObjectType::Tag) | None => {}
                }
            }
        }
    }
    tidy::write(&mut builder, into, guard)
}

/// What the packs take on disk.
fn size(repository: &Path) -> u64 {
    let entries = fs::read_dir(repository.join("objects/pack")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|found| found.len()).sum()
}
