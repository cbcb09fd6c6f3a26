//! Beginnings and ends: bots that are started, asked to stop and killed, machines that stand still or lose power.

use bots_core::machine::Span;

use super::{Body, BotEvent, Brain, Client, Frozen, Item, NodeId, World};
use crate::{
    plant::Plant,
    postgres::{PostgresBody, Process},
};

/// A guard that is woken has killed every process of its server after so long, whatever else the machine has to do.
pub(crate) const GUARD_LATE: Span = Span::from_millis(100);

/// So many processes out of a thousand that stand still alone are guards, where a server runs.
const GUARDS_AMONG_FROZEN: u64 = 400;

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
        let frozen = self.nodes[node.0].frozen;
        // Nothing stops a server whose guard stands still and whose bot is gone, but a device: who has none is spared it.
        if frozen == Frozen::Bot || (frozen == Frozen::Guard && !self.plan.device) {
            self.move_again(node);
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

    /// The machine stands still, or the bot of a server alone, or its guard.
    pub(super) fn freeze(&mut self, node: NodeId, pause: Span) {
        if self.nodes[node.0].frozen != Frozen::No {
            return;
        }
        let frozen = self.what_freezes(node);
        self.nodes[node.0].frozen = frozen;
        let name = self.nodes[node.0].name.clone();
        self.say(format_args!("{name} stands still for {pause}: {frozen:?}"));
        self.thaw_later(node, pause);
        if frozen == Frozen::Guard {
            self.device_runs_out(node);
        }
    }

    /// In some worlds a guard stands still once it has told a bot that came back of its server.
    pub(crate) fn tire_guard(&mut self, node: NodeId) {
        let n = &self.nodes[node.0];
        let has_told = n.postgres().is_some_and(|body| body.is_kept() && body.fence.is_some());
        if !self.plan.tired_guards || n.frozen != Frozen::No || !has_told {
            return;
        }
        let pause = self.rng.span(2_000, 9_000);
        self.nodes[node.0].frozen = Frozen::Guard;
        let name = self.nodes[node.0].name.clone();
        self.say(format_args!("{name}: its guard stands still for {pause}"));
        self.thaw_later(node, pause);
    }

    /// What stands still now moves again then, unless something else has ended that before.
    fn thaw_later(&mut self, node: NodeId, pause: Span) {
        let n = &mut self.nodes[node.0];
        n.freezes += 1;
        let (power, freeze) = (n.power, n.freezes);
        self.after(pause, Item::Thaw { node, power, freeze });
    }

    fn what_freezes(&mut self, node: NodeId) -> Frozen {
        let Some(process) = self.nodes[node.0].postgres().map(|body| body.process) else { return Frozen::Machine };
        if !self.rng.chance(500) || self.nodes[node.0].brain.is_none() {
            return Frozen::Machine;
        }
        let guard = self.rng.chance(GUARDS_AMONG_FROZEN) && process != Process::Down;
        if guard { Frozen::Guard } else { Frozen::Bot }
    }

    /// A guard that stands still does not keep its device alive, which then resets the machine: as late as its last order allows.
    fn device_runs_out(&mut self, node: NodeId) {
        let n = &self.nodes[node.0];
        let Some(body) = n.postgres().filter(|body| body.may_take_writes() && self.plan.device) else { return };
        let Some((device, fence)) = body.device.zip(body.fence) else { return };
        let (at, power, run) = (n.clock.global(device.max(fence)), n.power, body.run);
        self.at(at, Item::Reset { node, power, run });
    }

    /// The device acts, if the guard stands still as it did.
    pub(super) fn reset(&mut self, node: NodeId, power: u64, run: u64) {
        let n = &self.nodes[node.0];
        let same = n.power == power && n.frozen == Frozen::Guard;
        let armed = n.postgres().is_some_and(|body| body.run == run && body.may_take_writes());
        if same && armed && !self.device_is_off(node) {
            self.reset_machine(node);
        }
    }

    /// Whether a device acts on no server, for there is none or by a mistake.
    fn device_is_off(&self, node: NodeId) -> bool {
        let closed = self.nodes[node.0].postgres().is_some_and(PostgresBody::is_left_alone);
        match self.plant {
            Some(Plant::DeviceSleeps) => true,
            Some(Plant::DeviceClosedTooSoon) => closed || !self.plan.device,
            _no_mistake => !self.plan.device,
        }
    }

    fn reset_machine(&mut self, node: NodeId) {
        self.lose_power(node);
        let pause = self.rng.span(1_000, 5_000);
        self.start_later(node, pause);
    }

    /// The machine moves again, unless its watchdog device has reset it: no guard can stop a server in time that moves again
    /// together with it. The device acts as late as it may; until then, the guard finds its fence passed when it wakes.
    pub(super) fn thaw(&mut self, node: NodeId, power: u64, freeze: u64) {
        let is_another = self.nodes[node.0].freezes != freeze;
        if is_another || self.nodes[node.0].power != power || self.nodes[node.0].frozen == Frozen::No {
            return;
        }
        if self.nodes[node.0].frozen == Frozen::Machine && self.was_reset(node) {
            return self.reset_machine(node);
        }
        let name = self.nodes[node.0].name.clone();
        self.say(format_args!("{name} moves again"));
        self.move_again(node);
        self.deferred(node);
    }

    fn move_again(&mut self, node: NodeId) {
        let n = &mut self.nodes[node.0];
        let was = std::mem::replace(&mut n.frozen, Frozen::No);
        if was == Frozen::Machine {
            n.thawed = Some(self.now);
        }
        if was == Frozen::Guard {
            self.guard_moves_again(node);
        }
    }

    /// Whether a server that stood still past its fence, and its guard with it, moves again and is about to be killed. Without a watchdog
    /// device clients may get answers until then.
    pub(crate) fn is_overdue(&self, node: NodeId) -> bool {
        let n = &self.nodes[node.0];
        let fenced = n.postgres().and_then(|body| body.fence).is_some_and(|at| n.clock.local(self.now) >= at);
        !self.plan.device && fenced && n.thawed.is_some_and(|at| self.now < at + GUARD_LATE)
    }

    fn was_reset(&self, node: NodeId) -> bool {
        let n = &self.nodes[node.0];
        let Some(body) = n.postgres().filter(|body| body.may_take_writes()) else { return false };
        if self.device_is_off(node) {
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
