//! The rules for content: a tree is whole, bounded, and no path of it leaves the site.

use std::{collections::BTreeSet, path::Path};

use git2::{ErrorCode, ObjectType, Odb, Oid, Repository, TreeEntry};
use serde::Deserialize;

use super::{fault::Fault, gates::FILE_MODE_LINK, guard::Guard, origin::Limits, submodules};

/// Directories inside one another. The deepest real sites have a dozen.
pub(super) const DEPTH_MAX: usize = 64;

/// The longest path, in bytes; what Linux takes is 4096.
const PATH_LEN_MAX: usize = 1024;

/// The longest target of a symbolic link, in bytes.
const LINK_LEN_MAX: usize = 4096;

/// What a pointer of Git LFS begins with, and the most bytes that one has:
/// <https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md>.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/v1";
const LFS_POINTER_LEN_MAX: usize = 1024;

/// What becomes of a commit that has pointers of Git LFS for files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LfsPointers {
    /// It is unfit: visitors would get three lines of text for a picture.
    #[default]
    Refuse,
    /// They are files as others are.
    Allow,
}

/// Reads the whole commit: every object is there, unharmed, and within the rules.
///
/// # Errors
/// The first rule that is broken.
pub(super) fn verify(
    repository: &Repository,
    commit: Oid,
    limits: &Limits,
    pointers: LfsPointers,
    guard: &Guard,
) -> Result<(), Fault> {
    let odb = repository.odb().map_err(|e| Fault::local(&e))?;
    let (_, kind) = odb.read_header(commit).map_err(|e| missing(&e, commit, "the commit"))?;
    if kind != ObjectType::Commit {
        return Err(Fault::Unfit(format!("the reference points at a {kind}, not at a commit: correct git.ref")));
    }
    let tree = repository.find_commit(commit).and_then(|c| c.tree()).map_err(|e| missing(&e, commit, "the commit"))?;
    let submodules = submodules::kept(repository, commit).map_err(|e| Fault::local(&e))?;
    let mut walk = Walk {
        repository,
        odb,
        submodules,
        limits,
        pointers,
        guard,
        files: 0,
        directories: 0,
        bytes: 0,
        read: BTreeSet::new(),
    };
    walk.tree(&tree, "", 0)
}

struct Walk<'r> {
    repository: &'r Repository,
    odb: Odb<'r>,
    /// The commits of the submodules that belong to the site.
    submodules: BTreeSet<Oid>,
    limits: &'r Limits,
    pointers: LfsPointers,
    guard: &'r Guard,
    files: u64,
    directories: u64,
    bytes: u64,
    read: BTreeSet<Oid>,
}

impl Walk<'_> {
    fn tree(&mut self, tree: &git2::Tree<'_>, path: &str, depth: usize) -> Result<(), Fault> {
        if depth > DEPTH_MAX {
            return Err(too_deep(path));
        }
        self.directory()?;
        if !self.guard.allows() {
            return Err(self.guard.breach().unwrap_or(Fault::Vanished));
        }
        let mut names = BTreeSet::new();
        for entry in tree {
            let name = checked_name(&entry, path)?;
            // libgit2 takes a link and a directory of one name, and whoever writes both out follows the link. Names that differ
            // in their case alone are two names here; where a disk takes them for one, writing them out fails.
            if !names.insert(name.clone()) {
                let folder = if path.is_empty() { "the site" } else { path };
                return Err(Fault::Unfit(format!("{folder} has two entries of the name {name}: remove one")));
            }
            let path = if path.is_empty() { name } else { format!("{path}/{name}") };
            if path.len() > PATH_LEN_MAX {
                return Err(Fault::Unfit(format!("a path is longer than {PATH_LEN_MAX} bytes: {path}")));
            }
            match entry.kind() {
                Some(ObjectType::Tree) => {
                    let tree = self.repository.find_tree(entry.id()).map_err(|e| missing(&e, entry.id(), &path))?;
                    self.tree(&tree, &path, depth + 1)?;
                }
                Some(ObjectType::Blob) => self.blob(&entry, &path)?,
                Some(ObjectType::Commit) if self.submodules.contains(&entry.id()) => {
                    let commit = self.repository.find_commit(entry.id());
                    let tree = commit.and_then(|commit| commit.tree());
                    self.tree(&tree.map_err(|e| missing(&e, entry.id(), &path))?, &path, depth + 1)?;
                }
                // A submodule that is not part of this site; its place is an empty directory.
                Some(ObjectType::Commit) => self.directory()?,
                Some(ObjectType::Any | ObjectType::Tag) | None => {
                    return Err(Fault::Unfit(format!("{path} is neither file, link nor directory")));
                }
            }
        }
        Ok(())
    }

    /// Counts one more: trees without files cost time as well, and a few of them inside one another can be billions.
    fn directory(&mut self) -> Result<(), Fault> {
        self.directories += 1;
        if self.directories > self.limits.files_max {
            let max = self.limits.files_max;
            return Err(Fault::Unfit(format!(
                "it has more than {max} directories: remove some or raise git.files_max"
            )));
        }
        Ok(())
    }

    fn blob(&mut self, entry: &TreeEntry<'_>, path: &str) -> Result<(), Fault> {
        let id = entry.id();
        let (len, _) = self.odb.read_header(id).map_err(|e| missing(&e, id, path))?;
        self.files += 1;
        self.bytes = self.bytes.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
        if self.files > self.limits.files_max {
            let max = self.limits.files_max;
            return Err(Fault::Unfit(format!("it has more than {max} files: remove some or raise git.files_max")));
        }
        if self.bytes > self.limits.size_max {
            let max = self.limits.size_max;
            let fix = "shrink the site or raise git.size_max_bytes";
            return Err(Fault::Unfit(format!("its files are larger than {max} bytes together: {fix}")));
        }
        let is_link = entry.filemode() == FILE_MODE_LINK;
        if is_link && len > LINK_LEN_MAX {
            return Err(Fault::Unfit(format!("the link {path} is longer than {LINK_LEN_MAX} bytes")));
        }
        if !self.read.insert(id) && !is_link {
            return Ok(());
        }
        // Reading checks the content against its name: a flipped bit is found here and not by a visitor.
        let object = self.odb.read(id).map_err(|e| missing(&e, id, path))?;
        if is_link {
            return check_link(path, object.data());
        }
        match self.pointers {
            LfsPointers::Refuse if is_pointer(object.data()) => Err(Fault::Unfit(format!(
                "{path} is a pointer of Git LFS, and the file that it stands for is not fetched: commit the file itself, \
                 or set git.lfs_pointers to allow"
            ))),
            LfsPointers::Refuse | LfsPointers::Allow => Ok(()),
        }
    }
}

