//! Jobs of a small fleet's members, and what their servers do by themselves: stream, acknowledge, end.

use bots_core::wire::Timeline;
use postgres_bot::machine::{Event, Job, JobError, JobResult, Postgres, StopMode};

use crate::{
    cluster::Fleet,
    plant::Plant,
    server::{Data, Log, Process, Server},
};

impl Fleet {
    /// The running job of a member comes to its end.
    pub(crate) fn end_job(&mut self, at: usize) -> Result<(), String> {
        let Some((id, job)) = self.member(at).job.take() else { return Ok(()) };
        let result = self.carry_out(at, &job)?;
        if let Ok(JobResult::Started(server) | JobResult::Promoted { server, .. }) = &result {
            self.member(at).told = Postgres::Up(server.clone());
        }
        let result = result.map_err(|why| JobError { elsewhere: why.ends_with("does not answer"), why });
        self.step(at, Event::JobEnded { id, result })
    }

    /// What a job does, and how it ends.
    fn carry_out(&mut self, at: usize, job: &Job) -> Result<Result<JobResult, String>, String> {
        let done = Ok(Ok(JobResult::Done));
        let failed = |why: &str| Ok(Err(why.to_owned()));
        let process = self.members[at].server.process;
        let data = self.members[at].server.data;
        match job {
            Job::Initialize if data == Data::Empty => {
                self.clusters += 1;
                let system_id = format!("7{}", self.clusters);
                let server = &mut self.member(at).server;
                server.data = Data::Unfinished { cloning: false };
                (server.system_id, server.log) = (Some(system_id.clone()), Log::new());
                Ok(Ok(JobResult::Initialized { system_id }))
            }
            Job::Complete => {
                self.member(at).server.data = Data::Present { standby: false };
                done
            }
            Job::DiscardUnfinished { .. } | Job::SetAside { .. } if process == Process::Down => {
                let wanted = self.members[at].server.wanted;
                self.member(at).server = Server { wanted, ..Server::new() };
                done
            }
            Job::Clone { source } => self.copy(at, &source.name, data == Data::Empty),
            Job::Rewind { source } => self.copy(at, &source.name, process == Process::Down),
            Job::StartPrimary => self.start_primary(at),
            Job::StartStandby { upstream } => {
                let server = &mut self.member(at).server;
                let starts = process == Process::Down && matches!(data, Data::Present { .. });
                if !starts && process != Process::Standby {
                    return failed("it cannot be started as a standby");
                }
                server.kept = false;
                (server.process, server.data) = (Process::Standby, Data::Present { standby: true });
                server.upstream = upstream.as_ref().map(|up| up.name.clone());
                Ok(self.facts(at).map(JobResult::Started).ok_or_else(|| String::from("it is not up")))
            }
            Job::Promote { timeline, .. } if process == Process::Standby => self.promote(at, *timeline),
            Job::Follow { upstream } if process == Process::Standby => {
                self.member(at).server.upstream = upstream.as_ref().map(|up| up.name.clone());
                done
            }
            Job::CreateRoles | Job::Checkpoint | Job::Drain if process != Process::Down => done,
            Job::Stop { mode } => {
                let clean = *mode == StopMode::Fast && process == Process::Primary;
                let shutdown_checkpoint = clean.then(|| self.members[at].server.log.end());
                if clean {
                    // A clean shutdown waits until each standby has everything.
                    self.standbys_of(at).into_iter().for_each(|standby| self.stream(standby));
                }
                self.server_ends(at);
                Ok(Ok(JobResult::Stopped { shutdown_checkpoint }))
            }
            Job::Initialize
            | Job::DiscardUnfinished { .. }
            | Job::SetAside { .. }
            | Job::Promote { .. }
            | Job::Follow { .. }
            | Job::CreateRoles
            | Job::Checkpoint
            | Job::Drain => failed("the server is not as it should be"),
        }
    }

    /// A clone, or a rewind: afterwards the data is that of the source.
    fn copy(&mut self, at: usize, source: &str, fit: bool) -> Result<Result<JobResult, String>, String> {
        let found = self.named(source).filter(|up| self.members[*up].server.process != Process::Down);
        let Some(up) = found else { return Ok(Err(format!("{source} does not answer"))) };
        if !fit {
            return Ok(Err(String::from("the data directory is not as it should be")));
        }
        let (system_id, log) = (self.members[up].server.system_id.clone(), self.members[up].server.log.clone());
        let server = &mut self.member(at).server;
        (server.data, server.system_id, server.log) = (Data::Present { standby: true }, system_id, log);
        server.upstream = Some(source.to_owned());
        Ok(Ok(JobResult::Done))
    }

