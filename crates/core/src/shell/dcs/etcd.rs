//! A client of etcd with a deadline on every call, one connection a member, and three outcomes of a transaction.

use std::{
    error::Error as StdError,
    future::Future,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use etcd_client::{
    Client, Compare as EtcdCompare, CompareOp, Error, GetOptions, GetResponse, PutOptions, Txn, TxnOp, TxnOpResponse,
    WatchOptions, WatchStream,
};
use futures_util::Stream;
use tokio_stream::wrappers::ReceiverStream;

use super::{
    DcsSink,
    connect::{Connection, Connector},
    route::{Member, Route},
    watch,
};
use crate::{
    dcs::{Compare, DcsEvent, KeyValue, LeaseId, Outcome, Revision, Transaction, Write},
    machine::Span,
    shell::{config, metrics::Metrics, runtime},
};

/// How long a member may take to answer. A healthy one takes milliseconds; etcd itself gives up after seven seconds.
pub(super) const REQUEST_DEADLINE: Duration = Duration::from_secs(2);

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
    connections: Arc<Mutex<Vec<Option<Connection>>>>,
    connector: Arc<Connector>,
    metrics: Metrics,
}

/// What became of one attempt.
pub(super) enum Failure {
    /// Nothing was sent: another member may be asked the same.
    NotSent(String),
    /// Something may have been sent, and nothing is known.
    Lost(String),
    /// etcd does not know who asks, and has done nothing.
    Stranger(String),
    /// etcd's own answer.
    Refused { code: i32, message: String },
}

/// The gRPC code of "there is no such thing".
const NOT_FOUND: i32 = 5;
/// Invalid argument, not found, already exists, permission denied, failed precondition, out of range, unauthenticated:
/// the codes with which etcd says no before it does anything. All others may come from the way to it.
const DEFINITE: [i32; 7] = [3, NOT_FOUND, 6, PERMISSION_DENIED, 9, 11, UNAUTHENTICATED];
const PERMISSION_DENIED: i32 = 7;
const UNAUTHENTICATED: i32 = 16;
/// What etcd says to a login that it has forgotten: it was restarted, or its users were changed.
const FORGOTTEN: [&str; 2] =
    ["etcdserver: revision of auth store is old", "etcdserver: authentication failed, invalid user ID or password"];
