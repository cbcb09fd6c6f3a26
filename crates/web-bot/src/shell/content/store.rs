//! Reading a commit out of its repository: every object is read once, so that what is served is known to be whole. git's
//! library checks the hash of each object that it reads. Where links lead is another file's affair.

use std::{fs, path::Path};

use git2::{ObjectType, Oid, Repository, Tree};

use super::{
    ContentError, FILES_MAX,
    links::{FILE_MODE_LINK, Found, Links},
};
use crate::shell::plane::SiteBuilder;

/// The deepest folder; more is a tree made to exhaust us.
const DEPTH_MAX: usize = 64;

/// The most files, folders and links that are looked at: folders without files, and links to links, are not to keep us for ever.
const ENTRIES_MAX: usize = 4 * FILES_MAX;

const FILE_MODE_PROGRAM: i32 = 0o100_755;

/// One file of a revision.
struct File<'a> {
    path: &'a str,
    id: Oid,
    data: &'a [u8],
    is_program: bool,
}

/// What of a tree is no part of the site.
#[derive(Debug, Default)]
struct LeftOut {
    /// The first submodule whose commit did not come.
    submodule: Option<String>,
    /// How many links lead to nothing in the site, and the first of them.
    links: usize,
    first_link: Option<String>,
}

impl LeftOut {
    fn link(&mut self, path: &str) {
        self.links += 1;
        self.first_link.get_or_insert_with(|| path.to_owned());
    }

    /// Says it once for each preparation.
    fn tell(&self, commit: &str) {
        if let Some(first) = &self.first_link {
            tracing::warn!(
                commit,
                links = self.links,
                first,
                "links that lead out of the site, nowhere or in a circle are left out"
            );
        }
    }
}

/// Makes sure that the commit is there and every file of the site with it.
pub(crate) fn verify(repository: &Path, sha: &str, site: &[String], size_max: u64) -> Result<(), ContentError> {
    visit(repository, sha, site, size_max, |_| Ok(())).map(|_left_out| ())
}

/// The same of what came from the origin, which gives a commit without its submodules: half a site is none.
pub(crate) fn verify_alone(repository: &Path, sha: &str, site: &[String], size_max: u64) -> Result<(), ContentError> {
    match visit(repository, sha, site, size_max, |_| Ok(()))?.submodule {
        None => Ok(()),
        Some(path) => Err(ContentError::Unsound(format!(
            "it has a submodule at {path}, and only a content bot can tell whether it is part of the site: is one up?"
        ))),
    }
}

/// Reads the site's files into what will be a site; `begin` makes it, given the commit's time in seconds since 1970.
pub(crate) fn load(
    repository: &Path,
    sha: &str,
    site: &[String],
    size_max: u64,
    begin: impl FnOnce(u64) -> SiteBuilder,
) -> Result<SiteBuilder, ContentError> {
    let time = Repository::open_bare(repository)?.find_commit(Oid::from_str(sha)?)?.time().seconds();
    let mut loaded = begin(u64::try_from(time).unwrap_or(0));
    let left_out = visit(repository, sha, site, size_max, |file| {
        loaded.add(file.path, &file.id.to_string(), file.data).map_err(ContentError::from)
    })?;
    left_out.tell(sha);
    Ok(loaded)
}

/// Writes the site's files below `target`, which must not exist.
pub(crate) fn check_out(
    repository: &Path,
    sha: &str,
    site: &[String],
    size_max: u64,
    target: &Path,
) -> Result<(), ContentError> {
    fs::create_dir(target).map_err(ContentError::disk("make the folder", target))?;
    let left_out = visit(repository, sha, site, size_max, |file| {
        let path = target.join(file.path);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(ContentError::disk("make the folder", folder))?;
        }
        fs::write(&path, file.data).map_err(ContentError::disk("write", &path))?;
        if file.is_program {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
                .map_err(ContentError::disk("make a program of", &path))?;
        }
        Ok(())
    })?;
    left_out.tell(sha);
    Ok(())
}

