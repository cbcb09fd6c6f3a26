//! From nothing to a member: look around, make the cluster if nobody has, or copy the leader.

use bots_core::{
    dcs::{Compare, DcsAction, KeyValue, Outcome, Revision, Transaction, Write},
    machine::{Span, Time},
    membership::RETRY_AFTER,
};

use super::{
    event::{Job, JobResult},
    fence::{EARLIER_LEASE_ENDS, KILL},
    phase::{Bootstrap, Phase, Primary, Recovery, Suspect},
    postgres::{DataDir, Postgres, Running},
    state::{State, Timer},
    turn::{Happened, Turn},
};

/// How long a failed bootstrap or clone waits before the next try.
const TRY_AGAIN: Span = Span::from_secs(2);

impl State {
    /// There is, or may be, data of a cluster whose keys are gone: a copy of ours that was begun, or a member that has more than we.
    /// Whoever has it brings the keys back; a new cluster would be another one.
    pub(super) fn knows_of_data(&self) -> bool {
        let begun = matches!(self.data, Some(DataDir::Unfinished { cloning: true, .. }));
        begun || self.peers().any(|(_, member)| member.head.role != "uninitialized")
    }
}

impl Turn {
    /// Until etcd is known, the name is ours and the data directory is inspected, nothing is touched.
    pub(super) fn drive_initializing(&mut self, happened: &Happened) {
        if let Happened::JobEnded { job, result: Err(_) } = happened {
            let _waits_for_retry = job;
            self.s.timers.arm(Timer::Retry, self.now + TRY_AGAIN);
            return;
        }
        if self.s.job.is_some() || self.s.timers.armed(Timer::Retry).is_some() {
            return;
        }
        let Some(data) = self.s.data.clone() else { return self.inspect() };
        if self.s.kept_until().is_some_and(|until| until <= self.now) {
            return self.kill_kept();
        }
        if !self.s.view.is_complete() || !self.s.membership.is_registered() || !self.s.sees_itself(self.now) {
            return;
        }
        match data {
            DataDir::Empty | DataDir::Unfinished { .. } => self.become_phase(Phase::Waiting),
            // Before anything is stopped: a server that runs there is another cluster's, too.
            DataDir::Present { .. } if self.s.is_foreign() => self.refuse_foreign(),
            DataDir::Present { running, was_primary, .. } => {
                let mine = self.s.leader() == Some(self.s.settings.name.as_str());
                let goes_on = match running {
                    Running::No => false,
                    Running::LeftBehind { .. } => return self.stop_left_behind(),
                    // A standby may go on in any case, and a primary if the lock is ours still: its guard has kept to the
                    // old lease so far. What was on its way from the one to the other is neither.
                    Running::Guarded { fence: None } if !was_primary => true,
                    Running::Guarded { fence: Some(_) } if was_primary && mine && !self.s.is_half_promoted() => true,
                    Running::Guarded { .. } => return self.stop_left_behind(),
                };
                if goes_on {
                    self.s.postgres = Postgres::Starting;
                    // There is one, though not of our setting.
                    self.s.fence_set = was_primary.then_some(Time::ZERO);
                }
                self.become_phase(match (was_primary, mine) {
                    (true, true) if self.s.is_half_promoted() => Phase::Starting { attempts: 0 },
                    (true, true) => Phase::Recovering { step: Recovery::Reclaiming },
                    (true, false) => Phase::Rejoining { suspect: Suspect::Maybe, failures: 0 },
                    (false, _) => Phase::Starting { attempts: 0 },
                });
            }
        }
    }

    /// Its guard was to stop it by now; one that stands still does not.
    pub(super) fn kill_kept(&mut self) {
        self.s.trouble = Some(format!("Postgres was stopped: {EARLIER_LEASE_ENDS}"));
        self.run(Job::Stop { mode: KILL });
    }

    fn stop_left_behind(&mut self) {
        let mode = self.stop_at_once();
        self.run(Job::Stop { mode });
    }

    /// Nothing of another cluster's data is touched (S7).
    pub(super) fn refuse_foreign(&mut self) {
        let scope = self.s.settings.scope.name();
        let found = self.s.own_system_id().unwrap_or_default();
        let recorded = self.s.cluster_system_id().unwrap_or_default();
        let message = format!(
            "postgresql.data_dir belongs to another cluster: its system identifier is {found}, that of scope {scope} \
             is {recorded}; nothing was changed. Use another data_dir or another scope"
        );
        self.give_up(3, message);
    }

