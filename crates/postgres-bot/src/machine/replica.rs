//! Starting read-only and following the leader; noticing that the leader is gone, or that our data has left its path.

use std::collections::BTreeMap;

use bots_core::{machine::Span, wire::Lsn};

use super::{
    event::{Action, Job, JobResult, PeerAnswer, ProbeId, StopMode},
    phase::{Candidate, DemoteStep, DemoteWhy, Phase, Suspect},
    postgres::{DataDir, Postgres, Upstream},
    state::{Stall, Timer},
    turn::{Happened, Turn},
};

/// After so many failed starts beside a living leader, the data itself is suspect.
const STARTS_BEFORE_SUSPECT: u32 = 3;

/// A replica that has not followed a living leader for this long will not do so by itself: the leader has removed the log
/// that it lacks, or its own log is not a part of the leader's, though nobody has recorded where they parted. Connecting anew takes a fraction of a second, `wal_receiver_timeout` is five.
const STALLED_AFTER: Span = Span::from_secs(20);

/// A start on data of another timeline than the leader's, of which nothing more is known, is looked into after this long. It may
/// have much to replay, and then does so once more.
const START_PATIENCE: Span = Span::from_secs(60);

/// A stream that lasts this long proves that the data is on the leader's path. A shorter one proves nothing: where two logs
/// differ, it begins, breaks off at the first record, and begins again.
const PROVEN_AFTER: Span = Span::from_secs(10);

/// The leader gets this long to say that it can be reached.
const STALLED_PROBE_DEADLINE: Span = Span::from_millis(1_000);

impl Turn {
    /// Bringing the server up read-only.
    pub(super) fn drive_starting(&mut self, happened: &Happened) {
        let Phase::Starting { attempts } = self.s.phase else { return };
        if self.stop_unlocked_writer() {
            return;
        }
        match happened {
            Happened::JobEnded { job: Job::StartStandby { upstream }, result: Ok(JobResult::Started(_)) } => {
                let following = upstream.clone();
                return self.become_phase(Phase::Replica { following });
            }
            Happened::JobEnded { job: Job::StartStandby { .. }, result: _ } => {
                let attempts = attempts + 1;
                // Once it was rewound in vain, it is not the data that is to be suspected, but a setting, the memory, a port.
                if attempts >= STARTS_BEFORE_SUSPECT && self.s.upstream().is_some() && !self.is_rewound() {
                    return self.become_phase(Phase::Rejoining { suspect: Suspect::Maybe, failures: 0 });
                }
                self.s.phase = Phase::Starting { attempts };
                return self.s.timers.arm(Timer::Retry, self.now + Self::backoff(attempts));
            }
            Happened::Nothing
            | Happened::JobEnded { .. }
            | Happened::Exited { .. }
            | Happened::Observed
            | Happened::Probed { .. }
            | Happened::Answered { .. }
            | Happened::Due(_) => {}
        }
        // Who has promised not to receive from the leader starts without one.
        let upstream = self.s.upstream().filter(|_| !self.s.is_bound());
        match self.s.job.as_ref().map(|running| (&running.job, running.since)) {
            Some(_) if self.s.is_foreign() => {}
            // Rewound data is of no use before it has the leader's log: a start without it, or with another's, would never end.
            Some((Job::StartStandby { upstream: told }, _)) if upstream.is_some() && *told != upstream => {
                self.run(Job::StartStandby { upstream });
            }
            // Nor with a leader that has not all of the log of the one that the data was rewound to.
            Some((Job::StartStandby { .. }, since)) if upstream.is_some() => {
                let Some(patience) = self.start_patience() else { return };
                if self.now < since + patience {
                    return self.s.timers.arm(Timer::Stalled, since + patience);
                }
                self.become_phase(Phase::Rejoining { suspect: Suspect::Maybe, failures: 0 });
                // In good order, for a rewind asks for that.
                self.run(Job::Stop { mode: StopMode::Fast });
            }
            Some(_) => {}
            None if self.s.timers.armed(Timer::Retry).is_some() || self.s.pause.left_down => {}
            None if self.s.is_foreign() => self.refuse_foreign(),
            None => self.run(Job::StartStandby { upstream }),
        }
    }

    /// Following.
    pub(super) fn drive_replica(&mut self, happened: &Happened) {
        if self.server_gone(happened) {
            return self.become_phase(Phase::Starting { attempts: 0 });
        }
        if self.stop_unlocked_writer() {
            return;
        }
        match happened {
            Happened::JobEnded { job: Job::Follow { upstream }, result } => match result {
                Ok(_) => self.s.phase = Phase::Replica { following: upstream.clone() },
                Err(_) => self.s.timers.arm(Timer::Retry, self.now + Self::backoff(0)),
            },
            Happened::JobEnded { .. }
            | Happened::Nothing
            | Happened::Exited { .. }
            | Happened::Observed
            | Happened::Probed { .. }
            | Happened::Answered { .. }
            | Happened::Due(_) => {}
        }
        let probed = match happened {
            Happened::Probed { id, answers } => self.s.stall.probe.take_if(|asked| asked == id).map(|_asked| answers),
            _other => None,
        };
        if self.may_stand() {
            self.become_phase(Phase::Candidate(Candidate::default()));
            return self.open_candidacy();
        }
        let barred_until = self.s.watchdog_barred_until(self.now);
        if let Some(until) = self.others_first_until().into_iter().chain(barred_until).min() {
            self.s.timers.arm(Timer::OthersFirst, until);
        }
        if self.mind_takeover(happened) {
            return;
        }
        if self.s.job.is_some() || self.s.timers.armed(Timer::Retry).is_some() {
            return;
        }
        let Some(upstream) = self.s.upstream() else { return };
        // A rewind that found nothing to do knows better.
        if self.diverged_from(&upstream.name) && !self.is_rewound() && !self.s.dynamic.pause {
            return self.become_phase(Phase::Rejoining { suspect: Suspect::Maybe, failures: 0 });
        }
        if !matches!(&self.s.phase, Phase::Replica { following: Some(following) } if *following == upstream) {
            return self.run(Job::Follow { upstream: Some(upstream) });
        }
        if !self.s.dynamic.pause {
            self.mind_stall(probed, upstream);
        }
    }

