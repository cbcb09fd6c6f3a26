//! One face for the two stores, so that one suite can hold both to the same contract.

use bots_core::{
    dcs::{Change, DcsEvent, KeyValue, LeaseId, MemoryDcs, Outcome, Revision, Transaction},
    machine::{Span, Time},
    shell::{Etcd, testing::EtcdServer},
};
use futures_util::{Stream, StreamExt};
use tempfile::TempDir;

use super::PATIENCE;

/// What a store can be asked, in the caller's time.
pub(crate) trait Store {
    async fn transact(&mut self, transaction: Transaction) -> Outcome;
    async fn list(&mut self, prefix: &str) -> (Revision, Vec<KeyValue>);
    async fn grant(&mut self, ttl: Span) -> LeaseId;
    async fn keep_alive(&mut self, lease: LeaseId) -> bool;
    async fn revoke(&mut self, lease: LeaseId) -> bool;
    async fn compact(&mut self, revision: Revision);
    /// Lets time pass.
    async fn pass(&mut self, span: Span);
    /// Begins to watch; the first answer of [`Store::next`] is a list.
    async fn watch(&mut self, prefix: &str);
    /// What the watch shows next.
    async fn next(&mut self) -> DcsEvent;
}

/// The model, on a clock of its own.
pub(crate) struct Memory {
    dcs: MemoryDcs,
    now: Time,
    watch: Option<(String, Option<Revision>)>,
}

impl Memory {
    pub(crate) async fn start() -> Self {
        Self { dcs: MemoryDcs::new(), now: Time::from_millis(1_000), watch: None }
    }
}

impl Store for Memory {
    async fn transact(&mut self, transaction: Transaction) -> Outcome {
        self.dcs.transact(self.now, &transaction)
    }

    async fn list(&mut self, prefix: &str) -> (Revision, Vec<KeyValue>) {
        self.dcs.expire(self.now);
        self.dcs.list(prefix)
    }

    async fn grant(&mut self, ttl: Span) -> LeaseId {
        self.dcs.grant(self.now, ttl)
    }

    async fn keep_alive(&mut self, lease: LeaseId) -> bool {
        self.dcs.keep_alive(self.now, lease)
    }

    async fn revoke(&mut self, lease: LeaseId) -> bool {
        self.dcs.revoke(lease)
    }

    async fn compact(&mut self, revision: Revision) {
        self.dcs.compact(revision);
    }

    async fn pass(&mut self, span: Span) {
        self.now += span;
        self.dcs.expire(self.now);
    }

    async fn watch(&mut self, prefix: &str) {
        self.watch = Some((prefix.to_owned(), None));
    }

    async fn next(&mut self) -> DcsEvent {
        let (prefix, seen) = self.watch.as_mut().expect("watch first");
        let prefix = prefix.clone();
        let changes = seen.map(|revision| self.dcs.changes_after(&prefix, revision));
        match changes {
            Some(Ok(changes)) => {
                let revision = self.dcs.revision();
                *seen = Some(revision);
                DcsEvent::Changed { prefix, revision, changes }
            }
            Some(Err(_compacted)) => {
                *seen = None;
                DcsEvent::WatchLost { prefix, why: "compacted".into() }
            }
            None => {
                let (revision, entries) = self.dcs.list(&prefix);
                *seen = Some(revision);
                DcsEvent::Listed { prefix, revision, entries }
            }
        }
    }
}

/// The real one: a server of its own for every test.
pub(crate) struct Real {
    client: Etcd,
    watch: Option<Box<dyn Stream<Item = DcsEvent> + Unpin>>,
    _server: EtcdServer,
    _dir: TempDir,
}

impl Real {
    pub(crate) async fn start() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let server = EtcdServer::start(dir.path()).expect("etcd");
        Self { client: server.client(), watch: None, _server: server, _dir: dir }
    }
}

impl Store for Real {
    async fn transact(&mut self, transaction: Transaction) -> Outcome {
        self.client.transact(&transaction).await
    }

    async fn list(&mut self, prefix: &str) -> (Revision, Vec<KeyValue>) {
        self.client.list(prefix).await.expect("list")
    }

    async fn grant(&mut self, ttl: Span) -> LeaseId {
        self.client.grant(ttl).await.expect("grant").0
    }

    async fn keep_alive(&mut self, lease: LeaseId) -> bool {
        self.client.keep_alive_once(lease).await.expect("keep alive")
    }

    async fn revoke(&mut self, lease: LeaseId) -> bool {
        self.client.revoke(lease).await.expect("revoke")
    }

    async fn compact(&mut self, revision: Revision) {
        self.client.compact(revision).await.expect("compact");
    }

    async fn pass(&mut self, span: Span) {
        tokio::time::sleep(span.to_std()).await;
    }

    async fn watch(&mut self, prefix: &str) {
        self.watch = Some(Box::new(self.client.watch(prefix)));
    }

    async fn next(&mut self) -> DcsEvent {
        let watch = self.watch.as_mut().expect("watch first");
        let next = tokio::time::timeout(PATIENCE, watch.next()).await;
        next.unwrap_or_else(|_| panic!("the watch shows nothing for {PATIENCE:?}")).expect("a watch never ends")
    }
}

/// Takes in what the watch shows until `n` changes have come.
pub(crate) async fn changes(store: &mut impl Store, n: usize) -> Vec<Change> {
    let mut seen = Vec::new();
    while seen.len() < n {
        if let DcsEvent::Changed { changes, .. } = store.next().await {
            seen.extend(changes);
        }
    }
    seen
}
