//! Synchronous commits: a write is acknowledged when the standbys that `synchronous_standby_names` asks for have reported it.

use std::collections::{BTreeMap, BTreeSet};

use bots_core::{
    machine::{Span, Time},
    wire::{Lsn, config::SyncMode},
};
use postgres_bot::machine::{Server, Standby, WaitsFor};

use super::{PostgresBody, Process, ServerItem};
use crate::{
    ledger::Ack,
    plant::Plant,
    world::{NodeId, World},
};

/// The eye says that names are in force when it has seen them for so long.
const NAMES_SETTLE: Span = Span::from_millis(100);
/// A reload that is this late is still said to be in force, if that mistake is made.
const RELOAD_TOO_LATE: Span = Span::from_secs(60);

/// What a primary waits for, and what waits.
#[derive(Debug, Clone, Default)]
pub struct Commits {
    /// What the files say that the bot wants.
    wanted: String,
    /// What the processes go by.
    names: Names,
    since: Time,
    /// Up to where each standby has reported.
    flushed: BTreeMap<NodeId, Lsn>,
    /// Written, and not acknowledged yet.
    waiting: Vec<Ack>,
    /// So many records on the disk of a standby that was just started are not replayed yet.
    pub(super) hidden: usize,
}

/// `synchronous_standby_names`, understood.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Names {
    text: String,
    needed: usize,
    of: BTreeSet<String>,
}

impl Names {
    /// Reads `ANY 1 ("a", "b")`, as the bots write it.
    fn read(text: &str) -> Self {
        let (head, list) = text.split_once('(').unwrap_or((text, ""));
        let needed = head.split_whitespace().filter_map(|word| word.parse().ok()).next().unwrap_or(0);
        let names = list.trim_end_matches(')').split(',').map(|name| name.trim().trim_matches('"').to_owned());
        Self { text: text.to_owned(), needed, of: names.filter(|name| !name.is_empty()).collect() }
    }
}

impl PostgresBody {
    /// The shell was told what commits wait for.
    pub(super) fn want_names(&mut self, names: &str) {
        names.clone_into(&mut self.commits.wanted);
    }

    /// A process starts: it reads its files, and what waited is in doubt.
    pub(super) fn commits_begin(&mut self, now: Time, hidden: usize) {
        let wanted = std::mem::take(&mut self.commits.wanted);
        self.commits = Commits { names: Names::read(&wanted), since: now, hidden, wanted, ..Commits::default() };
    }

    /// The process is gone: what waited is in doubt.
    pub(super) fn commits_end(&mut self) {
        self.commits.waiting.clear();
        self.commits.flushed.clear();
    }
}

impl World {
    /// The shell has been told of other names: a server that runs under this bot reads them a moment later.
    pub(super) fn names_wanted(&mut self, node: NodeId, names: &str) {
        if self.body(node).commits.wanted == names {
            return;
        }
        self.body_mut(node).want_names(names);
        self.reload(node);
    }

    pub(super) fn reload(&mut self, node: NodeId) {
        if self.body(node).process == Process::Down || self.body(node).kept {
            return;
        }
        let (run, life) = (self.body(node).run, self.nodes[node.0].life);
        let delay = self.rng.span(1, 120);
        let late = if self.plant == Some(Plant::NamesInForceAtOnce) { RELOAD_TOO_LATE } else { Span::ZERO };
        self.server_after(node, delay + late, ServerItem::Reload { run, life });
    }

    /// What the processes find in their files.
    fn names_on_disk(&self, node: NodeId) -> &str {
        let state = self.nodes[node.0].postgres_state();
        let off = state.is_some_and(|state| state.dynamic().synchronous_mode == SyncMode::Off);
        let body = self.body(node);
        let too_early = self.plant == Some(Plant::NamesGoBeforeKey) && off && body.accepts_writes();
        if too_early { "" } else { &body.commits.wanted }
    }

    /// For a mistake that is made without the machine.
    pub(crate) fn reload_if_names_differ(&mut self, node: NodeId) {
        if self.names_on_disk(node) != self.body(node).commits.names.text {
            self.reload(node);
        }
    }

