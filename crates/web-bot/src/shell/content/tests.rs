//! The library against real repositories: from a pack, from the origin, from disk; damaged, incomplete, too large.

use std::{fs, path::Path};

use axum::{Router, body::Bytes, routing::get};
use git2::{Oid, Repository, Signature};

use super::{ContentError, Library, Shelving, Wanted};
use crate::machine::Mode;

struct Origin {
    dir: tempfile::TempDir,
    sha: String,
}

/// A repository whose commit has a page, a style sheet in a folder, a link that leads out and an earlier commit.
fn origin() -> Origin {
    let dir = tempfile::tempdir().expect("a folder");
    let repository = Repository::init_bare(dir.path()).expect("init");
    let first = commit(&repository, &[("index.html", "old", 0o100_644)], None);
    let files =
        [("index.html", "page", 0o100_644), ("run.sh", "#!/bin/sh", 0o100_755), ("leak", "/etc/passwd", 0o120_000)];
    let sha = commit(&repository, &files, Some(first)).to_string();
    Origin { dir, sha }
}

fn commit(repository: &Repository, files: &[(&str, &str, i32)], parent: Option<Oid>) -> Oid {
    let mut css = repository.treebuilder(None).expect("tree");
    css.insert("site.css", repository.blob(b"style").expect("blob"), 0o100_644).expect("insert");
    let mut tree = repository.treebuilder(None).expect("tree");
    tree.insert("css", css.write().expect("write"), 0o040_000).expect("insert");
    for (name, text, mode) in files {
        tree.insert(name, repository.blob(text.as_bytes()).expect("blob"), *mode).expect("insert");
    }
    let tree = repository.find_tree(tree.write().expect("write")).expect("tree");
    let who = Signature::new("a", "a@example.org", &git2::Time::new(0, 0)).expect("signature");
    let parent = parent.map(|id| repository.find_commit(id).expect("parent"));
    let parents: Vec<&git2::Commit<'_>> = parent.iter().collect();
    repository.commit(Some("refs/heads/main"), &who, &who, "words", &tree, &parents).expect("commit")
}

impl Origin {
    fn wanted(&self) -> Wanted {
        Wanted {
            sha: self.sha.clone(),
            pack_urls: Vec::new(),
            origin: format!("file://{}", self.dir.path().display()),
            reference: String::from("main"),
        }
    }

    /// A pack of the commit and its tree, without its history; `all` of its objects or not.
    fn pack(&self, all: bool) -> Vec<u8> {
        let repository = Repository::open_bare(self.dir.path()).expect("open");
        let mut builder = repository.packbuilder().expect("builder");
        let commit = repository.find_commit(self.sha.parse().expect("sha")).expect("commit");
        builder.insert_object(commit.id(), None).expect("insert");
        if all {
            builder.insert_tree(commit.tree_id()).expect("insert");
        } else {
            builder.insert_object(commit.tree_id(), None).expect("insert");
        }
        let mut pack = git2::Buf::new();
        builder.write_buf(&mut pack).expect("pack");
        pack.to_vec()
    }
}

/// A content bot that gives these bytes for every pack.
async fn content_bot(pack: Vec<u8>) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let url = format!("http://{}/pack/x", listener.local_addr().expect("address"));
    let pack = Bytes::from(pack);
    let router = Router::new().route("/pack/{sha}", get(move || async move { pack }));
    tokio::spawn(async move { axum::serve(listener, router).await });
    url
}

fn library(dir: &Path, mode: Mode) -> Library {
    Library::open(dir, shelving(mode, &[], 1 << 20)).expect("open")
}

fn shelving(mode: Mode, site: &[&str], size_max: u64) -> Shelving {
    let site_path = site.iter().map(|part| (*part).to_owned()).collect();
    Shelving { mode, site_path, size_max, memory_max: 1 << 20, name: String::from("web-1") }
}

