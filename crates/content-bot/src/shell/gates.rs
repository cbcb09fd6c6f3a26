//! The gates of a commit beyond the rules for content: who has signed it, and what a program of the operator's says of its
//! files. What does not pass is unfit, and is quarantined.

use std::{
    ffi::OsStr,
    fs,
    io::{self, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, OpenOptionsExt, symlink},
    },
    path::Path,
    time::Duration,
};

use bots_core::shell::process::{Ended, Program};
use git2::{ObjectType, Oid, Repository, Tree};

pub use super::signers::Signers;
use super::{fault::Fault, guard::Guard, origin::Origin, submodules, tool};

pub(super) const FILE_MODE_LINK: i32 = 0o120_000;
pub(super) const FILE_MODE_PROGRAM: i32 = 0o100_755;

/// A program that looks at the files of a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// How long it may take.
    pub deadline: Duration,
}

/// All gates.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Gates {
    /// Nothing: a commit need not be signed.
    pub signers: Option<Signers>,
    /// Nothing: no program is asked.
    pub check: Option<Check>,
}

/// What is judged.
pub(super) struct Candidate<'c> {
    /// Where it comes from.
    pub(super) origin: &'c Origin,
    /// Where it is.
    pub(super) repository: &'c Repository,
    /// The commit.
    pub(super) commit: Oid,
}

impl Gates {
    /// Lets the commit pass, or says why not. `scratch` is made and removed.
    ///
    /// # Errors
    /// [`Fault::Unfit`] or [`Fault::Doubtful`] with the reason, or what kept us from judging.
    pub(super) fn pass(&self, candidate: &Candidate<'_>, scratch: &Path, guard: &Guard) -> Result<(), Fault> {
        if self.signers.is_none() && self.check.is_none() {
            return Ok(());
        }
        let disk = |e: io::Error| Fault::Failed(format!("cannot use {}: {e}", scratch.display()));
        remove(scratch).map_err(disk)?;
        fs::DirBuilder::new().mode(0o700).create(scratch).map_err(disk)?;
        let passed = self.pass_in(candidate, scratch, guard);
        if let Err(error) = remove(scratch) {
            tracing::warn!(%error, path = %scratch.display(), "what a check has left cannot be removed");
        }
        passed
    }

    fn pass_in(&self, candidate: &Candidate<'_>, scratch: &Path, guard: &Guard) -> Result<(), Fault> {
        if let Some(signers) = &self.signers {
            signers.accept(candidate, scratch, guard)?;
        }
        match &self.check {
            Some(check) => check.accept(candidate.repository, candidate.commit, scratch, guard),
            None => Ok(()),
        }
    }
}

impl Check {
    fn accept(&self, repository: &Repository, commit: Oid, scratch: &Path, guard: &Guard) -> Result<(), Fault> {
        let Some((program, arguments)) = self.command.split_first() else { return Ok(()) };
        let tree = scratch.join("tree");
        check_out(repository, commit, &tree)?;
        let program = Program::new("verify", program)
            .args(arguments)
            .dir(&tree)
            .env("HOME", scratch)
            .env("CONTENT_DIR", &tree)
            .env("CONTENT_SHA", commit.to_string());
        let outcome = tool::run(program, self.deadline, scratch, guard)?;
        match outcome.ended {
            Some(ended) if ended.is_success() => Ok(()),
            Some(ended @ Ended::Code(_)) => {
                Err(Fault::Unfit(format!("verify.command says no ({ended}): {}", outcome.last_words())))
            }
            // It has not said anything: the machine may have run out of memory.
            Some(ended @ Ended::Signal(_)) => Err(Fault::Failed(format!("verify.command was cut short ({ended})"))),
            None => Err(Fault::Doubtful(format!("verify.command was not done within {:?}", self.deadline))),
        }
    }
}

/// Writes the files of a commit and of its submodules, as they are in git, into a new directory.
///
/// # Errors
/// If they cannot be read or written.
pub(super) fn check_out(repository: &Repository, commit: Oid, target: &Path) -> Result<(), Fault> {
    check_out_one(repository, commit, target)?;
    for place in submodules::places(repository, commit)? {
        check_out_one(repository, place.commit, &target.join(place.path))?;
    }
    Ok(())
}

fn check_out_one(repository: &Repository, commit: Oid, target: &Path) -> Result<(), Fault> {
    let tree = repository.find_commit(commit).and_then(|commit| commit.tree()).map_err(|e| Fault::local(&e))?;
    write_tree(repository, &tree, target)
}

/// libgit2's own way out of a bare repository stumbles over submodules. The tree has passed the rules for content, so that no
/// name leaves its folder, and the folder is new.
fn write_tree(repository: &Repository, tree: &Tree<'_>, target: &Path) -> Result<(), Fault> {
    let disk = |path: &Path| {
        let path = path.display().to_string();
        move |e: io::Error| Fault::Failed(format!("cannot write {path}: {e}"))
    };
    fs::create_dir_all(target).map_err(disk(target))?;
    for entry in tree {
        let path = target.join(OsStr::from_bytes(entry.name_bytes()));
        match entry.kind() {
            Some(ObjectType::Tree) => {
                let below = repository.find_tree(entry.id()).map_err(|e| Fault::local(&e))?;
                write_tree(repository, &below, &path)?;
            }
            Some(ObjectType::Blob) => {
                let blob = repository.find_blob(entry.id()).map_err(|e| Fault::local(&e))?;
                write_file(&path, entry.filemode(), blob.content()).map_err(disk(&path))?;
            }
            // The place of a submodule, as git leaves it.
            Some(ObjectType::Commit) => fs::create_dir_all(&path).map_err(disk(&path))?,
            Some(ObjectType::Any | ObjectType::Tag) | None => {}
        }
    }
    Ok(())
}

fn write_file(path: &Path, mode: i32, content: &[u8]) -> io::Result<()> {
    if mode == FILE_MODE_LINK {
        return symlink(OsStr::from_bytes(content), path);
    }
    // What others may do is for the umask to say, as with git.
    let mode = if mode == FILE_MODE_PROGRAM { 0o777 } else { 0o666 };
    fs::File::options().create_new(true).write(true).mode(mode).open(path)?.write_all(content)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        Ok(()) | Err(_) => Ok(()),
    }
}
