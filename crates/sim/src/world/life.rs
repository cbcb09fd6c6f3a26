//! Beginnings and ends: bots that are started, asked to stop and killed, machines that stand still or lose power.

use bots_core::machine::Span;

use super::{Body, BotEvent, Brain, Client, Frozen, Item, NodeId, World};
use crate::plant::Plant;

impl World {
    /// Starts a bot, unless its machine has lost power since that was decided or it runs already.
    pub(super) fn start(&mut self, node: NodeId, power: u64) {
        if self.nodes[node.0].power != power || self.nodes[node.0].brain.is_some() {
            return;
        }
        let instance = format!("{:016x}", self.rng.draw());
        let n = &mut self.nodes[node.0];
        n.life += 1;
        n.instance = instance;
        n.client = Client::default();
        n.inbox.clear();
        n.busy_until = self.now;
        (n.timer, n.fired) = (None, None);
        n.armed += 1;
        let (brain, prefixes) = Brain::new(n, &self.plan);
        n.brain = Some(brain);
        let (name, life) = (n.name.clone(), n.life);
        self.say(format_args!("{name} starts (life {life})"));
        match &self.nodes[node.0].body {
            Body::Postgres(_) => self.begin_observing(node),
            Body::Content(_) => {}
            Body::Web(_) => self.begin_measuring(node),
        }
        self.connect(node, prefixes);
        self.arm_first(node);
    }

    /// The bot's process is gone, at once. What it started dies with it.
    pub(super) fn end_bot(&mut self, node: NodeId, how: &str) {
        let n = &mut self.nodes[node.0];
        if n.brain.take().is_none() {
            return;
        }
        n.life += 1;
        n.client = Client::default();
        n.inbox.clear();
        n.timer = None;
        let name = n.name.clone();
        self.say(format_args!("{name} {how}"));
        if self.nodes[node.0].frozen == Frozen::Bot {
            self.nodes[node.0].frozen = Frozen::No;
        }
        match &self.nodes[node.0].body {
            Body::Postgres(_) => self.server_loses_bot(node),
            Body::Content(_) => {}
            Body::Web(_) => self.web_loses_bot(node),
        }
    }

    /// The machine loses power.
    pub(super) fn lose_power(&mut self, node: NodeId) {
        self.nodes[node.0].power += 1;
        self.nodes[node.0].frozen = Frozen::No;
        self.nodes[node.0].waiting.clear();
        self.end_bot(node, "loses power");
        if let Body::Postgres(_) = &self.nodes[node.0].body {
            self.server_loses_power(node);
        }
    }

    /// Starts the bot after a while, as systemd or the operator does.
    pub(super) fn start_later(&mut self, node: NodeId, pause: Span) {
        let power = self.nodes[node.0].power;
        self.after(pause, Item::Start { node, power });
    }

    /// The bot asked to end: systemd starts it again, however it ended.
    pub(crate) fn exited(&mut self, node: NodeId, code: u8, message: &str) {
        self.end_bot(node, &format!("exits with code {code}: {message}"));
        let pause = self.rng.span(500, 4_000);
        self.start_later(node, pause);
    }

    /// The machine stands still, or the bot of a server alone.
    pub(super) fn freeze(&mut self, node: NodeId, pause: Span) {
        if self.nodes[node.0].frozen != Frozen::No || self.nodes[node.0].brain.is_none() {
            return;
        }
        let alone = self.nodes[node.0].postgres().is_some() && self.rng.chance(500);
        self.nodes[node.0].frozen = if alone { Frozen::Bot } else { Frozen::Machine };
        let (name, power) = (self.nodes[node.0].name.clone(), self.nodes[node.0].power);
        self.say(format_args!("{name} stands still for {pause}"));
        self.after(pause, Item::Thaw { node, power });
    }

    /// The machine moves again, unless its watchdog device has reset it: no guard can stop a server in time that moves again
    /// together with it. The device acts as late as it may; until then, the guard finds its fence passed when it wakes.
    pub(super) fn thaw(&mut self, node: NodeId, power: u64) {
        if self.nodes[node.0].power != power || self.nodes[node.0].frozen == Frozen::No {
            return;
        }
        if self.nodes[node.0].frozen == Frozen::Machine && self.was_reset(node) {
            self.lose_power(node);
            let pause = self.rng.span(1_000, 5_000);
            return self.start_later(node, pause);
        }
        self.nodes[node.0].frozen = Frozen::No;
        let name = self.nodes[node.0].name.clone();
        self.say(format_args!("{name} moves again"));
        self.deferred(node);
    }

    fn was_reset(&self, node: NodeId) -> bool {
        let n = &self.nodes[node.0];
        let Some(body) = n.postgres().filter(|body| body.may_take_writes()) else { return false };
        if self.plant == Some(Plant::DeviceSleeps) {
            return false;
        }
        let acts = body.device.zip(body.fence).map(|(device, fence)| device.max(fence));
        acts.is_none_or(|acts| n.clock.local(self.now) >= acts)
    }

    /// Asks a bot to end in good order.
    pub(super) fn ask_to_stop(&mut self, node: NodeId) {
        if self.nodes[node.0].brain.is_some() {
            let event = BotEvent::shutdown(self.nodes[node.0].kind);
            self.tell(node, Span::ZERO, event);
        }
    }
}
