//! Submodules: other repositories' commits, at places of the site. Fetched into the same mirror and kept with the commit that
//! names them, so that its pack holds all of it. Which addresses may be asked, and how much, is decided here.

use std::collections::{BTreeMap, BTreeSet};

use git2::{ObjectType, Oid, Repository, Tree};
use serde::Deserialize;

use super::{
    fault::Fault,
    guard::Guard,
    origin::Origin,
    source::{Source, Transport},
    verify::{self, missing, too_deep},
};

/// What keeps a submodule's commit: `refs/bots-sub/<commit>/<submodule's commit>`.
const KEPT: &str = "refs/bots-sub";

/// Submodules of one commit, those of submodules with them. Real sites have a theme and a handful of parts.
const SUBMODULES_MAX: usize = 64;

/// Submodules inside one another.
const DEPTH_MAX: usize = 8;

/// Directories in which submodules are looked for: ten times as many as a site may have files unless it is told otherwise.
const DIRECTORIES_MAX: usize = 1_000_000;

/// The largest `.gitmodules`, in bytes.
const GITMODULES_LEN_MAX: usize = 64 * 1024;

/// Which submodules belong to the site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(try_from = "Written")]
pub enum Submodules {
    /// None: their places are empty.
    #[default]
    Off,
    /// The commit's own.
    Shallow,
    /// Theirs as well.
    Recursive,
}

/// The policy as it is written down: YAML takes `off` for a boolean.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Switch(bool),
    Word(String),
}

impl TryFrom<Written> for Submodules {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        match written {
            Written::Switch(false) => Ok(Self::Off),
            Written::Word(word) if word == "off" => Ok(Self::Off),
            Written::Word(word) if word == "shallow" => Ok(Self::Shallow),
            Written::Word(word) if word == "recursive" => Ok(Self::Recursive),
            Written::Switch(true) | Written::Word(_) => {
                Err(String::from("submodules are `off`, `shallow` or `recursive`"))
            }
        }
    }
}

/// A submodule of a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// Where it is in the site.
    pub(super) path: String,
    /// Its commit.
    pub(super) commit: Oid,
}

/// Brings the submodules of a commit into the mirror, and keeps them for it.
///
/// # Errors
/// [`Fault::Unfit`] if one breaks a rule, [`Fault::Doubtful`] if one is not given out, [`Fault::Failed`] if the way to one is
/// cut.
pub(super) fn fetch(
    policy: Submodules,
    origin: &Origin,
    repository: &Repository,
    commit: Oid,
    guard: &Guard,
) -> Result<(), Fault> {
    if policy == Submodules::Off {
        return Ok(());
    }
    let mut fetching = Fetching { policy, repository, commit, guard, fetched: 0 };
    fetching.all_of(origin, commit, "", 0)
}

struct Fetching<'f> {
    policy: Submodules,
    repository: &'f Repository,
    /// The commit of the site.
    commit: Oid,
    guard: &'f Guard,
    fetched: usize,
}

impl Fetching<'_> {
    fn all_of(&mut self, origin: &Origin, commit: Oid, above: &str, depth: usize) -> Result<(), Fault> {
        let links = links(self.repository, commit, SUBMODULES_MAX, self.guard)?;
        if links.is_empty() {
            return Ok(());
        }
        if depth >= DEPTH_MAX {
            return Err(Fault::Unfit(format!("submodules are more than {DEPTH_MAX} deep at {above}: make it flatter")));
        }
        let addresses = addresses(self.repository, commit)?;
        for Place { path, commit } in links {
            let shown = if above.is_empty() { path.clone() } else { format!("{above}/{path}") };
            self.fetched += 1;
            if self.fetched > SUBMODULES_MAX {
                return Err(too_many());
            }
            let words = |why: String| format!("the submodule {shown} cannot be had: {why}");
            let unfit = |why: String| Fault::Unfit(words(why));
            let address = addresses.get(&path);
            let address = address.ok_or_else(|| unfit(String::from(".gitmodules gives no address for it")))?;
            let source = resolve(origin.source(), address).map_err(unfit)?;
            let module = origin.submodule(source, commit);
            module.fetch(self.repository, commit, self.guard).map_err(|fault| match fault {
                // It may be pushed behind the site, a replica may lag, a token may be in the middle of its rotation.
                Fault::Vanished => {
                    Fault::Doubtful(words(format!("{} does not give out {commit}", module.source().shown())))
                }
                Fault::Refused(why) | Fault::Doubtful(why) => Fault::Doubtful(words(why)),
                Fault::Unfit(why) => unfit(why),
                Fault::Failed(why) => Fault::Failed(format!("the submodule {shown}: {why}")),
                Fault::Damaged(_) | Fault::Incomplete(_) => fault,
            })?;
            let name = format!("{KEPT}/{}/{commit}", self.commit);
            self.repository.reference(&name, commit, true, "submodule").map_err(|e| Fault::local(&e))?;
            if self.policy == Submodules::Recursive {
                self.all_of(&module, commit, &shown, depth + 1)?;
            }
        }
        Ok(())
    }
}

