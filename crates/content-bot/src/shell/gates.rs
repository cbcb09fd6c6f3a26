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
        check_out(repository, commit, &tree, guard)?;
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
/// If they cannot be read or written, or the directory is there.
pub(super) fn check_out(repository: &Repository, commit: Oid, target: &Path, guard: &Guard) -> Result<(), Fault> {
    fs::create_dir(target).map_err(|e| Fault::Failed(format!("cannot make {}: {e}", target.display())))?;
    check_out_one(repository, commit, target)?;
    for place in submodules::places(repository, commit, guard)? {
        // Its place was made with the folder around it.
        check_out_one(repository, place.commit, &target.join(place.path))?;
    }
    Ok(())
}

fn check_out_one(repository: &Repository, commit: Oid, target: &Path) -> Result<(), Fault> {
    let tree = repository.find_commit(commit).and_then(|commit| commit.tree()).map_err(|e| Fault::local(&e))?;
    write_tree(repository, &tree, target)
}

/// libgit2's own way out of a bare repository stumbles over submodules. The tree has passed the rules for content, so that no
/// name leaves its folder or is there twice, and the folder is new. Should two names be one after all, because the rules were
/// others or the disk makes no difference between them, the second cannot be made: nothing is ever written through a link.
fn write_tree(repository: &Repository, tree: &Tree<'_>, target: &Path) -> Result<(), Fault> {
    let disk = |path: &Path| {
        let path = path.display().to_string();
        move |e: io::Error| Fault::Failed(format!("cannot write {path}: {e}"))
    };
    for entry in tree {
        let path = target.join(OsStr::from_bytes(entry.name_bytes()));
        match entry.kind() {
            Some(ObjectType::Tree) => {
                let below = repository.find_tree(entry.id()).map_err(|e| Fault::local(&e))?;
                fs::create_dir(&path).map_err(disk(&path))?;
                write_tree(repository, &below, &path)?;
            }
            Some(ObjectType::Blob) => {
                let blob = repository.find_blob(entry.id()).map_err(|e| Fault::local(&e))?;
                write_file(&path, entry.filemode(), blob.content()).map_err(disk(&path))?;
            }
            // The place of a submodule, as git leaves it.
            Some(ObjectType::Commit) => fs::create_dir(&path).map_err(disk(&path))?,
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use git2::{ObjectType, Oid, Repository, Signature};
    use tempfile::TempDir;

    use super::{check_out, fs};
    use crate::shell::guard::{Guard, Stop};

    /// A tree as it is, though neither git nor we would make it.
    fn tree(repository: &Repository, entries: &[(&str, &str, Oid)]) -> Oid {
        let entry =
            |(mode, name, id): &(&str, &str, Oid)| [format!("{mode} {name}\0").as_bytes(), id.as_bytes()].concat();
        let raw: Vec<u8> = entries.iter().flat_map(entry).collect();
        repository.odb().expect("an odb").write(ObjectType::Tree, &raw).expect("written")
    }

    fn commit(repository: &Repository, tree: Oid) -> Oid {
        let somebody = Signature::now("t", "t@t").expect("somebody");
        let tree = repository.find_tree(tree).expect("a tree");
        repository.commit(None, &somebody, &somebody, "a change", &tree, &[]).expect("a commit")
    }

    #[test]
    fn nothing_is_written_through_a_link_that_has_the_name_of_a_directory() {
        let scratch = TempDir::new().expect("scratch");
        let repository = Repository::init_bare(scratch.path().join("git")).expect("a repository");
        let [up, text] = ["..", "text"].map(|content| repository.blob(content.as_bytes()).expect("a blob"));
        let guard = Guard::new(Stop::default(), Duration::from_secs(20), u64::MAX);
        let below = tree(&repository, &[("100644", "escaped", text)]);
        let link = ("120000", "l", up);
        let place = ("160000", "l", up);
        for (name, entries) in [
            ("directory", [link, ("40000", "l", below)]),
            ("submodule", [link, place]),
            ("place", [place, ("40000", "l", below)]),
        ] {
            let commit = commit(&repository, tree(&repository, &entries));
            let refused = check_out(&repository, commit, &scratch.path().join(name), &guard);
            assert!(
                refused.as_ref().is_err_and(|fault| fault.to_string().contains("File exists")),
                "{name}: {refused:?}"
            );
            assert!(!scratch.path().join("escaped").exists(), "{name}");
        }
        let whole = commit(&repository, tree(&repository, &[link, ("40000", "m", below)]));
        let target = scratch.path().join("whole");
        check_out(&repository, whole, &target, &guard).expect("two names");
        assert_eq!(fs::read_to_string(target.join("m/escaped")).expect("written"), "text");
        check_out(&repository, whole, &target, &guard).expect_err("it is there");
    }
}
