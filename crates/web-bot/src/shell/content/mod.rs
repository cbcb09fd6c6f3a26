//! The library of revisions on disk and in memory: prepares commits, hands them out, throws away what is not wanted.
//! Which ones are wanted is not its business.
//!
//! `data_dir/revisions/<sha>` is a bare repository that holds the commit and all below it; `data_dir/work/<sha>` its
//! files, for apps. Both appear under their name by one rename, whole and verified, or not at all.

mod fetch;
mod links;
mod store;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

pub(crate) use fetch::Wanted;

use super::plane::{Site, SiteBuilder, SiteError, Vault};
use crate::machine::Mode;

/// The most files in one revision: more than any site that one would push by hand.
pub(crate) const FILES_MAX: usize = 100_000;

/// The library. Clones share it.
#[derive(Clone)]
pub(crate) struct Library {
    inner: Arc<Inner>,
}

/// How a library is kept.
#[derive(Debug, Clone)]
pub(crate) struct Shelving {
    pub(crate) mode: Mode,
    /// The folder of the repository that is the site.
    pub(crate) site_path: Vec<String>,
    /// The largest revision, unpacked.
    pub(crate) size_max: u64,
    /// How much of all sites is held in memory.
    pub(crate) memory_max: u64,
    /// The bot's name, which every answer bears.
    pub(crate) name: String,
}

struct Inner {
    dir: PathBuf,
    shelving: Shelving,
    vault: Arc<Vault>,
    shelf: Mutex<Shelf>,
    last_draft: AtomicU64,
}

#[derive(Default)]
struct Shelf {
    /// What must not be thrown away.
    retained: BTreeSet<String>,
    /// Prepared sites, in static mode.
    sites: BTreeMap<String, Arc<Site>>,
}

