//! The mirror against real repositories: fetching, limits, force-pushes, damage, packs, credentials, silence.

#![cfg(feature = "shell")]

mod repo;

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use bots_core::shell::{Clock, Exit, testing::free_port};
use content_bot::{
    machine::{FetchResult, PollResult, Reference},
    shell::{
        guard::Stop,
        mirror::Mirror,
        origin::{Credentials, Limits, Origin, Reach},
        source::Source,
        verify::LfsPointers,
    },
};
use repo::{Repo, git, unpack};
use tempfile::TempDir;

const LIMITS: Limits = Limits {
    size_max: 10 * 1024 * 1024,
    files_max: 100,
    look: Duration::from_secs(20),
    fetch: Duration::from_secs(20),
};

const NOBODY: Credentials = Credentials {
    username: None,
    password: None,
    password_file: None,
    ssh_key_file: None,
    ssh_key_passphrase: None,
    known_hosts_file: None,
};

/// A repository and a mirror of it, in one scratch directory.
struct Bench {
    scratch: TempDir,
    repo: Repo,
}

impl Bench {
    fn new() -> Self {
        let scratch = TempDir::new().expect("scratch");
        let repo = Repo::new(scratch.path());
        Self { scratch, repo }
    }

    fn origin(&self, reference: &str) -> Origin {
        origin(&self.repo.url(), reference, NOBODY)
    }

    fn data_dir(&self) -> PathBuf {
        self.scratch.path().join("data")
    }

    fn open(&self, reference: &str, limits: Limits) -> Result<Mirror, Exit> {
        Mirror::open(&self.data_dir(), self.origin(reference), limits, Stop::default())
    }

    fn mirror(&self) -> Mirror {
        self.open("main", LIMITS).expect("a mirror")
    }

    fn look(&self, reference: &str) -> PollResult {
        self.origin(reference).look(Stop::default(), LIMITS.look)
    }

    fn check_pack(&self, mirror: &Mirror, sha: &str, files: &[(&str, &[u8])]) {
        let pack = fs::read(mirror.pack(sha).expect("readable").expect("held")).expect("a file");
        let dir = TempDir::new_in(self.scratch.path()).expect("scratch");
        let mut expected: Vec<_> = files.iter().map(|(path, content)| ((*path).to_owned(), content.to_vec())).collect();
        expected.sort();
        let mut found = unpack(dir.path(), &pack, sha);
        found.sort();
        assert_eq!(found, expected);
    }
}

fn origin(url: &str, reference: &str, credentials: Credentials) -> Origin {
    Origin::new(Source::parse(url).expect("an address"), Reference::parse(reference), credentials)
}

fn held(mirror: &Mirror) -> Vec<String> {
    mirror.holds().into_iter().map(|c| c.sha).collect()
}

fn check_unfit(result: &FetchResult, words: &str) {
    let FetchResult::Unfit { reason } = result else { panic!("{result:?}") };
    assert!(reason.contains(words), "{reason}");
}

#[test]
fn references_are_resolved_to_commits() {
    let bench = Bench::new();
    assert_eq!(bench.look("main"), PollResult::Missing, "an empty repository");
    let first = bench.repo.push(&[("index.html", b"one")]);
    git(&bench.repo.work, &["tag", "--annotate", "--message", "a release", "v1"]);
    git(&bench.repo.work, &["tag", "light"]);
    git(&bench.repo.work, &["push", "--quiet", "--tags"]);
    let second = bench.repo.push(&[("index.html", b"two")]);
    let found = |sha: &String| PollResult::Found { sha: sha.clone() };
    for name in ["main", "refs/heads/main", "HEAD"] {
        assert_eq!(bench.look(name), found(&second), "{name}");
    }
    for name in ["v1", "light", "refs/tags/v1"] {
        assert_eq!(bench.look(name), found(&first), "{name} is peeled");
    }
    assert_eq!(bench.look("nobody"), PollResult::Missing);
    let PollResult::Failed { why } = origin("/does/not/exist", "main", NOBODY).look(Stop::default(), LIMITS.look)
    else {
        panic!("there is no repository")
    };
    assert!(why.starts_with("cannot read /does/not/exist: ") && !why.contains('\n'), "{why}");
}

