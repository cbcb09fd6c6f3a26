//! A git repository as people use it: a bare origin, a work tree beside it, commits pushed by the `git` program.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::{
    process::{Program, system_binary, workspace_binary},
    scratch::Scratch,
};

/// How long one git command may take.
const GIT_DEADLINE: Duration = Duration::from_secs(20);

/// A bare repository with the branch `main`, and a clone of it.
#[derive(Debug)]
pub struct Origin {
    git: PathBuf,
    bare: PathBuf,
    work: PathBuf,
    logs: PathBuf,
}

impl Origin {
    /// Makes the repository `<name>.git` with one commit of the files below `seed`.
    ///
    /// # Errors
    /// If git is not installed or fails.
    pub async fn new(scratch: &Scratch, logs: &Path, name: &str, seed: &Path) -> Result<Self> {
        let git = system_binary("git", &[])?;
        let bare = scratch.dir(&format!("{name}.git"), None)?;
        let work = scratch.dir(name, None)?;
        let origin = Self { git, bare, work, logs: logs.to_owned() };
        origin.git(&["init", "--quiet", "--bare", "--initial-branch=main", &origin.bare.to_string_lossy()]).await?;
        origin.in_work(&["init", "--quiet", "--initial-branch=main", "."]).await?;
        origin.in_work(&["remote", "add", "origin", &origin.bare.to_string_lossy()]).await?;
        copy(seed, &origin.work)?;
        // A person's commits need an author too, and a bare `git push` knows where to go.
        origin.in_work(&["config", "user.name", "Demo"]).await?;
        origin.in_work(&["config", "user.email", "demo@example.org"]).await?;
        origin.in_work(&["config", "push.default", "current"]).await?;
        origin.push("A first page").await?;
        Ok(origin)
    }

    /// The address that the content bot fetches from.
    #[must_use]
    pub fn url(&self) -> String {
        format!("file://{}", self.bare.display())
    }

    /// The bare repository.
    #[must_use]
    pub fn bare(&self) -> &Path {
        &self.bare
    }

    /// The work tree.
    #[must_use]
    pub fn work(&self) -> &Path {
        &self.work
    }

    /// Lets every push tell `host:port` by `POST /push`, signed with the secret in a file, as a forge's webhook does.
    ///
    /// # Errors
    /// If the hook cannot be written.
    pub fn notify(&self, address: &str, secret_file: &Path) -> Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let (announce, secret_file) = (workspace_binary("announce")?, secret_file.display());
        let hook = format!(
            "#!/bin/sh\n# Tells the content bot at once; if it is away, it finds the commit at its next poll.\n\
             exec '{}' '{address}' '{secret_file}'\n",
            announce.display()
        );
        let path = self.bare.join("hooks/post-receive");
        fs::write(&path, hook).context("write the hook")?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).context("make the hook executable")
    }

    /// Writes a file of the work tree.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        let path = self.work.join(path);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).context("make a folder of the site")?;
        }
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    }

    /// Commits the work tree and pushes it; yields the commit.
    ///
    /// # Errors
    /// If git fails.
    pub async fn push(&self, message: &str) -> Result<String> {
        let sha = self.commit(message).await?;
        self.push_branch().await?;
        Ok(sha)
    }

    /// Commits the work tree, and pushes nothing yet; yields the commit.
    ///
    /// # Errors
    /// If git fails.
    pub async fn commit(&self, message: &str) -> Result<String> {
        self.in_work(&["add", "--all"]).await?;
        self.in_work(&["commit", "--quiet", "--allow-empty", "-m", message]).await?;
        Ok(self.in_work(&["rev-parse", "HEAD"]).await?.trim().to_owned())
    }

    /// `git push`.
    ///
    /// # Errors
    /// If git fails.
    pub async fn push_branch(&self) -> Result<()> {
        self.in_work(&["push", "--quiet", "--force", "origin", "main"]).await.map(|_said| ())
    }

    /// Takes away what [`Self::notify`] has put there: pushes are found by the poll alone.
    ///
    /// # Errors
    /// If the hook cannot be removed.
    pub fn keep_quiet(&self) -> Result<()> {
        fs::remove_file(self.bare.join("hooks/post-receive")).context("remove the hook")
    }

    /// Steps the branch back over its last commit, here and in the origin, and forgets the commit for good.
    ///
    /// # Errors
    /// If git fails.
    pub async fn drop_last_commit(&self) -> Result<()> {
        self.in_work(&["reset", "--quiet", "--hard", "HEAD~1"]).await?;
        self.in_work(&["push", "--quiet", "--force", "origin", "main"]).await?;
        let bare = self.bare.to_string_lossy();
        self.git(&["-C", &bare, "reflog", "expire", "--expire=now", "--all"]).await?;
        self.git(&["-C", &bare, "gc", "--quiet", "--prune=now"]).await?;
        Ok(())
    }

    async fn in_work(&self, args: &[&str]) -> Result<String> {
        let work = self.work.to_string_lossy();
        self.git(&[&["-C", &*work], args].concat()).await
    }

    async fn git(&self, args: &[&str]) -> Result<String> {
        // Whatever the machine's own configuration says, nothing is signed or rewritten.
        let program = Program::new("git", &self.git)
            .args(args.iter().copied())
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_CONFIG_NOSYSTEM", "1");
        let done = program.run(&self.logs, GIT_DEADLINE).await?;
        ensure!(done.code == Some(0), "git {}: {}{}", args.join(" "), done.stdout, done.stderr);
        Ok(done.stdout)
    }
}

/// Copies a folder.
fn copy(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).with_context(|| format!("read {}", from.display()))? {
        let entry = entry.context("read a folder")?;
        let target = to.join(entry.file_name());
        if entry.file_type().context("look at a file")?.is_dir() {
            fs::create_dir_all(&target).context("make a folder")?;
            copy(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target).with_context(|| format!("copy to {}", target.display()))?;
        }
    }
    Ok(())
}
