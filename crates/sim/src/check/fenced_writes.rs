//! S3: a step taken under a lock carries the lock's revision, so that etcd refuses it when it is stale. Looked at in every
//! transaction that etcd carries out.

use bots_core::{
    dcs::{Compare, KeyValue, Outcome, Scope, Transaction, Write},
    wire::Kind,
};

use super::{Check, Seen};
use crate::world::{Applied, Node, World};

#[derive(Debug)]
pub(super) struct FencedWrites;

impl Check for FencedWrites {
    fn requirement(&self) -> &'static str {
        "S3 a step taken under a lock carries the lock's revision and is refused when stale"
    }

    fn see(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        let Seen::Applied(applied) = seen else { return Ok(()) };
        if !matches!(applied.outcome, Outcome::Done(_)) {
            return Ok(());
        }
        for (write, before) in applied.transaction.then.iter().zip(applied.before) {
            check_write(world, applied, write, before.as_ref())?;
        }
        Ok(())
    }
}

fn check_write(world: &World, applied: &Applied<'_>, write: &Write, before: Option<&KeyValue>) -> Result<(), String> {
    let name = &world.nodes[applied.node.0].name;
    let (key, put) = match write {
        Write::Put { key, value, lease } => (key, Some((value, lease))),
        Write::Delete { key } => (key, None),
    };
    let scopes = [Kind::Postgres, Kind::Content, Kind::Web].map(Node::scope_of);
    let Some((scope, rest)) = scopes.iter().find_map(|scope| Some((scope, scope.strip(key)?))) else {
        return Err(format!("{name} writes {key}, which is in no scope"));
    };
    let transaction = applied.transaction;
    let fair = match rest {
        "leader" => match put {
            Some((value, lease)) => {
                let free = transaction.compare.contains(&Compare::Absent(key.clone()));
                let own = before.is_some_and(|kv| kv.value == *name && has_modified(transaction, key));
                value == name && lease.is_some() && (free || own)
            }
            None => is_guarded(scope, transaction) && (holds(before, name) || has_promises(scope, transaction)),
        },
        "history" | "timelines" | "status" | "failover" | "sync" | "failsafe" => is_guarded(scope, transaction),
        "initialize" | "config" => is_guarded(scope, transaction) || is_bootstrap(scope, transaction),
        "push" => true,
        rest if rest.starts_with("revision/") => is_guarded(scope, transaction),
        rest if rest.starts_with("promises/") => {
            scope.promise(name) == *key && transaction.compare.iter().any(|c| c.key() == key)
        }
        rest if rest.starts_with("members/") => {
            scope.member(name) == *key && transaction.compare.iter().any(|c| c.key() == key)
        }
        rest if rest.starts_with("load/") && rest.ends_with("/claim") => match put {
            Some((_, lease)) => {
                let message = key.trim_end_matches("/claim");
                let seen = transaction.compare.iter().any(|c| c.key() == message && !matches!(c, Compare::Absent(_)));
                lease.is_some() && seen && transaction.compare.contains(&Compare::Absent(key.clone()))
            }
            None => transaction.compare.iter().any(|c| matches!(c, Compare::LeaseIs(k, _) if k == key)),
        },
        rest if rest.starts_with("load/") => is_guarded(scope, transaction),
        _unknown => false,
    };
    if fair { Ok(()) } else { Err(format!("{name} writes {key} under the conditions {:?}", transaction.compare)) }
}

fn holds(lock: Option<&KeyValue>, name: &str) -> bool {
    lock.is_none_or(|kv| kv.value == name)
}

/// Whether the transaction, which takes another's lock away, is refused when a promise is taken back or the votes are others.
fn has_promises(scope: &Scope, transaction: &Transaction) -> bool {
    let promised = scope.key("promises/");
    has_modified(transaction, &scope.leader())
        && has_modified(transaction, &scope.sync())
        && transaction.compare.iter().any(|c| matches!(c, Compare::ModifiedAt(key, _) if key.starts_with(&promised)))
}

/// Whether the transaction is refused once the leader lock is another's, or taken anew.
fn is_guarded(scope: &Scope, transaction: &Transaction) -> bool {
    let leader = scope.leader();
    let created = transaction.compare.iter().any(|c| matches!(c, Compare::CreatedAt(key, _) if *key == leader));
    let leased = transaction.compare.iter().any(|c| matches!(c, Compare::LeaseIs(key, _) if *key == leader));
    created && leased
}

/// Whether the transaction is refused once another has the right to make the cluster.
fn is_bootstrap(scope: &Scope, transaction: &Transaction) -> bool {
    let initialize = scope.initialize();
    transaction.compare.iter().any(|c| match c {
        Compare::Absent(key) | Compare::LeaseIs(key, _) => *key == initialize,
        Compare::Present(_) | Compare::ValueIs(..) | Compare::ModifiedAt(..) | Compare::CreatedAt(..) => false,
    })
}

fn has_modified(transaction: &Transaction, key: &str) -> bool {
    transaction.compare.iter().any(|c| matches!(c, Compare::ModifiedAt(k, _) if k == key))
}
