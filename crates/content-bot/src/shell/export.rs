//! Trees on disk: the files of a commit below `root/.worktrees/<sha>`, and a symbolic link to one of them, which is moved by
//! one rename. Whatever instant the bot is killed at, the link names a whole tree. Not the decision which. All of it blocks.

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use bots_core::shell::{Exit, process::Program};
use git2::{ObjectType, Oid, Repository, TreeWalkMode, TreeWalkResult};
use rustix::fs::{CWD, RenameFlags, renameat_with, syncfs};

use super::{
    callers::Call,
    fault::Fault,
    gates::{Check, FILE_MODE_LINK, FILE_MODE_PROGRAM, check_out},
    guard::{Guard, Stop},
    mirror::{Mirror, remove},
    submodules, tool,
};
use crate::machine::Trees;

/// Where the trees are, below the root. The last part of a tree's path is its commit.
const TREES: &str = ".worktrees";

/// What the names of half trees and of those on their way out begin with.
const HALF: &str = ".half-";

/// What is exported where.
#[derive(Debug)]
pub struct Plan {
    /// Where the trees are.
    pub root: PathBuf,
    /// The link.
    pub link: PathBuf,
    /// The file that is touched.
    pub touch_file: Option<PathBuf>,
    /// Who is told.
    pub hook: Hook,
    /// Where a program that is told has its home, and a request leaves a file for a moment.
    pub scratch: PathBuf,
}

/// Who is told of a new tree.
#[derive(Debug, Default)]
pub struct Hook {
    /// A program, run in the tree.
    pub program: Option<Check>,
    /// A request.
    pub call: Option<Call>,
}

/// The hand that exports.
#[derive(Debug)]
pub struct Exporter {
    plan: Plan,
    trees: PathBuf,
    /// One change of the trees at a time.
    work: Mutex<()>,
    /// One bot, one root: held for as long as the process lives.
    _lock: File,
}

