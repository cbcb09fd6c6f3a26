//! The configuration: read into types, checked, and made into the machine's settings and the shell's limits.

mod export;
mod purge;
mod push;
mod together;

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use bots_core::{
    dcs::Scope,
    machine::Span,
    shell::{Common, Secret, config::one_secret},
};
use serde::Deserialize;

pub use self::{
    export::Export,
    purge::{Purge, PurgeRequest},
    push::Push,
    together::check_together,
};
use super::{
    gates::{Check, Gates, Signers},
    hands::Callees,
    known_hosts::KnownHosts,
    origin::{Credentials, Limits, Reach},
    source::{Source, Transport},
    submodules::Submodules,
    verify::LfsPointers,
};
use crate::machine::{CanarySettings, PurgeSettings, Reference, Settings};

/// etcd's floor: its elections take about a second, and a lease must outlive one.
const TTL_S_MIN: u64 = 2;
/// A fleet that learns of a death after more than this is not looked after.
const TTL_S_MAX: u64 = 300;
/// One look a second is the most that a git host should be asked for; a push is the way to be faster.
const POLL_INTERVAL_S_MIN: u64 = 1;
/// A day: a longer audit is none.
const POLL_INTERVAL_S_MAX: u64 = 86_400;
/// A look that fails is no news, nor is one that hangs, with the pause before it.
const STALE_LOOKS_MIN: u64 = 3;
/// A week: whoever waits longer does not want to know.
const STALE_AFTER_S_MAX: u64 = 7 * 86_400;
/// A web bot that takes longer than this to prepare is broken.
const PREPARE_TIMEOUT_S_MAX: u64 = 600;

/// A minute for a check: that of a large site's links takes seconds.
const COMMAND_TIMEOUT_S: u64 = 60;

/// The whole document.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    /// What every bot has.
    #[serde(flatten)]
    pub common: Common,
    /// The repository.
    pub git: Git,
    /// How pushes are announced.
    #[serde(default)]
    pub push: Push,
    /// What a commit must pass beside the rules for content.
    #[serde(default)]
    pub verify: Verify,
    /// Whether and how a commit is tried on one web bot before all serve it.
    pub canary: Option<Canary>,
    /// Whether and how caches in front are purged.
    pub purge: Option<Purge>,
    /// Whether and how the live commit is put on disk as files.
    pub export: Option<Export>,
    /// Where the mirror and the packs are kept; one bot, one directory.
    pub data_dir: PathBuf,
    /// The web scopes that serve the site.
    #[serde(default = "web_scopes")]
    pub web_scopes: Vec<String>,
    /// How long web bots may take to prepare a commit.
    #[serde(default = "prepare_timeout_s")]
    pub prepare_timeout_s: u64,
    /// The length of the lease.
    #[serde(default = "ttl_s")]
    pub ttl_s: u64,
}

/// The repository.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Git {
    /// Its address; may hold a password.
    pub url: Secret,
    /// A branch, a tag or a full commit.
    #[serde(rename = "ref", default = "reference")]
    pub reference: String,
    /// How often to look, give or take a tenth.
    #[serde(default = "poll_interval_s")]
    pub poll_interval_s: u64,
    /// After so long without an answer of the origin, the bot that leads is not ready; never if it is not given.
    pub stale_after_s: Option<u64>,
    /// How long a look may take.
    #[serde(default = "poll_timeout_s")]
    pub poll_timeout_s: u64,
    /// How long a fetch may take.
    #[serde(default = "fetch_timeout_s")]
    pub fetch_timeout_s: u64,
    /// The user; for a token any word will do.
    pub username: Option<String>,
    /// The password or token.
    pub password: Option<Secret>,
    /// The file that holds it, read afresh for every connection.
    pub password_file: Option<PathBuf>,
    /// The private key for ssh.
    pub ssh_key_file: Option<PathBuf>,
    /// The key's passphrase.
    pub ssh_key_passphrase: Option<Secret>,
    /// The hosts' keys; `~/.ssh/known_hosts` if there is none.
    pub known_hosts_file: Option<PathBuf>,
    /// The proxy, for https; may hold a password.
    pub proxy: Option<Secret>,
    /// How many commits of a branch are fetched; all if it is 0.
    #[serde(default)]
    pub depth: u32,
    /// Which submodules belong to the site.
    #[serde(default)]
    pub submodules: Submodules,
    /// Whether a commit may have pointers of Git LFS for files.
    #[serde(default)]
    pub lfs_pointers: LfsPointers,
    /// The largest transfer, and the largest tree.
    #[serde(default = "size_max_bytes")]
    pub size_max_bytes: u64,
    /// The most files in a tree.
    #[serde(default = "files_max")]
    pub files_max: u64,
}

