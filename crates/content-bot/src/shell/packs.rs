//! Packs on disk: a commit and its whole tree in one file each, built once however many web bots ask.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use git2::{Oid, Repository};

use super::{fault::Fault, guard::Guard, submodules};

/// The directory of packs.
#[derive(Debug)]
pub(super) struct Packs {
    dir: PathBuf,
    /// One build at a time: who waits finds the file.
    building: Mutex<()>,
}

impl Packs {
    /// Takes possession of `dir`, empty: a pack is built again in the time it takes to check an old one.
    ///
    /// # Errors
    /// If the directory cannot be used.
    pub(super) fn open(dir: PathBuf) -> io::Result<Self> {
        match fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            Ok(()) | Err(_) => fs::create_dir_all(&dir)?,
        }
        Ok(Self { dir, building: Mutex::new(()) })
    }

    /// The file with the pack of `commit`, built if need be.
    ///
    /// # Errors
    /// If the commit cannot be read, or the file cannot be written.
    pub(super) fn ensure(&self, repository: &Repository, commit: Oid, guard: &Guard) -> Result<PathBuf, Fault> {
        let path = self.path(&commit.to_string());
        let _building = self.building.lock().unwrap_or_else(PoisonError::into_inner);
        if path.exists() {
            return Ok(path);
        }
        let half = path.with_extension("half");
        build(repository, commit, &half, guard)?;
        let disk = |e: io::Error| Fault::Failed(format!("cannot write {}: {e}", path.display()));
        fs::rename(&half, &path).map_err(disk)?;
        Ok(path)
    }

    /// Removes the pack of a commit.
    pub(super) fn forget(&self, sha: &str) {
        // Whoever reads it keeps the open file.
        let _absent = fs::remove_file(self.path(sha));
    }

    fn path(&self, sha: &str) -> PathBuf {
        self.dir.join(format!("{sha}.pack"))
    }
}

fn build(repository: &Repository, commit: Oid, path: &Path, guard: &Guard) -> Result<(), Fault> {
    let disk = |e: io::Error| Fault::Failed(format!("cannot write {}: {e}", path.display()));
    let mut file = BufWriter::new(File::create(path).map_err(disk)?);
    let mut failed = None;
    let built = (|| {
        let mut builder = repository.packbuilder()?;
        builder.set_progress_callback(|_stage, _done, _all| guard.allows())?;
        // The commit and its tree, without its parents: a site needs no history.
        builder.insert_commit(commit)?;
        for submodule in submodules::kept(repository, commit)? {
            builder.insert_commit(submodule)?;
        }
        builder.foreach(|chunk| {
            failed = file.write_all(chunk).err();
            failed.is_none() && guard.allows()
        })
    })();
    match (failed, built) {
        (Some(error), _) => Err(disk(error)),
        (None, Err(error)) => Err(guard.breach().unwrap_or_else(|| Fault::local(&error))),
        (None, Ok(())) => file.flush().and_then(|()| file.get_ref().sync_all()).map_err(disk),
    }
}