#[test]
fn a_range_means_the_greatest_version_that_fits() {
    let bench = Bench::new();
    assert_eq!(bench.look("semver:^1"), PollResult::Missing, "no tags yet");
    let mut commits = Vec::new();
    for (at, tag) in ["v1.9.0", "1.10.0", "v1.11.0-rc.1", "v2.0.0", "nightly", "v3"].iter().enumerate() {
        commits.push(bench.repo.push(&[("index.html", format!("{at}").as_bytes())]));
        let annotated: &[&str] = if at % 2 == 1 { &["--annotate", "--message", "a release"] } else { &[] };
        git(&bench.repo.work, &[&["tag", tag], annotated].concat());
    }
    git(&bench.repo.work, &["push", "--quiet", "--tags"]);
    let found = |at: usize| PollResult::Found { sha: commits[at].clone() };
    assert_eq!(bench.look("semver:^1"), found(1), "numbers, not letters, and no release candidate");
    assert_eq!(bench.look("semver:~1.9"), found(0));
    assert_eq!(bench.look("semver:*"), found(3), "annotated, and peeled");
    assert_eq!(bench.look("semver:>=1.11.0-rc.0, <1.12"), found(2));
    assert_eq!(bench.look("semver:^4"), PollResult::Missing);
    let mirror = bench.open("semver:^1", LIMITS).expect("a mirror");
    assert_eq!(mirror.fetch(&commits[1]), FetchResult::Complete);
}

#[test]
fn branches_come_and_go() {
    let bench = Bench::new();
    let first = bench.repo.push(&[("index.html", b"one")]);
    let found = |sha: &String| PollResult::Found { sha: sha.clone() };
    git(&bench.repo.work, &["push", "--quiet", "origin", "HEAD:next"]);
    let second = bench.repo.push(&[("index.html", b"two")]);
    assert_eq!((bench.look("HEAD"), bench.look("next")), (found(&second), found(&first)));
    // The default branch becomes another one.
    git(&bench.repo.bare, &["symbolic-ref", "HEAD", "refs/heads/next"]);
    assert_eq!(bench.look("HEAD"), found(&first));
    // The branch is deleted: what is held stays.
    let mirror = bench.mirror();
    assert_eq!(mirror.fetch(&second), FetchResult::Complete);
    git(&bench.repo.work, &["push", "--quiet", "origin", ":main"]);
    assert_eq!(bench.look("main"), PollResult::Missing);
    assert_eq!(mirror.fetch(&second), FetchResult::Complete);
    bench.check_pack(&mirror, &second, &[("index.html", b"two")]);
}

#[test]
fn a_commit_comes_in_whole_and_goes_out_as_a_pack() {
    let bench = Bench::new();
    let mirror = bench.mirror();
    let big: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    let files: [(&str, &[u8]); 4] = [("index.html", b"<h1>hi"), ("a/b/c.css", b""), ("big.bin", &big), ("a/d", b"x")];
    bench.repo.push(&[("old.html", b"gone later")]);
    fs::remove_file(bench.repo.work.join("old.html")).expect("there");
    let sha = bench.repo.push(&files);
    assert_eq!(mirror.pack(&sha), Ok(None), "not held yet");
    assert_eq!(mirror.fetch(&sha), FetchResult::Complete);
    assert_eq!(mirror.fetch(&sha), FetchResult::Complete, "once more changes nothing");
    assert_eq!(mirror.holds()[0].subject, "Change index.html");
    bench.check_pack(&mirror, &sha, &files);
    // The next one is an increment, and both are held, oldest first.
    let next = bench.repo.push(&[("index.html", b"<h1>ho")]);
    assert_eq!(mirror.fetch(&next), FetchResult::Complete);
    assert_eq!(held(&mirror), [sha.clone(), next]);
    mirror.forget(&sha);
    assert_eq!(mirror.pack(&sha), Ok(None));
    // Another process finds what this one kept.
    drop(mirror);
    assert_eq!(held(&bench.mirror()).len(), 1);
}