#[tokio::test]
async fn a_pack_is_enough() {
    let (origin, dir) = (origin(), tempfile::tempdir().expect("a folder"));
    let library = library(dir.path(), Mode::Static);
    let url = content_bot(origin.pack(true)).await;
    let wanted = Wanted { pack_urls: vec![url], origin: String::new(), ..origin.wanted() };
    library.prepare(wanted.clone()).await.expect("prepared");
    let site = library.site_of(&origin.sha).expect("in memory");
    let get = |path: &str| {
        site.answer(&hyper::Method::GET, &path.parse().expect("a path"), &hyper::HeaderMap::new()).status().as_u16()
    };
    assert_eq!([get("/"), get("/css/site.css"), get("/leak")], [200, 200, 404]);
    // What is on disk needs no network, also for the next process.
    drop(library);
    let library = self::library(dir.path(), Mode::Static);
    library.prepare(Wanted { pack_urls: Vec::new(), ..wanted }).await.expect("from disk");
}

#[tokio::test]
async fn bad_packs_are_refused_and_the_origin_is_asked() {
    let (origin, dir) = (origin(), tempfile::tempdir().expect("a folder"));
    let library = library(dir.path(), Mode::Static);
    let mut flipped = origin.pack(true);
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0x10;
    for bad in [flipped, origin.pack(false), b"no pack".to_vec(), Vec::new()] {
        let url = content_bot(bad).await;
        let alone = Wanted { pack_urls: vec![url.clone()], origin: String::new(), ..origin.wanted() };
        let error = library.prepare(alone).await.expect_err("refused").to_string();
        assert!(error.contains(&url) && !error.contains('\n'), "{error}");
        assert!(library.site_of(&origin.sha).is_none());
    }
    let url = content_bot(b"no pack".to_vec()).await;
    let nobody = String::from("http://127.0.0.1:1/pack/x");
    library.prepare(Wanted { pack_urls: vec![nobody, url], ..origin.wanted() }).await.expect("from the origin");
    assert!(library.site_of(&origin.sha).is_some());
}

#[tokio::test]
async fn apps_get_files_and_no_links() {
    let (origin, dir) = (origin(), tempfile::tempdir().expect("a folder"));
    let library = library(dir.path(), Mode::App);
    library.prepare(origin.wanted()).await.expect("prepared");
    let files = library.files_of(&origin.sha);
    assert_eq!(fs::read_to_string(files.join("index.html")).expect("page"), "page");
    assert_eq!(fs::read_to_string(files.join("css/site.css")).expect("style"), "style");
    assert!(fs::symlink_metadata(files.join("leak")).is_err(), "links are left out");
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(fs::metadata(files.join("run.sh")).expect("program").permissions().mode() & 0o111, 0o111);
}

/// Writes files, links and folders, named by their paths, into a tree.
fn tree(repository: &Repository, files: &[(&str, &str, i32)]) -> Oid {
    let mut update = git2::build::TreeUpdateBuilder::new();
    for (path, text, mode) in files {
        let mode = if *mode == LINK { git2::FileMode::Link } else { git2::FileMode::Blob };
        update.upsert(path.as_bytes(), repository.blob(text.as_bytes()).expect("blob"), mode);
    }
    let empty = repository.treebuilder(None).expect("tree").write().expect("write");
    update.create_updated(repository, &repository.find_tree(empty).expect("tree")).expect("a tree")
}

const FILE: i32 = 0o100_644;
const LINK: i32 = 0o120_000;

