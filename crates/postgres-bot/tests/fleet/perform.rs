//! What a machine asks for, carried out in a small fleet, and what it is told.

use std::rc::Rc;

use bots_core::{
    dcs::{DcsAction, DcsEvent, KeyValue, Outcome, RequestId, Revision, Transaction, Write},
    machine::{Machine, Step},
    wire::Lsn,
};
use postgres_bot::machine::{
    Action, AskedId, Event, PeerAnswer, Postgres, PostgresBot, Server as Facts, Standby, WaitsFor,
};

use crate::{
    check::check_write,
    cluster::{Fleet, scope},
    plant::{alter_outcome, alter_request},
    server::Process,
};

/// The number of a member's question to another: one is asked at a time.
const ASKED: AskedId = AskedId(1);

impl Fleet {
    /// Tells a bot something, and carries out what it asks for.
    pub(crate) fn step(&mut self, at: usize, event: Event) -> Result<(), String> {
        let now = self.now;
        let Some(state) = self.member(at).state.take() else { return Ok(()) };
        let mut from = PostgresBot::role(&state);
        let Step { state, actions } = PostgresBot::step(state, now, event);
        for to in state.passed() {
            if !PostgresBot::TRANSITIONS.allows(from, *to) {
                return Err(format!("no edge {from} -> {to}"));
            }
            from = *to;
        }
        PostgresBot::invariants(&state)?;
        self.member(at).state = Some(state);
        self.actions.get_or_insert(actions.len());
        let dies_after = self.dies_after.take();
        let mut shares = Vec::new();
        for action in actions.into_iter().take(dies_after.unwrap_or(usize::MAX)) {
            shares.extend(self.perform(at, action));
        }
        if dies_after.is_some() {
            self.budget.crashes -= 1;
            self.kill_bot(at, true)?;
        }
        for (id, transaction) in shares {
            self.settle(at, id, transaction, true, true)?;
        }
        Ok(())
    }

    /// Carries an action out. A write of the bot's own member key, which nobody contends for, is given back, to be done at once.
    fn perform(&mut self, at: usize, action: Action) -> Option<(RequestId, Transaction)> {
        let member = self.member(at);
        match action {
            Action::Dcs(DcsAction::Transact { id, transaction }) => {
                let mine = scope().member(&member.name);
                let shares = |write: &Write| matches!(write, Write::Put { key, .. } if *key == mine);
                if !member.cut && transaction.then.iter().all(shares) {
                    return Some((id, transaction));
                }
                member.asked.push_back((id, transaction));
            }
            Action::Dcs(DcsAction::GrantLease { ttl }) => member.granting = Some(ttl),
            Action::Dcs(DcsAction::RevokeLease { lease }) if !member.cut => self.revoke(lease),
            Action::Dcs(DcsAction::RevokeLease { .. } | DcsAction::PaceLease { .. })
            | Action::ChangeSlots { .. }
            | Action::LookAtSlots { .. } => {}
            Action::ProbeName { .. } => member.naming = true,
            Action::InspectData => member.inspecting = true,
            Action::Observe => member.observing = true,
            Action::Configure { parameters, .. } => {
                member.server.names = parameters.get("synchronous_standby_names").cloned().unwrap_or_default();
                self.acknowledge(at);
            }
            Action::SetFence { at: fence, .. } => {
                member.server.wanted = Some(fence);
                if member.server.process != Process::Down {
                    member.server.fence = Some(fence);
                }
            }
            Action::Run { id, job } => member.job = Some((id, job)),
            Action::Cancel { .. } => member.job = None,
            Action::ProbePeers { id, peers, .. } => member.probe = Some((id, peers.into_keys().collect())),
            Action::AskMembers { id, ask, members, .. } => {
                member.asking.extend(members.into_keys().map(|name| (id, ask.clone(), name)));
            }
            Action::AnswerMember { id, answer } => member.said = Some((id, answer)),
            Action::Exit { .. } => {
                member.server.kept = member.server.process != Process::Down;
                member.bot_ends();
            }
        }
        None
    }

