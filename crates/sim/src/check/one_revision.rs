//! S4: every response is from exactly one published commit, and that commit is whole where it is served.

use std::collections::BTreeSet;

use bots_core::{
    dcs::{Outcome, Write},
    wire::{Canary, ContentRevision, Kind},
};

use super::{Check, Seen};
use crate::world::{Body, Node, World};

#[derive(Debug, Default)]
pub(super) struct OneRevision {
    published: BTreeSet<String>,
    /// What web bots were told to try, and who.
    tried: BTreeSet<(String, String)>,
}

impl Check for OneRevision {
    fn requirement(&self) -> &'static str {
        "S4 every response is from exactly one published commit"
    }

    fn see(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::Applied(applied) if matches!(applied.outcome, Outcome::Done(_)) => {
                let scope = Node::scope_of(Kind::Content);
                let (live, canary) = (scope.revision_live(), scope.revision_canary());
                for write in &applied.transaction.then {
                    if let Write::Put { key, value, .. } = write
                        && *key == canary
                    {
                        let canary: Canary =
                            serde_json::from_str(value).map_err(|e| format!("the canary cannot be read: {e}"))?;
                        self.tried.insert((canary.member, canary.sha));
                    }
                    if let Write::Put { key, value, .. } = write
                        && *key == live
                    {
                        let revision: ContentRevision = serde_json::from_str(value)
                            .map_err(|e| format!("the live revision cannot be read: {e}"))?;
                        // What nobody served could not be tried on anybody.
                        let untried = !self.tried.iter().any(|(_, sha)| *sha == revision.sha);
                        let unseen = world.plan.canary && untried && world.origin.is_sick(&revision.sha);
                        // What web bots alone can tell is looked at where it is known whether there were any.
                        let excused = unseen || world.origin.is_refused(&revision.sha);
                        if world.origin.is_unfit(&revision.sha) && !excused {
                            return Err(format!("{} is published, and it breaks the rules for content", revision.sha));
                        }
                        self.published.insert(revision.sha);
                    }
                }
                Ok(())
            }
            Seen::Response { node, sha } => {
                let n = &world.nodes[node.0];
                let member = format!("{}/{}", n.scope().name(), n.name);
                if !self.published.contains(*sha) && !self.tried.contains(&(member, (*sha).to_owned())) {
                    return Err(format!("{} serves {sha}, which was never published", n.name));
                }
                match &n.body {
                    Body::Web(body) if body.has(sha) => Ok(()),
                    Body::Web(_) | Body::Postgres(_) | Body::Content(_) => {
                        Err(format!("{} serves {sha}, which it does not have whole", n.name))
                    }
                }
            }
            Seen::Applied(_)
            | Seen::Moment
            | Seen::TimerFired { .. }
            | Seen::PostgresStep { .. }
            | Seen::JobStarted { .. }
            | Seen::Writable { .. }
            | Seen::SetAside { .. } => Ok(()),
        }
    }
}