impl Exporter {
    /// Takes possession of the root, and clears away what a killed predecessor left half.
    ///
    /// # Errors
    /// Code 2 if the folders cannot be used, 3 if another process uses them.
    pub fn open(plan: Plan) -> Result<Self, Exit> {
        let root = plan.root.display().to_string();
        let unusable = |e: io::Error| {
            Exit::usage(format!("export.root: cannot use {root}: {e}: give a directory that the bot may write to"))
        };
        let trees = plan.root.join(TREES);
        fs::create_dir_all(&trees).map_err(unusable)?;
        let lock = File::options().create(true).truncate(false).write(true).open(trees.join(".lock"));
        let lock = lock.map_err(unusable)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                let fix = "give every bot a root of its own";
                return Err(Exit::conflict(format!("export.root: another process exports to {root}: {fix}")));
            }
            Err(fs::TryLockError::Error(e)) => return Err(unusable(e)),
        }
        let exporter = Self { plan, trees, work: Mutex::new(()), _lock: lock };
        for name in exporter.names().into_iter().filter(|name| name.starts_with(HALF)) {
            remove(&exporter.trees.join(name)).map_err(unusable)?;
        }
        remove(&exporter.next_link()).map_err(unusable)?;
        remove(&exporter.plan.scratch).map_err(unusable)?;
        Ok(exporter)
    }

    /// The trees that are there.
    #[must_use]
    pub fn trees(&self) -> Trees {
        let linked = self.linked();
        let others = self.names().into_iter().filter(|name| is_commit(name) && Some(name) != linked.as_ref());
        Trees { others: others.collect(), linked }
    }

    /// Puts the tree of a commit in place, and lets the link name it.
    ///
    /// # Errors
    /// Why the link is as it was.
    pub fn put(&self, mirror: &Mirror, sha: &str) -> Result<(), Fault> {
        let _working = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        mirror.with_commit(sha, |repository, commit, guard| self.put_tree(repository, commit, guard))?;
        if self.linked().as_deref() != Some(sha) {
            self.move_link(sha)?;
        }
        match &self.plan.touch_file {
            Some(path) => touch(path).map_err(|e| failed("touch", path, &e)),
            None => Ok(()),
        }
    }

    /// Removes a tree, unless the link names it.
    pub fn remove(&self, sha: &str) {
        let _working = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        if self.linked().as_deref() == Some(sha) || !is_commit(sha) {
            return;
        }
        // Whoever kills us in the middle leaves nothing that looks like a tree.
        let (tree, going) = (self.trees.join(sha), self.half(sha));
        let removed = remove(&going).and_then(|()| fs::rename(&tree, &going)).and_then(|()| remove(&going));
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, path = %tree.display(), "an old tree cannot be removed");
            }
            Ok(()) | Err(_) => {}
        }
    }

    /// How long the program may take that is told.
    #[must_use]
    pub fn tell_deadline(&self) -> Duration {
        self.plan.hook.program.as_ref().map_or(Duration::ZERO, |program| program.deadline)
    }

    /// Runs the program that is to know of a tree.
    ///
    /// # Errors
    /// One line: what it said.
    pub fn run_hook(&self, sha: &str, stop: Stop) -> Result<(), String> {
        let Some(hook) = &self.plan.hook.program else { return Ok(()) };
        let Some((program, arguments)) = hook.command.split_first() else { return Ok(()) };
        let (tree, scratch) = (self.trees.join(sha), &self.plan.scratch);
        fs::DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(scratch)
            .map_err(|e| failed("make", scratch, &e).to_string())?;
        let program = Program::new("hook", program)
            .args(arguments)
            .dir(&tree)
            .env("HOME", scratch)
            .env("CONTENT_DIR", &tree)
            .env("CONTENT_SHA", sha)
            .env("GITSYNC_HASH", sha);
        let guard = Guard::new(stop, hook.deadline, u64::MAX);
        let outcome = tool::run(program, hook.deadline, scratch, &guard).map_err(|fault| fault.to_string())?;
        match outcome.ended {
            Some(ended) if ended.is_success() => Ok(()),
            Some(ended) => Err(format!("export.exec_hook failed ({ended}): {}", outcome.last_words())),
            None => Err(format!("export.exec_hook was not done within {:?}", hook.deadline)),
        }
    }

    /// Makes the request that tells of a tree.
    ///
    /// # Errors
    /// One line: who did not take it.
    pub async fn call(&self, sha: &str) -> Result<(), String> {
        let Some(call) = &self.plan.hook.call else { return Ok(()) };
        match call.make(sha, self.plan.scratch.parent().unwrap_or(&self.plan.scratch)).await {
            Ok(200..300) => Ok(()),
            Ok(status) => Err(format!("export.webhook: {} answers {status}", call.url)),
            Err(why) => Err(format!("export.webhook: {}: {why}", call.url)),
        }
    }

    /// The tree stands whole under its name, durably.
    fn put_tree(&self, repository: &Repository, commit: Oid, guard: &Guard) -> Result<(), Fault> {
        let tree = self.trees.join(commit.to_string());
        let mut sound = tree.is_dir() && is_sound(repository, commit, &tree, guard)?;
        for place in submodules::places(repository, commit, guard)? {
            sound = sound && is_sound(repository, place.commit, &tree.join(place.path), guard)?;
        }
        if sound {
            return Ok(());
        }
        let half = self.half(&commit.to_string());
        remove(&half).map_err(|e| failed("clear", &half, &e))?;
        check_out(repository, commit, &half, guard)?;
        // The names must not become durable before the files.
        File::open(&half).and_then(|dir| Ok(syncfs(dir)?)).map_err(|e| failed("write", &half, &e))?;
        if tree.exists() {
            // Damaged, and perhaps linked: the two change places at one instant.
            renameat_with(CWD, &half, CWD, &tree, RenameFlags::EXCHANGE)
                .map_err(|e| failed("mend", &tree, &e.into()))?;
            return remove(&half).map_err(|e| failed("clear", &half, &e));
        }
        fs::rename(&half, &tree).map_err(|e| failed("make", &tree, &e))
    }

    fn move_link(&self, sha: &str) -> Result<(), Fault> {
        let (link, next) = (&self.plan.link, self.next_link());
        match fs::symlink_metadata(link) {
            Ok(found) if !found.is_symlink() => {
                let link = link.display();
                return Err(Fault::Failed(format!(
                    "export.link: {link} is there and is no symbolic link: move it away"
                )));
            }
            Ok(_) | Err(_) => {}
        }
        let folder = link.parent().unwrap_or(&self.plan.root);
        fs::create_dir_all(folder).map_err(|e| failed("make", folder, &e))?;
        remove(&next).map_err(|e| failed("clear", &next, &e))?;
        symlink(self.target(sha), &next).map_err(|e| failed("make", &next, &e))?;
        fs::rename(&next, link).map_err(|e| failed("move", link, &e))?;
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(|e| failed("write", folder, &e))
    }

    /// What the link says: relative if it is below the root, so that the root can be mounted elsewhere.
    fn target(&self, sha: &str) -> PathBuf {
        match self.plan.link.parent().and_then(|folder| folder.strip_prefix(&self.plan.root).ok()) {
            Some(below) => below.components().map(|_| "..").chain([TREES, sha]).collect(),
            None => self.trees.join(sha),
        }
    }

    /// The commit that the link names, if its tree is there.
    fn linked(&self) -> Option<String> {
        let target = fs::read_link(&self.plan.link).ok()?;
        let sha = target.file_name()?.to_str()?.to_owned();
        (is_commit(&sha) && target == self.target(&sha) && self.trees.join(&sha).is_dir()).then_some(sha)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.trees).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    fn half(&self, sha: &str) -> PathBuf {
        self.trees.join(format!("{HALF}{sha}"))
    }

    fn next_link(&self) -> PathBuf {
        let mut name = OsString::from(".");
        name.push(self.plan.link.file_name().unwrap_or_default());
        name.push(".next");
        self.plan.link.with_file_name(name)
    }
}

