//! Jobs: how long each takes, what it leaves behind when it is cut off, and how it ends.

use bots_core::{machine::Span, wire::Timeline};
use postgres_bot::machine::{Job, JobId, JobResult, Upstream};

use super::{Contents, Disk, Process, RunningJob, ServerItem, Wal};
use crate::{
    check::Seen,
    plant::Plant,
    world::{NodeId, World},
};

/// A bot waits so long for its guard.
pub(super) const GUARD_PATIENCE: Span = Span::from_secs(2);

/// The end of what a job says of a source that cannot be reached.
pub(super) const SILENT: &str = " does not answer";

impl World {
    /// How long a job takes that should take `low` to `high` milliseconds.
    fn job_time(&mut self, low: u64, high: u64) -> Span {
        let slow = if self.is_healed() { 100 } else { self.plan.jobs_slow };
        self.rng.span(low, high).times(slow).divided_by(100)
    }

    fn job_fails(&mut self) -> bool {
        let fail = self.plan.jobs_fail;
        !self.is_healed() && self.rng.chance(fail)
    }

    /// A machine asks for a job.
    pub(super) fn run_job(&mut self, node: NodeId, id: JobId, job: Job) {
        if self.body(node).job.is_some() {
            self.abandon_job(node);
        }
        self.see(&Seen::JobStarted { node, job: &job });
        let source_run = match &job {
            Job::Clone { source } | Job::Rewind { source } => self.named(&source.name).map(|up| self.body(up).run),
            _any_other => None,
        };
        let body = self.body_mut(node);
        body.jobs += 1;
        let serial = body.jobs;
        body.job = Some(RunningJob { id, job: job.clone(), serial, source_run });
        match job {
            Job::Initialize => {
                if self.body(node).disk.contents == Contents::Empty {
                    self.body_mut(node).disk.contents = Contents::Unfinished { cloning: false };
                }
                let time = self.job_time(200, 1_200);
                self.job_after(node, time, serial);
            }
            Job::Clone { .. } => {
                if self.body(node).disk.contents == Contents::Empty {
                    self.body_mut(node).disk.contents = Contents::Unfinished { cloning: true };
                }
                let time = self.job_time(300, 4_000);
                self.job_after(node, time, serial);
            }
            Job::Rewind { .. } => {
                let time = self.job_time(200, 2_500);
                self.job_after(node, time, serial);
            }
            Job::CreateRoles
            | Job::Complete
            | Job::DiscardUnfinished { .. }
            | Job::SetAside { .. }
            | Job::Follow { .. } => {
                let time = self.job_time(2, 120);
                self.job_after(node, time, serial);
            }
            Job::Checkpoint => {
                let time = self.job_time(5, 500);
                self.job_after(node, time, serial);
            }
            Job::Drain => {
                let time = self.job_time(5, 1_000);
                self.job_after(node, time, serial);
            }
            Job::StartPrimary => self.start_server(node, true, None),
            Job::StartStandby { upstream } => self.start_server(node, false, upstream),
            Job::Promote { timeline, .. } => self.promote(node, serial, timeline),
            Job::Stop { mode } => {
                if self.body(node).process == Process::Down {
                    if !self.body(node).unburied {
                        self.job_after(node, Span::from_millis(3), serial);
                    }
                } else {
                    self.stop_server(node, mode);
                }
            }
        }
    }

    fn job_after(&mut self, node: NodeId, delay: Span, serial: u64) {
        self.server_after(node, delay, ServerItem::JobDone { serial });
    }

    fn start_server(&mut self, node: NodeId, primary: bool, upstream: Option<Upstream>) {
        let serial = self.body(node).jobs;
        let starts = !primary && self.body(node).process == Process::Starting { primary };
        if std::mem::take(&mut self.body_mut(node).kept) || starts {
            return self.take_over(node, serial, upstream);
        }
        let startable = match self.body(node).disk.contents {
            Contents::Present => true,
            Contents::Unfinished { cloning } => primary && !cloning && self.body(node).disk.system_id.is_some(),
            Contents::Empty => false,
        };
        if self.body(node).process != Process::Down || self.body(node).unburied || !startable {
            return self.job_after(node, Span::from_millis(5), serial);
        }
        let time = self.job_time(40, 1_500);
        let fails = self.body(node).disk.torn || self.job_fails();
        let body = self.body_mut(node);
        body.disk.standby = !primary;
        body.disk.upstream = upstream.map(|up| up.name);
        self.launch(node, primary, time, fails);
    }