/// Visits every file of the site, those of submodules with them whose commits came in the pack. A link is what it leads to, under
/// its own path; one that leads to nothing in the site is left out: it may lead anywhere.
fn visit(
    repository: &Path,
    sha: &str,
    site: &[String],
    size_max: u64,
    mut see: impl FnMut(&File<'_>) -> Result<(), ContentError>,
) -> Result<LeftOut, ContentError> {
    let repository = Repository::open_bare(repository)?;
    let commit = repository.find_commit(Oid::from_str(sha)?)?;
    let mut tree = commit.tree()?;
    for part in site {
        let folder = tree.get_name(part).filter(|entry| entry.kind() == Some(ObjectType::Tree)).map(|entry| entry.id());
        let id = folder.ok_or_else(|| {
            ContentError::Refused(format!("there is no folder {}: correct content.path_in_repo", site.join("/")))
        })?;
        tree = repository.find_tree(id)?;
    }
    let mut walk = Walk {
        repository: &repository,
        links: Links { repository: &repository, root: &tree },
        within: Vec::new(),
        size_left: size_max,
        files_left: FILES_MAX,
        entries_left: ENTRIES_MAX,
        left_out: LeftOut::default(),
        see: &mut see,
    };
    walk.tree(&tree, &Place::default(), 0)?;
    Ok(walk.left_out)
}

/// Under which path something is served, and where it stands: below a link to a folder, those are two.
#[derive(Debug, Clone, Default)]
struct Place {
    shown: String,
    real: String,
}

impl Place {
    fn below(&self, name: &str) -> Self {
        let join = |above: &str| if above.is_empty() { name.to_owned() } else { format!("{above}/{name}") };
        Self { shown: join(&self.shown), real: join(&self.real) }
    }
}

struct Walk<'r, F> {
    repository: &'r Repository,
    links: Links<'r>,
    /// Where the folders stand that we are in.
    within: Vec<String>,
    size_left: u64,
    files_left: usize,
    entries_left: usize,
    left_out: LeftOut,
    see: &'r mut F,
}

impl<F: FnMut(&File<'_>) -> Result<(), ContentError>> Walk<'_, F> {
    fn tree(&mut self, tree: &Tree<'_>, at: &Place, depth: usize) -> Result<(), ContentError> {
        if depth > DEPTH_MAX {
            return Err(ContentError::Refused(format!("{} is more than {DEPTH_MAX} folders deep", at.shown)));
        }
        self.within.push(at.real.clone());
        for entry in tree {
            self.entries_left = self.entries_left.checked_sub(1).ok_or_else(|| {
                ContentError::Refused(format!(
                    "the site has more than {ENTRIES_MAX} files, folders and links: shrink it"
                ))
            })?;
            let name = std::str::from_utf8(entry.name_bytes()).unwrap_or_default();
            if !is_plain(name) {
                continue;
            }
            let at = at.below(name);
            match entry.kind() {
                Some(ObjectType::Tree) => self.tree(&self.repository.find_tree(entry.id())?, &at, depth + 1)?,
                Some(ObjectType::Blob) if entry.filemode() == FILE_MODE_LINK => self.link(entry.id(), &at, depth)?,
                Some(ObjectType::Blob) => {
                    self.file(&at.shown, entry.id(), entry.filemode() == FILE_MODE_PROGRAM)?;
                }
                Some(ObjectType::Commit) => match self.repository.find_commit(entry.id()) {
                    Ok(submodule) => self.tree(&submodule.tree()?, &at, depth + 1)?,
                    Err(_absent) => {
                        self.left_out.submodule.get_or_insert(at.shown);
                    }
                },
                Some(ObjectType::Tag | ObjectType::Any) | None => {}
            }
        }
        self.within.pop();
        Ok(())
    }

    fn link(&mut self, id: Oid, at: &Place, depth: usize) -> Result<(), ContentError> {
        match self.links.follow(id, &at.real)? {
            Some(Found::File { id, mode }) => self.file(&at.shown, id, mode == FILE_MODE_PROGRAM),
            // A folder that we are in already would be in itself, and so on for ever.
            Some(Found::Folder { tree, real }) if !self.within.contains(&real) => {
                self.tree(&tree, &Place { shown: at.shown.clone(), real }, depth + 1)
            }
            Some(Found::Folder { .. }) | None => {
                self.left_out.link(&at.shown);
                Ok(())
            }
        }
    }

    fn file(&mut self, path: &str, id: Oid, is_program: bool) -> Result<(), ContentError> {
        let blob = self.repository.find_blob(id)?;
        let data = blob.content();
        let size = u64::try_from(data.len()).unwrap_or(u64::MAX);
        let limits = self.size_left.checked_sub(size).zip(self.files_left.checked_sub(1));
        let Some((size_left, files_left)) = limits else {
            return Err(ContentError::Refused(format!(
                "the site is larger than content.size_max_bytes or has more than {FILES_MAX} files: shrink it"
            )));
        };
        (self.size_left, self.files_left) = (size_left, files_left);
        (self.see)(&File { path, id, data, is_program })
    }
}

/// A name that stays in its folder and out of git's.
pub(super) fn is_plain(name: &str) -> bool {
    let escapes = matches!(name, "" | "." | "..") || name.contains(['/', '\\', '\0']);
    !escapes && !name.eq_ignore_ascii_case(".git")
}