pub(super) fn too_deep(path: &str) -> Fault {
    Fault::Unfit(format!("directories are more than {DEPTH_MAX} deep at {path}: make it flatter"))
}

fn checked_name(entry: &TreeEntry<'_>, path: &str) -> Result<String, Fault> {
    let bytes = entry.name_bytes();
    let shown = format!("{path}/{}", String::from_utf8_lossy(bytes).escape_debug());
    let Ok(name) = std::str::from_utf8(bytes) else {
        return Err(Fault::Unfit(format!("the name {shown} is not UTF-8: rename it")));
    };
    let escapes = name.is_empty() || name == "." || name == ".." || name.contains('/');
    if escapes || name.eq_ignore_ascii_case(".git") {
        return Err(Fault::Unfit(format!("the path {shown} leaves the site or reaches into git: remove it")));
    }
    if name.chars().any(char::is_control) {
        return Err(Fault::Unfit(format!("the name {shown} has a control character: rename it")));
    }
    Ok(name.to_owned())
}

/// A link may point anywhere inside the site. `..` counts only at the beginning, where the directories are real ones:
/// behind another link it could climb further than it seems.
fn check_link(path: &str, target: &[u8]) -> Result<(), Fault> {
    let shown = String::from_utf8_lossy(target);
    let leaves = || Fault::Unfit(format!("the link {path} -> {} leaves the site: remove it", shown.escape_debug()));
    let target = std::str::from_utf8(target).map_err(|_| leaves())?;
    if target.is_empty() || target.starts_with('/') || target.contains('\0') {
        return Err(leaves());
    }
    let mut depth = Path::new(path).components().count().saturating_sub(1);
    let mut climbing = true;
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." if climbing => depth = depth.checked_sub(1).ok_or_else(leaves)?,
            part if part == ".." || part.eq_ignore_ascii_case(".git") => return Err(leaves()),
            _ => climbing = false,
        }
    }
    Ok(())
}

fn is_pointer(content: &[u8]) -> bool {
    content.len() < LFS_POINTER_LEN_MAX && content.strip_prefix(LFS_POINTER).is_some_and(|rest| rest.starts_with(b"\n"))
}

/// What it means that an object cannot be read.
pub(super) fn missing(error: &git2::Error, id: Oid, what: &str) -> Fault {
    match (Fault::local(error), error.code()) {
        // The machine is at fault, not the commit.
        (failed @ Fault::Failed(_), _) => failed,
        (_, ErrorCode::NotFound) => {
            Fault::Incomplete(format!("{what} is incomplete: object {id} is missing: push it again"))
        }
        _ => Fault::Incomplete(format!("{what} is damaged: object {id}: {}", error.message())),
    }
}

#[cfg(test)]
mod tests {
    use git2::{Error, ErrorClass, ErrorCode, Oid};

    use super::{Fault, check_link, is_pointer, missing};

    #[test]
    fn a_machine_without_memory_or_files_does_not_condemn_a_commit() {
        let fault = |class, code| missing(&Error::new(code, class, "it does not work"), Oid::ZERO_SHA1, "a");
        for class in [ErrorClass::Os, ErrorClass::Filesystem, ErrorClass::NoMemory] {
            assert!(matches!(fault(class, ErrorCode::GenericError), Fault::Failed(_)), "{class:?}");
        }
        assert!(matches!(fault(ErrorClass::Odb, ErrorCode::NotFound), Fault::Incomplete(_)));
        assert!(matches!(fault(ErrorClass::Zlib, ErrorCode::GenericError), Fault::Incomplete(_)));
    }

    #[test]
    fn pointers_are_known_by_their_first_line_and_their_size() {
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
        assert!(is_pointer(pointer.as_bytes()));
        let about = format!("{pointer}{}", "A page about pointers. ".repeat(50));
        for other in
            ["", "version 1\n", &pointer[8..], &format!(" {pointer}"), &pointer.replace("v1\n", "v10\n"), &about]
        {
            assert!(!is_pointer(other.as_bytes()), "{other}");
        }
    }

    #[test]
    fn links_stay_inside_the_site() {
        for (path, target) in [("a", "b"), ("a/b", "../c"), ("a/b/c", "../../d/./e"), ("a/b", "..")] {
            assert!(check_link(path, target.as_bytes()).is_ok(), "{path} -> {target}");
        }
        let escapes = [("a", ".."), ("a", "../b"), ("a/b", "../../c"), ("a", "/etc/passwd"), ("a/m", "l/../..")];
        for (path, target) in escapes.into_iter().chain([("a", ".git/config"), ("a", ""), ("a", "x\0")]) {
            assert!(check_link(path, target.as_bytes()).is_err(), "{path} -> {target}");
        }
    }
}