/// The submodules' commits that are kept for a commit.
pub(super) fn kept(repository: &Repository, commit: Oid) -> Result<BTreeSet<Oid>, git2::Error> {
    let mut kept = BTreeSet::new();
    for reference in repository.references_glob(&glob(&commit.to_string()))? {
        kept.extend(reference?.target());
    }
    Ok(kept)
}

/// Where the submodules are that are kept for a commit; those of others come after them.
pub(super) fn places(repository: &Repository, commit: Oid, guard: &Guard) -> Result<Vec<Place>, Fault> {
    let kept = kept(repository, commit).map_err(|e| Fault::local(&e))?;
    let mut found: Vec<Place> = Vec::new();
    let mut above = vec![(String::new(), commit)];
    // Bounded, for a kept commit is within the bounds.
    while let Some((folder, commit)) = above.pop() {
        for Place { path, commit } in links(repository, commit, usize::MAX, guard)? {
            if kept.contains(&commit) && found.len() < SUBMODULES_MAX {
                let place = Place { path: format!("{folder}{path}"), commit };
                above.push((format!("{}/", place.path), commit));
                found.push(place);
            }
        }
    }
    Ok(found)
}

/// The names of what keeps the submodules of a commit.
pub(super) fn glob(commit: &str) -> String {
    format!("{KEPT}/{commit}/*")
}

fn too_many() -> Fault {
    Fault::Unfit(format!("it has more than {SUBMODULES_MAX} submodules: remove some"))
}

/// The places of the tree that are other repositories' commits.
fn links(repository: &Repository, commit: Oid, most: usize, guard: &Guard) -> Result<Vec<Place>, Fault> {
    let tree = repository.find_commit(commit).and_then(|commit| commit.tree()).map_err(|e| Fault::local(&e))?;
    let mut search = Search { repository, guard, most, barren: BTreeSet::new(), directories: 0, found: Vec::new() };
    search.tree(&tree, "", 0)?;
    Ok(search.found)
}

/// A search through trees that have perhaps not passed the rules for content yet: libgit2's own would go as deep as they are,
/// and through each as often as it is named.
struct Search<'s> {
    repository: &'s Repository,
    guard: &'s Guard,
    /// So many are found at most.
    most: usize,
    /// Trees without any.
    barren: BTreeSet<Oid>,
    directories: usize,
    found: Vec<Place>,
}

impl Search<'_> {
    fn tree(&mut self, tree: &Tree<'_>, path: &str, depth: usize) -> Result<(), Fault> {
        if depth > verify::DEPTH_MAX {
            return Err(too_deep(path));
        }
        self.directories += 1;
        if self.directories > DIRECTORIES_MAX {
            return Err(Fault::Unfit(format!("it has more than {DIRECTORIES_MAX} directories: remove some")));
        }
        if !self.guard.allows() {
            return Err(self.guard.breach().unwrap_or(Fault::Vanished));
        }
        let found_before = self.found.len();
        for entry in tree {
            // A name that is no text breaks a rule, which is said elsewhere.
            let Ok(name) = entry.name() else { continue };
            let path = || if path.is_empty() { name.to_owned() } else { format!("{path}/{name}") };
            match entry.kind() {
                Some(ObjectType::Commit) if self.found.len() >= self.most => return Err(too_many()),
                Some(ObjectType::Commit) => self.found.push(Place { path: path(), commit: entry.id() }),
                Some(ObjectType::Tree) if !self.barren.contains(&entry.id()) => {
                    let path = path();
                    let below = self.repository.find_tree(entry.id()).map_err(|e| missing(&e, entry.id(), &path))?;
                    self.tree(&below, &path, depth + 1)?;
                }
                Some(ObjectType::Tree | ObjectType::Blob | ObjectType::Any | ObjectType::Tag) | None => {}
            }
        }
        if self.found.len() == found_before {
            self.barren.insert(tree.id());
        }
        Ok(())
    }
}

/// The addresses that `.gitmodules` gives, by path.
fn addresses(repository: &Repository, commit: Oid) -> Result<BTreeMap<String, String>, Fault> {
    let tree = repository.find_commit(commit).and_then(|commit| commit.tree()).map_err(|e| Fault::local(&e))?;
    let Some(entry) = tree.get_name(".gitmodules") else { return Ok(BTreeMap::new()) };
    let blob = repository.find_blob(entry.id()).map_err(|e| Fault::local(&e))?;
    if blob.size() > GITMODULES_LEN_MAX {
        return Err(Fault::Unfit(format!(".gitmodules is larger than {GITMODULES_LEN_MAX} bytes")));
    }
    Ok(parse(&String::from_utf8_lossy(blob.content())))
}