#[test]
fn limits_are_kept() {
    let bench = Bench::new();
    let noise: Vec<u8> = (0..200_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()).collect();
    let sha = bench.repo.push(&[("noise.bin", &noise)]);
    let mirror = bench.open("main", Limits { size_max: 100_000, ..LIMITS }).expect("a mirror");
    // A transfer says nothing of the commit: whoever has the history already needs less.
    let large = mirror.fetch(&sha);
    assert!(matches!(&large, FetchResult::Failed { why } if why.contains("raise git.size_max_bytes")), "{large:?}");
    assert!(held(&mirror).is_empty());
    drop(mirror);
    // Small on the wire, large when unpacked.
    let zeros = vec![0_u8; 5_000_000];
    fs::remove_file(bench.repo.work.join("noise.bin")).expect("there");
    let bomb = bench.repo.push(&[("zeros.bin", &zeros)]);
    let mirror = bench.open("main", Limits { size_max: 2_000_000, ..LIMITS }).expect("a mirror");
    check_unfit(&mirror.fetch(&bomb), "larger than 2000000 bytes together");
    drop(mirror);
    let many: Vec<(String, Vec<u8>)> = (0..20).map(|n| (format!("f{n}"), vec![n])).collect();
    let many: Vec<(&str, &[u8])> = many.iter().map(|(path, content)| (path.as_str(), content.as_slice())).collect();
    let crowd = bench.repo.push(&many);
    let mirror = bench.open("main", Limits { files_max: 10, ..LIMITS }).expect("a mirror");
    check_unfit(&mirror.fetch(&crowd), "raise git.files_max");
    drop(mirror);
    a_small_commit_on_a_long_history(&bench);
    let mirror = bench.open("main", Limits { fetch: Duration::ZERO, ..LIMITS }).expect("a mirror");
    let late = bench.repo.push(&[("late", b"late")]);
    assert!(matches!(mirror.fetch(&late), FetchResult::Failed { .. }), "out of time is not the commit's fault");
}

/// A commit that is within the limit, and a history that is not: who has nothing fails and condemns nothing, and who has the
/// history fetches the rest.
fn a_small_commit_on_a_long_history(bench: &Bench) {
    fs::remove_file(bench.repo.work.join("zeros.bin")).expect("there");
    let small = bench.repo.push(&[("index.html", b"a page")]);
    let limits = Limits { size_max: 200_000, ..LIMITS };
    let data = bench.scratch.path().join("fresh");
    let fresh = Mirror::open(&data, bench.origin("main"), limits, Stop::default()).expect("a mirror");
    let failed = fresh.fetch(&small);
    assert!(
        matches!(&failed, FetchResult::Failed { why } if why.contains("takes more than 200000 bytes")),
        "{failed:?}"
    );
    let mirror = bench.open("main", limits).expect("a mirror");
    assert_eq!(mirror.fetch(&small), FetchResult::Complete);
}

#[test]
fn paths_do_not_leave_the_site() {
    let bench = Bench::new();
    let mirror = bench.mirror();
    std::os::unix::fs::symlink("index.html", bench.repo.work.join("inside")).expect("a link");
    let good = bench.repo.push(&[("index.html", b"hi")]);
    assert_eq!(mirror.fetch(&good), FetchResult::Complete);
    std::os::unix::fs::symlink("../../etc/passwd", bench.repo.work.join("outside")).expect("a link");
    let bad = bench.repo.push(&[]);
    check_unfit(&mirror.fetch(&bad), "the link outside -> ../../etc/passwd leaves the site");
    let blob = git2::Oid::from_str(&git(&bench.repo.work, &["rev-parse", &format!("{good}:index.html")])).expect("oid");
    for name in ["..", ".git", ".GIT", "."] {
        let entry = [format!("100644 {name}\0").as_bytes(), blob.as_bytes()].concat();
        let sha = bench.repo.push_raw_tree(&entry);
        check_unfit(&mirror.fetch(&sha), "leaves the site or reaches into git");
    }
    assert_eq!(held(&mirror), [good], "nothing unfit is kept");
}

/// Visitors would get three lines of text for a picture.
#[test]
fn pointers_of_lfs_are_not_published_unless_they_are_allowed() {
    let bench = Bench::new();
    let mirror = bench.mirror();
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n";
    let good = bench
        .repo
        .push(&[("index.html", b"hi"), ("about-lfs.txt", b"A pointer begins with `version https://git-lfs`")]);
    assert_eq!(mirror.fetch(&good), FetchResult::Complete);
    let bad = bench.repo.push(&[("img/logo.png", pointer), ("img/photo.png", pointer)]);
    check_unfit(&mirror.fetch(&bad), "img/logo.png is a pointer of Git LFS");
    check_unfit(&mirror.fetch(&bad), "set git.lfs_pointers to allow");
    assert_eq!(held(&mirror), [good]);
    let mirror = mirror.finding(LfsPointers::Allow);
    assert_eq!(mirror.fetch(&bad), FetchResult::Complete);
    let mut held_whole = vec![("img/logo.png", &pointer[..]), ("img/photo.png", pointer), ("index.html", b"hi")];
    held_whole.push(("about-lfs.txt", b"A pointer begins with `version https://git-lfs`"));
    bench.check_pack(&mirror, &bad, &held_whole);
}

