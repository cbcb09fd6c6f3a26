//! A client of etcd with a deadline on every call, one connection a member, and three outcomes of a transaction.

use std::{
    error::Error as StdError,
    future::Future,
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use etcd_client::{Client, ConnectOptions, Error, GetOptions, GetResponse, WatchOptions, WatchStream};
use futures_util::Stream;
use tokio_stream::wrappers::ReceiverStream;

use super::{
    DcsSink,
    convert::{outcome, range, secs_span, to_txn},
    route::{Member, Route},
    version::Renews,
    watch,
};
use crate::{
    dcs::{DcsEvent, KeyValue, LeaseId, Outcome, Revision, Transaction},
    machine::Span,
    shell::{
        config::{self, Secret},
        metrics::Metrics,
        runtime,
    },
};

/// How long a member may take to answer. A healthy one takes milliseconds; etcd itself gives up after seven seconds.
pub(super) const REQUEST_DEADLINE: Duration = Duration::from_secs(2);
/// How long a connection may take to come about.
const CONNECT_DEADLINE: Duration = Duration::from_secs(1);
/// A silent connection is asked whether it lives after this. etcd closes connections that ask more often than every 5 s.
const PING_INTERVAL: Duration = Duration::from_millis(5_500);
/// How long the answer to that may take.
const PING_DEADLINE: Duration = Duration::from_millis(1_500);

/// Why etcd gave no answer to act on.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// The configuration cannot work.
    #[error("{0}")]
    Config(String),
    /// No member answered.
    #[error("no etcd member answers: {0}")]
    Unavailable(String),
    /// etcd answered, and it said no.
    #[error("etcd refuses: {0}")]
    Refused(String),
}

/// A client for tools, tests and the tasks of a bot. Clones share connections; they belong to one runtime.
#[derive(Clone)]
pub struct Etcd {
    route: Arc<Route>,
    connections: Arc<Mutex<Vec<Connection>>>,
    user: Option<(String, Secret)>,
    /// It was said that etcd asks nobody for a password.
    said_open: Arc<AtomicBool>,
    /// How often an open watch is compared with a list.
    audit_every: Span,
    metrics: Metrics,
}

/// The way to one member; empty while there is none.
#[derive(Clone, Default)]
pub(super) struct Connection {
    client: Option<Arc<Client>>,
    /// What that member's renewals are worth; nothing before it was asked.
    pub(super) renews: Option<Renews>,
}

/// Everything below a prefix, and whose word that is.
pub(super) struct List {
    /// The cluster that answered: another one knows nothing of what this one has shown.
    pub(super) cluster: u64,
    pub(super) revision: Revision,
    pub(super) entries: Vec<KeyValue>,
}

/// What became of one attempt.
pub(super) enum Failure {
    /// Nothing was sent: another member may be asked the same.
    NotSent(String),
    /// Something may have been sent, and nothing is known.
    Lost(String),
    /// etcd no longer takes the token of this connection, and did nothing: another connection has another token.
    StaleToken(String),
    /// etcd's own answer.
    Refused { code: i32, message: String },
}

/// The gRPC code of "there is no such thing".
const NOT_FOUND: i32 = 5;
/// The gRPC code of "too much": etcd's space or its patience is exhausted, or the connection's.
const EXHAUSTED: i32 = 8;
/// The gRPC code of "who are you?".
const UNAUTHENTICATED: i32 = 16;
/// Invalid argument, not found, already exists, permission denied, failed precondition, out of range: the codes with which
/// etcd says no before it does anything. All others may come from the way to it.
const DEFINITE: [i32; 6] = [3, NOT_FOUND, 6, 7, 9, 11];
/// Who speaks, where a code may come from the way as well: etcd, or the server half of its connection.
const ETCDS_WORDS: [&str; 2] = ["etcdserver: ", "grpc: "];
/// What etcd says to a user's password while it asks nobody for one.
const OPEN_TO_ALL: &str = "authentication is not enabled";
/// What etcd says to a token of before a change of its users, to none at all since it asks for one, and to whoever wants a new one
/// since it does not. It did nothing then.
const STALE_TOKEN: [&str; 3] = ["revision of auth store is old", "user name is empty", OPEN_TO_ALL];

