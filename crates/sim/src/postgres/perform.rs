//! What a postgres bot asks of its shell, carried out on the simulated server.

use std::collections::BTreeMap;

use bots_core::machine::Span;
use postgres_bot::machine::{Action, Disk, Event, JobError, JobId, JobResult, PeerAnswer, Postgres};

use super::{PostgresBody, ServerItem, jobs::SILENT};
use crate::{
    plant::Plant,
    world::{BotEvent, Item, NodeId, World},
};

/// How often the shell looks at the server of its own accord.
const LOOK_EVERY: Span = Span::from_millis(1_000);

impl World {
    pub(crate) fn body(&self, node: NodeId) -> &PostgresBody {
        self.nodes[node.0].postgres().expect("only asked of machines with Postgres")
    }

    pub(crate) fn body_mut(&mut self, node: NodeId) -> &mut PostgresBody {
        self.nodes[node.0].postgres_mut().expect("only asked of machines with Postgres")
    }

    /// The machines that have a Postgres server.
    pub(crate) fn servers(&self) -> Vec<NodeId> {
        self.ids().filter(|node| self.nodes[node.0].postgres().is_some()).collect()
    }

    pub(crate) fn perform_postgres(&mut self, node: NodeId, action: Action) {
        let life = self.nodes[node.0].life;
        match action {
            Action::Dcs(action) => self.ask_store(node, action),
            Action::ProbeName { api_url } => self.probe_name(node, &api_url),
            Action::InspectData => {
                let delay = self.rng.span(1, 40);
                self.server_after(node, delay, ServerItem::Inspect { life });
            }
            Action::Observe => {
                let delay = self.rng.span(1, 25);
                self.server_after(node, delay, ServerItem::Observe { life });
            }
            Action::Configure { parameters, rules: _ } => {
                let names = parameters.get("synchronous_standby_names").map_or("", String::as_str);
                self.names_wanted(node, names);
            }
            // The servers here keep all of their log, and show no replication slots.
            Action::ChangeSlots { changes: _ } | Action::LookAtSlots { .. } => {}
            Action::SetFence { at, watchdog } => self.set_fence(node, at, watchdog),
            Action::Run { id, job } => self.run_job(node, id, job),
            Action::Cancel { id } => {
                if self.body(node).job.as_ref().is_some_and(|running| running.id == id) {
                    self.abandon_job(node);
                }
            }
            Action::ProbePeers { id, peers, deadline } => {
                let (answers, delay) = self.probe_peers(node, &peers, deadline);
                self.tell(node, delay, BotEvent::Postgres(Event::PeersProbed { id, answers }));
            }
            Action::AskMembers { id, ask, members, deadline } => self.ask_members(node, id, &ask, &members, deadline),
            Action::AnswerMember { id, answer } => self.answer_member(node, id, answer),
            Action::Exit { code, message } => self.exited(node, code, &message),
        }
    }

    pub(super) fn server_after(&mut self, node: NodeId, delay: Span, item: ServerItem) {
        self.after(delay, Item::Server { node, item });
    }

    /// Every peer's bot is asked; who does not answer costs the whole deadline.
    fn probe_peers(
        &mut self,
        node: NodeId,
        peers: &BTreeMap<String, String>,
        deadline: Span,
    ) -> (BTreeMap<String, PeerAnswer>, Span) {
        let mut answers = BTreeMap::new();
        let mut slowest = Span::ZERO;
        for (name, url) in peers {
            let delay = self.peer_delay() + self.peer_delay();
            let found = self.host_in(url).filter(|peer| self.network.peers_meet(node, *peer));
            let peer = found.map(|peer| &self.nodes[peer.0]).filter(|peer| peer.bot_moves() && delay <= deadline);
            let Some(state) = peer.and_then(|peer| peer.postgres_state()) else {
                slowest = slowest.max(deadline);
                continue;
            };
            slowest = slowest.max(delay);
            let tags = state.settings().tags.clone();
            // A server that is busy does not answer its bot in time, which then tells what it knew.
            let old_news = self.rng.chance(150) || self.plant == Some(Plant::EveryVoteCounts);
            let peer_id = found.filter(|_| !old_news);
            let fresh = peer_id.and_then(|peer| self.body(peer).facts()).filter(|_| state.server().is_some());
            let server = fresh.as_ref().or(state.server());
            let sure = fresh.as_ref().is_some_and(|server| server.settled);
            let answer = PeerAnswer {
                is_primary: server.is_some_and(|server| !server.in_recovery),
                timeline: server.map(|server| server.timeline).unwrap_or_default(),
                position: server.map(|server| server.position).unwrap_or_default(),
                may_lead: server.is_some() && !tags.nofailover(),
                priority: tags.failover_priority(),
                sure: sure || self.plant == Some(Plant::EveryVoteCounts),
            };
            answers.insert(name.clone(), answer);
        }
        (answers, slowest)
    }

