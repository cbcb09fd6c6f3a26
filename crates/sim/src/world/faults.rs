//! Faults: each kind that the seed has befalls the world now and then until all of them end.

use bots_core::{machine::Span, wire::Kind};
use postgres_bot::machine::{Command, CommandId, Event, Restart};

use super::{BotEvent, Cut, Frozen, Item, Network, NodeId, World, node::Node};
use crate::{plan::Fault, plant::Plant};

/// So many power failures out of a thousand are of a supply that other machines hang on, too.
const SHARED_SUPPLY: u64 = 400;

/// A fault begins or ends.
#[derive(Debug)]
pub(crate) enum ChaosItem {
    Begin(Fault),
    EndOutage,
    MendStore(NodeId),
    MendPeers(NodeId, NodeId),
    Quicken,
    OriginUp,
    SpeakAgain(NodeId),
    DiskGoesOn(NodeId),
    TakeBackMode(String),
}

impl World {
    pub(super) fn begin_faults(&mut self) {
        for (fault, pause) in self.plan.faults.clone() {
            let delay = self.rng.around(pause);
            self.after(delay, Item::Chaos(ChaosItem::Begin(fault)));
        }
    }

    pub(super) fn chaos(&mut self, item: ChaosItem) {
        match item {
            ChaosItem::Begin(fault) => {
                if self.is_healed() {
                    return;
                }
                self.say(format_args!("fault: {fault:?}"));
                self.befall(fault);
                if self.plant == Some(Plant::ClockSetBack) {
                    self.with_bot(Some(Kind::Postgres), Self::set_clock_back);
                }
                let pause = self.plan.faults.get(&fault).copied().unwrap_or(Span::from_secs(30));
                let delay = self.rng.around(pause);
                self.after(delay, Item::Chaos(ChaosItem::Begin(fault)));
            }
            ChaosItem::EndOutage => self.end_outage(),
            ChaosItem::MendStore(node) => self.mend_store(node),
            ChaosItem::MendPeers(a, b) => self.network.mend_peers(a, b),
            ChaosItem::Quicken => self.network.slow_store = false,
            ChaosItem::OriginUp => self.origin.down = false,
            ChaosItem::SpeakAgain(node) => self.silence_server(node, false),
            ChaosItem::DiskGoesOn(node) => self.stall_disk(node, false),
            ChaosItem::TakeBackMode(mode) => self.take_back_mode(mode),
        }
    }

    pub(super) const fn slow_store(&self) -> bool {
        self.network.slow_store
    }

    fn befall(&mut self, fault: Fault) {
        match fault {
            Fault::KillBot => self.with_bot(None, Self::kill_bot),
            Fault::PowerLoss => self.with_bot(None, Self::power_fails),
            Fault::Freeze => self.with_bot(None, |world, node| {
                let pause = world.pause(50, 12_000);
                world.freeze(node, pause);
            }),
            Fault::Shutdown => self.with_bot(None, Self::ask_to_stop),
            Fault::CutFromStore => self.with_bot(None, Self::cut_from_store),
            Fault::CutFromPeers => self.with_bot(None, Self::cut_from_peers),
            Fault::StoreOutage => self.begin_outage(),
            Fault::SlowStore => {
                self.network.slow_store = true;
                let pause = self.pause(500, 8_000);
                self.after(pause, Item::Chaos(ChaosItem::Quicken));
            }
            Fault::BreakWatches => {
                for node in self.ids() {
                    for prefix in self.nodes[node.0].client.prefixes() {
                        if self.rng.chance(500) {
                            self.break_watch(node, &prefix, "the connection was closed");
                        }
                    }
                }
            }
            Fault::CompactStore => self.store.compact(),
            Fault::CrashPostmaster => self.with_bot(Some(Kind::Postgres), |world, node| {
                let _lived = world.crash_server(node);
            }),
            Fault::Switchover => self.ask_for_switchover(),
            Fault::Operator => self.operate(),
            Fault::ChangeMode => self.change_mode(),
            Fault::Pin => self.pin(),
            Fault::ForcePush => {
                self.origin.force_push(&mut self.rng);
                self.call_webhook();
            }
            Fault::OriginDown => {
                self.origin.down = true;
                let pause = self.pause(500, 15_000);
                self.after(pause, Item::Chaos(ChaosItem::OriginUp));
            }
            Fault::BadCommit => self.push(false),
            Fault::CrashApp => self.with_bot(Some(Kind::Web), Self::crash_app),
            Fault::LoadSurge => self.change_load(),
            Fault::StarveContent => self.with_bot(Some(Kind::Web), |world, node| {
                let pause = world.pause(5_000, 40_000);
                world.starve(node, pause);
            }),
            Fault::CutLeader => self.cut_leader(),
            Fault::StallDisk => self.with_bot(Some(Kind::Postgres), |world, node| {
                let pause = world.pause(500, 40_000);
                world.stall_disk(node, true);
                world.after(pause, Item::Chaos(ChaosItem::DiskGoesOn(node)));
            }),
            Fault::SilenceServer => self.with_bot(Some(Kind::Postgres), |world, node| {
                let pause = world.pause(500, 40_000);
                world.silence_server(node, true);
                world.after(pause, Item::Chaos(ChaosItem::SpeakAgain(node)));
            }),
        }
    }