/// A tree may have a link and a directory of one name, as far as libgit2 is concerned; whoever writes it out follows the link.
#[test]
fn a_name_that_is_there_twice_is_refused() {
    let bench = Bench::new();
    let mirror = bench.mirror();
    let (here, up) = (bench.repo.blob(b"."), bench.repo.blob(b"../../../.."));
    let file = bench.repo.blob(b"written outside");
    let outside = bench.repo.tree(&[("100644", "escaped", &file)]);
    let mut tree = bench.repo.tree(&[("120000", "l", &up), ("40000", "l", &outside)]);
    for _folder in 0..4 {
        tree = bench.repo.tree(&[("120000", "a", &here), ("40000", "a", &tree)]);
    }
    check_unfit(&mirror.fetch(&bench.repo.push_tree(&tree)), "the site has two entries of the name a: remove one");
    let folder = bench.repo.tree(&[("120000", "l", &here), ("100644", "m", &file), ("40000", "l", &outside)]);
    let nested = bench.repo.tree(&[("40000", "css", &folder)]);
    check_unfit(&mirror.fetch(&bench.repo.push_tree(&nested)), "css has two entries of the name l");
    for second in [("160000", file.as_str()), ("100644", file.as_str())] {
        let twice = bench.repo.tree(&[("100644", "x", &file), (second.0, "x", second.1)]);
        check_unfit(&mirror.fetch(&bench.repo.push_tree(&twice)), "two entries of the name x");
    }
    // In different directories, or in different case, it is another one.
    let good = bench.repo.tree(&[
        ("100644", "A", &file),
        ("100644", "a", &file),
        ("40000", "b", &outside),
        ("40000", "c", &outside),
    ]);
    let good = bench.repo.push_tree(&good);
    assert_eq!(mirror.fetch(&good), FetchResult::Complete);
    assert_eq!(held(&mirror), [good]);
}

/// They have no file and no size, and whoever goes through all of them has no end.
#[test]
fn directories_are_counted() {
    let bench = Bench::new();
    let mirror = bench.mirror();
    let empty = bench.repo.tree(&[]);
    let many = bench.repo.many_trees(&empty, 40);
    check_unfit(
        &mirror.fetch(&bench.repo.push_tree(&many)),
        "more than 100 directories: remove some or raise git.files_max",
    );
    let deep = (0..70).fold(empty, |below, _| bench.repo.tree(&[("40000", "d", &below)]));
    check_unfit(&mirror.fetch(&bench.repo.push_tree(&deep)), "directories are more than 64 deep");
    // The places of submodules are directories, too.
    let names: Vec<String> = (0..120).map(|n| format!("{n:03}")).collect();
    let commit = "1234567890123456789012345678901234567890";
    let places: Vec<_> = names.iter().map(|name| ("160000", name.as_str(), commit)).collect();
    check_unfit(&mirror.fetch(&bench.repo.push_tree(&bench.repo.tree(&places))), "more than 100 directories");
    let good = bench.repo.tree(&places[..80]);
    assert_eq!(mirror.fetch(&bench.repo.push_tree(&good)), FetchResult::Complete);
}

#[test]
fn a_commit_survives_its_force_push() {
    let bench = Bench::new();
    let mirror = bench.mirror();
    bench.repo.push(&[("base", b"base")]);
    let base = bench.repo.head();
    let first = bench.repo.push(&[("page", b"first")]);
    assert_eq!(mirror.fetch(&first), FetchResult::Complete);
    git(&bench.repo.work, &["reset", "--quiet", "--hard", &base]);
    let second = bench.repo.push(&[("page", b"second")]);
    bench.repo.prune();
    assert_eq!(mirror.fetch(&second), FetchResult::Complete);
    mirror.pack(&first).expect("readable").expect("the mirror keeps what was published");
    // One that was never fetched is gone.
    git(&bench.repo.work, &["reset", "--quiet", "--hard", &base]);
    let third = bench.repo.push(&[("page", b"third")]);
    git(&bench.repo.work, &["reset", "--quiet", "--hard", &base]);
    bench.repo.push(&[("page", b"fourth")]);
    bench.repo.prune();
    assert_eq!(mirror.fetch(&third), FetchResult::Vanished);
    let never = "0123456789012345678901234567890123456789";
    assert_eq!(mirror.fetch(never), FetchResult::Vanished);
}

