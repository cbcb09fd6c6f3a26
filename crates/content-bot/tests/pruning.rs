//! The mirror when it grows: packs become one, and what force-pushes leave behind goes, while others read.

#![cfg(feature = "shell")]

mod repo;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use content_bot::{
    machine::{FetchResult, Reference},
    shell::{
        fault::Fault,
        guard::Stop,
        mirror::Mirror,
        origin::{Credentials, Limits, Origin},
        source::Source,
    },
};
use repo::{Repo, git, unpack};
use tempfile::TempDir;

const LIMITS: Limits = Limits {
    size_max: 10 * 1024 * 1024,
    files_max: 100,
    look: Duration::from_secs(20),
    fetch: Duration::from_secs(60),
};

/// A repository, and where its mirror is.
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

    fn data_dir(&self) -> PathBuf {
        self.scratch.path().join("data")
    }

    fn mirror(&self) -> Arc<Mirror> {
        let source = Source::parse(&self.repo.url()).expect("an address");
        let origin = Origin::new(source, Reference::parse("main"), Credentials::default());
        Arc::new(Mirror::open(&self.data_dir(), origin, LIMITS, Stop::default()).expect("a mirror"))
    }

    fn check_pack(&self, mirror: &Mirror, sha: &str, files: &[(&str, &[u8])]) {
        let pack = fs::read(mirror.pack(sha).expect("readable").expect("held")).expect("a file");
        let dir = TempDir::new_in(self.scratch.path()).expect("scratch");
        let expected: Vec<_> = files.iter().map(|(path, content)| ((*path).to_owned(), content.to_vec())).collect();
        assert!(unpack(dir.path(), &pack, sha) == expected, "{sha}");
    }
}

fn held(mirror: &Mirror) -> Vec<String> {
    mirror.holds().into_iter().map(|c| c.sha).collect()
}

/// Bytes that no compression makes fewer.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let next = std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    next.flatten().take(len).collect()
}

fn size_of(dir: &Path) -> u64 {
    fs::read_dir(dir).expect("a folder").map(|entry| entry.expect("readable").metadata().expect("there").len()).sum()
}

/// Reads a commit until it is told to end.
fn reader(mirror: &Arc<Mirror>, sha: &str) -> (SyncSender<()>, JoinHandle<()>) {
    let (begun, has_begun) = sync_channel(1);
    let (end, ends) = sync_channel(1);
    let (mirror, sha) = (Arc::clone(mirror), sha.to_owned());
    let reads = std::thread::spawn(move || {
        let read = mirror.with_commit(&sha, |repository, commit, _guard| {
            begun.send(()).expect("somebody waits");
            ends.recv_timeout(Duration::from_secs(60)).expect("told to end");
            repository.find_commit(commit).map_err(|e| Fault::local(&e)).map(|_commit| ())
        });
        read.expect("it is there until the end");
    });
    has_begun.recv_timeout(Duration::from_secs(20)).expect("it reads");
    (end, reads)
}

/// Whoever waits for the right to change packs keeps every new reader waiting, behind those that read for minutes.
#[test]
fn tidying_does_not_wait_for_who_reads_and_nobody_waits_for_it() {
    let bench = Bench::new();
    let mirror = bench.mirror();
    let mut last = String::new();
    for n in 0..42_u8 {
        last = bench.repo.push(&[("page", &[n])]);
        assert_eq!(mirror.fetch(&last), FetchResult::Complete);
    }
    let packs = || fs::read_dir(bench.data_dir().join("mirror.git/objects/pack")).expect("packs").count() / 2;
    let before = packs();
    let (end, reads) = reader(&mirror, &last);
    let (done, is_done) = sync_channel(1);
    let tidies = std::thread::spawn({
        let mirror = Arc::clone(&mirror);
        move || {
            mirror.tidy();
            done.send(()).expect("somebody waits");
        }
    });
    is_done.recv_timeout(Duration::from_secs(30)).expect("tidying ends while somebody reads");
    assert!(mirror.pack(&last).expect("readable").is_some(), "others read meanwhile");
    assert!(packs() >= before, "no pack is taken from who reads");
    end.send(()).expect("it waits");
    reads.join().expect("read");
    tidies.join().expect("tidied");
    mirror.tidy();
    assert!(packs() <= 2, "{} packs", packs());
    bench.check_pack(&mirror, &last, &[("page", &[41])]);
}

/// A branch that is force-pushed adds its size with each publication, and nothing leads to the old ones any more.
#[test]
fn what_a_force_push_has_left_behind_is_dropped_in_time() {
    let bench = Bench::new();
    let mirror = bench.mirror();
    let base = bench.repo.push(&[("base", b"base")]);
    assert_eq!(mirror.fetch(&base), FetchResult::Complete);
    mirror.tidy();
    let push = |n: u64| {
        git(&bench.repo.work, &["reset", "--quiet", "--hard", &base]);
        let sha = bench.repo.push(&[("large", &noise(n, 2_000_000))]);
        assert_eq!(mirror.fetch(&sha), FetchResult::Complete);
        sha
    };
    let mut pushed: Vec<String> = (1..=8).map(push).collect();
    let packs = bench.data_dir().join("mirror.git/objects/pack");
    mirror.tidy();
    assert!(size_of(&packs) > 15_000_000, "small mirrors are left alone: {}", size_of(&packs));
    pushed.push(push(9));
    for old in &pushed[..7] {
        mirror.forget(old);
    }
    // Whoever reads keeps what he reads, also where nothing leads to it.
    let (end, reads) = reader(&mirror, &pushed[0]);
    mirror.tidy();
    assert!(size_of(&packs) > 17_000_000, "nothing is taken from who reads: {}", size_of(&packs));
    end.send(()).expect("it waits");
    reads.join().expect("read");
    mirror.tidy();
    let size = size_of(&packs);
    assert!((4_000_000..5_000_000).contains(&size), "two commits are kept: {size}");
    assert_eq!(held(&mirror), [&base, &pushed[7], &pushed[8]].map(String::as_str));
    bench.check_pack(&mirror, &pushed[7], &[("base", b"base"), ("large", &noise(8, 2_000_000))]);
    git(&bench.data_dir().join("mirror.git"), &["fsck", "--full", "--strict"]);
    // It goes on, also with one that was dropped, and is not pruned again for nothing.
    let next = push(10);
    bench.check_pack(&mirror, &next, &[("base", b"base"), ("large", &noise(10, 2_000_000))]);
    git(&bench.repo.work, &["reset", "--quiet", "--hard", &pushed[0]]);
    git(&bench.repo.work, &["push", "--quiet", "--force", "origin", "HEAD:main"]);
    assert_eq!(mirror.fetch(&pushed[0]), FetchResult::Complete);
    mirror.tidy();
    assert!(size_of(&packs) > 8_000_000);
    // Killed in the middle of the change of places.
    drop(mirror);
    let data = bench.data_dir();
    fs::rename(data.join("mirror.git"), data.join("mirror.old")).expect("moved");
    fs::create_dir(data.join("mirror.lean")).expect("half");
    assert_eq!(held(&bench.mirror()), [&base, &pushed[7], &pushed[8], &next, &pushed[0]].map(String::as_str));
    assert!(!data.join("mirror.lean").exists() && !data.join("mirror.old").exists());
}