    fn set_clock_back(&mut self, node: NodeId) {
        let by = self.rng.span(3_000, 60_000);
        self.nodes[node.0].clock.set_back(by);
        self.guard_moves_again(node);
    }

    /// kill -9; it is started again.
    pub(super) fn kill_bot(&mut self, node: NodeId) {
        self.end_bot(node, "is killed");
        let pause = self.pause(200, 12_000);
        self.start_later(node, pause);
    }

    /// Most pauses are short, some are long.
    fn pause(&mut self, low: u64, high: u64) -> Span {
        let most = if self.rng.chance(500) { low + (high - low) / 6 } else { high };
        self.rng.span(low, most)
    }

    /// Picks a victim; leaders more often than their share, for there it hurts.
    fn with_bot(&mut self, kind: Option<Kind>, act: impl FnOnce(&mut Self, NodeId)) {
        let all: Vec<NodeId> = self.ids().filter(|id| kind.is_none_or(|kind| self.nodes[id.0].kind == kind)).collect();
        let leads = |id: &&NodeId| {
            let node: &Node = &self.nodes[id.0];
            self.store.value(&node.scope().leader()) == Some(node.name.as_str())
        };
        let leaders: Vec<NodeId> = all.iter().filter(leads).copied().collect();
        let from = if self.rng.chance(400) && !leaders.is_empty() { leaders } else { all };
        if let Some(node) = self.rng.pick(&from).copied() {
            act(self, node);
        }
    }

    /// Of one machine, or of those that hang on the same supply as well; each comes back in its own time.
    fn power_fails(&mut self, node: NodeId) {
        let shared = self.rng.chance(SHARED_SUPPLY);
        let others: Vec<NodeId> = self.ids().filter(|other| *other != node).collect();
        for dark in std::iter::once(node).chain(others) {
            if dark == node || (shared && self.rng.chance(500)) {
                self.lose_power(dark);
                let pause = self.pause(500, 20_000);
                self.start_later(dark, pause);
            }
        }
    }

    fn cut_from_store(&mut self, node: NodeId) {
        let cut = match self.rng.below(4) {
            0 => Cut { requests: true, replies: false },
            1 => Cut { requests: false, replies: true },
            _ => Cut { requests: true, replies: true },
        };
        let name = self.nodes[node.0].name.clone();
        self.say(format_args!("{name} is cut from etcd: {cut:?}"));
        self.network.cut_from_store(node, cut);
        self.watches_fall_silent(node);
        let pause = self.pause(300, if self.plan.failsafe { 25_000 } else { 15_000 });
        self.after(pause, Item::Chaos(ChaosItem::MendStore(node)));
        if self.rng.chance(500) {
            self.cut_from_peers(node);
        }
    }

    /// The Postgres leader, alone or with one that vouches for it, is cut from etcd and from nobody, one or all of the others.
    fn cut_leader(&mut self) {
        let leader = self.store.value(&Node::scope_of(Kind::Postgres).leader()).map(str::to_owned);
        let Some(leader) = leader.and_then(|name| self.named(&name)) else { return };
        let others: Vec<NodeId> = self.servers().into_iter().filter(|id| *id != leader).collect();
        let pause = self.rng.span(3_000, 25_000);
        let mut cut = vec![leader];
        if self.rng.chance(300) {
            cut.extend(self.rng.pick(&others).copied());
        }
        for node in cut {
            self.network.cut_from_store(node, Cut { requests: true, replies: true });
            self.watches_fall_silent(node);
            self.after(pause, Item::Chaos(ChaosItem::MendStore(node)));
        }
        let parted = match self.rng.below(4) {
            0 => Vec::new(),
            1 => others,
            _ => self.rng.pick(&others).copied().into_iter().collect(),
        };
        for peer in parted {
            self.network.cut_peers(leader, peer);
            self.after(pause, Item::Chaos(ChaosItem::MendPeers(leader, peer)));
        }
        self.look_at_streams();
    }