/// What git's own configuration format says of submodules. Nothing is included from elsewhere, whatever it says.
fn parse(text: &str) -> BTreeMap<String, String> {
    let (mut found, mut path, mut url) = (BTreeMap::new(), None, None);
    let mut close = |path: &mut Option<String>, url: &mut Option<String>| {
        if let (Some(path), Some(url)) = (path.take(), url.take()) {
            found.insert(path, url);
        }
    };
    for line in text.lines().map(str::trim) {
        if line.starts_with('[') {
            close(&mut path, &mut url);
            (path, url) = (None, None);
        } else if let Some((key, value)) = line.split_once('=') {
            let value = value.trim().trim_matches('"').to_owned();
            match key.trim() {
                "path" => path = Some(value),
                "url" => url = Some(value),
                _ => {}
            }
        }
    }
    close(&mut path, &mut url);
    found
}

/// The address of a submodule of a repository. What is on this machine may be reached from what is on this machine only.
fn resolve(parent: &Source, address: &str) -> Result<Source, String> {
    let relative = address.starts_with("./") || address.starts_with("../");
    let url = if relative { join(parent.url(), address)? } else { address.to_owned() };
    let source = Source::parse(&url).map_err(|e| format!("its address `{address}` cannot be used: {e}"))?;
    if source.transport() == Transport::Local && parent.transport() != Transport::Local {
        return Err(format!("its address `{address}` is on this machine, and the repository is not"));
    }
    Ok(source)
}

/// `address` seen from `base`, as git does it: the repository counts as a folder.
fn join(base: &str, address: &str) -> Result<String, String> {
    let mut base = base.trim_end_matches('/');
    let mut rest = address;
    loop {
        if let Some(below) = rest.strip_prefix("./") {
            rest = below;
        } else if let Some(beside) = rest.strip_prefix("../") {
            let at = base.rfind(['/', ':']).filter(|at| !base[..*at].ends_with([':', '/']) && *at > 0);
            let at = at.ok_or_else(|| format!("its address `{address}` leaves the host"))?;
            // Behind `user@host:` the path begins.
            base = if base.as_bytes().get(at) == Some(&b':') { &base[..=at] } else { &base[..at] };
            rest = beside;
        } else {
            let between = if base.ends_with(':') { "" } else { "/" };
            return Ok(format!("{base}{between}{rest}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Source, parse, resolve};

    #[test]
    fn gitmodules_are_read_without_what_they_include() {
        let text = "[include]\n\tpath = /etc/passwd\n[submodule \"a\"]\n\tpath = themes/a\n\turl = ../a.git\n\tbranch = x\n\
                    [submodule \"b\"]\nurl=\"https://h/b\"\n  path = b\n[submodule \"c\"]\n path = c\n";
        let found = parse(text);
        assert_eq!(found.get("themes/a").map(String::as_str), Some("../a.git"));
        assert_eq!(found.get("b").map(String::as_str), Some("https://h/b"));
        assert_eq!(found.len(), 2, "{found:?}");
    }

    #[test]
    fn addresses_stay_where_they_may() {
        let check = |parent: &str, address: &str, expected: Option<&str>| {
            let parent = Source::parse(parent).expect(parent);
            let found = resolve(&parent, address).map(|source| source.url().to_owned());
            assert_eq!(found.as_deref().ok(), expected, "{address}: {found:?}");
        };
        check("https://h/a/site.git", "../b.git", Some("https://h/a/b.git"));
        check("https://h/a/site.git", "./b.git", Some("https://h/a/site.git/b.git"));
        check("https://h/a/site.git", "../../b.git", Some("https://h/b.git"));
        check("https://h/a/site.git", "../../../b.git", None);
        check("git@h:a/site.git", "../b.git", Some("git@h:a/b.git"));
        check("git@h:a/site.git", "../../b.git", Some("git@h:b.git"));
        check("https://h/a.git", "https://other/b.git", Some("https://other/b.git"));
        check("https://h/a.git", "file:///etc/b.git", None);
        check("https://h/a.git", "/etc/b.git", None);
        check("https://h/a.git", "ext::sh -c true", None);
        check("https://h/a.git", "--upload-pack=true", None);
        check("file:///srv/a.git", "../b.git", Some("file:///srv/b.git"));
        check("/srv/a.git", "/srv/b.git", Some("/srv/b.git"));
        check("/a.git", "../../b.git", None);
    }
}