    fn start_primary(&mut self, at: usize) -> Result<Result<JobResult, String>, String> {
        let server = &mut self.member(at).server;
        match (server.process, server.data) {
            (Process::Primary, _) if server.kept => server.kept = false,
            (Process::Down, Data::Present { .. }) => {
                (server.process, server.data) = (Process::Primary, Data::Present { standby: false });
                server.fence = server.wanted;
            }
            (Process::Down, Data::Unfinished { cloning: false }) => {
                server.process = Process::Primary;
                server.fence = server.wanted;
            }
            (_, _) => return Ok(Err(String::from("it cannot be started as a primary"))),
        }
        self.check_reign(at)?;
        Ok(self.facts(at).map(JobResult::Started).ok_or_else(|| String::from("it is not up")))
    }

    fn promote(&mut self, at: usize, timeline: Timeline) -> Result<Result<JobResult, String>, String> {
        let server = &mut self.member(at).server;
        if server.fence.is_none() {
            return Err(format!("S6: {} is promoted without a fence", self.members[at].name));
        }
        server.log.branch(timeline.0);
        (server.process, server.data) = (Process::Primary, Data::Present { standby: false });
        server.upstream = None;
        let ancestry = server.log.ancestry();
        self.check_reign(at)?;
        Ok(self
            .facts(at)
            .map(|server| JobResult::Promoted { server, ancestry })
            .ok_or_else(|| String::from("it is not up")))
    }

    /// The bot is killed. Its server goes on in its guard's care, and so does what the server was told to do last.
    pub(crate) fn kill_bot(&mut self, at: usize, job_goes_on: bool) -> Result<(), String> {
        if let Some((_, job)) = self.member(at).job.take()
            && job_goes_on
            && matches!(job, Job::Promote { .. } | Job::StartPrimary | Job::Stop { .. })
        {
            let _nobody_hears = self.carry_out(at, &job)?;
        }
        let member = self.member(at);
        member.server.kept = member.server.process != Process::Down;
        member.bot_ends();
        Ok(())
    }

    /// Every process of the server is gone; a bot that lives will hear of it.
    pub(crate) fn server_ends(&mut self, at: usize) {
        let member = self.member(at);
        if member.server.process != Process::Down {
            member.server.ends();
            member.server.unheard = member.state.is_some();
        }
    }

    /// Whom a standby streams from.
    pub(crate) fn upstream_of(&self, at: usize) -> Option<usize> {
        let server = &self.members[at].server;
        let up = self.named(server.upstream.as_deref()?).filter(|up| *up != at)?;
        let theirs = &self.members[up].server;
        let streams = server.process == Process::Standby
            && theirs.process != Process::Down
            && server.system_id == theirs.system_id
            && server.log.follows(&theirs.log);
        streams.then_some(up)
    }

    pub(crate) fn standbys_of(&self, at: usize) -> Vec<usize> {
        (0..self.members.len()).filter(|standby| self.upstream_of(*standby) == Some(at)).collect()
    }

    /// Whether a standby has not received all that its upstream has.
    pub(crate) fn lags(&self, at: usize) -> bool {
        self.upstream_of(at).is_some_and(|up| self.members[at].server.log != self.members[up].server.log)
    }

    pub(crate) fn stream(&mut self, at: usize) {
        let Some(up) = self.upstream_of(at) else { return };
        let log = self.members[up].server.log.clone();
        self.member(at).server.log = log;
        self.acknowledge(up);
    }

    /// A client writes.
    pub(crate) fn write(&mut self, at: usize) {
        self.budget.writes -= 1;
        self.written += 1;
        let record = self.written;
        let server = &mut self.member(at).server;
        server.log.records.push(record);
        server.waiting.push(record);
        self.acknowledge(at);
    }

    /// The standbys that a commit waits for and that stream, and how many of them it takes.
    fn counted(&self, at: usize) -> (usize, Vec<usize>) {
        let (needed, names) = self.members[at].server.waits_for();
        let needed = if self.options.plant == Some(Plant::WaitsForNobody) { 0 } else { needed };
        let counts = |standby: &usize| names.contains(&self.members[*standby].name.as_str());
        (needed, self.standbys_of(at).into_iter().filter(counts).collect())
    }

    pub(crate) fn can_acknowledge(&self, at: usize) -> bool {
        let (needed, standbys) = self.counted(at);
        standbys.len() >= needed
    }

    /// Answers the clients that it may answer.
    pub(crate) fn acknowledge(&mut self, at: usize) {
        if self.members[at].server.process != Process::Primary || self.members[at].server.waiting.is_empty() {
            return;
        }
        let (needed, standbys) = self.counted(at);
        let has = |standby: &&usize, record: &u32| self.members[**standby].server.log.records.contains(record);
        let waiting = &self.members[at].server.waiting;
        let enough = |record: &u32| standbys.iter().filter(|standby| has(standby, record)).count() >= needed;
        let (answered, left): (Vec<u32>, Vec<u32>) = waiting.iter().copied().partition(enough);
        self.acknowledged.extend(answered);
        self.member(at).server.waiting = left;
    }
}
