//! Reading a commit out of its repository: every object is read once, so that what is served is known to be whole. git's
//! library checks the hash of each object that it reads.

use std::{fs, path::Path};

use git2::{ObjectType, Oid, Repository, Tree};

use super::{ContentError, FILES_MAX};
use crate::shell::plane::SiteBuilder;

/// The deepest folder; more is a tree made to exhaust us.
const DEPTH_MAX: usize = 64;

const FILE_MODE_LINK: i32 = 0o120_000;
const FILE_MODE_PROGRAM: i32 = 0o100_755;

/// One file of a revision.
struct File<'a> {
    path: &'a str,
    id: Oid,
    data: &'a [u8],
    is_program: bool,
}

/// Makes sure that the commit is there and every file of the site with it.
pub(crate) fn verify(repository: &Path, sha: &str, site: &[String], size_max: u64) -> Result<(), ContentError> {
    visit(repository, sha, site, size_max, |_| Ok(())).map(|_left_out| ())
}

/// The same of what came from the origin, which gives a commit without its submodules: half a site is none.
pub(crate) fn verify_alone(repository: &Path, sha: &str, site: &[String], size_max: u64) -> Result<(), ContentError> {
    match visit(repository, sha, site, size_max, |_| Ok(()))? {
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
    let _left_out = visit(repository, sha, site, size_max, |file| {
        loaded.add(file.path, &file.id.to_string(), file.data).map_err(ContentError::from)
    })?;
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
    let _left_out = visit(repository, sha, site, size_max, |file| {
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
    Ok(())
}

/// Visits every plain file of the site, those of submodules with them whose commits came in the pack. Links are left out: they
/// may lead anywhere. Yields the place of a submodule that is left out too.
fn visit(
    repository: &Path,
    sha: &str,
    site: &[String],
    size_max: u64,
    mut see: impl FnMut(&File<'_>) -> Result<(), ContentError>,
) -> Result<Option<String>, ContentError> {
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
    let (size_left, files_left) = (size_max, FILES_MAX);
    let mut walk = Walk { repository: &repository, size_left, files_left, left_out: None, see: &mut see };
    walk.tree(&tree, "", 0)?;
    Ok(walk.left_out)
}

struct Walk<'r, F> {
    repository: &'r Repository,
    size_left: u64,
    files_left: usize,
    left_out: Option<String>,
    see: &'r mut F,
}

impl<F: FnMut(&File<'_>) -> Result<(), ContentError>> Walk<'_, F> {
    fn tree(&mut self, tree: &Tree<'_>, above: &str, depth: usize) -> Result<(), ContentError> {
        if depth > DEPTH_MAX {
            return Err(ContentError::Refused(format!("{above} is more than {DEPTH_MAX} folders deep")));
        }
        for entry in tree {
            let name = std::str::from_utf8(entry.name_bytes()).unwrap_or_default();
            if !is_plain(name) || entry.filemode() == FILE_MODE_LINK {
                continue;
            }
            let path = if above.is_empty() { name.to_owned() } else { format!("{above}/{name}") };
            match entry.kind() {
                Some(ObjectType::Tree) => self.tree(&self.repository.find_tree(entry.id())?, &path, depth + 1)?,
                Some(ObjectType::Blob) => self.file(&path, entry.id(), entry.filemode() == FILE_MODE_PROGRAM)?,
                Some(ObjectType::Commit) => match self.repository.find_commit(entry.id()) {
                    Ok(submodule) => self.tree(&submodule.tree()?, &path, depth + 1)?,
                    Err(_absent) => self.left_out = self.left_out.take().or(Some(path)),
                },
                Some(ObjectType::Tag | ObjectType::Any) | None => {}
            }
        }
        Ok(())
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
fn is_plain(name: &str) -> bool {
    let escapes = matches!(name, "" | "." | "..") || name.contains(['/', '\\', '\0']);
    !escapes && !name.eq_ignore_ascii_case(".git")
}