/// What etcd says to who has no login, once it has users.
const NO_LOGIN: &str = "etcdserver: user name is empty";

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
        let connector = Arc::new(Connector::new(config).map_err(EtcdError::Config)?);
        let connections = Arc::new(Mutex::new(vec![None; addresses.len()]));
        Ok(Self { route: Arc::new(Route::new(addresses, Box::new(on_trouble))), connections, connector, metrics })
    }

    /// The same route with connections of its own, for another runtime.
    pub(super) fn on_another_thread(&self) -> Self {
        let connections = Arc::new(Mutex::new(vec![None; self.route.len()]));
        Self { connections, ..self.clone() }
    }

    /// Everything below `prefix`, as a majority knows it.
    ///
    /// # Errors
    /// If no member answers.
    pub async fn list(&self, prefix: &str) -> Result<(Revision, Vec<KeyValue>), EtcdError> {
        let options = GetOptions::new().with_prefix();
        let found = self
            .ask("range", REQUEST_DEADLINE, |client| {
                let options = options.clone();
                async move { client.kv_client().get(prefix, Some(options)).await }
            })
            .await?;
        Ok(range(&found))
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

    /// Runs a transaction once. A lost answer is [`Outcome::Unknown`]; a member that cannot be reached at all is passed over.
    pub async fn transact(&self, transaction: &Transaction) -> Outcome {
        let mut why = String::new();
        for _ in 0..self.route.len() {
            let member = self.route.current();
            let run = |client: Arc<Client>| async move { client.kv_client().txn(to_txn(transaction)).await };
            match self.attempt("txn", member, REQUEST_DEADLINE, run).await {
                Ok(answer) => return outcome(&answer),
                Err(Failure::NotSent(reason)) => why = reason,
                Err(Failure::Lost(reason) | Failure::Stranger(reason)) => return Outcome::Unknown(reason),
                Err(Failure::Refused { code: NOT_FOUND, .. }) => {
                    // The lease of a put is gone; nothing was changed, and nothing was read.
                    return Outcome::Refused { revision: Revision(0), found: Vec::new() };
                }
                Err(Failure::Refused { message, .. }) => {
                    tracing::error!(message, "etcd does not take a transaction");
                    return Outcome::Unknown(message);
                }
            }
        }
        Outcome::Unknown(why)
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
            match self.keep_alive_at_current(lease, REQUEST_DEADLINE).await {
                Ok(lives) => return Ok(lives),
                Err(error) => why = error.to_string(),
            }
        }
        Err(EtcdError::Unavailable(why))
    }

    /// One try at the current member. Every try is a stream of its own, so that a reply can never belong to an earlier one.
    pub(super) async fn keep_alive_at_current(&self, lease: LeaseId, deadline: Duration) -> Result<bool, EtcdError> {
        let renew = |client: Arc<Client>| async move {
            // The library waits for the first reply and says in words if that has no time left.
            match client.lease_client().keep_alive(lease.0).await {
                Ok(_renewed) => Ok(true),
                Err(Error::LeaseKeepAliveError(why)) if why == "lease not found" => Ok(false),
                Err(error) => Err(error),
            }
        };
        match self.attempt("lease_keepalive", self.route.current(), deadline, renew).await {
            Ok(lives) => Ok(lives),
            Err(Failure::Refused { code: NOT_FOUND, .. }) => Ok(false),
            Err(Failure::Refused { message, .. } | Failure::Stranger(message)) => Err(EtcdError::Refused(message)),
            Err(Failure::NotSent(why) | Failure::Lost(why)) => Err(EtcdError::Unavailable(why)),
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
    /// Never ends. Must be called inside a runtime.
    pub fn watch(&self, prefix: &str) -> impl Stream<Item = DcsEvent> + Unpin + use<> {
        let (sender, receiver) = tokio::sync::mpsc::channel(runtime::QUEUE_LEN_MAX);
        let sink = DcsSink::new(runtime::Events::over(sender.clone()), |event| event);
        let follow = watch::follow(self.clone(), prefix.to_owned(), sink);
        tokio::spawn(async move {
            tokio::select! {
                () = follow => {}
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
            Err(Failure::Refused { message, .. } | Failure::Stranger(message)) => Err(EtcdError::Refused(message)),
            Err(Failure::NotSent(why) | Failure::Lost(why)) => Err(EtcdError::Unavailable(why)),
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
                Err(Failure::Refused { message, .. } | Failure::Stranger(message)) => {
                    return Err(EtcdError::Refused(message));
                }
                Err(Failure::NotSent(reason) | Failure::Lost(reason)) => why = reason,
            }
        }
        Err(EtcdError::Unavailable(why))
    }

    /// Asks one member within the deadline: once, and once more if it has forgotten our login, for then nothing was done.
    async fn attempt<T, F>(
        &self,
        op: &'static str,
        member: Member,
        deadline: Duration,
        call: impl Fn(Arc<Client>) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Error>>,
    {
        self.metrics.etcd_request(op);
        let connection = self.connected(member, deadline).await?;
        match self.called(member, deadline, connection, &call).await {
            Err(Failure::Stranger(_forgotten)) => {
                let connection = self.connected(member, deadline).await?;
                self.called(member, deadline, connection, &call).await
            }
            done => done,
        }
    }

    async fn connected(&self, member: Member, deadline: Duration) -> Result<Connection, Failure> {
        match tokio::time::timeout(deadline, self.connection(member)).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(Failure::Stranger(why))) => {
                self.route.refused(member, &why);
                Err(Failure::Stranger(why))
            }
            Ok(Err(failure)) => Err(self.failed(member, failure)),
            Err(_elapsed) => Err(self.failed(member, Failure::NotSent(format!("no connection in {deadline:?}")))),
        }
    }

    async fn called<T, F>(
        &self,
        member: Member,
        deadline: Duration,
        connection: Connection,
        call: &impl Fn(Arc<Client>) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Error>>,
    {
        match tokio::time::timeout(deadline, Box::pin(call(connection.client))).await {
            Ok(Ok(answer)) => {
                self.route.answered(member);
                Ok(answer)
            }
            Ok(Err(error)) => Err(self.failed(member, self.known(classify(&error), connection.is_anonymous))),
            Err(_elapsed) => Err(self.failed(member, Failure::Lost(format!("no answer in {deadline:?}")))),
        }
    }

    /// The failure, as somebody with a login sees it.
    fn known(&self, failure: Failure, is_anonymous: bool) -> Failure {
        match failure {
            Failure::Refused { message, .. } if message == NO_LOGIN && !self.connector.has_user() => Failure::Refused {
                code: UNAUTHENTICATED,
                message: String::from("it has users: etcd3.username is missing"),
            },
            Failure::Refused { code, message }
                if code == UNAUTHENTICATED
                    || message == NO_LOGIN
                    || FORGOTTEN.contains(&message.as_str())
                    || code == PERMISSION_DENIED && is_anonymous =>
            {
                Failure::Stranger(message)
            }
            other => other,
        }
    }

    fn failed(&self, member: Member, failure: Failure) -> Failure {
        match &failure {
            Failure::NotSent(why) | Failure::Lost(why) => {
                // A connection that failed once is not trusted again.
                self.drop_connection(member);
                self.route.failed(member, why);
            }
            Failure::Stranger(_) => self.drop_connection(member),
            Failure::Refused { .. } => self.route.answered(member),
        }
        failure
    }

    fn drop_connection(&self, member: Member) {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)[Route::index(member)] = None;
    }

    async fn connection(&self, member: Member) -> Result<Connection, Failure> {
        let slot = Route::index(member);
        let known = self.connections.lock().unwrap_or_else(PoisonError::into_inner)[slot].clone();
        if let Some(connection) = known {
            return Ok(connection);
        }
        let connection = self.connector.connect(self.route.address(member)).await?;
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)[slot] = Some(connection.clone());
        Ok(connection)
    }
}

