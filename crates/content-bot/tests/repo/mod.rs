//! Real git repositories in a scratch directory, made with the git program.

#![allow(dead_code, unreachable_pub, reason = "each test uses its own part")]

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

/// A bare repository that is pushed to, and a work tree that pushes.
pub struct Repo {
    pub bare: PathBuf,
    pub work: PathBuf,
}

impl Repo {
    pub fn new(dir: &Path) -> Self {
        let repo = Self { bare: dir.join("origin.git"), work: dir.join("work") };
        git(dir, &["init", "--quiet", "--bare", "--initial-branch=main", "origin.git"]);
        git(dir, &["clone", "--quiet", "origin.git", "work"]);
        repo
    }

    pub fn url(&self) -> String {
        format!("file://{}", self.bare.display())
    }

    /// Commits these files on top of what is there and pushes; the commit's name.
    pub fn push(&self, files: &[(&str, &[u8])]) -> String {
        let sha = self.commit(files);
        git(&self.work, &["push", "--quiet", "--force", "origin", "HEAD:main"]);
        sha
    }

    pub fn commit(&self, files: &[(&str, &[u8])]) -> String {
        for (path, content) in files {
            let path = self.work.join(path);
            std::fs::create_dir_all(path.parent().expect("below the work tree")).expect("mkdir");
            std::fs::write(path, content).expect("write");
        }
        git(&self.work, &["add", "--all"]);
        let subject = format!("Change {}", files.first().map_or("nothing", |(path, _)| path));
        git(&self.work, &["commit", "--quiet", "--allow-empty", "--message", &subject]);
        self.head()
    }

    pub fn head(&self) -> String {
        git(&self.work, &["rev-parse", "HEAD"])
    }

    /// Writes a file's content, or a link's target.
    pub fn blob(&self, content: &[u8]) -> String {
        git_in(&self.work, &["hash-object", "-w", "--stdin"], content)
    }

    /// Writes a tree with these entries (mode, name, object), which no work tree need be able to hold.
    pub fn tree(&self, entries: &[(&str, &str, &str)]) -> String {
        let entry = |(mode, name, id): &(&str, &str, &str)| {
            let id = git2::Oid::from_str(id).expect("an object's name");
            [format!("{mode} {name}\0").as_bytes(), id.as_bytes()].concat()
        };
        self.raw_tree(&entries.iter().flat_map(entry).collect::<Vec<u8>>())
    }

    fn raw_tree(&self, raw: &[u8]) -> String {
        git_in(&self.work, &["hash-object", "-w", "-t", "tree", "--literally", "--stdin"], raw)
    }

    /// Pushes a commit with this one tree entry, which no work tree could hold.
    pub fn push_raw_tree(&self, entry: &[u8]) -> String {
        self.push_tree(&self.raw_tree(entry))
    }

    /// Pushes a commit with this tree.
    pub fn push_tree(&self, tree: &str) -> String {
        let sha = git(&self.work, &["commit-tree", "-m", "raw", tree]);
        git(&self.work, &["push", "--quiet", "--force", "origin", &format!("{sha}:refs/heads/main")]);
        sha
    }

    /// Writes trees inside one another, each with the last one twice: two to the power of `depth` directories.
    pub fn many_trees(&self, last: &str, depth: usize) -> String {
        (0..depth).fold(last.to_owned(), |below, _| self.tree(&[("40000", "a", &below), ("40000", "b", &below)]))
    }

    /// Forgets everything that no branch or tag reaches.
    pub fn prune(&self) {
        git(&self.bare, &["reflog", "expire", "--expire=now", "--all"]);
        git(&self.bare, &["gc", "--quiet", "--prune=now"]);
    }
}

/// Runs git; what it prints.
pub fn git(dir: &Path, args: &[&str]) -> String {
    git_in(dir, args, b"")
}

fn git_in(dir: &Path, args: &[&str], input: &[u8]) -> String {
    let mut child = Command::new("git")
        .args(args)
        .current_dir(dir)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_SYSTEM", "/dev/null")
        .envs([("GIT_AUTHOR_NAME", "t"), ("GIT_AUTHOR_EMAIL", "t@t"), ("GIT_COMMITTER_NAME", "t")])
        .env("GIT_COMMITTER_EMAIL", "t@t")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("git");
    child.stdin.take().expect("piped").write_all(input).expect("write");
    let Output { status, stdout, stderr } = child.wait_with_output().expect("git");
    assert!(status.success(), "git {args:?}: {}", String::from_utf8_lossy(&stderr));
    String::from_utf8_lossy(&stdout).trim().to_owned()
}

/// Reads a pack the way a web bot does: every file of the commit, with its path.
pub fn unpack(dir: &Path, pack: &[u8], sha: &str) -> Vec<(String, Vec<u8>)> {
    let repository = git2::Repository::init_bare(dir).expect("init");
    let odb = repository.odb().expect("odb");
    let mut writer = odb.packwriter().expect("packwriter");
    writer.write_all(pack).expect("write");
    writer.commit().expect("a whole pack");
    let commit = repository.find_commit(git2::Oid::from_str(sha).expect("sha")).expect("the commit");
    let mut files = Vec::new();
    let read = commit.tree().expect("tree").walk(git2::TreeWalkMode::PreOrder, |parent, entry| {
        if entry.kind() == Some(git2::ObjectType::Blob) {
            let blob = repository.find_blob(entry.id()).expect("every blob is in the pack");
            files.push((format!("{parent}{}", entry.name().expect("UTF-8")), blob.content().to_vec()));
        }
        git2::TreeWalkResult::Ok
    });
    read.expect("every tree is in the pack");
    files
}
