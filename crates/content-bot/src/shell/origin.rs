//! The origin: where its reference points, and fetching from it. libgit2 alone; every operation blocks and is limited.

use std::{cell::Cell, collections::BTreeMap, path::PathBuf, sync::Once, time::Duration};

use bots_core::shell::{Secret, config::one_secret};
use git2::{
    AutotagOption, CertificateCheckStatus, Cred, CredentialType, Direction, ErrorCode, FetchOptions, Oid, ProxyOptions,
    Remote, RemoteCallbacks, Repository,
};
use semver::{Version, VersionReq};

use super::{
    fault::{Fault, is_refusal, is_remote},
    guard::{Guard, Stop},
    known_hosts::KnownHosts,
    source::{Source, Transport},
};
use crate::machine::{PollResult, Reference};

/// How long a connection may take to come about, and how long the origin may say nothing in the middle of one.
const SILENCE_MAX_MS: i32 = 10_000;

/// Credentials are shown this often on one connection: libgit2 asks again as long as they are refused.
const CREDENTIAL_TRIES_MAX: u32 = 2;

/// Where a fetch leaves what it brought; overwritten by the next one. What is to stay gets a reference of its own.
const LANDING: &str = "refs/bots-origin";

/// What the origin is shown; nothing by default.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    /// The user.
    pub username: Option<String>,
    /// The password.
    pub password: Option<Secret>,
    /// The file that holds the password.
    pub password_file: Option<PathBuf>,
    /// The private key.
    pub ssh_key_file: Option<PathBuf>,
    /// The key's passphrase.
    pub ssh_key_passphrase: Option<Secret>,
    /// The file with the hosts' keys, read afresh for every connection.
    pub known_hosts_file: Option<PathBuf>,
}

/// How the origin is reached.
#[derive(Debug, Clone, Default)]
pub struct Reach {
    /// The proxy, for https: libgit2 goes past it to all other servers.
    pub proxy: Option<Secret>,
    /// How many commits of a branch are fetched; all if it is 0.
    pub depth: u32,
}

/// The limits of all work with git.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of a transfer, and of a tree.
    pub size_max: u64,
    /// Files of a tree.
    pub files_max: u64,
    /// The time of a look.
    pub look: Duration,
    /// The time of a fetch.
    pub fetch: Duration,
}

/// The origin.
#[derive(Debug)]
pub struct Origin {
    source: Source,
    reference: Reference,
    credentials: Credentials,
    reach: Reach,
}

/// How the reference leads to a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Way {
    /// Through an annotated tag, which is in the mirror.
    Tag {
        /// Its full name at the origin.
        name: String,
        /// The object.
        tag: Oid,
    },
    /// Through no object of its own.
    Straight,
    /// Not any more: the reference is a tag that names another commit now, or none.
    Elsewhere,
}

impl Origin {
    /// An origin; nothing is connected yet.
    #[must_use]
    pub fn new(source: Source, reference: Reference, credentials: Credentials) -> Self {
        limit_silence();
        Self { source, reference, credentials, reach: Reach::default() }
    }

    /// The same origin, reached in another way.
    #[must_use]
    pub fn reached(self, reach: Reach) -> Self {
        Self { reach, ..self }
    }

    /// Where it is.
    #[must_use]
    pub const fn source(&self) -> &Source {
        &self.source
    }

    /// The origin of a submodule, at one commit. It is shown credentials if it is at the same host, by the same protocol.
    #[must_use]
    pub(super) fn submodule(&self, source: Source, commit: Oid) -> Self {
        let credentials = match source.place() == self.source.place() {
            true => self.credentials.clone(),
            false => {
                Credentials { known_hosts_file: self.credentials.known_hosts_file.clone(), ..Credentials::default() }
            }
        };
        let (reference, reach) = (Reference::Pinned(commit.to_string()), self.reach.clone());
        let depth = if source.transport() == Transport::Local { 0 } else { reach.depth };
        Self { source, reference, credentials, reach: Reach { depth, ..reach } }
    }