/// What a commit must pass beside the rules for content.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Verify {
    /// OpenSSH's file of allowed signers. With it, a commit must be signed.
    pub ssh_allowed_signers_file: Option<PathBuf>,
    /// Public keys of GPG, exported with `gpg --export`. With it, a commit must be signed.
    pub gpg_keys_file: Option<PathBuf>,
    /// A program that is run in the files of the commit, and its arguments; it says yes by ending with 0.
    pub command: Vec<String>,
    /// How long it may take.
    pub command_timeout_s: u64,
}

impl Default for Verify {
    fn default() -> Self {
        Self {
            ssh_allowed_signers_file: None,
            gpg_keys_file: None,
            command: Vec::new(),
            command_timeout_s: COMMAND_TIMEOUT_S,
        }
    }
}

impl Verify {
    /// The gates.
    #[must_use]
    pub fn gates(&self) -> Gates {
        let (ssh, gpg) = (self.ssh_allowed_signers_file.clone(), self.gpg_keys_file.clone());
        let deadline = Duration::from_secs(self.command_timeout_s);
        let check = Check { command: self.command.clone(), deadline };
        Gates {
            signers: (ssh.is_some() || gpg.is_some()).then_some(Signers { ssh, gpg }),
            check: (!self.command.is_empty()).then_some(check),
        }
    }

    fn check(&self) -> Result<(), String> {
        let files = [
            ("verify.ssh_allowed_signers_file", &self.ssh_allowed_signers_file, "ssh-keygen", "openssh-client"),
            ("verify.gpg_keys_file", &self.gpg_keys_file, "gpg", "gpg"),
        ];
        for (field, path, tool, package) in files {
            let Some(path) = path else { continue };
            std::fs::File::open(path).map_err(|e| format!("{field}: cannot read {}: {e}", path.display()))?;
            if !is_program(tool) {
                return Err(format!("{field}: {tool} is not installed: `apt-get install {package}`"));
            }
        }
        self.command.first().map_or(Ok(()), |program| check_program("verify.command", program))
    }
}

/// Checks a program that is run in the files of a commit. A path that begins there would be looked up among them, and whoever
/// pushes would decide what is run.
fn check_program(field: &str, name: &str) -> Result<(), String> {
    if name.contains('/') && !name.starts_with('/') {
        return Err(format!("{field}: {name} would be looked for in the commit itself: give the whole path"));
    }
    if is_program(name) {
        Ok(())
    } else {
        Err(format!("{field}: {name} is not there or not executable: give the path of a program"))
    }
}

/// Whether `name` can be run: a path, or a name that is looked up on PATH.
fn is_program(name: &str) -> bool {
    use std::os::unix::fs::PermissionsExt;
    let runs =
        |path: &std::path::Path| path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    if name.contains('/') {
        return runs(std::path::Path::new(name));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| runs(&dir.join(name)))
}

/// How a commit is tried on one web bot before all serve it.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Canary {
    /// How long its pages are read.
    pub observe_s: u64,
    /// How long it may take until it serves the commit and has been read.
    pub timeout_s: u64,
    /// The pages.
    pub paths: Vec<String>,
    /// How many of a hundred may fail.
    pub failures_percent_max: u64,
}

impl Default for Canary {
    fn default() -> Self {
        Self { observe_s: 5, timeout_s: 60, paths: vec![String::from("/")], failures_percent_max: 0 }
    }
}