#[test]
fn a_pinned_commit_is_found_behind_the_branch() {
    let bench = Bench::new();
    let old = bench.repo.push(&[("page", b"old")]);
    bench.repo.push(&[("page", b"new")]);
    let mirror = bench.open(&old, LIMITS).expect("a mirror");
    assert_eq!(mirror.fetch(&old), FetchResult::Complete);
    bench.check_pack(&mirror, &old, &[("page", b"old")]);
}

#[test]
fn what_a_killed_bot_leaves_is_cleared_away() {
    let bench = Bench::new();
    let first = bench.repo.push(&[("page", b"first")]);
    assert_eq!(bench.mirror().fetch(&first), FetchResult::Complete);
    let data = bench.data_dir();
    for left in ["mirror.git/HEAD.lock", "mirror.git/refs/bots-origin/tip.lock", "mirror.git/packed-refs.lock"] {
        fs::write(data.join(left), b"").expect(left);
    }
    fs::write(data.join("mirror.git/objects/pack/pack_git2_x1"), b"half").expect("left-over");
    fs::write(data.join("packs/abc.half"), b"half").expect("left-over");
    fs::create_dir_all(data.join("mirror.new/objects")).expect("left-over");
    fs::create_dir_all(data.join("mirror.old")).expect("left-over");
    let mirror = bench.mirror();
    let second = bench.repo.push(&[("page", b"second")]);
    assert_eq!(mirror.fetch(&second), FetchResult::Complete);
    assert_eq!(held(&mirror), [first, second]);
    assert!(!data.join("mirror.new").exists() && !data.join("packs/abc.half").exists());
}