    /// An empty data directory: race to make the cluster, or wait for a leader to copy.
    pub(super) fn drive_waiting(&mut self, happened: &Happened) {
        if let Happened::JobEnded { job, result: Err(_) } = happened {
            self.try_again_later(job);
        }
        if self.s.postgres.is_alive() && self.s.job.is_none() {
            let mode = self.stop_at_once();
            return self.run(Job::Stop { mode });
        }
        match &self.s.data {
            None => return self.inspect(),
            // Of a bootstrap that was cut off, with its guard: what it has made is looked at when it is down.
            Some(DataDir::Unfinished { running, .. }) if running.is_any() && self.s.job.is_none() => {
                return self.stop_left_behind();
            }
            Some(DataDir::Empty | DataDir::Unfinished { .. } | DataDir::Present { .. }) => {}
        }
        if self.s.job.is_some() || self.s.timers.armed(Timer::Retry).is_some() || !self.s.view.is_watched() {
            return;
        }
        let recorded = self.s.cluster_system_id().map(str::to_owned);
        match (&self.s.data, recorded) {
            // A bootstrap of ours that was cut off is kept until we know that it was not recorded: another cluster is,
            // or we win the race again.
            (Some(DataDir::Unfinished { system_id, cloning: false, .. }), Some(recorded)) => {
                let ours = system_id.as_ref() == Some(&recorded);
                return self.run(if ours { Job::Complete } else { self.discard() });
            }
            // Half a copy is of no use, but it is thrown away only for a whole one.
            (Some(DataDir::Unfinished { cloning: true, .. }), _) if self.s.upstream().is_some() => {
                return self.run(self.discard());
            }
            (Some(DataDir::Present { .. }), _) => {
                return self.become_phase(Phase::Rejoining { suspect: Suspect::Maybe, failures: 0 });
            }
            (Some(DataDir::Empty | DataDir::Unfinished { .. }) | None, _) => {}
        }
        if let Some(source) = self.s.copy_source() {
            self.become_phase(Phase::Cloning { source: source.name.clone() });
            return self.run(Job::Clone { source });
        }
        let initialize = self.s.settings.scope.initialize();
        let Some(lease) = self.s.membership.lease(self.now) else { return };
        if let Some(kv) = self.s.view.get(&initialize) {
            if kv.lease == Some(lease) && kv.value.is_empty() {
                // From a bootstrap of ours that failed, or a race whose answer was lost. No server of ours runs: others may
                // try before we do again.
                let unchanged =
                    vec![Compare::LeaseIs(kv.key.clone(), lease), Compare::ModifiedAt(kv.key.clone(), kv.modified)];
                let id = self.s.membership.next_request();
                let transaction = Transaction::new(unchanged, vec![Write::delete(initialize)]);
                self.push_dcs(vec![DcsAction::Transact { id, transaction }]);
                self.s.timers.arm(Timer::Retry, self.now + RETRY_AFTER);
            }
            return;
        }
        let barred = self.s.settings.tags.nofailover() || self.s.bar_by_watchdog(self.now).is_some();
        if self.s.leader().is_some() || barred || self.s.knows_of_data() {
            return;
        }
        let request = self.s.membership.next_request();
        // Bound to the lease until the cluster stands: a bootstrap that dies does not bar the next.
        let transaction = Transaction::new(
            vec![Compare::Absent(initialize.clone()), Compare::Absent(self.s.settings.scope.leader())],
            vec![Write::put_leased(initialize, "", lease)],
        );
        self.push_dcs(vec![DcsAction::Transact { id: request, transaction }]);
        self.become_phase(Phase::Bootstrapping(Bootstrap::Racing(request)));
    }

    fn discard(&self) -> Job {
        Job::DiscardUnfinished { remove_rewound: self.s.may_remove_data(true) }
    }

    fn try_again_later(&mut self, failed: &Job) {
        self.s.timers.arm(Timer::Retry, self.now + TRY_AGAIN);
        if matches!(failed, Job::DiscardUnfinished { .. }) {
            // It may not be what it was taken for: a copy that was given up at its very end is whole.
            self.s.data = None;
        }
    }