impl Etcd {
    /// A client of the configured members; connects when first used.
    ///
    /// # Errors
    /// If the configuration names no usable member.
    pub fn new(config: &config::Etcd) -> Result<Self, EtcdError> {
        Self::for_bot(config, Metrics::new(), |_trouble| {})
    }

    /// A client that counts its requests and tells `on_trouble` when members stop or begin to answer.
    pub(super) fn for_bot(
        config: &config::Etcd,
        metrics: Metrics,
        on_trouble: impl Fn(Option<String>) + Send + Sync + 'static,
    ) -> Result<Self, EtcdError> {
        let addresses = config.endpoints().map_err(EtcdError::Config)?;
        let user = config.user().map_err(EtcdError::Config)?;
        let connections = Arc::new(Mutex::new(vec![Connection::default(); addresses.len()]));
        let (route, said_open) = (Arc::new(Route::new(addresses, Box::new(on_trouble))), Arc::default());
        Ok(Self { route, connections, user, said_open, audit_every: watch::AUDIT_INTERVAL, metrics })
    }

    /// The same client, whose watches are compared with lists this often: for tests, which cannot wait for a minute.
    #[must_use]
    pub const fn audited_every(mut self, span: Span) -> Self {
        self.audit_every = span;
        self
    }

    pub(super) const fn audit_interval(&self) -> Span {
        self.audit_every
    }

    /// The same route with connections of its own, for another runtime.
    pub(super) fn on_another_thread(&self) -> Self {
        let connections = Arc::new(Mutex::new(vec![Connection::default(); self.route.len()]));
        Self { connections, ..self.clone() }
    }

    /// Everything below `prefix`, as a majority knows it.
    ///
    /// # Errors
    /// If no member answers.
    pub async fn list(&self, prefix: &str) -> Result<(Revision, Vec<KeyValue>), EtcdError> {
        self.list_anywhere(prefix).await.map(|list| (list.revision, list.entries))
    }

    /// The same, with whose word it is.
    pub(super) async fn list_anywhere(&self, prefix: &str) -> Result<List, EtcdError> {
        let get = |client: Arc<Client>| async move { client.kv_client().get(prefix, Some(below())).await };
        self.ask("range", REQUEST_DEADLINE, get).await.map(|found| list(&found))
    }

    /// The same from one member, which knows as much as a majority by then, or does not answer.
    pub(super) async fn list_at(&self, member: Member, prefix: &str) -> Result<List, EtcdError> {
        let get = |client: Arc<Client>| async move { client.kv_client().get(prefix, Some(below())).await };
        match self.attempt("range", member, REQUEST_DEADLINE, get).await {
            Ok(found) => Ok(list(&found)),
            Err(failure) => Err(failure.into()),
        }
    }

    /// What stands at `key`, as a majority knows it.
    ///
    /// # Errors
    /// If no member answers.
    pub async fn get(&self, key: &str) -> Result<Option<KeyValue>, EtcdError> {
        let found = self
            .ask("range", REQUEST_DEADLINE, |client| async move { client.kv_client().get(key, None).await })
            .await?;
        Ok(range(&found).1.pop())
    }

    /// Runs a transaction once. A lost answer is [`Outcome::Unknown`], and so is none; a member that cannot be reached at all is
    /// passed over.
    pub async fn transact(&self, transaction: &Transaction) -> Outcome {
        self.try_transact(transaction).await.unwrap_or_else(|error| Outcome::Unknown(error.to_string()))
    }