#[tokio::test]
async fn a_link_is_what_it_leads_to_in_the_site_and_nothing_else() {
    let dir = tempfile::tempdir().expect("a folder");
    let repository = Repository::init_bare(dir.path()).expect("init");
    let id = tree(
        &repository,
        &[
            ("secret.txt", "secret", FILE),
            ("site/page.txt", "page", FILE),
            ("site/a/b/deep.txt", "deep", FILE),
            ("site/a/b/up.txt", "../../page.txt", LINK),
            ("site/near.txt", "./page.txt", LINK),
            ("site/twice.txt", "near.txt", LINK),
            ("site/folder", "a/b", LINK),
            ("site/through.txt", "folder/deep.txt", LINK),
            // As the kernel sees it: above the folder that the link leads to.
            ("site/above.txt", "folder/../../page.txt", LINK),
            ("site/a/again", "../c", LINK),
            ("site/c/file.txt", "c", FILE),
            ("site/c/circle", "../a", LINK),
            ("site/out.txt", "../secret.txt", LINK),
            ("site/far.txt", "/etc/passwd", LINK),
            ("site/nowhere.txt", "missing.txt", LINK),
            ("site/below.txt", "page.txt/x", LINK),
            ("site/one.txt", "other.txt", LINK),
            ("site/other.txt", "one.txt", LINK),
            ("site/self", ".", LINK),
            ("site/a/root", "..", LINK),
        ],
    );
    let who = Signature::new("a", "a@example.org", &git2::Time::new(0, 0)).expect("signature");
    let id = repository.find_tree(id).expect("tree");
    let sha = repository.commit(Some("refs/heads/main"), &who, &who, "words", &id, &[]).expect("commit").to_string();
    let origin = Origin { dir, sha };
    let there = [
        ("page.txt", "page"),
        ("near.txt", "page"),
        ("twice.txt", "page"),
        ("through.txt", "deep"),
        ("above.txt", "page"),
        ("folder/deep.txt", "deep"),
        ("folder/up.txt", "page"),
        ("a/b/up.txt", "page"),
        ("a/again/file.txt", "c"),
        ("c/circle/b/deep.txt", "deep"),
    ];
    let not_there = [
        "out.txt",
        "far.txt",
        "nowhere.txt",
        "below.txt",
        "one.txt",
        "self",
        "a/root",
        "a/again/circle",
        "c/circle/again",
    ];
    let data = tempfile::tempdir().expect("a folder");
    for mode in [Mode::Static, Mode::App] {
        let library = Library::open(data.path(), shelving(mode, &["site"], 1 << 20)).expect("open");
        library.prepare(origin.wanted()).await.expect("prepared");
        let blob = |text: &str| repository.blob(text.as_bytes()).expect("blob").to_string();
        // The entity tag is the blob's id.
        let found = |path: &str| match mode {
            Mode::App => fs::read_to_string(library.files_of(&origin.sha).join(path)).ok().map(|text| blob(&text)),
            Mode::Static => {
                let site = library.site_of(&origin.sha).expect("in memory");
                let path = format!("/{path}").parse().expect("a path");
                let answer = site.answer(&hyper::Method::GET, &path, &hyper::HeaderMap::new());
                let tag = answer.headers().get("etag").filter(|_| answer.status() == 200);
                tag.map(|tag| tag.to_str().expect("ascii").trim_matches('"').to_owned())
            }
        };
        for (path, text) in there {
            assert_eq!(found(path), Some(blob(text)), "{mode:?} {path}");
        }
        for path in not_there {
            assert_eq!(found(path), None, "{mode:?} {path}");
        }
    }
    let work = data.path().join("work").join(&origin.sha);
    assert!(fs::symlink_metadata(work.join("folder")).expect("there").is_dir(), "an app sees files and folders only");
    for path in not_there {
        assert!(fs::symlink_metadata(work.join(path)).is_err(), "{path}");
    }
}

