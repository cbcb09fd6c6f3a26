//! Streaming replication: standbys connect, receive, fall silent and connect again.

use bots_core::machine::Span;

use super::{Link, Process, ServerItem};
use crate::world::{NodeId, World};

/// How often a standby that is not connected tries again.
pub(super) const CONNECT_EVERY: Span = Span::from_millis(250);
/// How often a connection without traffic is looked at.
const SILENCE_LOOK: Span = Span::from_millis(500);
/// After so many silent looks a standby gives a connection up (`wal_receiver_timeout`: 5 s, and 1 s where voters take over).
const SILENT_LOOKS_MAX: u32 = 10;
const SILENT_LOOKS_MAX_OF_VOTERS: u32 = 2;

impl World {
    /// A standby tries to connect to the server that its configuration names.
    pub(super) fn connect_upstream(&mut self, node: NodeId, run: u64) {
        let body = self.body(node);
        let standby = matches!(body.process, Process::Up { in_recovery: true, promoting: false });
        if body.run == run && standby && body.link.is_none() && body.commits.hidden > 0 {
            // It connects when it has nothing of its own left to replay.
            return self.server_after(node, CONNECT_EVERY, ServerItem::Connect { run });
        }
        if body.run != run || !standby || body.link.is_some() {
            return;
        }
        self.server_after(node, CONNECT_EVERY, ServerItem::Connect { run });
        let upstream = self.body(node).disk.upstream.clone().and_then(|name| self.named(&name));
        let Some(upstream) = upstream.filter(|up| *up != node && self.servers_meet(node, *up)) else { return };
        if !self.body(upstream).is_open() || self.body(upstream).disk.system_id != self.body(node).disk.system_id {
            return;
        }
        let timeline = self.body(upstream).disk.wal.timeline();
        let follows = self.body(node).disk.wal.is_part_of(&self.body(upstream).disk.wal);
        let upstream_run = self.body(upstream).run;
        let body = self.body_mut(node);
        body.disk.history_seen = body.disk.history_seen.max(timeline);
        if follows {
            body.link = Some(Link { to: upstream, run: upstream_run, busy: false, silent: 0 });
            self.stream_soon(node);
        }
    }

    /// The standbys that are connected to a server.
    pub(super) fn standbys_of(&self, node: NodeId) -> Vec<NodeId> {
        let run = self.body(node).run;
        let linked = |s: &NodeId| self.body(*s).link.is_some_and(|link| link.to == node && link.run == run);
        self.servers().into_iter().filter(linked).collect()
    }

    /// A server has something for its standbys.
    pub(crate) fn stream_to_standbys(&mut self, node: NodeId) {
        for standby in self.standbys_of(node) {
            self.stream_soon(standby);
        }
    }

    /// Connections are to be looked at: somebody was cut off or stands still.
    pub(crate) fn look_at_streams(&mut self) {
        for node in self.servers() {
            if self.body(node).link.is_some() {
                self.stream_soon(node);
            }
        }
    }

    fn stream_soon(&mut self, standby: NodeId) {
        let delay = self.plan.wal_delay.draw(&mut self.rng);
        let body = self.body_mut(standby);
        let run = body.run;
        if let Some(link) = body.link.as_mut().filter(|link| !link.busy) {
            link.busy = true;
            self.server_after(standby, delay, ServerItem::Stream { run });
        }
    }

    /// WAL arrives.
    pub(super) fn stream(&mut self, node: NodeId, run: u64) {
        if self.body(node).run != run || !matches!(self.body(node).process, Process::Up { in_recovery: true, .. }) {
            return;
        }
        let Some(link) = self.body(node).link else { return };
        let there = self.body(link.to).run == link.run && self.body(link.to).process != Process::Down;
        if !self.servers_meet(node, link.to) {
            let most = if self.plan.takeover { SILENT_LOOKS_MAX_OF_VOTERS } else { SILENT_LOOKS_MAX };
            let body = self.body_mut(node);
            let silent = link.silent + 1;
            body.link = (silent < most).then_some(Link { silent, ..link });
            let next = if body.link.is_some() { ServerItem::Stream { run } } else { ServerItem::Connect { run } };
            return self.server_after(node, SILENCE_LOOK, next);
        }
        if !there {
            return self.drop_link(node);
        }
        let wal = self.body(link.to).disk.wal.clone();
        let body = self.body_mut(node);
        body.disk.wal.catch_up(&wal);
        body.disk.history_seen = body.disk.history_seen.max(wal.timeline());
        body.link = Some(Link { busy: false, silent: 0, ..link });
        self.report_flush(node);
        // What follows a standby follows on.
        self.stream_to_standbys(node);
    }

    /// The standby sees that the other end is gone.
    pub(super) fn drop_link(&mut self, node: NodeId) {
        let body = self.body_mut(node);
        body.link = None;
        let run = body.run;
        self.server_after(node, Span::from_millis(100), ServerItem::Connect { run });
    }

    /// For a mistake that is made without the machine.
    pub(crate) fn forget_upstream(&mut self, node: NodeId) {
        self.body_mut(node).disk.upstream = None;
        self.drop_link(node);
    }

    /// A server is gone: standbys that it can reach see their connection closed, others when they hear nothing any more.
    pub(super) fn standbys_notice_end(&mut self, node: NodeId) {
        for standby in self.standbys_of(node) {
            if self.servers_meet(node, standby) {
                self.drop_link(standby);
            } else {
                self.stream_soon(standby);
            }
        }
    }

    /// A clean shutdown waits until every standby that can be reached has everything.
    pub(super) fn last_words(&mut self, node: NodeId) {
        let wal = self.body(node).disk.wal.clone();
        for standby in self.standbys_of(node) {
            if self.servers_meet(node, standby) {
                self.body_mut(standby).disk.wal.catch_up(&wal);
            }
        }
    }
}