impl Config {
    /// Checks what the types cannot.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn check(&self) -> Result<(), String> {
        self.source()?;
        self.credentials()?;
        self.push.check(self.common.restapi.listen)?;
        self.web()?;
        self.verify.check()?;
        check_reference(&self.git.reference)?;
        within("ttl_s", self.ttl_s, TTL_S_MIN, TTL_S_MAX)?;
        within("git.poll_interval_s", self.git.poll_interval_s, POLL_INTERVAL_S_MIN, POLL_INTERVAL_S_MAX)?;
        within("git.poll_timeout_s", self.git.poll_timeout_s, 1, 600)?;
        if let Some(stale_after_s) = self.git.stale_after_s {
            let least = STALE_LOOKS_MIN * (self.git.poll_interval_s + self.git.poll_timeout_s);
            within("git.stale_after_s", stale_after_s, least, STALE_AFTER_S_MAX)?;
        }
        within("git.fetch_timeout_s", self.git.fetch_timeout_s, 1, 86_400)?;
        within("prepare_timeout_s", self.prepare_timeout_s, 1, PREPARE_TIMEOUT_S_MAX)?;
        within("verify.command_timeout_s", self.verify.command_timeout_s, 1, self.git.fetch_timeout_s)?;
        within("git.size_max_bytes", self.git.size_max_bytes, 1, u64::MAX)?;
        within("git.files_max", self.git.files_max, 1, u64::MAX)?;
        self.check_canary_and_purge()?;
        self.check_reach()?;
        self.export.as_ref().map_or(Ok(()), Export::check)?;
        Ok(())
    }

    /// The repository's address.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn source(&self) -> Result<Source, String> {
        Source::parse(self.git.url.expose()).map_err(|e| format!("git.url: {e}"))
    }

    /// How the origin is reached.
    #[must_use]
    pub fn reach(&self) -> Reach {
        Reach { proxy: self.git.proxy.clone(), depth: self.git.depth }
    }

    /// What the origin is shown.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn credentials(&self) -> Result<Credentials, String> {
        let git = &self.git;
        if git.password.is_some() || git.password_file.is_some() {
            one_secret("git.password", git.password.as_ref(), git.password_file.as_ref())?;
        }
        if let Some(path) = &git.ssh_key_file {
            std::fs::File::open(path).map_err(|e| format!("git.ssh_key_file: cannot read {}: {e}", path.display()))?;
        } else if self.source()?.transport() == Transport::Ssh {
            return Err(String::from("git.ssh_key_file is missing, and git.url uses ssh: name the private key's file"));
        }
        if let Some(path) = &git.known_hosts_file {
            KnownHosts::read(path).map_err(|e| format!("git.known_hosts_file: {e}"))?;
        }
        Ok(Credentials {
            username: git.username.clone(),
            password: git.password.clone(),
            password_file: git.password_file.clone(),
            ssh_key_file: git.ssh_key_file.clone(),
            ssh_key_passphrase: git.ssh_key_passphrase.clone(),
            known_hosts_file: git.known_hosts_file.clone(),
        })
    }

    /// The limits of all work with git.
    #[must_use]
    pub const fn limits(&self) -> Limits {
        Limits {
            size_max: self.git.size_max_bytes,
            files_max: self.git.files_max,
            look: Duration::from_secs(self.git.poll_timeout_s),
            fetch: Duration::from_secs(self.git.fetch_timeout_s),
        }
    }

    /// The machine's settings. `api_path` stands before the paths of the bot's API.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn settings(&self, instance: &str, api_path: &str) -> Result<Settings, String> {
        let api = format!("{}{api_path}", self.common.api_url());
        Ok(Settings {
            scope: self.common.scope(),
            web_scopes: self.web()?,
            name: self.common.name.clone(),
            instance: instance.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            api_url: format!("{api}/status"),
            pack_url: api,
            origin: self.source()?.shown().to_owned(),
            reference: Reference::parse(&self.git.reference),
            ttl: Span::from_secs(self.ttl_s),
            poll_interval: Span::from_secs(self.git.poll_interval_s),
            stale_after: self.git.stale_after_s.map(Span::from_secs),
            prepare_timeout: Span::from_secs(self.prepare_timeout_s),
            pushes_expected: self.push.is_signed(),
            canary: self.canary.as_ref().map(|canary| CanarySettings {
                observe: Span::from_secs(canary.observe_s),
                timeout: Span::from_secs(canary.timeout_s),
                failures_percent_max: canary.failures_percent_max,
            }),
            export: self.export.as_ref().map(Export::settings),
            purge: self.purge.as_ref().map(|p| PurgeSettings { again_after: Span::from_secs(p.again_after_s) }),
        })
    }

    /// Whom the bot calls.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    pub fn callees(&self) -> Result<Callees, String> {
        let mut callees = Callees { scratch: self.data_dir.clone(), ..Callees::default() };
        callees.canary_paths = self.canary.as_ref().map(|canary| canary.paths.clone()).unwrap_or_default();
        if let Some(purge) = &self.purge {
            callees.purging = purge.purging()?;
        }
        Ok(callees)
    }

    fn check_reach(&self) -> Result<(), String> {
        let source = self.source()?;
        let transport = source.transport();
        // libgit2 asks a proxy to connect to TLS servers, and goes past it to all others.
        if self.git.proxy.is_some() && !source.url().starts_with("https://") {
            return Err(String::from("git.proxy: only https goes through a proxy: give git.url so, or remove it"));
        }
        if self.git.depth > 0 && transport == Transport::Local {
            return Err(String::from("git.depth: a repository on this machine is fetched whole: remove it"));
        }
        Ok(())
    }

    fn check_canary_and_purge(&self) -> Result<(), String> {
        if let Some(canary) = &self.canary {
            within("canary.observe_s", canary.observe_s, 1, 3_600)?;
            within("canary.timeout_s", canary.timeout_s, canary.observe_s + 1, 7_200)?;
            within("canary.failures_percent_max", canary.failures_percent_max, 0, 100)?;
            if canary.paths.is_empty() {
                return Err(String::from("canary.paths is empty: name a page to read, for example /"));
            }
        }
        if let Some(purge) = &self.purge {
            within("purge.again_after_s", purge.again_after_s, 1, 3_600)?;
            if purge.requests.is_empty() {
                return Err(String::from("purge.requests is empty: give a request, or remove purge"));
            }
        }
        self.callees().map(|_callees| ())
    }

    fn web(&self) -> Result<BTreeSet<Scope>, String> {
        let read = |name: &String| {
            if *name == self.common.scope {
                return Err(format!("web_scopes: {name} is the content scope itself: name the web bots' scope"));
            }
            self.common.other_scope(name).map_err(|e| format!("web_scopes: {e}"))
        };
        self.web_scopes.iter().map(read).collect()
    }
}