#[tokio::test]
async fn folders_without_end_are_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let repository = Repository::init_bare(dir.path()).expect("init");
    // Ten folders in ten folders in ten, and so on, of a few hundred bytes each, and no file at all.
    let mut id = repository.treebuilder(None).expect("tree").write().expect("write");
    for _level in 0..20 {
        let mut builder = repository.treebuilder(None).expect("tree");
        for name in 0..10 {
            builder.insert(name.to_string(), id, 0o040_000).expect("insert");
        }
        id = builder.write().expect("write");
    }
    let who = Signature::new("a", "a@example.org", &git2::Time::new(0, 0)).expect("signature");
    let id = repository.find_tree(id).expect("tree");
    let sha = repository.commit(Some("refs/heads/main"), &who, &who, "words", &id, &[]).expect("commit").to_string();
    let (origin, data) = (Origin { dir, sha }, tempfile::tempdir().expect("a folder"));
    let error = library(data.path(), Mode::App).prepare(origin.wanted()).await.expect_err("refused");
    assert!(matches!(&error, ContentError::Refused(why) if why.contains("folders and links")), "{error:?}");
}

/// The origin here gives no commit by its name: the reference has to lead to it.
#[tokio::test]
async fn the_origin_is_asked_for_whatever_the_reference_may_be() {
    let origin = origin();
    let repository = Repository::open_bare(origin.dir.path()).expect("open");
    repository.set_head("refs/heads/main").expect("set");
    let commit = repository.find_commit(origin.sha.parse().expect("sha")).expect("commit");
    let who = commit.author();
    repository.tag("v1.2.3", commit.as_object(), &who, "words", false).expect("tag");
    for reference in
        ["main", "HEAD", "refs/heads/main", "refs/tags/v1.2.3", "v1.2.3", "semver:^1.2", origin.sha.as_str()]
    {
        let dir = tempfile::tempdir().expect("a folder");
        let library = library(dir.path(), Mode::Static);
        let wanted = Wanted { reference: reference.to_owned(), ..origin.wanted() };
        library.prepare(wanted).await.unwrap_or_else(|error| panic!("{reference}: {error}"));
    }
    let dir = tempfile::tempdir().expect("a folder");
    let wanted = Wanted { reference: String::from("other"), ..origin.wanted() };
    assert!(library(dir.path(), Mode::Static).prepare(wanted).await.is_err(), "nothing else leads to it");
}

#[tokio::test]
async fn submodules_come_in_the_pack_or_the_commit_does_not_come() {
    let dir = tempfile::tempdir().expect("a folder");
    let repository = Repository::init_bare(dir.path()).expect("init");
    let part = commit(&repository, &[("part.html", "a part", 0o100_644)], None);
    // Another repository's, so that nothing here leads to it.
    repository.find_reference("refs/heads/main").and_then(|mut main| main.delete()).expect("delete");
    let first = commit(&repository, &[("index.html", "page", 0o100_644)], None);
    let first = repository.find_commit(first).expect("commit");
    let mut tree = repository.treebuilder(Some(&first.tree().expect("tree"))).expect("tree");
    tree.insert("part", part, 0o160_000).expect("insert");
    let tree = repository.find_tree(tree.write().expect("write")).expect("tree");
    let who = first.author();
    let sha = repository.commit(Some("refs/heads/main"), &who, &who, "words", &tree, &[&first]).expect("commit");
    let mut builder = repository.packbuilder().expect("builder");
    builder.insert_commit(sha).and_then(|()| builder.insert_commit(part)).expect("insert");
    let mut pack = git2::Buf::new();
    builder.write_buf(&mut pack).expect("pack");
    let (origin, data) = (Origin { dir, sha: sha.to_string() }, tempfile::tempdir().expect("a folder"));
    let library = library(data.path(), Mode::App);
    let error = library.prepare(origin.wanted()).await.expect_err("half a site is none");
    assert!(error.to_string().contains("a submodule at part"), "{error}");
    let pack_urls = vec![content_bot(pack.to_vec()).await];
    library.prepare(Wanted { pack_urls, ..origin.wanted() }).await.expect("from the pack");
    let files = library.files_of(&origin.sha);
    assert_eq!(fs::read_to_string(files.join("part/part.html")).expect("a part"), "a part");
    assert_eq!(fs::read_to_string(files.join("index.html")).expect("a page"), "page");
}

