//! Submodules, with real repositories: in the pack, on disk, within their bounds, and refused with a reason.

#![cfg(feature = "shell")]

mod repo;

use std::{fs, path::Path, time::Duration};

use content_bot::{
    machine::{FetchResult, Reference},
    shell::{
        export::{Exporter, Hook, Plan},
        guard::Stop,
        mirror::Mirror,
        origin::{Credentials, Limits, Origin},
        source::Source,
        submodules::Submodules,
    },
};
use repo::{Repo, git};
use tempfile::TempDir;

const LIMITS: Limits =
    Limits { size_max: 1_000_000, files_max: 10, look: Duration::from_secs(20), fetch: Duration::from_secs(60) };

/// A site with the submodule `theme`, which has the submodule `icons`.
struct Bench {
    scratch: TempDir,
    site: Repo,
    theme: Repo,
    icons: Repo,
}

impl Bench {
    fn new() -> Self {
        let scratch = TempDir::new().expect("scratch");
        let [site, theme, icons] = ["site", "theme", "icons"].map(|name| {
            let dir = scratch.path().join(name);
            fs::create_dir(&dir).expect("mkdir");
            Repo::new(&dir)
        });
        let bench = Self { scratch, site, theme, icons };
        let icons = bench.icons.push(&[("star.svg", b"a star")]);
        bench.link(&bench.theme, "icons", "../../icons/origin.git", &icons);
        let theme = bench.theme.push(&[("theme.css", b"a style")]);
        bench.link(&bench.site, "parts/theme", "../../theme/origin.git", &theme);
        bench
    }

    /// Puts a submodule into the next commit of `repo`.
    fn link(&self, repo: &Repo, path: &str, url: &str, sha: &str) {
        let text = format!("[submodule \"{path}\"]\n\tpath = {path}\n\turl = {url}\n");
        fs::write(repo.work.join(".gitmodules"), text).expect("write");
        fs::create_dir_all(repo.work.join(path)).expect("mkdir");
        git(&repo.work, &["update-index", "--add", "--cacheinfo", &format!("160000,{sha},{path}")]);
    }

    fn mirror(&self, submodules: Submodules) -> Mirror {
        let nobody = Credentials::default();
        let source = Source::parse(&self.site.url()).expect("good");
        let origin = Origin::new(source, Reference::parse("main"), nobody);
        let data = self.scratch.path().join(format!("data-{submodules:?}"));
        Mirror::open(&data, origin, LIMITS, Stop::default()).expect("a mirror").following(submodules)
    }

    /// Writes the tree of a commit out, and says which of the three files are there.
    fn exported(&self, mirror: &Mirror, sha: &str) -> [bool; 3] {
        let root = self.scratch.path().join("out");
        let link = root.join("current");
        let scratch = root.join("scratch");
        let plan = Plan { root, link: link.clone(), touch_file: None, hook: Hook::default(), scratch };
        Exporter::open(plan).expect("an exporter").put(mirror, sha).expect("exported");
        let is = |path: &str, text: &str| fs::read_to_string(link.join(path)).is_ok_and(|found| found == text);
        let found = [
            is("index.html", "a page"),
            is("parts/theme/theme.css", "a style"),
            is("parts/theme/icons/star.svg", "a star"),
        ];
        let _next = fs::remove_dir_all(self.scratch.path().join("out"));
        found
    }
}

fn unfit(result: FetchResult, words: &str) {
    match result {
        FetchResult::Unfit { reason } => assert!(reason.contains(words), "{reason}"),
        other => panic!("must be unfit for `{words}`: {other:?}"),
    }
}

#[test]
fn a_commit_comes_with_the_submodules_that_are_asked_for() {
    let bench = Bench::new();
    let sha = bench.site.push(&[("index.html", b"a page")]);
    let check = |submodules: Submodules, expected: [bool; 3]| {
        let mirror = bench.mirror(submodules);
        assert_eq!(mirror.fetch(&sha), FetchResult::Complete, "{submodules:?}");
        assert_eq!(bench.exported(&mirror, &sha), expected, "{submodules:?}");
        mirror
    };
    check(Submodules::Off, [true, false, false]);
    check(Submodules::Shallow, [true, true, false]);
    let mirror = check(Submodules::Recursive, [true, true, true]);
    // The pack has all of it: the objects of both submodules are there.
    let pack = fs::read(mirror.pack(&sha).expect("readable").expect("kept")).expect("a pack");
    let unpacked = bench.scratch.path().join("unpacked");
    repo::unpack(&unpacked, &pack, &sha);
    for (module, file) in [(&bench.theme, "theme.css"), (&bench.icons, "star.svg")] {
        git(&unpacked, &["cat-file", "blob", &format!("{}:{file}", module.head())]);
    }
    // What is not kept any more leaves no name behind.
    mirror.forget(&sha);
    assert!(!git(&mirror_dir(&bench), &["for-each-ref"]).contains("bots-sub"));
}

