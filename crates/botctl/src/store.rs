//! The way to etcd: reads whole namespaces, runs transactions, follows changes. Its failures are the operator's words.

use std::time::Duration;

use bots_core::{
    dcs::{DcsEvent, KeyValue, NameError, Outcome, Revision, Scope, Transaction, View},
    machine::Span,
    shell::{Etcd, Secret, config, dcs::EtcdError},
};
use futures_util::{Stream, StreamExt};

use crate::{
    args::Args,
    failure::{Failure, one_line},
    fleet::{Fleet, ScopeView},
};

/// etcd under one namespace.
pub(crate) struct Store {
    etcd: Etcd,
    hosts: String,
    namespace: String,
}

/// A prefix that is watched, and what is known of it.
pub(crate) struct Followed<S> {
    changes: S,
    view: View,
    prefix: String,
}

impl Store {
    pub(crate) fn new(args: &Args) -> Result<Self, Failure> {
        let mut members = config::Etcd::from_hosts(&args.etcd);
        match (&args.etcd_username, &args.etcd_password_file) {
            (Some(username), Some(path)) => {
                let password = Secret::from_file(path);
                let password = password.map_err(|e| Failure::usage(format!("--etcd-password-file: {e}")))?;
                (members.username, members.password) = (Some(username.clone()), Some(password));
            }
            (None, None) => {}
            (Some(_), None) | (None, Some(_)) => {
                return Err(Failure::usage("--etcd-username and --etcd-password-file belong together"));
            }
        }
        let etcd = Etcd::new(&members).map_err(|e| Failure::usage(format!("--etcd: {e}")))?;
        // A namespace of several parts is as good as one; a scope's name checks all of them.
        Scope::new(&args.namespace, "any").map_err(|e: NameError| Failure::usage(format!("--namespace: {e}")))?;
        Ok(Self { etcd, hosts: args.etcd.clone(), namespace: args.namespace.trim_matches('/').to_owned() })
    }

    pub(crate) fn scope(&self, name: &str) -> Result<Scope, Failure> {
        Scope::new(&self.namespace, name).map_err(|e| Failure::usage(e.to_string()))
    }

    /// Every scope.
    pub(crate) async fn fleet(&self) -> Result<Fleet, Failure> {
        Ok(Fleet::of(&self.namespace, &self.list(&self.prefix()).await?))
    }

    /// One scope, which must have keys.
    pub(crate) async fn scope_view(&self, scope: &Scope) -> Result<ScopeView, Failure> {
        let entries = self.list(&scope.prefix()).await?;
        let mut fleet = Fleet::of(&self.namespace, &entries);
        match fleet.scopes.remove(scope.name()) {
            Some(view) => Ok(view),
            None => {
                let known = self.fleet().await?.scopes.into_keys().collect::<Vec<_>>().join(", ");
                let known = if known.is_empty() { String::from("there is none") } else { format!("there is {known}") };
                Err(Failure::not_found(format!("no scope {} in /{}: {known}", scope.name(), self.namespace)))
            }
        }
    }

    /// Runs a transaction; `changed` is what to say if its conditions do not hold any more.
    pub(crate) async fn write(&self, transaction: &Transaction, changed: &str) -> Result<Revision, Failure> {
        match self.etcd.try_transact(transaction).await.map_err(|error| self.failed(&error))? {
            Outcome::Done(revision) => Ok(revision),
            Outcome::Refused { .. } => Err(Failure::failed(changed)),
            Outcome::Unknown(why) => Err(Failure::unknown(&self.hosts, &why)),
        }
    }

    /// Watches all scopes.
    pub(crate) fn follow_all(&self) -> Followed<impl Stream<Item = DcsEvent> + Unpin> {
        self.follow(self.prefix())
    }

    /// Watches one scope.
    pub(crate) fn follow_scope(&self, scope: &Scope) -> Followed<impl Stream<Item = DcsEvent> + Unpin> {
        self.follow(scope.prefix())
    }

    /// etcd has been silent for as long as anybody waits for it.
    pub(crate) fn silent(&self, patience: Span) -> Failure {
        Failure::etcd(&self.hosts, &format!("nothing was heard of it for {patience}"))
    }

    /// What has come of a call that etcd did not answer, or that it refused.
    fn failed(&self, error: &EtcdError) -> Failure {
        match error {
            EtcdError::Refused(why) => Failure::failed(one_line(&format!("etcd at {} refuses: {why}", self.hosts))),
            EtcdError::Unavailable(_) | EtcdError::Config(_) => Failure::etcd(&self.hosts, error),
        }
    }

    fn follow(&self, prefix: String) -> Followed<impl Stream<Item = DcsEvent> + Unpin> {
        Followed { changes: self.etcd.watch(&prefix), view: View::of([prefix.clone()]), prefix }
    }

    fn prefix(&self) -> String {
        format!("/{}/", self.namespace)
    }

    async fn list(&self, prefix: &str) -> Result<Vec<KeyValue>, Failure> {
        self.etcd.list(prefix).await.map(|(_, entries)| entries).map_err(|e| self.failed(&e))
    }
}

impl<S: Stream<Item = DcsEvent> + Unpin> Followed<S> {
    /// Waits for the next change, for `patience` at most; says whether there was one. Changes that wait are taken
    /// together.
    pub(crate) async fn changed(&mut self, patience: Duration) -> bool {
        let next = async {
            match self.changes.next().await {
                Some(event) => event,
                // etcd has forgotten what it has shown: nothing will ever follow.
                None => std::future::pending().await,
            }
        };
        let Ok(event) = tokio::time::timeout(patience, next).await else { return false };
        let mut changed = self.view.apply(&event);
        while let Ok(Some(event)) = tokio::time::timeout(Duration::ZERO, self.changes.next()).await {
            changed |= self.view.apply(&event);
        }
        changed
    }

    /// Whether it has been read at all.
    pub(crate) fn is_known(&self) -> bool {
        self.view.is_complete()
    }

    /// Whether what is known is kept up to date.
    pub(crate) fn is_fresh(&self) -> bool {
        self.view.is_watched()
    }

    pub(crate) fn fleet(&self, namespace: &Store) -> Fleet {
        Fleet::of(&namespace.namespace, self.view.below(&self.prefix))
    }

    pub(crate) fn revision(&self) -> Revision {
        self.view.revision(&self.prefix)
    }
}