    /// The server runs on as it was. One that is on its way up or down ends the job when it comes there.
    fn take_over(&mut self, node: NodeId, serial: u64, upstream: Option<Upstream>) {
        let body = self.body_mut(node);
        let upstream = upstream.map(|up| up.name);
        let turned = std::mem::replace(&mut body.disk.upstream, upstream.clone()) != upstream;
        let run_on = body.process != Process::Down;
        let (up, standby) = (matches!(body.process, Process::Up { .. }), body.disk.standby);
        if turned && standby {
            self.drop_link(node);
        }
        if run_on {
            self.reload(node);
        }
        if up {
            let time = self.job_time(3, 60);
            self.job_after(node, time, serial);
        }
    }

    fn promote(&mut self, node: NodeId, serial: u64, timeline: Timeline) {
        let run = self.body(node).run;
        let (mut time, mut fails) = (self.job_time(20, 700), self.job_fails());
        if self.nodes[node.0].frozen.holds_guard() {
            // Without its word that the fence stands, nothing is promoted.
            (time, fails) = (GUARD_PATIENCE, true);
        }
        let body = self.body_mut(node);
        body.promoting_to = timeline.max(Timeline(body.disk.wal.timeline().max(body.disk.history_seen).0 + 1));
        match &mut body.process {
            Process::Up { in_recovery: true, promoting } if !fails => {
                *promoting = true;
                self.server_after(node, time, ServerItem::Promoted { run });
            }
            _unfit => self.job_after(node, time, serial),
        }
    }

    /// A job is cut off: what it has begun stays half done.
    pub(super) fn abandon_job(&mut self, node: NodeId) {
        let Some(running) = self.body_mut(node).job.take() else { return };
        if let Job::Rewind { source } = &running.job
            && let Some(up) = self.named(&source.name)
        {
            let body = self.body(node);
            let pointless = body.disk.wal.timeline() == self.body(up).disk.control_timeline;
            if !pointless && self.rng.chance(500) {
                // Half rewound, it is of no more use than half a copy.
                self.body_mut(node).disk.contents = Contents::Unfinished { cloning: true };
            }
        }
    }

    /// A job that is no process of the server has come to its end.
    pub(super) fn job_done_at(&mut self, node: NodeId, serial: u64) {
        let Some(running) = self.body_mut(node).job.take_if(|running| running.serial == serial) else { return };
        let result = self.end_job(node, &running);
        let rewinds = matches!(running.job, Job::Rewind { .. });
        if rewinds && result.is_err() && self.plant == Some(Plant::FailedRewindIsFinal) {
            return;
        }
        self.job_ended(node, running.id, result);
    }

    fn end_job(&mut self, node: NodeId, running: &RunningJob) -> Result<JobResult, String> {
        let failed = self.job_fails();
        let open = self.body(node).is_open();
        let fail = |why: &str| Err(why.to_owned());
        match &running.job {
            Job::Stop { .. } => Ok(JobResult::Stopped { shutdown_checkpoint: None }),
            Job::StartPrimary | Job::StartStandby { .. } => match self.body(node).facts() {
                Some(facts) => Ok(JobResult::Started(facts)),
                None => fail("nothing to start"),
            },
            Job::Promote { .. } => fail("the server does not leave recovery"),
            Job::Rewind { source } => self.rewind(node, source, running.source_run, failed),
            Job::Complete => {
                self.body_mut(node).disk.contents = Contents::Present;
                Ok(JobResult::Done)
            }
            _any if failed => fail("a fault"),
            Job::Initialize => self.initialize(node),
            Job::Clone { source } => self.clone_from(node, source, running.source_run),
            Job::CreateRoles | Job::Checkpoint | Job::Drain | Job::Follow { .. } if !open => {
                fail("the server does not answer")
            }
            Job::Drain => Ok(JobResult::Done),
            Job::CreateRoles => {
                self.write_record(node, 4_000);
                Ok(JobResult::Done)
            }
            Job::Checkpoint => {
                if self.body(node).accepts_writes() {
                    self.write_record(node, 120);
                }
                let body = self.body_mut(node);
                body.disk.control_timeline = body.disk.wal.timeline();
                Ok(JobResult::Done)
            }
            Job::Follow { upstream: None } if self.plant == Some(Plant::PromiseNotKept) => Ok(JobResult::Done),
            Job::Follow { upstream } => {
                self.body_mut(node).disk.upstream = upstream.as_ref().map(|up| up.name.clone());
                self.drop_link(node);
                Ok(JobResult::Done)
            }
            Job::DiscardUnfinished { .. } => {
                if !matches!(self.body(node).disk.contents, Contents::Unfinished { .. }) {
                    return fail("the data directory is not marked unfinished");
                }
                self.body_mut(node).disk = Disk::default();
                Ok(JobResult::Done)
            }
            Job::SetAside { .. } => {
                if self.body(node).process != Process::Down {
                    return fail("the server runs");
                }
                // What an operator wants gone is gone, however good it is.
                if !self.nodes[node.0].postgres_state().is_some_and(postgres_bot::machine::State::is_remade) {
                    self.see(&Seen::SetAside { node });
                }
                self.body_mut(node).disk = Disk::default();
                Ok(JobResult::Done)
            }
        }
    }