fn mirror_dir(bench: &Bench) -> std::path::PathBuf {
    bench.scratch.path().join("data-Recursive/mirror.git")
}

#[test]
fn a_submodule_that_breaks_a_rule_makes_a_commit_unfit_with_the_reason() {
    let bench = Bench::new();
    let mirror = bench.mirror(Submodules::Recursive);
    let theme = bench.theme.head();
    let check = |url: &str, sha: &str, words: &str| {
        bench.link(&bench.site, "parts/theme", url, sha);
        let commit = bench.site.push(&[("index.html", url.as_bytes()), ("sha", sha.as_bytes())]);
        unfit(mirror.fetch(&commit), words);
    };
    check("ext::sh -c true", &theme, "cannot be used");
    // Its own address is missing.
    fs::remove_file(bench.site.work.join(".gitmodules")).expect("there");
    let commit = bench.site.push(&[("index.html", b"no address")]);
    unfit(mirror.fetch(&commit), ".gitmodules gives no address");
    // The limits hold for all of it together.
    let files: Vec<String> = (0..12).map(|n| format!("many/{n}")).collect();
    let files: Vec<(&str, &[u8])> = files.iter().map(|path| (path.as_str(), b"x".as_slice())).collect();
    let large = bench.theme.push(&files);
    bench.link(&bench.site, "parts/theme", "../../theme/origin.git", &large);
    let commit = bench.site.push(&[("index.html", b"a page")]);
    unfit(mirror.fetch(&commit), "git.files_max");
    // A good one after all of these.
    bench.link(&bench.site, "parts/theme", "../../theme/origin.git", &theme);
    let commit = bench.site.push(&[("index.html", b"a page")]);
    assert_eq!(mirror.fetch(&commit), FetchResult::Complete);
    assert_eq!(bench.exported(&mirror, &commit), [true, true, true]);
    assert!(Path::new(&mirror_dir(&bench)).is_dir());
}

#[test]
fn a_submodule_that_is_not_given_out_yet_leaves_a_doubt_and_is_asked_for_again() {
    let bench = Bench::new();
    let mirror = bench.mirror(Submodules::Recursive);
    let doubtful = |sha: &str| match mirror.fetch(sha) {
        FetchResult::Doubtful { reason } => assert!(reason.contains("parts/theme cannot be had"), "{reason}"),
        other => panic!("it may come a moment later: {other:?}"),
    };
    let late = bench.theme.commit(&[("theme.css", b"a style that is pushed behind the site")]);
    bench.link(&bench.site, "parts/theme", "../../theme/origin.git", &late);
    let sha = bench.site.push(&[("index.html", b"a page")]);
    doubtful(&sha);
    doubtful(&sha);
    git(&bench.theme.work, &["push", "--quiet", "origin", "HEAD:main"]);
    assert_eq!(mirror.fetch(&sha), FetchResult::Complete);
    // Its place is not there, or not for us.
    bench.link(&bench.site, "parts/theme", "../../nowhere.git", "1234567890123456789012345678901234567890");
    doubtful(&bench.site.push(&[("index.html", b"another page")]));
}

/// Submodules are looked for before the commit has passed the rules for content, and this must end, too.
#[test]
fn trees_without_end_are_unfit_before_submodules_are_fetched() {
    let bench = Bench::new();
    let mirror = bench.mirror(Submodules::Recursive);
    let many = bench.site.many_trees(&bench.site.tree(&[]), 60);
    unfit(mirror.fetch(&bench.site.push_tree(&many)), "more than 10 directories: remove some or raise git.files_max");
    // One submodule in a quintillion of places.
    let theme = bench.theme.head();
    let many = bench.site.many_trees(&bench.site.tree(&[("160000", "theme", &theme)]), 60);
    unfit(mirror.fetch(&bench.site.push_tree(&many)), "more than 64 submodules");
    let deep = (0..70).fold(bench.site.tree(&[]), |below, _| bench.site.tree(&[("40000", "d", &below)]));
    unfit(mirror.fetch(&bench.site.push_tree(&deep)), "directories are more than 64 deep");
    // A good one after all of these.
    let sha = bench.site.push(&[("index.html", b"a page")]);
    assert_eq!(mirror.fetch(&sha), FetchResult::Complete);
    assert_eq!(bench.exported(&mirror, &sha), [true, true, true]);
}
