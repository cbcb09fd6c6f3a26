//! What must hold in every state of a small fleet: S1, S2, S3, S6 and S7 of the design.

use bots_core::dcs::{Compare, KeyValue, Transaction, Write};

use crate::{
    cluster::{Fleet, scope},
    server::{Data, Process},
};

impl Fleet {
    /// S1, S6, S7: what can be seen in a state by itself.
    pub(crate) fn check_state(&self) -> Result<(), String> {
        let identifier = self.dcs.get(&scope().initialize()).map(|kv| kv.value.as_str());
        if self.identifier.is_some() && identifier != self.identifier.as_deref() {
            return Err(format!("S7: the cluster's identifier was {:?} and is {identifier:?}", self.identifier));
        }
        let leader = self.dcs.get(&scope().leader()).map(|kv| kv.value.as_str());
        let mut writers = Vec::new();
        for (at, member) in self.members.iter().enumerate() {
            if member.server.process != Process::Primary || (self.options.takeover && !self.can_acknowledge(at)) {
                continue;
            }
            // A cluster in the making is nobody's yet.
            let newborn = !matches!(member.server.data, Data::Present { .. });
            // On the word of members it may go on for as long as its fence stands.
            let vouched = self.options.failsafe && member.server.fence.is_some_and(|fence| self.now < fence);
            if leader != Some(member.name.as_str()) && !newborn && !vouched {
                return Err(format!("S6: {} takes writes, and the lock is {leader:?}'s", member.name));
            }
            writers.push(member.name.as_str());
        }
        if writers.len() > 1 {
            return Err(format!("S1: {writers:?} take writes"));
        }
        Ok(())
    }

    /// S2: who begins to take writes has all that was acknowledged, where a synchronous mode is on.
    pub(crate) fn check_reign(&self, at: usize) -> Result<(), String> {
        let member = &self.members[at];
        let lacks = self.acknowledged.iter().find(|record| !member.server.log.records.contains(record));
        match lacks.filter(|_| self.options.synchronous != "off") {
            Some(record) => Err(format!("S2: {} takes over without the acknowledged write {record}", member.name)),
            None => Ok(()),
        }
    }
}

/// S3: a write that only the holder of the lock may make carries the lock.
pub(crate) fn check_write(name: &str, transaction: &Transaction, before: &[Option<KeyValue>]) -> Result<(), String> {
    let scope = scope();
    let compares = |wanted: &dyn Fn(&Compare) -> bool| transaction.compare.iter().any(wanted);
    let leader = scope.leader();
    let guarded = compares(&|c| matches!(c, Compare::CreatedAt(key, _) if *key == leader))
        && compares(&|c| matches!(c, Compare::LeaseIs(key, _) if *key == leader));
    let deposes = compares(&|c| matches!(c, Compare::ModifiedAt(key, _) if key.contains("/promises/")))
        && compares(&|c| matches!(c, Compare::ModifiedAt(key, _) if *key == leader));
    let makes = compares(&|c| match c {
        Compare::Absent(key) | Compare::LeaseIs(key, _) => *key == scope.initialize(),
        Compare::Present(_) | Compare::ValueIs(..) | Compare::ModifiedAt(..) | Compare::CreatedAt(..) => false,
    });
    for (write, before) in transaction.then.iter().zip(before) {
        let (key, put) = match write {
            Write::Put { key, lease, .. } => (key, Some(lease)),
            Write::Delete { key } => (key, None),
        };
        let own = before.as_ref().is_some_and(|kv| kv.value == name);
        let fair = match scope.strip(key).unwrap_or_default() {
            "leader" => match put {
                Some(lease) => {
                    let free = transaction.compare.contains(&Compare::Absent(key.clone()));
                    let same = compares(&|c| matches!(c, Compare::ModifiedAt(k, _) if k == key));
                    lease.is_some() && (free || (own && same))
                }
                None => guarded || deposes,
            },
            "history" | "timelines" | "status" | "failover" | "sync" | "failsafe" => guarded,
            "initialize" | "config" => guarded || makes,
            rest => {
                let mine = rest == format!("members/{name}") || rest == format!("promises/{name}");
                mine && compares(&|c| c.key() == key)
            }
        };
        if !fair {
            return Err(format!("S3: {name} writes {key} if {:?}", transaction.compare));
        }
    }
    Ok(())
}