    /// A record that is no client's write.
    fn write_record(&mut self, node: NodeId, size: u64) {
        let serial = self.ledger.next_record();
        self.body_mut(node).disk.wal.append(serial, size);
        self.stream_to_standbys(node);
    }

    fn initialize(&mut self, node: NodeId) -> Result<JobResult, String> {
        let fresh = Contents::Unfinished { cloning: false };
        if self.body(node).disk.contents != fresh || self.body(node).disk.system_id.is_some() {
            return Err(String::from("the data directory is not empty"));
        }
        let serial = self.ledger.next_record();
        let system_id = format!("7{:018}", self.rng.below(1_000_000_000_000_000_000));
        let wal = Wal::new(serial);
        let disk = &mut self.body_mut(node).disk;
        *disk = Disk {
            contents: fresh,
            system_id: Some(system_id.clone()),
            control_timeline: wal.timeline(),
            history_seen: wal.timeline(),
            wal,
            ..Disk::default()
        };
        Ok(JobResult::Initialized { system_id })
    }

    /// The server that a job copies from, if it has been there all the time.
    fn source(&self, node: NodeId, source: &Upstream, run: Option<u64>) -> Result<NodeId, String> {
        let found = self.named(&source.name).filter(|up| self.servers_meet(node, *up));
        found
            .filter(|up| self.body(*up).is_open() && Some(self.body(*up).run) == run)
            .ok_or_else(|| format!("{}{SILENT}", source.name))
    }

    fn clone_from(&mut self, node: NodeId, source: &Upstream, run: Option<u64>) -> Result<JobResult, String> {
        let up = self.source(node, source, run)?;
        if self.body(node).disk.contents != (Contents::Unfinished { cloning: true }) {
            return Err(String::from("the data directory is not empty"));
        }
        let copy = Disk {
            contents: Contents::Present,
            standby: true,
            upstream: Some(source.name.clone()),
            torn: false,
            rewound: false,
            ..self.body(up).disk.clone()
        };
        self.body_mut(node).disk = copy;
        Ok(JobResult::Done)
    }

    /// As `pg_rewind` of PostgreSQL 15 does it, with its short cut: the same timeline in both control files means that
    /// there is nothing to do, be it true or not.
    fn rewind(&mut self, node: NodeId, source: &Upstream, run: Option<u64>, failed: bool) -> Result<JobResult, String> {
        if self.body(node).process != Process::Down {
            return Err(String::from("the server runs"));
        }
        if self.body(node).disk.contents != Contents::Present {
            return Err(String::from("an earlier rewind was cut off half-way: only a new copy helps"));
        }
        if self.plant == Some(Plant::RewindSkipped) {
            self.body_mut(node).disk.standby = true;
            return Ok(JobResult::Done);
        }
        let up = self.source(node, source, run)?;
        if self.body(node).disk.system_id != self.body(up).disk.system_id {
            return Err(String::from("source and target are from different systems"));
        }
        let theirs = self.body(up).disk.clone();
        let disk = &mut self.body_mut(node).disk;
        disk.control_timeline = disk.wal.timeline();
        if disk.control_timeline == theirs.control_timeline {
            disk.standby = true;
            return Ok(JobResult::Done);
        }
        let parted = disk.wal.parted_from(&theirs.wal);
        if disk.wal.end() <= parted {
            disk.standby = true;
            return Ok(JobResult::Done);
        }
        if failed {
            disk.contents = Contents::Unfinished { cloning: true };
            return Err(String::from("a fault"));
        }
        (disk.standby, disk.rewound) = (true, true);
        disk.wal.cut(parted);
        // Where the timelines lie, pages of two histories are mixed, and nothing starts on them.
        disk.torn = !disk.wal.is_part_of(&theirs.wal);
        disk.wal.catch_up(&theirs.wal);
        disk.history_seen = disk.history_seen.max(theirs.wal.timeline());
        disk.control_timeline = theirs.control_timeline;
        Ok(JobResult::Done)
    }
}
