//! A Postgres bot, its guard and its server: how they are set up, lost, frozen and stopped.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use rustix::process::Signal;

use super::{Bot, Place};
use crate::{
    free_port,
    ground::Site,
    process::{children_of, lives, signal_pid, workspace_binary},
    scratch::Account,
};

/// A Postgres bot and its server.
#[derive(Debug)]
pub struct PostgresBot {
    /// The bot.
    pub bot: Bot,
    /// Where the server is.
    pub host: String,
    /// The server's port.
    pub port: u16,
    /// The server's files.
    pub data_dir: PathBuf,
}

/// The program that keeps a server. All read the same configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Keeper {
    /// Our own bot.
    Bot,
    /// Patroni, to be measured beside it.
    Patroni {
        /// Its program.
        binary: PathBuf,
        /// The pause between its rounds, in seconds.
        loop_wait_s: u64,
        /// How long it tries an operation again, in seconds.
        retry_timeout_s: u64,
    },
}

impl Keeper {
    fn binary(&self) -> Result<PathBuf> {
        match self {
            Self::Bot => workspace_binary("postgres-bot"),
            Self::Patroni { binary, .. } => Ok(binary.clone()),
        }
    }

    /// What it is told beyond the common configuration: below `bootstrap.dcs`, and below `postgresql`.
    fn settings(&self, folder: &Path) -> (String, String) {
        match self {
            Self::Bot => (String::new(), String::new()),
            Self::Patroni { loop_wait_s, retry_timeout_s, .. } => (
                format!("    loop_wait: {loop_wait_s}\n    retry_timeout: {retry_timeout_s}\n"),
                // Their defaults are a home folder and a folder of the system. Nothing here connects by a socket, and one in
                // the data folder would stop pg_rewind, which copies every file.
                format!(
                    "  pgpass: {}\n  parameters:\n    unix_socket_directories: \"\"\n",
                    folder.join("pgpass").display()
                ),
            ),
        }
    }
}

/// The passwords of a Postgres cluster.
#[derive(Debug, Clone)]
pub struct Passwords {
    /// Of the superuser `postgres`.
    pub superuser: String,
    /// Of `replicator`.
    pub replication: String,
    /// Of `rewinder`.
    pub rewind: String,
}

impl Passwords {
    /// New ones.
    #[must_use]
    pub fn new() -> Self {
        let [superuser, replication, rewind] = std::array::from_fn(|_| bots_core::shell::instance_id());
        Self { superuser, replication, rewind }
    }
}

impl Default for Passwords {
    fn default() -> Self {
        Self::new()
    }
}

impl PostgresBot {
    /// A bot with an empty data folder.
    ///
    /// # Errors
    /// If it cannot be set up.
    pub fn new(place: &Place<'_>, scope: &str, name: &str, passwords: &Passwords) -> Result<Self> {
        Self::kept_by(&Keeper::Bot, place, (scope, name), passwords)
    }

    /// The same server with another keeper.
    ///
    /// # Errors
    /// If it cannot be set up.
    pub fn kept_by(keeper: &Keeper, place: &Place<'_>, who: (&str, &str), passwords: &Passwords) -> Result<Self> {
        let (scope, name) = who;
        let account = Account::for_postgres()?;
        let port = free_port()?;
        let folder = place.scratch.dir(&format!("{scope}-{name}"), account)?;
        let data_dir = folder.join("data");
        let (dcs, own) = keeper.settings(&folder);
        let rest = postgres_yaml(place, &dcs, port, &data_dir, &postgres_bin_dir()?, passwords) + &own;
        let bot = Bot::of(place, who, keeper.binary()?, &rest, account)?;
        Ok(Self { bot, host: place.site.host.clone(), port, data_dir })
    }

    /// The processes of the keeper alone: the bot, and the guard that it may have.
    ///
    /// # Errors
    /// If the bot does not run.
    pub fn keeper_processes(&mut self) -> Result<Vec<u32>> {
        let guard = self.guard();
        Ok([self.bot.process()?.pid()].into_iter().chain(guard).collect())
    }

    /// What the server logs, whatever becomes of its data.
    #[must_use]
    pub fn server_log(&self) -> PathBuf {
        self.data_dir.with_file_name(format!("{}-postgres.log", self.bot.name))
    }

    /// The server's process, if it lives: by the file that it keeps in its data folder.
    #[must_use]
    pub fn postmaster(&self) -> Option<u32> {
        let text = fs::read_to_string(self.data_dir.join("postmaster.pid")).ok()?;
        let pid = text.lines().next()?.trim().parse().ok()?;
        // The file may be left over, and its number another process's by now.
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let ours = String::from_utf8_lossy(&command).contains(&*self.data_dir.to_string_lossy());
        (ours && lives(pid)).then_some(pid)
    }

