//! Left behind: the live commit is served by others, and this bot does not have it, or its app does not come up on it. Who is,
//! leaves the serving set until it has caught up, so that the site is one commit again. Whoever would be the last to serve stays: older content is better
//! than none.

use bots_core::{
    machine::{Deadline, Span, Time},
    wire::{Kind, Member, WebFacts},
};
use serde::Serialize;

use super::{Role, State, content::short};

/// How long a serving bot may go on with an older commit once another serves the live one. The content bot has waited for
/// this bot before it made the commit live, so that whoever is late now is late for a reason; what is left is the time in
/// which the end of a preparation and the flip pass each other.
pub const CATCH_UP_MAX: Span = Span::from_secs(3);

/// The sub-machine: since when the bot has been behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub(super) struct Behind {
    since: Option<Time>,
}

impl Behind {
    pub(super) fn observe(&mut self, now: Time, is_behind: bool) {
        self.since = is_behind.then(|| self.since.unwrap_or(now));
    }
}

impl State {
    /// Whether another bot serves the live commit while this one cannot. What a broken watch shows may be old, and while
    /// the database fails over nobody comes or goes.
    pub(super) fn is_behind(&self, now: Time) -> bool {
        let Some(live) = self.falls_short_of() else { return false };
        self.view.is_watched() && !self.database.is_frozen(now) && self.is_served_elsewhere(live)
    }

    /// The live commit, if this bot cannot serve it as it is. An app that does not run falls short of nothing: it may come up on
    /// it, and otherwise it does not serve.
    fn falls_short_of(&self) -> Option<&str> {
        self.content.lacks().or_else(|| self.content.live().filter(|live| self.app.falls_short_of(live)))
    }

    fn is_served_elsewhere(&self, sha: &str) -> bool {
        let prefix = self.settings.scope.members_prefix();
        let own = self.settings.scope.member(&self.settings.name);
        let others = self.view.below(&prefix).filter(|kv| kv.key != own);
        let serves = |m: Member| {
            let is_up = m.head.kind == Kind::Web && m.head.node == Role::Serving.to_string();
            is_up && m.facts::<WebFacts>().is_some_and(|facts| facts.serving.as_deref() == Some(sha))
        };
        others.filter_map(|kv| Member::from_json(&kv.value)).any(serves)
    }

    /// Whether what the bot has is not to be served: at once when it comes, wakes, or has lost its place, a moment later
    /// when it has served without a break.
    pub(super) fn is_left_behind(&self, now: Time) -> bool {
        self.leaves_at().is_some_and(|at| at <= now)
    }

    fn leaves_at(&self) -> Option<Time> {
        let serves_on = self.role == Role::Serving && self.slots.held().is_some();
        let patience = if serves_on { CATCH_UP_MAX } else { Span::ZERO };
        self.behind.since.map(|since| since + patience)
    }

    /// When the sub-machine wants a step of its own accord.
    pub(super) fn behind_deadline(&self) -> Option<Deadline> {
        let at = self.leaves_at().filter(|_| self.role == Role::Serving)?;
        Some(Deadline { at, reason: String::from("leave to those who have the live commit") })
    }

    /// Why a bot with an older commit serves all the same, for the report.
    pub(super) fn why_it_serves_on(&self) -> Option<String> {
        let live = self.falls_short_of().filter(|_| self.role == Role::Serving && self.behind.since.is_none())?;
        Some(format!("no other bot is known to serve commit {}: older content is better than none", short(live)))
    }
}