    /// The same for whoever makes a difference between what may have been done and what was not.
    ///
    /// # Errors
    /// If nothing was done: no member could be reached, or etcd does not take the transaction.
    pub async fn try_transact(&self, transaction: &Transaction) -> Result<Outcome, EtcdError> {
        let mut why = String::new();
        for _ in 0..self.route.len() {
            let member = self.route.current();
            let run = |client: Arc<Client>| async move { client.kv_client().txn(to_txn(transaction)).await };
            match self.attempt("txn", member, REQUEST_DEADLINE, run).await {
                Ok(answer) => {
                    self.route.accepted(WRITES);
                    return Ok(outcome(&answer));
                }
                Err(Failure::NotSent(reason) | Failure::StaleToken(reason)) => why = reason,
                Err(Failure::Lost(reason)) => return Ok(Outcome::Unknown(reason)),
                Err(Failure::Refused { code: NOT_FOUND, .. }) => {
                    // The lease of a put is gone; nothing was changed, and nothing was read.
                    return Ok(Outcome::Refused { revision: Revision(0), found: Vec::new() });
                }
                Err(Failure::Refused { code, message }) => {
                    self.route.refused(WRITES, &message);
                    // The write that fills the space is made, and answered like those that are refused after it.
                    return if code == EXHAUSTED {
                        Ok(Outcome::Unknown(message))
                    } else {
                        Err(EtcdError::Refused(message))
                    };
                }
            }
        }
        Err(EtcdError::Unavailable(why))
    }

    /// A lease, and how long the store lets it live.
    ///
    /// # Errors
    /// If no member answers.
    pub async fn grant(&self, ttl: Span) -> Result<(LeaseId, Span), EtcdError> {
        let secs = i64::try_from(ttl.as_millis().div_ceil(1_000)).unwrap_or(i64::MAX).max(1);
        let granted = self
            .ask("lease_grant", REQUEST_DEADLINE, |client| async move { client.lease_client().grant(secs, None).await })
            .await?;
        Ok((LeaseId(granted.id()), secs_span(granted.ttl())))
    }

    /// Renews a lease once, for as long as it was granted; `false` if it is gone.
    ///
    /// # Errors
    /// If no member answers.
    pub async fn keep_alive_once(&self, lease: LeaseId) -> Result<bool, EtcdError> {
        let mut why = String::new();
        for _ in 0..self.route.len() {
            match self.keep_alive_at(self.route.current(), lease, REQUEST_DEADLINE).await {
                Ok(lives) => return Ok(lives),
                Err(error) => why = error.to_string(),
            }
        }
        Err(EtcdError::Unavailable(why))
    }

    /// One try at one member. Every try is a stream of its own, so that a reply can never belong to an earlier one.
    pub(super) async fn keep_alive_at(
        &self,
        member: Member,
        lease: LeaseId,
        deadline: Duration,
    ) -> Result<bool, EtcdError> {
        let renew = |client: Arc<Client>| async move {
            // The library waits for the first reply and says in words if that has no time left.
            match client.lease_client().keep_alive(lease.0).await {
                Ok(_renewed) => Ok(true),
                Err(Error::LeaseKeepAliveError(why)) if why == "lease not found" => Ok(false),
                Err(error) => Err(error),
            }
        };
        match self.attempt("lease_keepalive", member, deadline, renew).await {
            Ok(lives) => Ok(lives),
            Err(Failure::Refused { code: NOT_FOUND, .. }) => Ok(false),
            Err(failure) => Err(failure.into()),
        }
    }

    /// Gives a lease back, with every key bound to it; `false` if it was gone.
    ///
    /// # Errors
    /// If no member answers.
    pub async fn revoke(&self, lease: LeaseId) -> Result<bool, EtcdError> {
        let revoke = |client: Arc<Client>| async move {
            match client.lease_client().revoke(lease.0).await {
                Ok(_revoked) => Ok(true),
                Err(Error::GRpcStatus(status)) if i32::from(status.code()) == NOT_FOUND => Ok(false),
                Err(error) => Err(error),
            }
        };
        self.ask("lease_revoke", REQUEST_DEADLINE, revoke).await
    }