    /// What the reference points at.
    #[must_use]
    pub fn look(&self, stop: Stop, patience: Duration) -> PollResult {
        let guard = Guard::new(stop, patience, u64::MAX);
        let looked = || {
            let mut remote = Remote::create_detached(self.source.url())?;
            let connection = remote.connect_auth(Direction::Fetch, Some(self.callbacks(&guard)), Some(self.proxy()))?;
            let heads = connection.list()?.iter().map(|h| (h.name().to_owned(), h.oid())).collect::<Vec<_>>();
            Ok::<_, git2::Error>(self.resolve(&heads))
        };
        match looked() {
            Ok(Some((_, oid))) => PollResult::Found { sha: oid.to_string() },
            Ok(None) => PollResult::Missing,
            Err(error) => PollResult::Failed { why: self.unreachable(&error, &guard) },
        }
    }

    /// Brings the commit into `repository`, with its history.
    ///
    /// # Errors
    /// Why the commit is not there.
    pub fn fetch(&self, repository: &Repository, commit: Oid, guard: &Guard) -> Result<(), Fault> {
        let here = || repository.odb().map(|odb| odb.exists(commit)).map_err(|e| Fault::local(&e));
        if here()? {
            return Ok(());
        }
        let mut remote = repository.remote_anonymous(self.source.url()).map_err(|e| Fault::local(&e))?;
        let name = match &self.reference {
            Reference::Pinned(_) => None,
            Reference::Named(_) | Reference::Range(_) => {
                let heads = self.heads(&mut remote, guard)?;
                self.resolve(&heads).map(|(name, _)| name)
            }
        };
        if let Some(name) = name {
            self.transfer(&mut remote, &[format!("+{name}:{LANDING}/tip")], guard)?;
            if here()? {
                return Ok(());
            }
        }
        // The reference has moved on by force: the commit itself may still be given out.
        match self.transfer(&mut remote, &[format!("+{commit}:{LANDING}/commit")], guard) {
            Ok(()) | Err(Fault::Vanished | Fault::Damaged(_)) => {}
            Err(fault) => return Err(fault),
        }
        if !here()? && matches!(self.reference, Reference::Pinned(_)) {
            let all = [format!("+refs/heads/*:{LANDING}/heads/*"), format!("+refs/tags/*:{LANDING}/tags/*")];
            self.transfer(&mut remote, &all, guard)?;
        }
        if here()? { Ok(()) } else { Err(Fault::Vanished) }
    }

    /// How the reference leads to `commit`, which is in `repository`; a tag on the way is brought there, too.
    ///
    /// # Errors
    /// If the origin does not say, or does not give the tag out.
    pub(super) fn way(&self, repository: &Repository, commit: Oid, guard: &Guard) -> Result<Way, Fault> {
        if matches!(self.reference, Reference::Pinned(_)) {
            return Ok(Way::Straight);
        }
        let mut remote = repository.remote_anonymous(self.source.url()).map_err(|e| Fault::local(&e))?;
        let mut heads = self.heads(&mut remote, guard)?;
        if self.reference.range().is_some() {
            // Of the versions that fit, one that is live may not be the greatest any more.
            heads = only_to(commit, heads);
        }
        let found = self.resolve(&heads).filter(|(name, to)| *to == commit || !name.starts_with("refs/tags/"));
        let Some((name, _)) = found else { return Ok(Way::Elsewhere) };
        let object = heads.iter().find(|(head, _)| *head == name).map(|(_, oid)| *oid);
        let Some(tag) = object.filter(|tag| *tag != commit && name.starts_with("refs/tags/")) else {
            return Ok(Way::Straight);
        };
        let here = || repository.odb().map(|odb| odb.exists(tag)).map_err(|e| Fault::local(&e));
        if !here()? {
            self.transfer(&mut remote, &[format!("+{name}:{LANDING}/tag")], guard)?;
        }
        if here()? { Ok(Way::Tag { name, tag }) } else { Ok(Way::Elsewhere) }
    }

    /// All that the origin shows, and what it points at.
    fn heads(&self, remote: &mut Remote<'_>, guard: &Guard) -> Result<Vec<(String, Oid)>, Fault> {
        let connected = remote.connect_auth(Direction::Fetch, Some(self.callbacks(guard)), Some(self.proxy()));
        let listed = connected.and_then(|connection| {
            Ok(connection.list()?.iter().map(|h| (h.name().to_owned(), h.oid())).collect::<Vec<_>>())
        });
        listed.map_err(|e| self.fault(&e, guard))
    }