#[tokio::test]
async fn what_is_not_wanted_any_more_is_deleted_and_damage_is_mended() {
    let (origin, dir) = (origin(), tempfile::tempdir().expect("a folder"));
    let library = library(dir.path(), Mode::App);
    library.retain_also(&origin.sha);
    library.prepare(origin.wanted()).await.expect("prepared");
    library.retain(vec![origin.sha.clone()])();
    assert!(library.files_of(&origin.sha).is_dir());
    // Damaged on disk: noticed at the next preparation and fetched anew.
    let packs = dir.path().join("revisions").join(&origin.sha).join("objects");
    fs::remove_dir_all(packs).expect("damage");
    library.prepare(origin.wanted()).await.expect("mended");
    library.retain(Vec::new())();
    assert!(!library.files_of(&origin.sha).exists());
    let left = fs::read_dir(dir.path().join("revisions")).expect("read").count();
    let drafts = fs::read_dir(dir.path().join("drafts")).expect("read").count();
    assert_eq!((left, drafts), (0, 0));
}

#[tokio::test]
async fn limits_and_folders_are_named() {
    let (origin, dir) = (origin(), tempfile::tempdir().expect("a folder"));
    let check = async |site: &str, expected: &str| {
        let library = Library::open(dir.path(), shelving(Mode::Static, &[site], 1 << 20)).expect("open");
        let error: ContentError = library.prepare(origin.wanted()).await.expect_err("refused");
        assert!(matches!(&error, ContentError::Refused(why) if why.contains(expected)), "{error:?}");
    };
    check("nowhere", "content.path_in_repo").await;
    check("index.html", "content.path_in_repo").await;
    // Another source may have a smaller pack: that is tried again.
    let library = Library::open(dir.path(), shelving(Mode::Static, &["css"], 3)).expect("open");
    let error = library.prepare(origin.wanted()).await.expect_err("cut off");
    assert!(matches!(&error, ContentError::Fetch(why) if why.contains("content.size_max_bytes")), "{error:?}");
    let library = Library::open(dir.path(), shelving(Mode::Static, &["css"], 1 << 20)).expect("open");
    library.prepare(origin.wanted()).await.expect("prepared");
    let site = library.site_of(&origin.sha).expect("in memory");
    let answer = site.answer(&hyper::Method::GET, &"/site.css".parse().expect("a path"), &hyper::HeaderMap::new());
    assert_eq!(answer.status().as_u16(), 200);
}

#[tokio::test]
async fn rules_that_cannot_be_read_refuse_the_commit_and_a_bad_pack_does_not() {
    let dir = tempfile::tempdir().expect("a folder");
    let repository = Repository::init_bare(dir.path()).expect("init");
    let sha = commit(&repository, &[("_redirects", "/a /b 299", 0o100_644)], None).to_string();
    let (origin, data) = (Origin { dir, sha }, tempfile::tempdir().expect("a folder"));
    let library = library(data.path(), Mode::Static);
    let url = content_bot(origin.pack(true)).await;
    for wanted in [Wanted { pack_urls: vec![url], origin: String::new(), ..origin.wanted() }, origin.wanted()] {
        let error = library.prepare(wanted).await.expect_err("refused");
        assert!(matches!(&error, ContentError::Refused(why) if why.contains("_redirects")), "{error:?}");
    }
    let url = content_bot(b"no pack".to_vec()).await;
    let damaged = Wanted { pack_urls: vec![url], origin: String::new(), ..origin.wanted() };
    let error = library.prepare(damaged).await.expect_err("damaged");
    assert!(matches!(error, ContentError::Fetch(_)), "{error:?}");
    // An app has no such rules.
    let library = self::library(&data.path().join("app"), Mode::App);
    library.prepare(origin.wanted()).await.expect("prepared");
}