    /// Whether a member's own machine has something to tell its bot.
    pub(crate) fn has_local(&self, at: usize) -> bool {
        let member = &self.members[at];
        let Some(state) = &member.state else { return false };
        let etcd = !member.cut && (member.granting.is_some() || !state.view().is_watched());
        let own = member.server.unheard || member.naming || member.inspecting || member.observing;
        etcd || own || self.has_news(at) || member.is_due(self.now)
    }

    fn has_news(&self, at: usize) -> bool {
        self.observed(at).is_some_and(|found| found != self.members[at].told)
    }

    pub(crate) fn local(&mut self, at: usize) -> Result<(), String> {
        let found = self.observed(at).filter(|found| self.members[at].observing || *found != self.members[at].told);
        let inspected = self.members[at].server.inspected();
        let member = self.member(at);
        let Some(state) = &member.state else { return Ok(()) };
        let event = if std::mem::take(&mut member.server.unheard) {
            member.told = Postgres::Down;
            Event::PostgresExited { how: String::from("it ended") }
        } else if !member.cut && !state.view().is_watched() {
            return self.list(at);
        } else if std::mem::take(&mut member.naming) {
            Event::NameProbed { instance: None }
        } else if let Some(ttl) = member.granting.take_if(|_| !member.cut) {
            let (lease, valid_until) = (self.grant(ttl), self.now + ttl);
            Event::Dcs(DcsEvent::LeaseGranted { lease, valid_until })
        } else if std::mem::take(&mut member.inspecting) {
            Event::DataInspected(inspected)
        } else if let Some(found) = found {
            (member.observing, member.told) = (false, found.clone());
            Event::PostgresObserved(found)
        } else if std::mem::take(&mut member.observing) {
            return Ok(());
        } else {
            Event::TimerFired
        };
        self.step(at, event)
    }

    fn list(&mut self, at: usize) -> Result<(), String> {
        let prefix = scope().prefix();
        let (revision, entries) = self.dcs.list(&prefix);
        self.member(at).shown = revision;
        self.step(at, Event::Dcs(DcsEvent::Listed { prefix, revision, entries }))
    }

    pub(crate) fn watch(&mut self, at: usize) -> Result<(), String> {
        let (prefix, revision) = (scope().prefix(), self.dcs.revision());
        let Ok(changes) = self.dcs.changes_after(&prefix, self.members[at].shown) else { return self.list(at) };
        self.member(at).shown = revision;
        self.step(at, Event::Dcs(DcsEvent::Changed { prefix, revision, changes }))
    }

    /// etcd gets a member's oldest question, or does not, and the member hears of it, or does not.
    pub(crate) fn answer(&mut self, at: usize, arrives: bool, heard: bool) -> Result<(), String> {
        let member = self.member(at);
        let reaches = !member.cut;
        let Some((id, transaction)) = member.asked.pop_front() else { return Ok(()) };
        self.settle(at, id, transaction, arrives && reaches, heard && reaches)
    }

    fn settle(
        &mut self,
        at: usize,
        id: RequestId,
        mut transaction: Transaction,
        arrives: bool,
        heard: bool,
    ) -> Result<(), String> {
        alter_request(self.options.plant, &mut transaction);
        let mut outcome = Outcome::Unknown(String::from("no answer in 2 s"));
        if arrives {
            let done = self.transact(at, &transaction)?;
            if heard {
                outcome = done;
            }
        }
        let outcome = alter_outcome(self.options.plant, self.dcs.revision(), outcome);
        self.step(at, Event::Dcs(DcsEvent::Answered { id, outcome }))
    }