#[test]
fn a_damaged_mirror_heals() {
    fn packs_of(dir: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(dir.join("mirror.git/objects/pack")).expect("packs");
        entries.map(|e| e.expect("entry").path()).filter(|p| p.extension().is_some_and(|e| e == "pack")).collect()
    }
    type Damage = (&'static str, fn(&Path));
    let damages: [Damage; 4] = [
        ("packs are gone", |data| {
            packs_of(data).iter().for_each(|p| fs::remove_file(p).expect("there"));
        }),
        ("packs are garbled", |data| {
            for path in packs_of(data) {
                let mut bytes = fs::read(&path).expect("there");
                let middle = bytes.len() / 2;
                bytes[middle..].iter_mut().for_each(|b| *b ^= 0x55);
                fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("chmod");
                fs::write(&path, bytes).expect("write");
            }
        }),
        ("no repository any more", |data| fs::remove_file(data.join("mirror.git/HEAD")).expect("there")),
        ("a file in its place", |data| {
            fs::remove_dir_all(data.join("mirror.git")).expect("there");
            fs::write(data.join("mirror.git"), b"nonsense").expect("write");
        }),
    ];
    for (damage, inflict) in damages {
        let bench = Bench::new();
        let noise: Vec<u8> = (0..50_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()).collect();
        let first = bench.repo.push(&[("page", b"first"), ("noise", &noise)]);
        assert_eq!(bench.mirror().fetch(&first), FetchResult::Complete, "{damage}");
        inflict(&bench.data_dir());
        let mirror = bench.mirror();
        assert_eq!(mirror.fetch(&first), FetchResult::Complete, "{damage}");
        let second = bench.repo.push(&[("page", b"second")]);
        assert_eq!(mirror.fetch(&second), FetchResult::Complete, "{damage}");
        bench.check_pack(&mirror, &second, &[("page", b"second"), ("noise", &noise)]);
        assert!(held(&mirror).contains(&second), "{damage}");
    }
}

#[test]
fn many_fetches_do_not_pile_up_packs() {
    let bench = Bench::new();
    let mirror = bench.mirror();
    let mut last = String::new();
    for n in 0..50_u8 {
        last = bench.repo.push(&[("page", &[n])]);
        assert_eq!(mirror.fetch(&last), FetchResult::Complete);
        mirror.tidy();
        while mirror.holds().len() > 16 {
            mirror.forget(&held(&mirror)[0]);
        }
    }
    let packs = fs::read_dir(bench.data_dir().join("mirror.git/objects/pack")).expect("packs").count() / 2;
    assert!(packs <= 41, "{packs} packs");
    assert_eq!(held(&mirror).len(), 16);
    bench.check_pack(&mirror, &last, &[("page", &[49])]);
    // Nothing is lost on the way, and the next fetch brings no more than is new.
    git(&bench.data_dir().join("mirror.git"), &["fsck", "--full", "--strict"]);
    last = bench.repo.push(&[("page", &[50])]);
    assert_eq!(mirror.fetch(&last), FetchResult::Complete);
    let left_over = bench.data_dir().join("mirror.git/objects/pack/pack-0.pack");
    fs::write(&left_over, b"without its index").expect("write");
    drop(mirror);
    assert_eq!(held(&bench.mirror()).last(), Some(&last));
    assert!(!left_over.exists(), "a pack whose index was removed is removed too");
}

#[test]
fn one_directory_serves_one_bot() {
    let bench = Bench::new();
    let _first = bench.mirror();
    let second = bench.open("main", LIMITS).expect_err("taken");
    assert_eq!(second.code, 3);
    assert!(second.message.starts_with("data_dir: another process uses"), "{}", second.message);
    let elsewhere = Mirror::open(Path::new("/proc/nowhere"), bench.origin("main"), LIMITS, Stop::default());
    assert_eq!(elsewhere.expect_err("no such place").code, 2);
}

/// A program that is stopped by its pid when the test ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

#[test]
fn the_git_protocol_works() {
    let bench = Bench::new();
    let sha = bench.repo.push(&[("page", b"over the wire")]);
    let port = free_port().expect("a port");
    // Without `--reuseaddr` and detaching: one process, ended by its pid.
    let program = git(bench.scratch.path(), &["--exec-path"]) + "/git-daemon";
    let daemon = Command::new(program)
        .args(["--export-all", "--listen=127.0.0.1", &format!("--port={port}")])
        .arg(format!("--base-path={}", bench.scratch.path().display()))
        .stderr(Stdio::null())
        .spawn()
        .map(Running)
        .expect("git daemon");
    let url = format!("git://127.0.0.1:{port}/origin.git");
    let mirror =
        Mirror::open(&bench.data_dir(), origin(&url, "main", NOBODY), LIMITS, Stop::default()).expect("mirror");
    let look = || mirror.origin().look(Stop::default(), LIMITS.look);
    let began = Clock::now();
    while look() != (PollResult::Found { sha: sha.clone() }) {
        assert!(Clock::now().since(began).as_millis() < 10_000, "the daemon does not come up");
    }
    assert_eq!(mirror.fetch(&sha), FetchResult::Complete);
    bench.check_pack(&mirror, &sha, &[("page", b"over the wire")]);
    // Without the history, and on top of a fetch without it; also when the branch is moved by force.
    let shallow = origin(&url, "main", NOBODY).reached(Reach { proxy: None, depth: 1 });
    let shallow =
        Mirror::open(&bench.scratch.path().join("shallow"), shallow, LIMITS, Stop::default()).expect("mirror");
    let second = bench.repo.push(&[("page", b"on top")]);
    assert_eq!(shallow.fetch(&second), FetchResult::Complete);
    git(&bench.repo.work, &["reset", "--quiet", "--hard", &sha]);
    let third = bench.repo.push(&[("page", b"in its place")]);
    assert_eq!(shallow.fetch(&third), FetchResult::Complete);
    bench.check_pack(&shallow, &third, &[("page", b"in its place")]);
    assert_eq!(held(&shallow), [second, third]);
    // A network that is gone is not the commit's fault.
    drop(daemon);
    assert!(matches!(look(), PollResult::Failed { .. }));
    let next = bench.repo.push(&[("page", b"unreachable")]);
    assert!(matches!(mirror.fetch(&next), FetchResult::Failed { .. }));
    assert_eq!(held(&mirror), [sha]);
}

#[test]
fn an_origin_that_says_nothing_is_given_up() {
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = silent.local_addr().expect("bound").port();
    let began = Clock::now();
    let url = format!("git://127.0.0.1:{port}/site.git");
    let looked = origin(&url, "main", NOBODY).look(Stop::default(), LIMITS.look);
    assert!(matches!(looked, PollResult::Failed { .. }), "{looked:?}");
    assert!(Clock::now().since(began).as_millis() < 15_000);
}
