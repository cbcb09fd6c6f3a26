//! The mirror: a bare repository of our own that keeps the commits that were published, whatever the origin does.
//!
//! It can be lost at any time: whatever is broken is made anew beside it and swapped in. Everything here blocks.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError, RwLock, RwLockWriteGuard, TryLockError},
};

use bots_core::shell::Exit;
use git2::{Oid, Repository};
use rustix::fs::syncfs;

use super::{
    callers,
    fault::Fault,
    gates::{Candidate, Gates},
    guard::{Guard, Stop},
    origin::{Limits, Origin},
    packs::Packs,
    prune,
    submodules::{self, Submodules},
    tidy,
    verify::{LfsPointers, verify},
};
use crate::machine::{Commit, FetchResult};

/// What keeps a commit: `refs/bots/<number>/<sha>`. The number grows, so that the oldest is known.
const KEPT: &str = "refs/bots";

/// The longest subject that is shown, in characters.
const SUBJECT_LEN_MAX: usize = 100;

/// The mirror and the packs beside it.
#[derive(Debug)]
pub struct Mirror {
    dir: PathBuf,
    origin: Origin,
    limits: Limits,
    stop: Stop,
    gates: Gates,
    submodules: Submodules,
    pointers: LfsPointers,
    packs: Packs,
    /// Read to use the repository, written to swap it.
    swap: RwLock<()>,
    /// One fetch at a time, also if an earlier one hangs beyond its deadline.
    fetching: Mutex<()>,
    /// One tidying at a time.
    tidying: Mutex<()>,
    /// One bot, one directory: held for as long as the process lives.
    _lock: File,
}