    fn transact(&mut self, at: usize, transaction: &Transaction) -> Result<Outcome, String> {
        let before: Vec<Option<KeyValue>> = transaction
            .then
            .iter()
            .map(|write| match write {
                Write::Put { key, .. } | Write::Delete { key } => self.dcs.get(key).cloned(),
            })
            .collect();
        let lease_gone = transaction.then.iter().any(|write| match write {
            Write::Put { lease: Some(lease), .. } => !self.dcs.lease_lives(*lease),
            Write::Put { lease: None, .. } | Write::Delete { .. } => false,
        });
        let outcome = Rc::make_mut(&mut self.dcs).transact(self.now, transaction);
        if matches!(outcome, Outcome::Done(_)) {
            check_write(&self.members[at].name, transaction, &before)?;
        }
        Ok(match outcome {
            // etcd answers with an error then, and reads nothing.
            Outcome::Refused { .. } if lease_gone => Outcome::Refused { revision: Revision(0), found: Vec::new() },
            outcome => outcome,
        })
    }

    pub(crate) fn renew(&mut self) -> Result<(), String> {
        for at in 0..self.members.len() {
            let Some(lease) = self.members[at].lease().filter(|_| !self.members[at].cut) else { continue };
            let event = match self.leases.get_mut(&lease) {
                Some(kept) => {
                    kept.expires = self.now + kept.ttl;
                    DcsEvent::LeaseRenewed { lease, valid_until: kept.expires }
                }
                None => DcsEvent::LeaseLost { lease, why: String::from("it has expired") },
            };
            self.step(at, Event::Dcs(event))?;
        }
        Ok(())
    }

    /// Each peer's bot says where its server is; one that is dead says nothing.
    pub(crate) fn probe(&mut self, at: usize) -> Result<(), String> {
        let Some((id, peers)) = self.member(at).probe.take() else { return Ok(()) };
        let answer = |name: &String| {
            let peer = self.named(name).filter(|peer| self.members[*peer].state.is_some())?;
            let facts = self.facts(peer);
            let facts = facts.as_ref();
            Some(PeerAnswer {
                is_primary: facts.is_some_and(|facts| !facts.in_recovery),
                timeline: facts.map(|facts| facts.timeline).unwrap_or_default(),
                position: facts.map(|facts| facts.position).unwrap_or_default(),
                may_lead: facts.is_some(),
                priority: 1,
                sure: facts.is_some(),
            })
        };
        let answers = peers.iter().filter_map(|name| Some((name.clone(), answer(name)?))).collect();
        self.step(at, Event::PeersProbed { id, answers })
    }

    /// Another member's bot gives its word or refuses it; one that is dead says nothing.
    pub(crate) fn ask_member(&mut self, at: usize) -> Result<(), String> {
        let Some((id, ask, member)) = self.member(at).asking.pop_front() else { return Ok(()) };
        let mut answer = Err(format!("{member} does not answer"));
        if let Some(other) = self.named(&member) {
            self.step(other, Event::MemberAsked { id: ASKED, ask })?;
            answer = self.member(other).said.take().map_or(answer, |(_, said)| said);
        }
        self.step(at, Event::MemberAnswered { id, member, answer })
    }

    /// What a look at the server shows, if there is one.
    fn observed(&self, at: usize) -> Option<Postgres> {
        self.facts(at).map(Postgres::Up)
    }

    /// What the server says of itself, if it runs.
    pub(crate) fn facts(&self, at: usize) -> Option<Facts> {
        let server = &self.members[at].server;
        let in_recovery = match server.process {
            Process::Down => return None,
            Process::Standby => true,
            Process::Primary => false,
        };
        let position = server.log.end();
        let received = if in_recovery { position } else { Lsn(0) };
        let streaming = self.upstream_of(at).is_some();
        let mut facts = Facts { in_recovery, position, streaming, settled: in_recovery, ..Facts::default() };
        (facts.timeline, facts.received, facts.replayed) =
            (bots_core::wire::Timeline(server.log.timeline), received, received);
        if !in_recovery {
            facts.waits_for = WaitsFor { names: server.names.clone(), in_force: true };
            let standby = |of: usize| Standby { streams: true, flushed: self.members[of].server.log.end() };
            facts.standbys =
                self.standbys_of(at).into_iter().map(|of| (self.members[of].name.clone(), standby(of))).collect();
        }
        Some(facts)
    }
}