/// Whether every file of the commit is there as it is in git. What else lies there is somebody else's.
fn is_sound(repository: &Repository, commit: Oid, folder: &Path, guard: &Guard) -> Result<bool, Fault> {
    let tree = repository.find_commit(commit).and_then(|commit| commit.tree()).map_err(|e| Fault::local(&e))?;
    let mut sound = true;
    let walked = tree.walk(TreeWalkMode::PreOrder, |parent, entry| {
        if entry.kind() == Some(ObjectType::Blob) {
            let path = entry.name().map(|name| folder.join(parent).join(name));
            sound = guard.allows() && path.is_ok_and(|path| is_as_in_git(&path, entry.id(), entry.filemode()));
        }
        if sound { TreeWalkResult::Ok } else { TreeWalkResult::Abort }
    });
    match guard.breach() {
        Some(breach) => Err(breach),
        None if sound => walked.map(|()| true).map_err(|e| Fault::local(&e)),
        None => Ok(false),
    }
}

fn is_as_in_git(path: &Path, id: Oid, mode: i32) -> bool {
    let Ok(found) = fs::symlink_metadata(path) else { return false };
    if mode == FILE_MODE_LINK {
        let target = fs::read_link(path).unwrap_or_default();
        let target = target.as_os_str().as_encoded_bytes();
        return found.is_symlink() && Oid::hash_object(ObjectType::Blob, target).is_ok_and(|hash| hash == id);
    }
    let runs = found.permissions().mode() & 0o100 != 0;
    found.is_file()
        && runs == (mode == FILE_MODE_PROGRAM)
        && Oid::hash_file(ObjectType::Blob, path).is_ok_and(|hash| hash == id)
}

fn is_commit(name: &str) -> bool {
    name.len() == 40 && name.bytes().all(|b| b.is_ascii_hexdigit())
}

fn touch(path: &Path) -> io::Result<()> {
    let now = bots_core::shell::Clock::unix_ms();
    let file = File::options().create(true).truncate(false).write(true).open(path)?;
    file.set_modified(std::time::UNIX_EPOCH + Duration::from_millis(now))
}

fn failed(what: &str, path: &Path, error: &io::Error) -> Fault {
    Fault::Failed(format!("cannot {what} {}: {error}", path.display()))
}
