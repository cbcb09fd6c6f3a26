//! Where the links of a tree lead, as the kernel would follow them if the site were the whole file system. Opens nothing that
//! stands outside of the site.

use git2::{ObjectType, Oid, Repository, Tree};

use super::{ContentError, store::is_plain};

pub(super) const FILE_MODE_LINK: i32 = 0o120_000;

/// The longest target of a link, in bytes: the kernel's limit for a path.
const TARGET_BYTES_MAX: usize = 4_096;

/// Links that lead to links: as many as any site has, and an end to those that go round in a circle.
const LINKS_MAX: usize = 8;

/// The site's tree.
pub(super) struct Links<'r> {
    pub(super) repository: &'r Repository,
    pub(super) root: &'r Tree<'r>,
}

/// What a link leads to.
pub(super) enum Found<'r> {
    File {
        id: Oid,
        mode: i32,
    },
    /// A folder below the site's own, and where it stands.
    Folder {
        tree: Tree<'r>,
        real: String,
    },
}

impl<'r> Links<'r> {
    /// What the link leads to that stands at `real`; nothing if that is not in the site.
    pub(super) fn follow(&self, link: Oid, real: &str) -> Result<Option<Found<'r>>, ContentError> {
        let Some(mut todo) = self.target(link)? else { return Ok(None) };
        let above = real.rsplit_once('/').map_or("", |(above, _name)| above);
        todo.extend(parts(above));
        let (mut here, mut links): (Vec<(String, Tree<'r>)>, usize) = (Vec::new(), 1);
        while let Some(part) = todo.pop() {
            match part.as_str() {
                "" | "." => continue,
                ".." => match here.pop() {
                    Some(_left) => continue,
                    None => return Ok(None),
                },
                name if !is_plain(name) => return Ok(None),
                _plain => {}
            }
            let folder = here.last().map_or(self.root, |(_name, tree)| tree);
            let Some(entry) = folder.get_name(&part).map(|entry| (entry.kind(), entry.id(), entry.filemode())) else {
                return Ok(None);
            };
            match entry {
                (Some(ObjectType::Tree), id, _) => here.push((part, self.repository.find_tree(id)?)),
                (Some(ObjectType::Commit), id, _) => match self.repository.find_commit(id) {
                    Ok(submodule) => here.push((part, submodule.tree()?)),
                    Err(_absent) => return Ok(None),
                },
                (Some(ObjectType::Blob), id, FILE_MODE_LINK) => {
                    links += 1;
                    let Some(more) = self.target(id)?.filter(|_| links <= LINKS_MAX) else { return Ok(None) };
                    todo.extend(more);
                }
                (Some(ObjectType::Blob), id, mode) => return Ok(todo.is_empty().then_some(Found::File { id, mode })),
                (Some(ObjectType::Tag | ObjectType::Any) | None, _, _) => return Ok(None),
            }
        }
        let real = here.iter().map(|(name, _tree)| name.as_str()).collect::<Vec<_>>().join("/");
        Ok(here.pop().map(|(_name, tree)| Found::Folder { tree, real }))
    }

    /// The parts of a link's target, the last one first; nothing if it begins at the root, or is no path.
    fn target(&self, link: Oid) -> Result<Option<Vec<String>>, ContentError> {
        let blob = self.repository.find_blob(link)?;
        let target = std::str::from_utf8(blob.content()).unwrap_or_default();
        let is_path = !target.is_empty() && !target.starts_with('/') && target.len() <= TARGET_BYTES_MAX;
        Ok(is_path.then(|| parts(target)))
    }
}

fn parts(path: &str) -> Vec<String> {
    path.split('/').rev().map(str::to_owned).collect()
}
