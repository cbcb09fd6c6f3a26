//! A web bot that lacks the live commit does not go on serving an older one beside others that serve the live one.
//!
//! Judged by what etcd holds and the bot has heard of, for longer than it takes the bot to leave. What a bot cannot know, and
//! what an app that starts anew has not got to yet, is not held against it.

use std::collections::BTreeMap;

use bots_core::{
    machine::{Span, Time},
    wire::{Canary, ContentRevision, Kind, Member, WebFacts},
};
use web_bot::machine::{CATCH_UP_MAX, DRAIN_NOTICE, Role};

use super::{Check, Seen};
use crate::world::{Body, Node, World};

/// Stalls, late timers and clocks that run slow.
const MARGIN: Span = Span::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct LeftBehind {
    /// Since when each bot could have known, by name and life.
    since: BTreeMap<(String, u64), Time>,
}

impl Check for LeftBehind {
    fn requirement(&self) -> &'static str {
        "S4 a web bot that lacks the live commit leaves the serving set to those that have it"
    }

    fn see(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String> {
        if !matches!(seen, Seen::Moment) || world.plan.cast.content == 0 {
            return Ok(());
        }
        let lagging: Vec<&Node> = world.nodes.iter().filter(|node| lags(world, node).unwrap_or(false)).collect();
        self.since.retain(|(name, life), _| lagging.iter().any(|node| node.name == *name && node.life == *life));
        for node in lagging {
            let since = *self.since.entry((node.name.clone(), node.life)).or_insert(world.now);
            let lagged = world.now.since(since);
            if lagged > CATCH_UP_MAX + DRAIN_NOTICE + MARGIN {
                return Err(format!("{} has served an older commit beside the live one for {lagged}", node.name));
            }
        }
        Ok(())
    }
}

/// Whether the bot serves an older commit, and has heard that the live one is another and served by another bot.
fn lags(world: &World, node: &Node) -> Option<bool> {
    let state = node.web_state().filter(|state| node.bot_moves() && state.view().is_watched())?;
    let Body::Web(body) = &node.body else { return None };
    let (content, web) = (Node::scope_of(Kind::Content), node.scope());
    let live = world.store.get(&content.revision_live())?;
    let sha = serde_json::from_str::<ContentRevision>(&live.value).ok()?.sha;
    let older = body.served().is_some_and(|served| served != sha) && !body.has(&sha);
    let canary = world.store.value(&content.revision_canary()).and_then(|t| serde_json::from_str::<Canary>(t).ok());
    let tries = canary.is_some_and(|canary| canary.member == format!("{}/{}", web.name(), node.name));
    let heard = state.view().revision(&content.prefix()) >= live.modified;
    if !older || tries || !heard || state.holds_still() {
        return Some(false);
    }
    let known = state.view().revision(&web.prefix());
    let served = world.store.list(&web.members_prefix()).into_iter().filter(|kv| kv.modified <= known).any(|kv| {
        let serves = |m: Member| m.head.node == Role::Serving.to_string() && serving(&m).as_ref() == Some(&sha);
        kv.key != web.member(&node.name) && Member::from_json(&kv.value).is_some_and(serves)
    });
    Some(served)
}

fn serving(member: &Member) -> Option<String> {
    member.facts::<WebFacts>()?.serving
}