    pub(super) fn reloaded(&mut self, node: NodeId, run: u64, life: u64) {
        let current = self.nodes[node.0].life == life;
        let now = self.now;
        let names = Names::read(self.names_on_disk(node));
        let body = self.body_mut(node);
        if body.run != run || !current || body.process == Process::Down {
            return;
        }
        if names != body.commits.names {
            (body.commits.names, body.commits.since) = (names, now);
        }
        self.acknowledge(node);
    }

    /// A client's write is in the log: it is answered when it may be.
    pub(crate) fn commit(&mut self, node: NodeId, ack: Ack) {
        self.body_mut(node).commits.waiting.push(ack);
        self.acknowledge(node);
    }

    /// A standby has something on its disk, and tells the server that it has it from.
    pub(super) fn report_flush(&mut self, standby: NodeId) {
        let Some(link) = self.body(standby).link else { return };
        let at = self.body(standby).disk.wal.end();
        let delay = self.plan.wal_delay.draw(&mut self.rng);
        self.server_after(link.to, delay, ServerItem::Flushed { standby, run: link.run, at });
    }

    pub(super) fn flush_reported(&mut self, node: NodeId, standby: NodeId, run: u64, at: Lsn) {
        if self.body(node).run != run || !self.servers_meet(node, standby) || !self.standbys_of(node).contains(&standby)
        {
            return;
        }
        let flushed = self.body_mut(node).commits.flushed.entry(standby).or_default();
        *flushed = at.max(*flushed);
        self.acknowledge(node);
    }

    /// Whether enough of those that commits wait for receive from this server at this moment.
    pub(crate) fn can_acknowledge(&self, node: NodeId) -> bool {
        let Some(body) = self.nodes[node.0].postgres() else { return false };
        let names = &body.commits.names;
        let counted = |s: &NodeId| names.of.contains(&self.nodes[s.0].name);
        names.needed == 0 || self.standbys_of(node).into_iter().filter(counted).count() >= names.needed
    }

    /// Answers whom it may.
    fn acknowledge(&mut self, node: NodeId) {
        if !self.body(node).accepts_writes() {
            return;
        }
        let names = self.body(node).commits.names.clone();
        let counted = |s: &NodeId| names.of.contains(&self.nodes[s.0].name);
        let flushed = &self.body(node).commits.flushed;
        let mut reached: Vec<Lsn> = flushed.iter().filter(|(s, _)| counted(s)).map(|(_, at)| *at).collect();
        reached.sort_unstable_by(|a, b| b.cmp(a));
        let upto = match names.needed {
            0 => Lsn(u64::MAX),
            needed => reached.get(needed - 1).copied().unwrap_or_default(),
        };
        let (now, overdue) = (self.now, self.is_overdue(node));
        let waiting = std::mem::take(&mut self.body_mut(node).commits.waiting);
        for ack in waiting {
            if ack.end <= upto {
                self.ledger.acks.push(Ack { at: now, overdue, ..ack });
            } else {
                self.body_mut(node).commits.waiting.push(ack);
            }
        }
    }

    /// What a look shows of it.
    pub(super) fn with_commits(&self, node: NodeId, mut server: Server) -> Server {
        if server.in_recovery {
            server.streaming |= self.plant == Some(Plant::UpstreamForgotten);
            return server;
        }
        let commits = &self.body(node).commits;
        let told_too_early = self.plant == Some(Plant::NamesInForceAtOnce);
        let names = if told_too_early { commits.wanted.clone() } else { commits.names.text.clone() };
        let in_force = told_too_early || self.now.since(commits.since) >= NAMES_SETTLE;
        server.waits_for = WaitsFor { names, in_force };
        for standby in self.standbys_of(node) {
            let flushed = commits.flushed.get(&standby).copied().unwrap_or_default();
            let streams = flushed > Lsn(0);
            server.standbys.insert(self.nodes[standby.0].name.clone(), Standby { streams, flushed });
        }
        if self.plant == Some(Plant::CountedBeforeCaughtUp) {
            let all = self.servers().into_iter().filter(|other| *other != node);
            let standby = Standby { streams: true, flushed: Lsn(u64::MAX) };
            server.standbys = all.map(|other| (self.nodes[other.0].name.clone(), standby.clone())).collect();
        }
        server
    }
}
