//! Everybody outside the fleet: clients that write, readers, and people who push.

use bots_core::{
    machine::Span,
    wire::{Kind, Pin},
};
use content_bot::machine::{Announcement, Event};

use super::{BotEvent, Frozen, Item, NodeId, World, node::Node};
use crate::ledger::Ack;

/// How often somebody reads a page.
const READ_EVERY: Span = Span::from_millis(250);
/// Load is never at a border between two numbers of bots, where rounding would decide.
const LOADS: [u64; 5] = [500, 5_000, 12_500, 20_500, 60_000];

/// What users do.
#[derive(Debug)]
pub(crate) enum UserItem {
    Write,
    Read,
    Push,
    EdgeAnswers { edge: usize, drained: bool },
}

impl World {
    pub(super) fn begin_users(&mut self) {
        if self.plan.cast.postgres > 0 {
            self.after(Span::from_secs(1), Item::User(UserItem::Write));
        }
        if self.plan.cast.content > 0 {
            self.load.in_flight_milli = LOADS[0];
            self.after(Span::from_secs(1), Item::User(UserItem::Read));
            let delay = self.rng.span(2_000, 12_000);
            self.after(delay, Item::User(UserItem::Push));
        }
    }

    pub(super) fn user(&mut self, item: UserItem) {
        match item {
            UserItem::EdgeAnswers { edge, drained } => self.edge_answers(edge, drained),
            UserItem::Write => {
                self.write();
                let pause = self.plan.write_pause;
                let delay = self.rng.around(pause);
                self.after(delay, Item::User(UserItem::Write));
            }
            UserItem::Read => {
                let web: Vec<NodeId> = self.ids().filter(|id| self.nodes[id.0].kind == Kind::Web).collect();
                if let Some(node) = self.rng.pick(&web).copied().filter(|node| !self.nodes[node.0].frozen.holds_bot()) {
                    self.request(node);
                }
                self.after(READ_EVERY, Item::User(UserItem::Read));
            }
            UserItem::Push => {
                if !self.is_healed() {
                    self.push(true);
                    let delay = self.rng.span(3_000, 20_000);
                    self.after(delay, Item::User(UserItem::Push));
                }
            }
        }
    }

    /// A client writes to whatever server takes it, as a connection string with all hosts does.
    fn write(&mut self) {
        let mut servers = self.servers();
        while !servers.is_empty() {
            let at = usize::try_from(self.rng.below(u64::try_from(servers.len()).unwrap_or(1))).unwrap_or(0);
            let node = servers.swap_remove(at);
            if self.nodes[node.0].frozen == Frozen::Machine || !self.body(node).accepts_writes() {
                continue;
            }
            let size =
                if self.rng.chance(20) { self.rng.between(60_000, 700_000) } else { self.rng.between(60, 9_000) };
            let (serial, now) = (self.ledger.next_record(), self.now);
            let body = self.body_mut(node);
            body.disk.wal.append(serial, size);
            let (index, end) = (body.disk.wal.len() - 1, body.disk.wal.end());
            self.commit(node, Ack { at: now, node, index, serial, end, overdue: false });
            self.stream_to_standbys(node);
            return;
        }
    }

    /// Somebody pushes a commit; a webhook tells a content bot, most of the time.
    pub(super) fn push(&mut self, fit: bool) {
        self.origin.push(&mut self.rng, fit);
        self.call_webhook();
    }

    pub(super) fn call_webhook(&mut self) {
        let head = self.origin.head().to_owned();
        self.say(format_args!("git: the branch is at {head}"));
        let bots: Vec<NodeId> =
            self.ids().filter(|id| self.nodes[id.0].kind == Kind::Content && self.nodes[id.0].bot_moves()).collect();
        if let Some(node) = self.rng.pick(&bots).copied()
            && self.rng.chance(700)
        {
            let delay = self.rng.span(1, 200);
            let announcement = Announcement { delivery: Some(head.clone()), tip: Some(head) };
            self.tell(node, delay, BotEvent::Content(Event::PushReceived(announcement)));
        }
    }

    /// An operator pins some commit, whatever it is like, or takes the pin away.
    pub(super) fn pin(&mut self) {
        if !self.store.answers() {
            return;
        }
        let known = self.origin.commits();
        match self.rng.pick(&known).cloned() {
            Some(sha) if self.rng.chance(600) => {
                let pin = Pin { sha, since_unix_ms: 0 };
                let key = Node::scope_of(Kind::Content).revision_pin();
                self.write_by_hand(key, serde_json::to_string(&pin).unwrap_or_default());
            }
            Some(_) | None => self.unpin(),
        }
    }

    pub(super) fn unpin(&mut self) {
        let key = Node::scope_of(Kind::Content).revision_pin();
        if self.store.get(&key).is_some() {
            self.remove_by_hand(key);
        }
    }

    /// Load changes.
    pub(super) fn change_load(&mut self) {
        if let Some(load) = self.rng.pick(&LOADS).copied() {
            self.load.in_flight_milli = load;
            self.say(format_args!("load: {load} thousandths of a request in flight"));
        }
    }
}