    /// Forgets history up to `revision`.
    ///
    /// # Errors
    /// If no member answers, or the revision is compacted already or lies ahead.
    pub async fn compact(&self, revision: Revision) -> Result<(), EtcdError> {
        let revision = i64::try_from(revision.0).unwrap_or(i64::MAX);
        self.ask("compact", REQUEST_DEADLINE, |client| async move { client.kv_client().compact(revision, None).await })
            .await
            .map(|_done| ())
    }

    /// What happens below `prefix`: `Listed`, then `Changed` as it changes; after every break `WatchLost` and `Listed` again.
    /// Ends only if etcd itself has forgotten what it has shown. Must be called inside a runtime.
    pub fn watch(&self, prefix: &str) -> impl Stream<Item = DcsEvent> + Unpin + use<> {
        let (sender, receiver) = tokio::sync::mpsc::channel(runtime::QUEUE_LEN_MAX);
        let sink = DcsSink::new(runtime::Events::over(sender.clone()), |event| event);
        let follow = watch::follow(self.clone(), prefix.to_owned(), sink);
        tokio::spawn(async move {
            tokio::select! {
                why = follow => tracing::warn!(why, "a watch has ended"),
                () = sender.closed() => {}
            }
        });
        ReceiverStream::new(receiver)
    }

    /// The member that is asked at the moment, as `host:port`.
    #[must_use]
    pub fn address(&self) -> String {
        self.route.address(self.route.current()).to_owned()
    }

    /// How many members there are.
    pub(super) fn members(&self) -> u64 {
        u64::try_from(self.route.len()).unwrap_or(u64::MAX)
    }

    pub(super) fn route(&self) -> &Route {
        &self.route
    }

    /// A watch of everything below `prefix` that changes from `from` on, at the current member.
    pub(super) async fn open_watch(&self, prefix: &str, from: Revision) -> Result<(Member, WatchStream), EtcdError> {
        let member = self.route.current();
        let from = i64::try_from(from.0).unwrap_or(i64::MAX);
        let open = |client: Arc<Client>| async move {
            let options = WatchOptions::new().with_prefix().with_start_revision(from);
            client.watch_client().watch(prefix, Some(options)).await
        };
        match self.attempt("watch", member, REQUEST_DEADLINE, open).await {
            Ok(stream) => Ok((member, stream)),
            Err(failure) => Err(failure.into()),
        }
    }