    /// The only member that may make the cluster, as long as its lease holds the `initialize` key.
    pub(super) fn drive_bootstrapping(&mut self, happened: &Happened) {
        let Phase::Bootstrapping(step) = self.s.phase.clone() else { return };
        if !matches!(step, Bootstrap::Racing(_)) && !self.s.has_ample_lease(self.now) {
            // With the lease, the `initialize` key goes, and another may make the cluster: no server of ours is up by then.
            return self.bootstrap_lost();
        }
        match (step, happened) {
            (Bootstrap::Racing(request), Happened::Answered { id, outcome }) if request == *id => match outcome {
                // Won long ago, by a bot that stood still since: another may have made the cluster.
                Outcome::Done(_) if !self.s.has_ample_lease(self.now) => self.bootstrap_lost(),
                Outcome::Done(won) => {
                    self.s.phase = Phase::Bootstrapping(Bootstrap::Working { won: *won, system_id: None });
                    let empty = self.s.data == Some(DataDir::Empty);
                    self.run(if empty { Job::Initialize } else { self.discard() });
                }
                // Unknown: if the race was won after all, the key is found to be ours when we look again.
                Outcome::Refused { .. } | Outcome::Unknown(_) => self.bootstrap_lost(),
            },
            (Bootstrap::Working { .. }, Happened::JobEnded { result: Err(_), .. } | Happened::Exited { .. }) => {
                self.bootstrap_lost();
            }
            (Bootstrap::Working { won, system_id }, Happened::JobEnded { job, result: Ok(result) }) => {
                self.bootstrap_goes_on(won, system_id, job, result);
            }
            (Bootstrap::Recording { request, system_id, won }, Happened::Answered { id, outcome })
                if request == *id =>
            {
                match outcome {
                    Outcome::Done(_) => self.bootstrap_recorded(),
                    // An earlier try of ours may have gone through with its answer lost.
                    Outcome::Refused { found, .. } if found.iter().any(|kv| kv.value == system_id) => {
                        self.bootstrap_recorded();
                    }
                    // Everything is as it was but the configuration: it is kept, and the rest recorded again.
                    Outcome::Refused { found, .. } if self.is_only_configured(won, found) => {
                        self.s.timers.arm(Timer::Retry, self.now + RETRY_AFTER);
                    }
                    Outcome::Refused { .. } => self.bootstrap_lost(),
                    Outcome::Unknown(_) => self.s.timers.arm(Timer::Retry, self.now + RETRY_AFTER),
                }
            }
            (Bootstrap::Recording { won, system_id, .. }, Happened::Due(Timer::Retry)) => self.record(won, system_id),
            (Bootstrap::Recording { system_id, .. }, _)
                if self.s.cluster_system_id() == Some(system_id.as_str()) && self.s.leadership.is_held() =>
            {
                self.bootstrap_recorded();
            }
            (Bootstrap::Completing, Happened::JobEnded { job: Job::Complete, result: Ok(_) }) => {
                self.s.data = None;
                self.inspect();
            }
            (Bootstrap::Completing, Happened::JobEnded { .. }) => self.s.timers.arm(Timer::Retry, self.now + TRY_AGAIN),
            (Bootstrap::Completing, Happened::Due(Timer::Retry)) => self.run(Job::Complete),
            (Bootstrap::Completing, _) if self.s.data.is_some() && self.s.job.is_none() => self.bootstrap_completed(),
            (
                Bootstrap::Racing(_) | Bootstrap::Working { .. } | Bootstrap::Recording { .. } | Bootstrap::Completing,
                _,
            ) => {}
        }
    }

    fn bootstrap_goes_on(&mut self, won: Revision, system_id: Option<String>, job: &Job, result: &JobResult) {
        match (job, result) {
            (Job::DiscardUnfinished { .. }, _done) => self.run(Job::Initialize),
            (Job::Initialize, JobResult::Initialized { system_id }) => {
                self.s.phase = Phase::Bootstrapping(Bootstrap::Working { won, system_id: Some(system_id.clone()) });
                self.run(Job::StartPrimary);
            }
            (Job::StartPrimary, JobResult::Started(_)) => self.run(Job::CreateRoles),
            (Job::CreateRoles, _done) => match system_id {
                Some(system_id) => self.record(won, system_id),
                None => self.bootstrap_lost(),
            },
            (_other, _ended) => {}
        }
    }

