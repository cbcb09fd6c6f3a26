//! A leader that is new to the web scope does not lower the count of load messages before it has watched for a whole stable
//! window: who leads is no reason for a bot to rest.

use bots_core::{
    dcs::{Outcome, Write},
    machine::{Span, Time},
    wire::Kind,
};

use super::{Check, Seen};
use crate::{
    web::STABLE_WINDOW,
    world::{Node, World},
};

/// What a clock may run fast within a window.
const MARGIN: Span = Span::from_millis(20);

#[derive(Debug, Default)]
pub(super) struct SteadyCount {
    led_since: Option<Time>,
}

impl Check for SteadyCount {
    fn requirement(&self) -> &'static str {
        "S5 a new leader does not change the count before it has watched for a whole window"
    }

    fn see(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        let Seen::Applied(applied) = seen else { return Ok(()) };
        if !matches!(applied.outcome, Outcome::Done(_)) {
            return Ok(());
        }
        let scope = Node::scope_of(Kind::Web);
        let (leader, prefix) = (scope.leader(), scope.load_prefix());
        for (write, before) in applied.transaction.then.iter().zip(applied.before) {
            match write {
                Write::Put { key, .. } if *key == leader => self.led_since = Some(world.now),
                Write::Delete { key } if key.starts_with(&prefix) && !key.ends_with("/claim") && before.is_some() => {
                    let led = self.led_since.map_or(Span::ZERO, |since| world.now.since(since));
                    if led + MARGIN < STABLE_WINDOW {
                        let name = &world.nodes[applied.node.0].name;
                        return Err(format!("{name} takes {key} away after it has led for {led}"));
                    }
                }
                Write::Put { .. } | Write::Delete { .. } => {}
            }
        }
        Ok(())
    }
}