    fn transfer(&self, remote: &mut Remote<'_>, refspecs: &[String], guard: &Guard) -> Result<(), Fault> {
        let mut options = FetchOptions::new();
        options.remote_callbacks(self.callbacks(guard)).download_tags(AutotagOption::None).update_fetchhead(false);
        options.proxy_options(self.proxy());
        if let Ok(depth) = i32::try_from(self.reach.depth)
            && depth > 0
        {
            options.depth(depth);
        }
        let fetched = remote.fetch(refspecs, Some(&mut options), None);
        let _disconnected = remote.disconnect();
        fetched.map_err(|e| self.fault(&e, guard))
    }

    /// The full name that the configured reference has at the origin, and the commit behind it.
    fn resolve(&self, heads: &[(String, Oid)]) -> Option<(String, Oid)> {
        let name = self.reference.as_str();
        if let Some(range) = self.reference.range() {
            return greatest(range, heads);
        }
        let candidates = if name == "HEAD" || name.starts_with("refs/") {
            vec![name.to_owned()]
        } else {
            vec![format!("refs/heads/{name}"), format!("refs/tags/{name}")]
        };
        let find = |wanted: &str| heads.iter().find(|(found, _)| found == wanted).map(|(_, oid)| *oid);
        // An annotated tag is an object of its own; its commit stands under the peeled name.
        candidates.into_iter().find_map(|full| Some((full.clone(), find(&format!("{full}^{{}}")).or(find(&full))?)))
    }

    fn callbacks<'g>(&'g self, guard: &'g Guard) -> RemoteCallbacks<'g> {
        let mut callbacks = RemoteCallbacks::new();
        let tries = Cell::new(0);
        callbacks.credentials(move |_url, user, allowed| {
            tries.set(tries.get() + 1);
            if tries.get() > CREDENTIAL_TRIES_MAX { Err(refused()) } else { self.credential(user, allowed) }
        });
        callbacks.transfer_progress(|progress| guard.allows_bytes(progress.received_bytes()));
        callbacks.sideband_progress(|_text| guard.allows());
        if let Some(path) = &self.credentials.known_hosts_file {
            callbacks.certificate_check(move |certificate, host| {
                let Some(shown) = certificate.as_hostkey() else {
                    return Ok(CertificateCheckStatus::CertificatePassthrough);
                };
                let known = KnownHosts::read(path);
                let knows = |key| known.as_ref().is_ok_and(|known| known.knows(host, self.source.port(), key));
                if shown.hostkey().is_some_and(knows) {
                    return Ok(CertificateCheckStatus::CertificateOk);
                }
                // libgit2 puts its own words in the place of these.
                Err(git2::Error::new(ErrorCode::Certificate, git2::ErrorClass::Ssh, "unknown host"))
            });
        }
        callbacks
    }