    /// Records the new cluster: identifier, configuration and lock together, only if this very race is still ours.
    fn record(&mut self, won: Revision, system_id: String) {
        let scope = self.s.settings.scope.clone();
        let Some(lease) = self.s.membership.lease(self.now) else { return self.bootstrap_lost() };
        let request = self.s.membership.next_request();
        let mut then = vec![
            Write::put(scope.initialize(), system_id.clone()),
            Write::put_leased(scope.leader(), self.s.settings.name.clone(), lease),
        ];
        let mut compare = vec![
            Compare::LeaseIs(scope.initialize(), lease),
            Compare::ModifiedAt(scope.initialize(), won),
            Compare::Absent(scope.leader()),
        ];
        if self.s.view.get(&scope.config()).is_none() {
            // One that an operator has written meanwhile stays.
            compare.push(Compare::Absent(scope.config()));
            then.push(Write::put(scope.config(), self.s.settings.bootstrap_config.to_string()));
        }
        let transaction = Transaction::new(compare, then);
        self.push_dcs(vec![DcsAction::Transact { id: request, transaction }]);
        self.s.phase = Phase::Bootstrapping(Bootstrap::Recording { won, request, system_id });
    }

    /// A record was refused for the configuration alone.
    fn is_only_configured(&self, won: Revision, found: &[KeyValue]) -> bool {
        let scope = &self.s.settings.scope;
        let is_there = |key: &str| found.iter().any(|kv| kv.key == key);
        let is_ours = found.iter().any(|kv| kv.key == scope.initialize() && kv.modified == won);
        is_ours && is_there(&scope.config()) && !is_there(&scope.leader())
    }

    fn bootstrap_recorded(&mut self) {
        self.s.phase = Phase::Bootstrapping(Bootstrap::Completing);
        self.s.data = None;
        self.run(Job::Complete);
    }

    /// The data directory is whole, and the lock came with the record: it shows in the watch, or is lost already.
    fn bootstrap_completed(&mut self) {
        if self.s.leadership.fence(self.now, &self.s.membership).is_some() {
            return self.become_phase(Phase::Primary(Primary::default()));
        }
        if self.s.cluster_system_id().is_some() || self.s.membership.lease(self.now).is_none() {
            self.bootstrap_lost();
        }
    }

    /// Back to the start: the server stopped, the data directory looked at again. The mark is still on it, so whatever was
    /// made is ours to discard; the `initialize` key is given back once the server is down.
    fn bootstrap_lost(&mut self) {
        self.become_phase(Phase::Waiting);
        self.s.timers.arm(Timer::Retry, self.now + TRY_AGAIN);
        self.s.data = None;
        if self.s.postgres.is_alive() || self.s.job.is_some() {
            let mode = self.stop_at_once();
            self.run(Job::Stop { mode });
        } else {
            self.inspect();
        }
    }

    /// Copying the leader.
    pub(super) fn drive_cloning(&mut self, happened: &Happened) {
        match happened {
            Happened::JobEnded { job: Job::Clone { .. }, result: Ok(_) } => {
                // Other data than what was rewound.
                self.s.stall.rewound = None;
                self.s.data = None;
                self.inspect();
            }
            Happened::JobEnded { .. } => {
                self.s.data = None;
                self.become_phase(Phase::Waiting);
                self.s.timers.arm(Timer::Retry, self.now + TRY_AGAIN);
                self.inspect();
            }
            Happened::Nothing
            | Happened::Observed
            | Happened::Exited { .. }
            | Happened::Probed { .. }
            | Happened::Answered { .. }
            | Happened::Due(_) => match &self.s.data {
                Some(DataDir::Present { .. }) if self.s.job.is_none() => {
                    self.become_phase(Phase::Starting { attempts: 0 });
                }
                Some(DataDir::Empty | DataDir::Unfinished { .. }) if self.s.job.is_none() => {
                    self.become_phase(Phase::Waiting);
                    self.s.timers.arm(Timer::Retry, self.now + TRY_AGAIN);
                }
                Some(_) | None => {}
            },
        }
    }
}