    fn mend_store(&mut self, node: NodeId) {
        for item in self.network.mend_store(node) {
            let delay = self.rng.span(1, 300);
            self.after(delay, item);
        }
        self.watches_resume(node);
    }

    fn cut_from_peers(&mut self, node: NodeId) {
        let all = self.rng.chance(500);
        let pause = self.pause(300, 15_000);
        let others: Vec<NodeId> = self.ids().filter(|id| *id != node).collect();
        let cut = if all { others } else { self.rng.pick(&others).copied().into_iter().collect() };
        for peer in cut {
            self.network.cut_peers(node, peer);
            self.after(pause, Item::Chaos(ChaosItem::MendPeers(node, peer)));
        }
        self.look_at_streams();
    }

    fn begin_outage(&mut self) {
        self.store.begin_outage(self.now);
        for node in self.ids() {
            self.watches_fall_silent(node);
        }
        let pause = self.pause(300, if self.plan.failsafe { 40_000 } else { 12_000 });
        self.after(pause, Item::Chaos(ChaosItem::EndOutage));
    }

    fn end_outage(&mut self) {
        let held = self.store.end_outage(self.now);
        for item in held {
            let delay = self.rng.span(1, 300);
            self.after(delay, item);
        }
        for node in self.ids() {
            self.watches_resume(node);
        }
    }

    /// An operator asks for a switchover, as `botctl` and `patronictl` do.
    fn ask_for_switchover(&mut self) {
        let scope = Node::scope_of(Kind::Postgres);
        let Some(leader) = self.store.value(&scope.leader()).map(str::to_owned) else { return };
        let others: Vec<String> =
            self.servers().iter().map(|id| self.nodes[id.0].name.clone()).filter(|name| *name != leader).collect();
        let to = if self.rng.chance(600) { self.rng.pick(&others).cloned() } else { None };
        let request = match to {
            Some(to) => serde_json::json!({ "leader": leader, "member": to }),
            None => serde_json::json!({ "leader": leader }),
        };
        if self.store.answers() {
            self.place_edges();
            self.write_by_hand(scope.failover(), request.to_string());
        }
    }

    /// An operator does to the Postgres cluster what `patronictl` can do.
    fn operate(&mut self) {
        if self.rng.chance(300) {
            let pause = self.rng.chance(600);
            return self.set_pause(pause);
        }
        self.with_bot(Some(Kind::Postgres), |world, node| {
            if !world.nodes[node.0].bot_moves() {
                return;
            }
            let command = match world.rng.below(8) {
                0..4 => Command::Restart(Restart::default()),
                4 => {
                    let at = world.nodes[node.0].clock.epoch_unix_ms() + world.now.as_millis() + world.rng.below(9_000);
                    Command::Restart(Restart { at_unix_ms: Some(at), ..Restart::default() })
                }
                5 => Command::DropRestart,
                wish => Command::Reinitialize { force: wish == 6, from_leader: world.rng.chance(500) },
            };
            let name = world.nodes[node.0].name.clone();
            world.say(format_args!("operator: {name}: {command:?}"));
            let event = Event::Commanded { id: CommandId(world.rng.between(1, 1_000_000)), command };
            world.tell(node, Span::from_millis(1), BotEvent::Postgres(event));
        });
    }

    /// Writes the cluster's `pause`, if etcd answers and the cluster has settings.
    pub(super) fn set_pause(&mut self, pause: bool) {
        self.set_in_config("pause", serde_json::json!(pause));
    }

    /// Everything is mended, and everybody is started again.
    pub(super) fn end_faults(&mut self) {
        self.end_outage();
        for node in self.network.cut_off() {
            self.mend_store(node);
        }
        let held = std::mem::take(&mut self.network.held);
        self.network = Network::default();
        for (_, item) in held {
            self.after(Span::from_millis(10), item);
        }
        self.origin.down = false;
        self.set_pause(false);
        for node in self.servers() {
            self.silence_server(node, false);
            self.stall_disk(node, false);
        }
        for node in self.ids() {
            if self.nodes[node.0].frozen != Frozen::No {
                let (power, freeze) = (self.nodes[node.0].power, self.nodes[node.0].freezes);
                self.thaw(node, power, freeze);
            }
            if self.nodes[node.0].brain.is_none() {
                let delay = self.rng.span(10, 2_000);
                self.start_later(node, delay);
            }
        }
        if self.plan.cast.content > 0 {
            self.unpin();
            self.push(true);
            self.change_load();
        }
    }
}