    fn proxy(&self) -> ProxyOptions<'_> {
        let mut options = ProxyOptions::new();
        if let Some(proxy) = &self.reach.proxy {
            options.url(proxy.expose());
        }
        options
    }

    fn credential(&self, user: Option<&str>, allowed: CredentialType) -> Result<Cred, git2::Error> {
        let own = &self.credentials;
        let user = own.username.as_deref().or(user).unwrap_or("git");
        if let Some(key) = own.ssh_key_file.as_ref().filter(|_| allowed.contains(CredentialType::SSH_KEY)) {
            let passphrase = own.ssh_key_passphrase.as_ref().map(Secret::expose);
            return Cred::ssh_key(user, None, key, passphrase);
        }
        if allowed.contains(CredentialType::USERNAME) {
            return Cred::username(user);
        }
        let given = own.password.is_some() || own.password_file.is_some();
        if given && allowed.contains(CredentialType::USER_PASS_PLAINTEXT) {
            // Read for every connection: tokens are rotated under our feet.
            let password = one_secret("git.password", own.password.as_ref(), own.password_file.as_ref());
            let password = password.map_err(|e| git2::Error::from_str(&e))?;
            return Cred::userpass_plaintext(user, password.expose());
        }
        let why = "it asks for credentials: set git.username and git.password_file, or git.ssh_key_file";
        Err(git2::Error::new(ErrorCode::Auth, git2::ErrorClass::Callback, why))
    }

    fn fault(&self, error: &git2::Error, guard: &Guard) -> Fault {
        match guard.breach() {
            _ if error.message().contains("not our ref") || error.message().contains("specific object") => {
                Fault::Vanished
            }
            Some(_) => Fault::Failed(self.unreachable(error, guard)),
            None if is_refusal(error) => Fault::Refused(self.unreachable(error, guard)),
            None if is_remote(error) => Fault::Failed(self.unreachable(error, guard)),
            None => Fault::Damaged(self.source.censor(error.message())),
        }
    }

    /// One line that says what the origin's trouble is.
    fn unreachable(&self, error: &git2::Error, guard: &Guard) -> String {
        let shown = self.source.shown();
        match guard.breach() {
            Some(breach) => format!("cannot read {shown}: {}", self.source.censor(&breach.to_string())),
            None if error.class() == git2::ErrorClass::Ssh && error.code() == ErrorCode::Certificate => {
                format!("cannot read {shown}: {}", self.unknown_host())
            }
            None => {
                let fix = match error.code() {
                    ErrorCode::Owner => ": give it to the user of this bot, or add it to git's safe.directory",
                    _ => "",
                };
                format!("cannot read {shown}: {}{fix}", self.source.censor(&self.hide(error.message())))
            }
        }
    }

    /// Why the host is not known, and what makes it so.
    fn unknown_host(&self) -> String {
        let (host, port) = (self.source.host(), self.source.port());
        let scan = format!("add it with `ssh-keyscan -p {port} {host}`");
        match &self.credentials.known_hosts_file {
            Some(path) => match KnownHosts::read(path) {
                Ok(_) => format!("the key of {host} is not in git.known_hosts_file: {scan}"),
                Err(why) => format!("git.known_hosts_file: {why}"),
            },
            None => format!("the key of {host} is not in ~/.ssh/known_hosts: {scan}, or set git.known_hosts_file"),
        }
    }

    fn hide(&self, text: &str) -> String {
        match self.credentials.password.as_ref().map(Secret::expose).filter(|p| !p.is_empty()) {
            Some(password) => text.replace(password, "***"),
            None => text.to_owned(),
        }
    }
}

/// The tag with the greatest version that fits the range, and the commit behind it.
fn greatest(range: &str, heads: &[(String, Oid)]) -> Option<(String, Oid)> {
    let range = VersionReq::parse(range).ok()?;
    let version = |full: &str| {
        let tag = full.strip_prefix("refs/tags/")?;
        Version::parse(tag.strip_prefix('v').unwrap_or(tag)).ok()
    };
    let fitting = heads.iter().filter_map(|(full, oid)| Some((version(full)?, full, *oid)));
    let (_, full, oid) = fitting.filter(|(version, ..)| range.matches(version)).max_by(|a, b| a.0.cmp(&b.0))?;
    // An annotated tag is an object of its own; its commit stands under the peeled name.
    let peeled = format!("{full}^{{}}");
    let commit = heads.iter().find(|(found, _)| *found == peeled).map_or(oid, |(_, commit)| *commit);
    Some((full.clone(), commit))
}

/// Those of the heads that lead to a commit, peeled or not.
fn only_to(commit: Oid, heads: Vec<(String, Oid)>) -> Vec<(String, Oid)> {
    let name = |full: &str| full.trim_end_matches("^{}").to_owned();
    let peeled: BTreeMap<String, Oid> =
        heads.iter().filter(|(full, _)| full.ends_with("^{}")).map(|(full, to)| (name(full), *to)).collect();
    heads.into_iter().filter(|(full, to)| peeled.get(&name(full)).unwrap_or(to) == &commit).collect()
}

fn refused() -> git2::Error {
    let why = "it refuses the credentials: correct git.username, git.password_file or git.ssh_key_file";
    git2::Error::new(ErrorCode::Auth, git2::ErrorClass::Callback, why)
}

/// An origin that accepts a connection and then says nothing must not hold a thread for ever.
fn limit_silence() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        #[expect(unsafe_code, reason = "libgit2's global options are not synchronised; set before its first use")]
        // SAFETY: within `Once`, before this program calls anything else of libgit2's that reads these options.
        let set = unsafe {
            git2::opts::set_server_connect_timeout_in_milliseconds(SILENCE_MAX_MS)
                .and_then(|()| git2::opts::set_server_timeout_in_milliseconds(SILENCE_MAX_MS))
        };
        if let Err(error) = set {
            tracing::warn!(%error, "libgit2 takes no time limit for a silent origin");
        }
    });
}