    /// Kills the server, as a crash does, and leaves the bot alone.
    ///
    /// # Errors
    /// If it does not run.
    pub fn crash_postmaster(&self) -> Result<u32> {
        let pid = self.postmaster().with_context(|| format!("{} has no server", self.bot.name))?;
        signal_pid(pid, Signal::KILL);
        Ok(pid)
    }

    /// Kills bot and server together, with every process of theirs, as the loss of the machine does.
    pub fn kill_node(&mut self) {
        // The bot is frozen first, so that it does not see its server die and act on it.
        let _not_running = self.bot.freeze();
        if let Some(guard) = self.guard() {
            signal_pid(guard, Signal::STOP);
        }
        if let Some(postmaster) = self.postmaster() {
            let backends = children_of(postmaster);
            signal_pid(postmaster, Signal::KILL);
            backends.into_iter().for_each(|pid| signal_pid(pid, Signal::KILL));
        }
        self.bot.kill_group();
        self.end_server();
    }

    /// Freezes bot, guard and server with every process of theirs, as a hypervisor does with the machine; yields them.
    ///
    /// # Errors
    /// If the bot does not run.
    pub fn freeze_node(&mut self) -> Result<Vec<u32>> {
        let mut frozen = self.keeper_processes()?;
        frozen.iter().for_each(|pid| signal_pid(*pid, Signal::STOP));
        // The postmaster first, so that it starts no further process.
        if let Some(postmaster) = self.postmaster() {
            signal_pid(postmaster, Signal::STOP);
            let server: Vec<u32> = children_of(postmaster).into_iter().chain([postmaster]).collect();
            server.iter().for_each(|pid| signal_pid(*pid, Signal::STOP));
            frozen.extend(server);
        }
        Ok(frozen)
    }

    /// The process that guards the server, if it lives: by the file that it keeps beside the data folder.
    #[must_use]
    pub fn guard(&self) -> Option<u32> {
        let lock = self.data_dir.with_extension("run").join("guard.lock");
        let pid = fs::read_to_string(lock).ok()?.trim().parse().ok()?;
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let ours = String::from_utf8_lossy(&command).contains(&*self.data_dir.to_string_lossy());
        (ours && lives(pid)).then_some(pid)
    }

    /// Asks bot and server to stop; says whether both went by themselves.
    pub fn stop(&mut self) -> bool {
        // One whose bot was killed before runs on, as it should.
        let was_running = self.bot.is_running();
        let clean = self.bot.stop();
        let left = was_running && self.postmaster().is_some();
        self.end_server();
        clean && !left
    }

    /// No server outlives its harness, whatever became of its bot.
    fn end_server(&self) {
        for pid in self.postmaster().into_iter().chain(self.guard()) {
            signal_pid(pid, Signal::KILL);
        }
    }
}

impl Drop for PostgresBot {
    fn drop(&mut self) {
        self.stop();
    }
}

fn postgres_yaml(
    place: &Place<'_>,
    own_dcs: &str,
    port: u16,
    data_dir: &Path,
    bin_dir: &Path,
    passwords: &Passwords,
) -> String {
    let Passwords { superuser, replication, rewind } = passwords;
    let Place { ttl_s, dcs, site: Site { host, neighbours, .. }, .. } = place;
    let (data_dir, bin_dir) = (data_dir.display(), bin_dir.display());
    format!(
        "\
bootstrap:
  dcs:
    ttl: {ttl_s}
{dcs}{own_dcs}    maximum_lag_on_failover: 1048576
    postgresql:
      use_pg_rewind: true
      parameters:
        shared_buffers: 16MB
        max_connections: 50
  initdb:
    - encoding: UTF8
    - locale: C.UTF-8
    - data-checksums
postgresql:
  listen: {host}:{port}
  connect_address: {host}:{port}
  data_dir: {data_dir}
  bin_dir: {bin_dir}
  authentication:
    superuser:
      username: postgres
      password: \"{superuser}\"
    replication:
      username: replicator
      password: \"{replication}\"
    rewind:
      username: rewinder
      password: \"{rewind}\"
  pg_hba:
    - local all all scram-sha-256
    - host all all {neighbours} scram-sha-256
    - host replication replicator {neighbours} scram-sha-256
"
    )
}

/// Where the newest installed Postgres has its programs.
///
/// # Errors
/// If there is none.
pub fn postgres_bin_dir() -> Result<PathBuf> {
    let version = |path: &Path| path.parent()?.file_name()?.to_str()?.parse::<u32>().ok();
    let mut found: Vec<PathBuf> =
        fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten().map(|e| e.path().join("bin")).collect();
    found.retain(|bin| bin.join("postgres").is_file());
    found.sort_by_key(|bin| version(bin));
    let on_path = || crate::process::system_binary("postgres", &[]).ok()?.parent().map(Path::to_path_buf);
    found.pop().or_else(on_path).context("Postgres is not installed: run `make setup`")
}