impl Mirror {
    /// Takes possession of `dir` and clears away what a killed predecessor left.
    ///
    /// # Errors
    /// Code 2 if the directory cannot be used, 3 if another process uses it.
    pub fn open(dir: &Path, origin: Origin, limits: Limits, stop: Stop) -> Result<Self, Exit> {
        let unusable = |e: io::Error| {
            let fix = "give a directory that the bot may write to";
            Exit::usage(format!("data_dir: cannot use {}: {e}: {fix}", dir.display()))
        };
        fs::create_dir_all(dir).map_err(unusable)?;
        let dir = dir.canonicalize().map_err(unusable)?;
        let lock = File::options().create(true).truncate(false).write(true).open(dir.join("lock")).map_err(unusable)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                let fix = "give every bot a directory of its own";
                return Err(Exit::conflict(format!("data_dir: another process uses {}: {fix}", dir.display())));
            }
            Err(fs::TryLockError::Error(e)) => return Err(unusable(e)),
        }
        let packs = Packs::open(dir.join("packs")).map_err(unusable)?;
        let mirror = Self {
            dir,
            origin,
            limits,
            stop,
            gates: Gates::default(),
            submodules: Submodules::Off,
            pointers: LfsPointers::Refuse,
            packs,
            swap: RwLock::new(()),
            fetching: Mutex::new(()),
            tidying: Mutex::new(()),
            _lock: lock,
        };
        if !mirror.path().exists() && mirror.worn().exists() {
            // Killed between the two steps of a change of places.
            fs::rename(mirror.worn(), mirror.path()).map_err(unusable)?;
        }
        for left_over in [mirror.fresh(), mirror.worn(), mirror.lean(), mirror.checking()] {
            remove(&left_over).map_err(unusable)?;
        }
        clear_left_overs(&mirror.path()).map_err(unusable)?;
        callers::clear(&mirror.dir).map_err(unusable)?;
        Ok(mirror)
    }

    /// Lets every commit pass through `gates` before it is kept.
    #[must_use]
    pub fn behind(self, gates: Gates) -> Self {
        Self { gates, ..self }
    }

    /// Takes these submodules of every commit in with it.
    #[must_use]
    pub fn following(self, submodules: Submodules) -> Self {
        Self { submodules, ..self }
    }

    /// Does this with commits in which it finds pointers of Git LFS.
    #[must_use]
    pub fn finding(self, pointers: LfsPointers) -> Self {
        Self { pointers, ..self }
    }

    /// The origin that it mirrors.
    #[must_use]
    pub const fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The commits that it keeps, oldest first.
    #[must_use]
    pub fn holds(&self) -> Vec<Commit> {
        let _using = self.swap.read().unwrap_or_else(PoisonError::into_inner);
        let Ok(repository) = self.repository() else { return Vec::new() };
        let kept = kept(&repository).unwrap_or_default();
        let commit = |(_, oid): &(u64, Oid)| {
            let commit = repository.find_commit(*oid).ok()?;
            commit.tree().ok()?;
            let subject = commit.summary().ok().flatten().unwrap_or_default().chars();
            let subject = subject.filter(|c| !c.is_control()).take(SUBJECT_LEN_MAX).collect();
            Some(Commit { sha: oid.to_string(), subject })
        };
        kept.iter().filter_map(commit).collect()
    }

    /// Brings a commit into the mirror, verifies it, keeps it and builds its pack.
    #[must_use]
    pub fn fetch(&self, sha: &str) -> FetchResult {
        let Ok(commit) = Oid::from_str(sha) else {
            return FetchResult::Unfit { reason: format!("`{sha}` is not a commit's name") };
        };
        let _fetching = match self.fetching.try_lock() {
            Ok(held) => held,
            Err(TryLockError::Poisoned(held)) => held.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return FetchResult::Failed { why: String::from("an earlier fetch still hangs") };
            }
        };
        let guard = Guard::new(self.stop.clone(), self.limits.fetch, self.limits.size_max);
        let fetched = self.fetch_in_place(commit, &guard).or_else(|fault| match fault {
            Fault::Damaged(why) | Fault::Incomplete(why) => {
                tracing::warn!(why, "the mirror is made anew");
                self.make_anew(commit, &guard)
            }
            Fault::Unfit(_) | Fault::Doubtful(_) | Fault::Vanished | Fault::Refused(_) | Fault::Failed(_) => Err(fault),
        });
        match fetched {
            Ok(()) => FetchResult::Complete,
            // The mirror is new, so it is not ours that lacks the object.
            Err(Fault::Incomplete(reason) | Fault::Unfit(reason)) => FetchResult::Unfit { reason },
            Err(Fault::Doubtful(reason)) => FetchResult::Doubtful { reason },
            Err(Fault::Vanished) => FetchResult::Vanished,
            Err(Fault::Damaged(why) | Fault::Refused(why) | Fault::Failed(why)) => FetchResult::Failed { why },
        }
    }

    /// The file with the pack of a commit that the mirror keeps; nothing if it does not.
    ///
    /// # Errors
    /// If the commit can no longer be read.
    pub fn pack(&self, sha: &str) -> Result<Option<PathBuf>, Fault> {
        let _using = self.swap.read().unwrap_or_else(PoisonError::into_inner);
        let Ok(commit) = Oid::from_str(sha) else { return Ok(None) };
        let Ok(repository) = self.repository() else { return Ok(None) };
        let is_kept = kept(&repository).is_ok_and(|kept| kept.iter().any(|(_, oid)| *oid == commit));
        if !is_kept {
            return Ok(None);
        }
        let guard = Guard::new(self.stop.clone(), self.limits.fetch, u64::MAX);
        self.packs.ensure(&repository, commit, &guard).map(Some)
    }

    /// Makes one pack of many small ones, if there are many, and drops what nothing kept leads to, if it may be much. Fetches
    /// and readers go on meanwhile.
    pub fn tidy(&self) {
        let Ok(_tidying) = self.tidying.try_lock() else { return };
        self.merge_packs();
        self.prune();
    }

    fn merge_packs(&self) {
        let Some(packs) = tidy::crowd(&self.path()) else { return };
        let guard = Guard::new(self.stop.clone(), self.limits.fetch, u64::MAX);
        let merged = {
            let _using = self.swap.read().unwrap_or_else(PoisonError::into_inner);
            let repository = self.repository().map_err(|e| Fault::local(&e));
            repository.and_then(|repository| tidy::merge(&repository, packs, &guard))
        };
        let packs = match merged {
            Ok(packs) => packs,
            Err(fault) => {
                tracing::warn!(%fault, "the mirror could not be tidied up; it works as it is");
                return;
            }
        };
        // Nobody reads meanwhile: who has the repository open looks for packs that it has seen. Where somebody does, nobody is
        // kept waiting for him: the packs go another time.
        let Some(_swapping) = self.try_swap() else { return };
        if let Err(error) = tidy::remove(&packs) {
            tracing::warn!(%error, "old packs of the mirror cannot be removed");
        }
    }

    fn prune(&self) {
        let kept = self.repository().and_then(|repository| kept(&repository)).unwrap_or_default();
        if !prune::is_due(&self.path(), kept.len()) {
            return;
        }
        let pruned = self.change_to_lean();
        if let Err(error) = remove(&self.lean()) {
            tracing::warn!(%error, "a copy of the mirror cannot be removed");
        }
        match pruned {
            Ok(true) => {
                prune::note(&self.path());
                tracing::info!("the mirror is pruned");
            }
            // Another time.
            Ok(false) => {}
            Err(fault) => {
                if self.guard().allows() {
                    // It is not the end of the bot: not before it has grown again as much.
                    prune::note(&self.path());
                }
                tracing::warn!(%fault, "the mirror could not be pruned; it works as it is");
            }
        }
    }

    /// Copies what is kept, without keeping anybody from anything, and puts the copy in the mirror's place; `false` if that is
    /// not possible at this moment.
    fn change_to_lean(&self) -> Result<bool, Fault> {
        let disk = |e: io::Error| Fault::Failed(format!("cannot write to data_dir {}: {e}", self.dir.display()));
        let local = |e: git2::Error| Fault::local(&e);
        remove(&self.lean()).map_err(disk)?;
        let lean = open_or_create(&self.lean()).map_err(local)?;
        let old = self.repository().map_err(local)?;
        let copied = references(&old).map_err(local)?;
        let commits: Vec<Oid> = copied.iter().map(|(_, commit)| *commit).collect();
        prune::copy(&old, &commits, &lean, &self.guard())?;
        drop(old);
        for (name, commit) in &copied {
            lean.reference(name, *commit, true, "kept").map_err(local)?;
        }
        // A power cut must not find the old one gone and the new one not there.
        File::open(lean.path()).and_then(|dir| Ok(syncfs(dir)?)).map_err(disk)?;
        let Some(_swapping) = self.try_swap() else { return Ok(false) };
        // A fetch that goes on without reading the mirror makes it anew; one that begins now waits for us.
        if matches!(self.fetching.try_lock(), Err(TryLockError::WouldBlock)) {
            return Ok(false);
        }
        let now = self.repository().and_then(|repository| references(&repository)).map_err(local)?;
        if !now.is_subset(&copied) {
            return Ok(false);
        }
        for (name, _forgotten) in copied.difference(&now) {
            lean.find_reference(name).and_then(|mut reference| reference.delete()).map_err(local)?;
        }
        drop(lean);
        self.put_in_place(&self.lean()).map_err(disk)?;
        Ok(true)
    }

    /// The right to swap, if nobody reads: who waits for it would keep new readers waiting, too.
    fn try_swap(&self) -> Option<RwLockWriteGuard<'_, ()>> {
        match self.swap.try_write() {
            Ok(held) => Some(held),
            Err(TryLockError::Poisoned(held)) => Some(held.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Works with a commit that the mirror keeps, within the time of a fetch.
    ///
    /// # Errors
    /// Those of `work`, or if the mirror does not keep the commit.
    pub fn with_commit<T>(
        &self,
        sha: &str,
        work: impl FnOnce(&Repository, Oid, &Guard) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let _using = self.swap.read().unwrap_or_else(PoisonError::into_inner);
        let commit = Oid::from_str(sha).map_err(|e| Fault::local(&e))?;
        let repository = self.repository().map_err(|e| Fault::local(&e))?;
        work(&repository, commit, &Guard::new(self.stop.clone(), self.limits.fetch, u64::MAX))
    }

    /// Keeps a commit no longer.
    pub fn forget(&self, sha: &str) {
        let _using = self.swap.read().unwrap_or_else(PoisonError::into_inner);
        let forgotten = self.repository().and_then(|repository| {
            let ending = format!("/{sha}");
            for reference in repository.references_glob(&format!("{KEPT}/*"))? {
                let mut reference = reference?;
                if reference.name().is_ok_and(|n| n.ends_with(&ending)) {
                    reference.delete()?;
                }
            }
            for reference in repository.references_glob(&submodules::glob(sha))? {
                reference?.delete()?;
            }
            Ok(())
        });
        if let Err(error) = forgotten {
            tracing::warn!(%error, sha, "a commit could not be forgotten");
        }
        self.packs.forget(sha);
    }

    fn fetch_in_place(&self, commit: Oid, guard: &Guard) -> Result<(), Fault> {
        let _using = self.swap.read().unwrap_or_else(PoisonError::into_inner);
        let repository = open_or_create(&self.path()).map_err(|e| Fault::local(&e))?;
        self.take_in(&repository, commit, guard).map_err(|fault| match fault {
            // libgit2 tells the origin that it has what its references name, and asks for nothing.
            Fault::Vanished if !is_sound(&repository) => {
                Fault::Damaged(String::from("its references name commits that it does not have"))
            }
            other => other,
        })
    }

    /// Fetches everything into a new repository beside the old one, saves what the old one has, and swaps them.
    fn make_anew(&self, commit: Oid, guard: &Guard) -> Result<(), Fault> {
        self.replace(|fresh| {
            if let Err(fault) = self.copy_kept(fresh) {
                tracing::warn!(%fault, "not all commits of the old mirror could be saved");
            }
            self.take_in(fresh, commit, guard)
        })
    }

    fn take_in(&self, repository: &Repository, commit: Oid, guard: &Guard) -> Result<(), Fault> {
        self.origin.fetch(repository, commit, guard)?;
        submodules::fetch(self.submodules, &self.origin, repository, commit, guard)?;
        verify(repository, commit, &self.limits, self.pointers, guard)?;
        self.gates.pass(&Candidate { origin: &self.origin, repository, commit }, &self.checking(), guard)?;
        keep(repository, commit).map_err(|e| Fault::local(&e))?;
        self.packs.ensure(repository, commit, guard).map(|_path| ())
    }

    /// Copies every kept commit that can still be read, one by one, so that a damaged one costs only itself.
    fn copy_kept(&self, fresh: &Repository) -> Result<(), Fault> {
        let old = Repository::open_bare(self.path()).map_err(|e| Fault::local(&e))?;
        let path = self.path();
        let path = path.to_str().ok_or_else(|| Fault::Failed(String::from("data_dir is not UTF-8")))?;
        let mut first_fault = Ok(());
        for (number, oid) in kept(&old).map_err(|e| Fault::local(&e))? {
            let name = format!("{KEPT}/{number:012}/{oid}");
            let guard = Guard::new(self.stop.clone(), self.limits.fetch, u64::MAX);
            let copied = fresh
                .remote_anonymous(path)
                .and_then(|mut remote| {
                    let all = submodules::glob(&oid.to_string());
                    remote.fetch(&[format!("+{name}:{name}"), format!("+{all}:{all}")], None, None)
                })
                .map_err(|e| Fault::local(&e))
                // Whatever it was asked when it came: it is kept, and only damage counts.
                .and_then(|()| verify(fresh, oid, &self.limits, LfsPointers::Allow, &guard));
            if let Err(fault) = copied {
                let _absent = fresh.find_reference(&name).and_then(|mut r| r.delete());
                first_fault = first_fault.and(Err(fault));
            }
        }
        first_fault
    }

    fn replace(&self, fill: impl FnOnce(&Repository) -> Result<(), Fault>) -> Result<(), Fault> {
        let disk = |e: io::Error| Fault::Failed(format!("cannot write to data_dir {}: {e}", self.dir.display()));
        remove(&self.fresh()).map_err(disk)?;
        let fresh = open_or_create(&self.fresh()).map_err(|e| Fault::local(&e))?;
        let filled = fill(&fresh);
        drop(fresh);
        if filled.is_err() {
            // It may be what fills the disk.
            remove(&self.fresh()).map_err(disk)?;
        }
        filled?;
        let _swapping = self.swap.write().unwrap_or_else(PoisonError::into_inner);
        self.put_in_place(&self.fresh()).map_err(disk)
    }

    /// Puts another repository in the mirror's place, for who has the right to swap.
    fn put_in_place(&self, other: &Path) -> io::Result<()> {
        remove(&self.worn())?;
        if self.path().exists() {
            fs::rename(self.path(), self.worn())?;
        }
        if let Err(error) = fs::rename(other, self.path()) {
            let _back = fs::rename(self.worn(), self.path());
            return Err(error);
        }
        remove(&self.worn())
    }

    /// Limits for work with what is here already.
    fn guard(&self) -> Guard {
        Guard::new(self.stop.clone(), self.limits.fetch, u64::MAX)
    }

    fn repository(&self) -> Result<Repository, git2::Error> {
        Repository::open_bare(self.path())
    }

    fn path(&self) -> PathBuf {
        self.dir.join("mirror.git")
    }

    fn checking(&self) -> PathBuf {
        self.dir.join("checking")
    }

    fn fresh(&self) -> PathBuf {
        self.dir.join("mirror.new")
    }

    fn lean(&self) -> PathBuf {
        self.dir.join("mirror.lean")
    }

    fn worn(&self) -> PathBuf {
        self.dir.join("mirror.old")
    }
}

fn open_or_create(path: &Path) -> Result<Repository, git2::Error> {
    if path.exists() { Repository::open_bare(path) } else { Repository::init_bare(path) }
}

/// Everything that keeps a commit, of the site or of a submodule.
fn references(repository: &Repository) -> Result<BTreeSet<(String, Oid)>, git2::Error> {
    let mut found = BTreeSet::new();
    for glob in [format!("{KEPT}/*"), submodules::glob("*")] {
        for reference in repository.references_glob(&glob)? {
            let reference = reference?;
            if let (Ok(name), Some(commit)) = (reference.name(), reference.target()) {
                found.insert((name.to_owned(), commit));
            }
        }
    }
    Ok(found)
}

/// The kept commits with their numbers, oldest first.
fn kept(repository: &Repository) -> Result<Vec<(u64, Oid)>, git2::Error> {
    let mut kept = Vec::new();
    for reference in repository.references_glob(&format!("{KEPT}/*"))? {
        let reference = reference?;
        let Ok(name) = reference.name() else { continue };
        let parts = name.strip_prefix(KEPT).and_then(|rest| rest.trim_start_matches('/').split_once('/'));
        if let Some((number, sha)) = parts
            && let (Ok(number), Ok(oid)) = (number.parse(), Oid::from_str(sha))
        {
            kept.push((number, oid));
        }
    }
    kept.sort_unstable();
    Ok(kept)
}

fn keep(repository: &Repository, commit: Oid) -> Result<(), git2::Error> {
    let kept = kept(repository)?;
    if kept.iter().any(|(_, oid)| *oid == commit) {
        return Ok(());
    }
    let number = kept.last().map_or(0, |(number, _)| *number) + 1;
    repository.reference(&format!("{KEPT}/{number:012}/{commit}"), commit, true, "published").map(|_reference| ())
}

/// Whether every reference names something that is there.
fn is_sound(repository: &Repository) -> bool {
    let all_there = || {
        for reference in repository.references()? {
            if let Some(commit) = reference?.resolve()?.target() {
                repository.odb()?.read(commit)?;
            }
        }
        Ok::<_, git2::Error>(())
    };
    all_there().is_ok()
}

/// Removes locks and half-written files: nobody else works here, so whoever wrote them is dead.
fn clear_left_overs(dir: &Path) -> io::Result<()> {
    if !dir.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if entry.file_type()?.is_dir() {
            clear_left_overs(&entry.path())?;
        } else if name.ends_with(".pack") && !entry.path().with_extension("idx").exists()
            || name.ends_with(".lock")
            || name.starts_with("pack_git2_")
            || name.starts_with("tmp_")
        {
            tracing::info!(file = %entry.path().display(), "a left-over is removed");
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}