/// The failure that an error of the library stands for.
pub(super) fn classify(error: &Error) -> Failure {
    let Error::GRpcStatus(status) = error else { return Failure::Lost(text(error)) };
    let code = i32::from(status.code());
    if DEFINITE.contains(&code) {
        return Failure::Refused { code, message: status.message().to_owned() };
    }
    if never_connected(status) {
        return Failure::NotSent(text(status));
    }
    Failure::Lost(text(status))
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

fn to_txn(transaction: &Transaction) -> Txn {
    let compare: Vec<EtcdCompare> = transaction.compare.iter().map(to_compare).collect();
    let then: Vec<TxnOp> = transaction.then.iter().map(to_op).collect();
    let mut keys: Vec<&str> = transaction.compare.iter().map(Compare::key).collect();
    keys.sort_unstable();
    keys.dedup();
    let otherwise: Vec<TxnOp> = keys.into_iter().map(|key| TxnOp::get(key, None)).collect();
    Txn::new().when(compare).and_then(then).or_else(otherwise)
}

fn to_compare(compare: &Compare) -> EtcdCompare {
    let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    match compare {
        Compare::Absent(key) => EtcdCompare::create_revision(key.as_str(), CompareOp::Equal, 0),
        Compare::Present(key) => EtcdCompare::create_revision(key.as_str(), CompareOp::Greater, 0),
        Compare::ValueIs(key, value) => EtcdCompare::value(key.as_str(), CompareOp::Equal, value.as_str()),
        Compare::ModifiedAt(key, at) => EtcdCompare::mod_revision(key.as_str(), CompareOp::Equal, number(at.0)),
        Compare::CreatedAt(key, at) => EtcdCompare::create_revision(key.as_str(), CompareOp::Equal, number(at.0)),
        Compare::LeaseIs(key, lease) => EtcdCompare::lease(key.as_str(), CompareOp::Equal, lease.0),
    }
}

fn to_op(write: &Write) -> TxnOp {
    match write {
        Write::Put { key, value, lease } => {
            let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
            TxnOp::put(key.as_str(), value.as_str(), options)
        }
        Write::Delete { key } => TxnOp::delete(key.as_str(), None),
    }
}

fn outcome(answer: &etcd_client::TxnResponse) -> Outcome {
    let revision = header_revision(answer.header());
    if answer.succeeded() {
        return Outcome::Done(revision);
    }
    let read = answer.op_responses().into_iter().filter_map(|op| match op {
        TxnOpResponse::Get(found) => Some(range(&found).1),
        TxnOpResponse::Put(_) | TxnOpResponse::Delete(_) | TxnOpResponse::Txn(_) => None,
    });
    Outcome::Refused { revision, found: read.flatten().collect() }
}

fn range(found: &GetResponse) -> (Revision, Vec<KeyValue>) {
    (header_revision(found.header()), found.kvs().iter().map(key_value).collect())
}

fn header_revision(header: Option<&etcd_client::ResponseHeader>) -> Revision {
    Revision(header.map_or(0, |h| u64::try_from(h.revision()).unwrap_or(0)))
}

/// Ours are UTF-8; a foreign value that is not is shown as well as it can be.
pub(super) fn key_value(kv: &etcd_client::KeyValue) -> KeyValue {
    let revision = |n: i64| Revision(u64::try_from(n).unwrap_or(0));
    KeyValue {
        key: String::from_utf8_lossy(kv.key()).into_owned(),
        value: String::from_utf8_lossy(kv.value()).into_owned(),
        created: revision(kv.create_revision()),
        modified: revision(kv.mod_revision()),
        lease: (kv.lease() != 0).then(|| LeaseId(kv.lease())),
    }
}

fn secs_span(secs: i64) -> Span {
    Span::from_secs(u64::try_from(secs).unwrap_or(0))
}
