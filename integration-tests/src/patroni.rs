//! Patroni, installed from PyPI into a folder of its own, to be measured beside our bots.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::{
    process::{Finished, Program},
    scratch::{Account, Scratch},
};

/// The version that is measured, so that figures of different days can be compared.
pub const VERSION: &str = "4.1.5";

/// A download from PyPI may be slow; without a network it fails at once.
const INSTALL_DEADLINE: Duration = Duration::from_secs(180);

/// Python takes a second to load Patroni on a busy machine.
const CHECK_DEADLINE: Duration = Duration::from_secs(20);

/// Loads all that a member needs, and prints which Patroni that is.
const CHECK: &str = "import psycopg2, patroni.dcs.etcd3, patroni.version; print(patroni.version.__version__)";

/// Its programs.
#[derive(Debug, Clone)]
pub struct Patroni {
    folder: PathBuf,
}

impl Patroni {
    /// Finds or installs it. It is kept below the build's target folder; where Postgres's account may not enter that, it
    /// lives in the scratch folder.
    ///
    /// # Errors
    /// If it can be installed in neither, with the last reason.
    pub async fn install(scratch: &Scratch, logs: &Path) -> Result<Self> {
        let own = std::env::current_exe().context("find the running program")?;
        let target = own.ancestors().nth(2).context("find the target folder")?;
        let name = format!("patroni-{VERSION}");
        let kept = Self { folder: target.join(&name) };
        if kept.check(logs).await.is_ok() {
            return Ok(kept);
        }
        let mut why = anyhow::anyhow!("there is no python3: install python3 and python3-venv");
        for folder in [kept.folder, scratch.path().join(&name)] {
            for python in pythons() {
                let patroni = Self { folder: folder.clone() };
                match patroni.install_with(&python, logs).await {
                    Ok(()) => return Ok(patroni),
                    Err(error) => why = error.context(format!("with {}", python.display())),
                }
            }
        }
        Err(why)
    }

    /// The keeper of a server.
    #[must_use]
    pub fn binary(&self) -> PathBuf {
        self.folder.join("bin/patroni")
    }

    /// The operator's hand.
    #[must_use]
    pub fn patronictl(&self) -> PathBuf {
        self.folder.join("bin/patronictl")
    }

    async fn install_with(&self, python: &Path, logs: &Path) -> Result<()> {
        let folder = self.folder.to_string_lossy().into_owned();
        let venv = Program::new("venv", python).args(["-m", "venv", "--clear", &folder]);
        succeed(venv, INSTALL_DEADLINE, logs).await.context("make a virtual environment (package python3-venv)")?;
        let wanted = format!("patroni[etcd3]=={VERSION}");
        let pip = Program::new("pip", self.folder.join("bin/pip"));
        let pip = pip.args(["install", "--quiet", "--retries", "1", &wanted, "psycopg2-binary"]);
        succeed(pip, INSTALL_DEADLINE, logs).await.context("install Patroni from PyPI")?;
        self.check(logs).await
    }

    /// Whether the account that Postgres runs under can run it.
    async fn check(&self, logs: &Path) -> Result<()> {
        let python = Program::new("patroni-check", self.folder.join("bin/python3")).args(["-c", CHECK]);
        let said = succeed(python.account(Account::for_postgres()?), CHECK_DEADLINE, logs).await;
        let said = said.context("load Patroni under Postgres's account")?;
        if said.stdout.trim() != VERSION {
            bail!("Patroni {} is installed where {VERSION} should be", said.stdout.trim());
        }
        Ok(())
    }
}

/// The interpreters to try. The system's comes first: one in a home folder is closed to Postgres's account.
fn pythons() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(PathBuf::from("/usr/bin")).chain(std::env::split_paths(&path));
    let mut found: Vec<PathBuf> = folders.map(|f| f.join("python3")).filter(|p| p.is_file()).collect();
    found.dedup();
    found
}

async fn succeed(program: Program, deadline: Duration, logs: &Path) -> Result<Finished> {
    let done = program.run(logs, deadline).await?;
    if done.code != Some(0) {
        bail!("{} {:?} ends with {:?}: {}", program.path.display(), program.args, done.code, done.stderr.trim());
    }
    Ok(done)
}