    /// Asks one member after the other until one answers. For what may be asked twice.
    async fn ask<T, F>(
        &self,
        op: &'static str,
        deadline: Duration,
        call: impl Fn(Arc<Client>) -> F,
    ) -> Result<T, EtcdError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut why = String::new();
        for _ in 0..self.route.len() {
            match self.attempt(op, self.route.current(), deadline, &call).await {
                Ok(answer) => return Ok(answer),
                Err(Failure::Refused { message, .. }) => return Err(EtcdError::Refused(message)),
                Err(Failure::NotSent(reason) | Failure::Lost(reason) | Failure::StaleToken(reason)) => why = reason,
            }
        }
        Err(EtcdError::Unavailable(why))
    }

    /// Asks one member, once, within the deadline; and once more with a new token, if etcd does not take the old one.
    pub(super) async fn attempt<T, F>(
        &self,
        op: &'static str,
        member: Member,
        deadline: Duration,
        call: impl Fn(Arc<Client>) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut answer = self.attempt_once(op, member, deadline, &call).await;
        if let Err(Failure::StaleToken(_)) = answer {
            answer = self.attempt_once(op, member, deadline, &call).await;
        }
        match answer {
            // A token that is refused as soon as it is given out: this member is of no use.
            Err(Failure::StaleToken(why)) => Err(self.failed(member, None, Failure::NotSent(why))),
            answer => answer,
        }
    }

    async fn attempt_once<T, F>(
        &self,
        op: &'static str,
        member: Member,
        deadline: Duration,
        call: impl FnOnce(Arc<Client>) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Error>>,
    {
        self.metrics.etcd_request(op);
        let connected = tokio::time::timeout(deadline, self.client(member)).await;
        let client = match connected {
            Ok(Ok(client)) => client,
            Ok(Err(error)) => return Err(self.failed(member, None, Failure::NotSent(text(&error)))),
            Err(_elapsed) => {
                let why = format!("no connection in {deadline:?}");
                return Err(self.failed(member, None, Failure::NotSent(why)));
            }
        };
        match tokio::time::timeout(deadline, Box::pin(call(Arc::clone(&client)))).await {
            Ok(Ok(answer)) => {
                self.route.answered(member);
                Ok(answer)
            }
            Ok(Err(error)) => Err(self.failed(member, Some(&client), classify(&error, self.user.is_some()))),
            Err(_elapsed) => {
                Err(self.failed(member, Some(&client), Failure::Lost(format!("no answer in {deadline:?}"))))
            }
        }
    }

    fn failed(&self, member: Member, used: Option<&Arc<Client>>, failure: Failure) -> Failure {
        // A connection that failed once is not trusted again; one that somebody else has made since is.
        let forget = || {
            self.connection(member, |connection| {
                let is_used = |held: &Arc<Client>| used.is_none_or(|used| Arc::ptr_eq(held, used));
                if connection.client.as_ref().is_some_and(is_used) {
                    *connection = Connection::default();
                }
            });
        };
        match &failure {
            Failure::NotSent(why) | Failure::Lost(why) => {
                forget();
                self.route.failed(member, why);
            }
            Failure::StaleToken(why) => {
                tracing::debug!(member = self.route.address(member), why, "etcd wants another token");
                forget();
                self.route.answered(member);
            }
            Failure::Refused { .. } => self.route.answered(member),
        }
        failure
    }

    pub(super) fn connection<T>(&self, member: Member, look: impl FnOnce(&mut Connection) -> T) -> T {
        look(&mut self.connections.lock().unwrap_or_else(PoisonError::into_inner)[Route::index(member)])
    }

    async fn client(&self, member: Member) -> Result<Arc<Client>, Error> {
        if let Some(client) = self.connection(member, |connection| connection.client.clone()) {
            return Ok(client);
        }
        let client = Arc::new(self.connect(member).await?);
        let made = Connection { client: Some(Arc::clone(&client)), renews: None };
        self.connection(member, |connection| *connection = made);
        Ok(client)
    }

    async fn connect(&self, member: Member) -> Result<Client, Error> {
        let address = [self.route.address(member)];
        let options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_DEADLINE)
            .with_keep_alive(PING_INTERVAL, PING_DEADLINE)
            .with_keep_alive_while_idle(false)
            .with_require_leader(true);
        let Some((name, password)) = &self.user else {
            return Box::pin(Client::connect(address, Some(options))).await;
        };
        let named = options.clone().with_user(name, password.expose()).with_auto_token_refresh(true);
        match Box::pin(Client::connect(address, Some(named))).await {
            Err(Error::GRpcStatus(status)) if status.message().contains(OPEN_TO_ALL) => {
                // Its users may be set up after the bots: it says so as soon as it asks for one.
                if !self.said_open.swap(true, Ordering::Relaxed) {
                    let fix = "enable it (`etcdctl auth enable`), or take etcd3.username away";
                    tracing::warn!(fix, "etcd3.username is given, but etcd asks nobody for a password");
                }
                Box::pin(Client::connect(address, Some(options))).await
            }
            connected => connected,
        }
    }
}

/// The refusals of transactions, among those that are told.
const WRITES: &str = "a write";

