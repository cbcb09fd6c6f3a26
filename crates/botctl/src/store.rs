//! The way to etcd: reads whole namespaces, runs transactions, follows changes. Its failures are the operator's words.

use std::time::Duration;

use bots_core::{
    dcs::{DcsEvent, KeyValue, NameError, Outcome, Scope, Transaction, View},
    shell::{Etcd, Secret, config, dcs::EtcdError},
};
use futures_util::{Stream, StreamExt};

use crate::{
    args::Args,
    failure::Failure,
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
        if args.etcd_username.is_some() != args.etcd_password_file.is_some() {
            return Err(Failure::usage("--etcd-username and --etcd-password-file belong together"));
        }
        let mut members = config::Etcd {
            username: args.etcd_username.clone(),
            // Who names an authority wants TLS, whether or not the addresses say so.
            protocol: args.etcd_cacert.is_some().then(|| String::from("https")),
            cacert: args.etcd_cacert.clone(),
            cert: args.etcd_cert.clone(),
            key: args.etcd_key.clone(),
            ..config::Etcd::from_hosts(&args.etcd)
        };
        if let Some(path) = &args.etcd_password_file {
            members.password =
                Some(Secret::from_file(path).map_err(|e| Failure::usage(format!("--etcd-password-file: {e}")))?);
        }
        let etcd = Etcd::new(&members).map_err(|e| Failure::usage(in_our_words(&e.to_string())))?;
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

    pub(crate) async fn transact(&self, transaction: &Transaction) -> Outcome {
        self.etcd.transact(transaction).await
    }

    /// Watches all scopes.
    pub(crate) fn follow_all(&self) -> Followed<impl Stream<Item = DcsEvent> + Unpin> {
        self.follow(self.prefix())
    }

    /// Watches one scope.
    pub(crate) fn follow_scope(&self, scope: &Scope) -> Followed<impl Stream<Item = DcsEvent> + Unpin> {
        self.follow(scope.prefix())
    }

    /// The failure of a call that etcd did not answer.
    pub(crate) fn silent(&self, why: &dyn std::fmt::Display) -> Failure {
        Failure::etcd(&self.hosts, why)
    }

    fn follow(&self, prefix: String) -> Followed<impl Stream<Item = DcsEvent> + Unpin> {
        Followed { changes: self.etcd.watch(&prefix), view: View::of([prefix.clone()]), prefix }
    }

    fn prefix(&self) -> String {
        format!("/{}/", self.namespace)
    }

    async fn list(&self, prefix: &str) -> Result<Vec<KeyValue>, Failure> {
        self.etcd.list(prefix).await.map(|(_, entries)| entries).map_err(|e| match &e {
            EtcdError::Refused(_) => Failure::failed(in_our_words(&format!("etcd at {}: {e}", self.hosts))),
            EtcdError::Config(_) | EtcdError::Unavailable(_) => self.silent(&e),
        })
    }
}

/// The same with our options in the place of the fields of a bot's configuration.
fn in_our_words(message: &str) -> String {
    let fields = [
        ("set etcd3.protocol to https", "give --etcd-cacert"),
        ("etcd3.hosts", "--etcd"),
        ("etcd3.protocol", "--etcd-cacert"),
        ("etcd3.username", "--etcd-username"),
        ("etcd3.password", "--etcd-password-file"),
        ("etcd3.", "--etcd-"),
    ];
    fields.into_iter().fold(message.to_owned(), |text, (field, option)| text.replace(field, option))
}

impl<S: Stream<Item = DcsEvent> + Unpin> Followed<S> {
    /// Waits for the next change, for `patience` at most; says whether there was one. Changes that wait are taken
    /// together.
    pub(crate) async fn changed(&mut self, patience: Duration) -> bool {
        let Ok(Some(event)) = tokio::time::timeout(patience, self.changes.next()).await else { return false };
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

    pub(crate) fn revision(&self) -> bots_core::dcs::Revision {
        self.view.revision(&self.prefix)
    }
}