    /// Looks into a server that follows in name only. If the leader can be reached, the data is at fault: it is rewound,
    /// and if that does not help, copied anew.
    fn mind_stall(&mut self, probed: Option<&BTreeMap<String, PeerAnswer>>, leader: Upstream) {
        let Some(server) = self.s.server() else { return };
        let (position, settled) = (server.position, server.settled);
        if server.streaming {
            return self.mind_stream(position);
        }
        self.s.stall.streaming_since = None;
        if !settled {
            // It asks nobody for more before it has replayed what it has, however long that takes.
            if self.s.stall.since.replace(self.now).is_none() {
                self.s.stall.at = position;
            }
            self.s.stall.probe = None;
            return;
        }
        if let Some(answers) = probed {
            self.s.stall.since = None;
            if answers.get(&leader.name).is_some_and(|answer| answer.is_primary) {
                let suspect = self.suspicion();
                self.s.trouble = Some(format!("it could not follow {} for {STALLED_AFTER}", leader.name));
                return self.become_phase(Phase::Rejoining { suspect, failures: 0 });
            }
        }
        if self.s.stall.since.is_none() {
            self.s.stall.at = position;
        }
        let due = *self.s.stall.since.get_or_insert(self.now) + STALLED_AFTER;
        if self.now < due {
            return self.s.timers.arm(Timer::Stalled, due);
        }
        if self.s.stall.probe.is_none()
            && let Some((member, _)) = self.s.member(&leader.name)
        {
            self.s.probes += 1;
            let id = ProbeId(self.s.probes);
            self.s.stall.probe = Some(id);
            let peers = BTreeMap::from([(leader.name, member.head.api_url)]);
            self.out.push(Action::ProbePeers { id, peers, deadline: STALLED_PROBE_DEADLINE });
        }
    }

    /// What to think of data that a living leader's does not go with: one rewind is tried.
    fn suspicion(&self) -> Suspect {
        if self.is_rewound() { Suspect::Hopeless } else { Suspect::Maybe }
    }

    /// A rewind to the cluster's present timeline has been tried.
    fn is_rewound(&self) -> bool {
        self.s.stall.rewound == Some(self.s.timelines().current)
    }

    /// How long a start may take; nothing if as long as it likes, for the leader is known to have all that the data needs, or another
    /// rewind, which would be the answer, is not to be made.
    fn start_patience(&self) -> Option<Span> {
        if self.s.dynamic.pause || !self.s.uses_rewind() {
            return None;
        }
        let current = self.s.timelines().current;
        match (self.s.stall.rewound, &self.s.data) {
            (Some(to), _) => (to != current).then_some(STALLED_AFTER),
            // By an earlier life of the bot.
            (None, Some(DataDir::Present { timeline, rewound: true, .. })) => {
                (*timeline != current).then_some(STALLED_AFTER)
            }
            (None, Some(DataDir::Present { timeline, .. })) => (*timeline != current).then_some(START_PATIENCE),
            (None, _) => None,
        }
    }

    /// It streams: if that lasts, or brings it on, the data is proven to follow.
    fn mind_stream(&mut self, position: Lsn) {
        let proven = *self.s.stall.streaming_since.get_or_insert(self.now) + PROVEN_AFTER;
        let gets_on = self.s.stall.since.is_some() && position > self.s.stall.at;
        if self.now >= proven || gets_on {
            self.s.stall = Stall { streaming_since: self.s.stall.streaming_since, ..Stall::default() };
            if let Some(DataDir::Present { rewound, .. }) = &mut self.s.data {
                *rewound = false;
            }
        } else if self.s.stall.since.is_some() || self.s.stall.rewound.is_some() {
            self.s.timers.arm(Timer::Stalled, proven);
        }
    }

    /// Whether the server of a replica or a candidate has ended.
    pub(super) fn server_gone(&mut self, happened: &Happened) -> bool {
        if let Happened::Exited { how } = happened {
            self.s.trouble = Some(format!("Postgres exited by itself: {how}"));
            self.s.pause.left_down |= self.s.dynamic.pause;
            if let Some(running) = self.s.job.take() {
                self.out.push(Action::Cancel { id: running.id });
            }
            return true;
        }
        self.s.postgres == Postgres::Down && self.s.job.is_none()
    }

    /// A server that left recovery without us holding the lock was promoted by hand: it must not take a write (S1).
    pub(super) fn stop_unlocked_writer(&mut self) -> bool {
        if self.s.server().is_none_or(|server| server.in_recovery) {
            return false;
        }
        let why =
            String::from("it left recovery without the leader lock: was it promoted by hand? Use botctl switchover");
        self.s.trouble = Some(format!("Postgres was stopped: {why}"));
        let mode = self.stop_at_once();
        self.become_phase(Phase::Demoting {
            why: DemoteWhy::Fenced(why),
            step: DemoteStep::Stopping,
            shutdown_checkpoint: None,
        });
        self.run(Job::Stop { mode });
        true
    }
}