fn below() -> GetOptions {
    GetOptions::new().with_prefix()
}

fn list(found: &GetResponse) -> List {
    let (revision, entries) = range(found);
    List { cluster: found.header().map_or(0, etcd_client::ResponseHeader::cluster_id), revision, entries }
}

impl From<Failure> for EtcdError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused { message, .. } => Self::Refused(message),
            Failure::NotSent(why) | Failure::Lost(why) | Failure::StaleToken(why) => Self::Unavailable(why),
        }
    }
}

fn classify(error: &Error, has_user: bool) -> Failure {
    let Error::GRpcStatus(status) = error else { return Failure::Lost(text(error)) };
    match etcds_own(i32::from(status.code()), status.message(), has_user) {
        Some(failure) => failure,
        None if never_connected(status) => Failure::NotSent(text(status)),
        None => Failure::Lost(text(status)),
    }
}

/// What a status means if etcd itself says it, to one who has a user or has none.
fn etcds_own(code: i32, message: &str, has_user: bool) -> Option<Failure> {
    let is_stale = code == UNAUTHENTICATED || STALE_TOKEN.iter().any(|words| message.contains(words));
    if has_user && is_stale {
        return Some(Failure::StaleToken(message.to_owned()));
    }
    let is_exhausted = code == EXHAUSTED && ETCDS_WORDS.iter().any(|words| message.starts_with(words));
    let is_definite = DEFINITE.contains(&code) || code == UNAUTHENTICATED || is_exhausted;
    is_definite.then(|| Failure::Refused { code, message: message.to_owned() })
}

/// Whether the error can only come from a connection that did not come about.
fn never_connected(error: &(dyn StdError + 'static)) -> bool {
    let refused = |e: &io::Error| {
        matches!(
            e.kind(),
            io::ErrorKind::ConnectionRefused | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable
        )
    };
    causes(error).any(|e| e.downcast_ref::<io::Error>().is_some_and(refused))
}

/// One line: the last cause says most.
fn text(error: &(dyn StdError + 'static)) -> String {
    causes(error).last().map_or_else(String::new, ToString::to_string)
}

fn causes<'e>(error: &'e (dyn StdError + 'static)) -> impl Iterator<Item = &'e (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |e: &&'e (dyn StdError + 'static)| (*e).source())
}

#[cfg(test)]
mod tests {
    use super::{EXHAUSTED, Failure, UNAUTHENTICATED, etcds_own};

    #[test]
    fn what_etcd_says_itself_says_nothing_against_the_way_to_it() {
        let check = |code, message, has_user, expected| {
            let got = match etcds_own(code, message, has_user) {
                Some(Failure::Refused { .. }) => "refused",
                Some(Failure::StaleToken(_)) => "another token",
                Some(Failure::NotSent(_) | Failure::Lost(_)) | None => "the way",
            };
            assert_eq!(got, expected, "{code} {message}");
        };
        check(EXHAUSTED, "etcdserver: mvcc: database space exceeded", true, "refused");
        check(EXHAUSTED, "etcdserver: too many requests", false, "refused");
        check(EXHAUSTED, "grpc: received message larger than max (9 vs. 8)", false, "refused");
        check(EXHAUSTED, "h2 protocol error: too_many_pings", false, "the way");
        check(3, "etcdserver: revision of auth store is old", true, "another token");
        check(3, "etcdserver: user name is empty", true, "another token");
        check(3, "etcdserver: user name is empty", false, "refused");
        check(9, "etcdserver: authentication is not enabled", true, "another token");
        check(UNAUTHENTICATED, "etcdserver: invalid auth token", true, "another token");
        check(UNAUTHENTICATED, "etcdserver: invalid auth token", false, "refused");
        check(7, "etcdserver: permission denied", true, "refused");
        check(14, "etcdserver: request timed out", true, "the way");
    }
}