/// Why a commit is not ready: one line, with the way out where there is one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContentError {
    /// Nobody gave it.
    #[error("{0}")]
    Fetch(String),
    /// It did not come whole or sound; from another source it may.
    #[error("{0}")]
    Unsound(String),
    /// It came whole, and can never be served as this bot is set up.
    #[error("{0}")]
    Refused(String),
    /// The disk.
    #[error("{what} {}: {source}", .path.display())]
    Disk { what: &'static str, path: PathBuf, source: io::Error },
    /// The git library.
    #[error("git: {0}")]
    Git(#[from] git2::Error),
}

impl From<SiteError> for ContentError {
    fn from(error: SiteError) -> Self {
        match error {
            SiteError::Rules(wrong) => Self::Refused(wrong),
            SiteError::Spill(_) => Self::Unsound(error.to_string()),
        }
    }
}

impl ContentError {
    pub(crate) fn disk(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Disk { what, path, source }
    }
}

impl Library {
    /// The library in `dir`, which is made if it is missing. Drafts and files of an earlier process are thrown away: only
    /// what git can verify outlives a power cut.
    pub(crate) fn open(dir: &Path, shelving: Shelving) -> Result<Self, ContentError> {
        let (drafts, work) = (dir.join("drafts"), dir.join("work"));
        for path in [&drafts, &work] {
            match fs::remove_dir_all(path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(ContentError::disk("clear", path)(e)),
                Ok(()) | Err(_) => {}
            }
        }
        for path in [dir.to_owned(), drafts, work, dir.join("revisions")] {
            fs::create_dir_all(&path).map_err(ContentError::disk("make the folder", &path))?;
        }
        let dir = dir.canonicalize().map_err(ContentError::disk("find", dir))?;
        let (shelf, vault) = (Mutex::default(), Vault::new(&dir.join("drafts"), shelving.memory_max));
        let inner = Inner { dir, shelving, vault, shelf, last_draft: AtomicU64::new(0) };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Makes a commit ready: from disk, else from a pack, else from the origin. What git has verified and cannot be served
    /// would not be another commit from elsewhere.
    pub(crate) async fn prepare(&self, wanted: Wanted) -> Result<(), ContentError> {
        let (library, sha) = (self.clone(), wanted.sha.clone());
        let from_disk = blocking(move || library.finish(&sha)).await;
        if matches!(from_disk, Ok(()) | Err(ContentError::Refused(_))) {
            return from_disk;
        }
        let draft = self.draft();
        let fetched = fetch::fetch(&wanted, &draft, self.inner.shelving.size_max, self.site()).await;
        if let Err(error) = fetched {
            let _leftovers = fs::remove_dir_all(&draft);
            return Err(error);
        }
        let library = self.clone();
        blocking(move || {
            let place = library.place("revisions", &wanted.sha);
            library.put(&draft, &place)?;
            library.finish(&wanted.sha)
        })
        .await
    }

    /// Verifies what is on disk and makes of it what the mode needs. Throws it away if it is damaged.
    fn finish(&self, sha: &str) -> Result<(), ContentError> {
        let repository = self.place("revisions", sha);
        if !repository.is_dir() {
            return Err(ContentError::Fetch(format!("{sha} is not on disk")));
        }
        let made = match self.inner.shelving.mode {
            Mode::Static => self.put_together(&repository, sha),
            Mode::App => self.check_out(&repository, sha),
        };
        if made.is_err() {
            let _leftovers = fs::remove_dir_all(&repository);
        }
        made
    }

    /// Reads a site; what can be compressed follows on a thread of its own, while the site is served already.
    fn put_together(&self, repository: &Path, sha: &str) -> Result<(), ContentError> {
        let name = &self.inner.shelving.name;
        let begin = |modified_s| SiteBuilder::new(sha, modified_s, name, &self.inner.vault);
        let loaded = store::load(repository, sha, self.site(), self.inner.shelving.size_max, begin)?;
        let press = loaded.press();
        self.shelf().sites.insert(sha.to_owned(), Arc::new(loaded.finish()));
        let thread = std::thread::Builder::new().name(String::from("compress")).spawn(press);
        if let Err(error) = thread {
            tracing::warn!(%error, "files are served as they are: no thread to compress them can be had");
        }
        Ok(())
    }

    fn check_out(&self, repository: &Path, sha: &str) -> Result<(), ContentError> {
        let work = self.place("work", sha);
        store::verify(repository, sha, self.site(), self.inner.shelving.size_max)?;
        if work.is_dir() {
            return Ok(());
        }
        let draft = self.draft();
        let done = store::check_out(repository, sha, self.site(), self.inner.shelving.size_max, &draft)
            .and_then(|()| self.put(&draft, &work));
        if done.is_err() {
            let _leftovers = fs::remove_dir_all(&draft);
        }
        done
    }

    /// The site of a prepared commit, in static mode.
    pub(crate) fn site_of(&self, sha: &str) -> Option<Arc<Site>> {
        self.shelf().sites.get(sha).cloned()
    }

    /// How much of all sites is held in memory.
    pub(crate) fn memory_used(&self) -> u64 {
        self.inner.vault.memory_used()
    }

    /// The files of a prepared commit, in app mode.
    pub(crate) fn files_of(&self, sha: &str) -> PathBuf {
        self.place("work", sha)
    }

    /// Keeps a commit until it is left out of a list, for one that is about to be prepared.
    pub(crate) fn retain_also(&self, sha: &str) {
        self.shelf().retained.insert(sha.to_owned());
    }

    /// Keeps these commits; returns what throws away the others, which is for a thread that may wait.
    pub(crate) fn retain(&self, shas: Vec<String>) -> impl FnOnce() + Send + 'static {
        {
            let mut shelf = self.shelf();
            shelf.retained = shas.into_iter().collect();
            let Shelf { retained, sites } = &mut *shelf;
            sites.retain(|sha, _| retained.contains(sha));
        }
        let library = self.clone();
        move || library.sweep()
    }

    fn sweep(&self) {
        for kind in ["revisions", "work"] {
            let Ok(entries) = fs::read_dir(self.inner.dir.join(kind)) else { continue };
            for entry in entries.flatten() {
                let draft = self.draft();
                // Looked at and moved away under the lock: what is wanted again meanwhile is prepared anew.
                let moved = {
                    let shelf = self.shelf();
                    let unwanted = !shelf.retained.contains(&*entry.file_name().to_string_lossy());
                    unwanted && fs::rename(entry.path(), &draft).is_ok()
                };
                if moved && let Err(error) = fs::remove_dir_all(&draft) {
                    tracing::warn!(%error, path = %draft.display(), "an old revision cannot be deleted");
                }
            }
        }
    }

    /// Moves a finished draft to its place; what stands there, whole or damaged, makes way.
    fn put(&self, draft: &Path, place: &Path) -> Result<(), ContentError> {
        let _shelf = self.shelf();
        if place.exists() {
            let old = self.draft();
            fs::rename(place, &old).map_err(ContentError::disk("move away", place))?;
            let _leftovers = fs::remove_dir_all(&old);
        }
        fs::rename(draft, place).map_err(ContentError::disk("put a revision at", place))
    }

    fn place(&self, kind: &str, sha: &str) -> PathBuf {
        self.inner.dir.join(kind).join(sha)
    }

    fn draft(&self) -> PathBuf {
        let number = self.inner.last_draft.fetch_add(1, Ordering::Relaxed);
        self.inner.dir.join("drafts").join(number.to_string())
    }

    fn site(&self) -> &[String] {
        &self.inner.shelving.site_path
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.inner.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs what waits for the disk or the network on a thread where it may.
pub(crate) async fn blocking<R: Send + 'static>(
    work: impl FnOnce() -> Result<R, ContentError> + Send + 'static,
) -> Result<R, ContentError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(ended) => Err(ContentError::Fetch(format!("the work was cut off: {ended}"))),
    }
}

#[cfg(test)]
mod tests;