fn within(field: &str, value: u64, min: u64, max: u64) -> Result<(), String> {
    let fits = (min..=max).contains(&value);
    if fits { Ok(()) } else { Err(format!("{field} is {value}: use a number from {min} to {max}")) }
}

/// What git would take for the name of a branch or tag.
fn check_reference(reference: &str) -> Result<(), String> {
    if let Some(range) = Reference::parse(reference).range() {
        let read = semver::VersionReq::parse(range);
        return read.map(|_range| ()).map_err(|e| {
            format!(
                "git.ref: `{range}` is no range of versions: {e}: write it as in `semver:^1.2` or `semver:>=1.0, <2.0`"
            )
        });
    }
    let full = if reference.starts_with("refs/") { reference.to_owned() } else { format!("refs/heads/{reference}") };
    if git2::Reference::is_valid_name(&full) {
        Ok(())
    } else {
        Err(format!("git.ref: `{reference}` is not a name that git allows: use a branch, a tag or a full commit"))
    }
}

fn reference() -> String {
    String::from("main")
}

fn web_scopes() -> Vec<String> {
    vec![String::from("web")]
}

const fn poll_interval_s() -> u64 {
    10
}

const fn poll_timeout_s() -> u64 {
    20
}

const fn fetch_timeout_s() -> u64 {
    300
}

const fn prepare_timeout_s() -> u64 {
    10
}

const fn ttl_s() -> u64 {
    5
}

/// Half a gibibyte: web bots hold a site in memory.
const fn size_max_bytes() -> u64 {
    512 * 1024 * 1024
}

const fn files_max() -> u64 {
    100_000
}

#[cfg(test)]
mod tests;
