//! S7: an existing cluster is never initialised again: its identifier stands once and for all, and no server with another
//! one takes writes.

use bots_core::{
    dcs::{Outcome, Write},
    wire::Kind,
};
use postgres_bot::machine::Job;

use super::{Check, Seen};
use crate::world::{Node, World};

#[derive(Debug, Default)]
pub(super) struct OneCluster {
    recorded: Option<String>,
}

impl Check for OneCluster {
    fn requirement(&self) -> &'static str {
        "S7 an existing cluster is never initialised again"
    }

    fn see(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::Applied(applied) => {
                let initialize = Node::scope_of(Kind::Postgres).initialize();
                let touched = matches!(applied.outcome, Outcome::Done(_))
                    && applied.transaction.then.iter().any(|write| match write {
                        Write::Put { key, .. } | Write::Delete { key } => *key == initialize,
                    });
                if !touched {
                    return Ok(());
                }
                let now = world.store.value(&initialize).filter(|id| !id.is_empty());
                if self.recorded.is_some() && self.recorded.as_deref() != now {
                    return Err(format!("the recorded identifier {:?} became {now:?}", self.recorded));
                }
                self.recorded = now.map(str::to_owned);
                Ok(())
            }
            Seen::JobStarted { node, job: Job::Initialize } if self.recorded.is_some() => {
                Err(format!("{} begins to make a cluster, and there is one", world.nodes[node.0].name))
            }
            // Its guard is about to kill it: what it acknowledges until then counts for nothing.
            Seen::Writable { node } if world.is_overdue(*node) => Ok(()),
            Seen::Writable { node } => {
                let n = &world.nodes[node.0];
                let own = n.postgres().and_then(|body| body.disk.system_id.clone());
                if self.recorded.is_some() && own != self.recorded {
                    return Err(format!("{} accepts writes as {own:?}; the cluster is {:?}", n.name, self.recorded));
                }
                Ok(())
            }
            Seen::Moment
            | Seen::TimerFired { .. }
            | Seen::PostgresStep { .. }
            | Seen::JobStarted { .. }
            | Seen::SetAside { .. }
            | Seen::Response { .. } => Ok(()),
        }
    }
}