    /// One way between two machines.
    pub(crate) fn peer_delay(&mut self) -> Span {
        self.plan.peer_delay.draw(&mut self.rng)
    }

    pub(super) fn tell_postgres(&mut self, node: NodeId, delay: Span, event: Event) {
        if self.nodes[node.0].brain.is_some() {
            self.tell(node, delay, BotEvent::Postgres(event));
        }
    }

    /// A job has ended, and the bot is told.
    pub(super) fn job_ended(&mut self, node: NodeId, id: JobId, result: Result<JobResult, String>) {
        match &result {
            Ok(JobResult::Started(server) | JobResult::Promoted { server, .. }) => {
                self.body_mut(node).told = Postgres::Up(server.clone());
            }
            Ok(JobResult::Stopped { .. }) => self.body_mut(node).told = Postgres::Down,
            Ok(JobResult::Done | JobResult::Initialized { .. }) | Err(_) => {}
        }
        let result = result.map_err(|why| JobError { elsewhere: why.ends_with(SILENT), why });
        self.tell_postgres(node, Span::ZERO, Event::JobEnded { id, result });
    }

    /// The shell of a bot that has just been started begins to look at the server.
    pub(crate) fn begin_observing(&mut self, node: NodeId) {
        let life = self.nodes[node.0].life;
        let body = self.body_mut(node);
        (body.told, body.told_stalled) = (Postgres::Down, false);
        if !self.plan.device {
            let none = Err(String::from("/dev/watchdog: No such file or directory"));
            self.tell_postgres(node, Span::ZERO, Event::WatchdogSeen(none));
        }
        let delay = self.rng.span(1, LOOK_EVERY.as_millis());
        self.server_after(node, delay, ServerItem::Look { life });
    }

    pub(crate) fn server_item(&mut self, node: NodeId, item: ServerItem) {
        match item {
            ServerItem::Ready { run } => self.server_ready(node, run),
            ServerItem::Promoted { run } => self.server_promoted(node, run),
            ServerItem::StillWritable { run } => self.still_writable(node, run),
            ServerItem::Closed { run } => self.server_closed(node, run),
            ServerItem::Gone { run, end } => self.server_gone(node, run, end),
            ServerItem::Buried { run, life, end, checkpoint } => self.buried(node, run, life, &end, checkpoint),
            ServerItem::JobDone { serial } => self.job_done_at(node, serial),
            ServerItem::Stream { run } => self.stream(node, run),
            ServerItem::Connect { run } => self.connect_upstream(node, run),
            ServerItem::Look { life } => {
                if self.nodes[node.0].life == life && self.nodes[node.0].brain.is_some() {
                    self.observe(node, false);
                    self.server_after(node, LOOK_EVERY, ServerItem::Look { life });
                }
            }
            ServerItem::Observe { life } => {
                if self.nodes[node.0].life == life {
                    self.observe(node, true);
                }
            }
            ServerItem::Inspect { life } => {
                if self.nodes[node.0].life == life {
                    let guard_moves = !self.nodes[node.0].frozen.holds_guard();
                    self.body_mut(node).unheard &= !guard_moves;
                    let found = self.body(node).inspected(guard_moves, self.plant);
                    self.tell_postgres(node, Span::ZERO, Event::DataInspected(found));
                    self.tire_guard(node);
                }
            }
            ServerItem::Guard { run } => self.guard_acts(node, run),
            ServerItem::Reload { run, life } => self.reloaded(node, run, life),
            ServerItem::Flushed { standby, run, at } => self.flush_reported(node, standby, run, at),
            ServerItem::Replayed { run } => self.replayed(node, run),
        }
    }

    fn observe(&mut self, node: NodeId, asked: bool) {
        let body = self.body_mut(node);
        let stalled = body.stalled;
        if std::mem::replace(&mut body.told_stalled, stalled) != stalled {
            let disk = if stalled { Disk::Stalled } else { Disk::Good };
            self.tell_postgres(node, Span::ZERO, Event::DiskObserved(disk));
        }
        let Some(found) = self.body(node).observed() else { return };
        let found = match found {
            Postgres::Up(server) => Postgres::Up(self.with_commits(node, server)),
            other @ (Postgres::Down | Postgres::Starting | Postgres::Silent) => other,
        };
        let news = self.body(node).told != found;
        if news || asked {
            self.body_mut(node).told = found.clone();
            self.tell_postgres(node, Span::ZERO, Event::PostgresObserved(found));
        }
    }
}
