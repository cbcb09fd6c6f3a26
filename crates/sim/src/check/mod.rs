//! What must never be broken, and what must come true in the end. One file a requirement, each named after it; all of
//! them look after everything that happens.

mod acknowledged_writes;
mod counted_changes;
mod fenced_writes;
mod lease_deadline;
mod left_behind;
pub mod liveness;
mod load_claims;
mod one_cluster;
mod one_owner;
mod one_revision;
mod one_writer;
mod protection;
mod quiet;
mod rewinds;
mod servable_commits;
mod steady_count;
mod words;

use std::fmt;

use postgres_bot::machine::{Action, Job, Role};

use crate::world::{Applied, NodeId, World};

/// Something that the checks look at.
#[derive(Debug)]
pub enum Seen<'a> {
    /// Something has happened, whatever it was.
    Moment,
    /// etcd has carried out or refused a transaction.
    Applied(Applied<'a>),
    /// A bot's timer has fired.
    TimerFired {
        /// Whose.
        node: NodeId,
    },
    /// A postgres bot has made a step.
    PostgresStep {
        /// Which.
        node: NodeId,
        /// The role before.
        from: Role,
        /// The role after.
        to: Role,
        /// What it asks for.
        actions: &'a [Action],
    },
    /// A postgres bot's shell begins a job.
    JobStarted {
        /// Whose.
        node: NodeId,
        /// What.
        job: &'a Job,
    },
    /// A server accepts writes from now on; of one that is overdue (`World::is_overdue`) it is said again after the time in which
    /// its guard kills it, if it still does.
    Writable {
        /// Which.
        node: NodeId,
    },
    /// A data directory is renamed or removed.
    SetAside {
        /// Which.
        node: NodeId,
    },
    /// A web bot answers a request.
    Response {
        /// Which.
        node: NodeId,
        /// The commit that the answer is from.
        sha: &'a str,
    },
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Something that must never happen has happened.
    Safety,
    /// Something that must come true has not.
    Liveness,
}

/// A requirement that was not met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// How bad.
    pub class: Class,
    /// The requirement.
    pub requirement: &'static str,
    /// What happened instead.
    pub what: String,
}

impl Violation {
    fn safety(requirement: &'static str, what: String) -> Self {
        Self { class: Class::Safety, requirement, what }
    }

    pub(crate) fn liveness(what: String) -> Self {
        Self { class: Class::Liveness, requirement: liveness::REQUIREMENT, what }
    }

    pub(crate) fn storm(things: u64) -> Self {
        Self::safety(quiet::REQUIREMENT, format!("{things} things have happened, and there is no end of it"))
    }

    pub(crate) fn edge(kind: &str, from: &str, to: &str) -> Self {
        Self::safety("every edge taken is declared", format!("{kind}: {from} -> {to}"))
    }

    pub(crate) fn invariant(bot: &str, broken: &str) -> Self {
        Self::safety("every machine's invariants hold after every step", format!("{bot}: {broken}"))
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.requirement, self.what)
    }
}

/// A requirement.
pub(crate) trait Check: fmt::Debug {
    /// The sentence that it guards.
    fn requirement(&self) -> &'static str;
    /// Looks at something that has happened.
    fn see(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), String>;
}

/// All of them.
#[derive(Debug, Default)]
pub struct Checks(Vec<Box<dyn Check>>);

impl Checks {
    /// All but those whose requirement begins with `skip`.
    pub(crate) fn all_but(skip: Option<&str>) -> Self {
        let mut all = Self::all();
        all.0.retain(|check| skip.is_none_or(|skip| !check.requirement().starts_with(skip)));
        all
    }

    fn all() -> Self {
        Self(vec![
            Box::new(one_writer::OneWriter),
            Box::new(one_owner::OneOwner::default()),
            Box::new(acknowledged_writes::AcknowledgedWrites::default()),
            Box::new(fenced_writes::FencedWrites),
            Box::new(one_revision::OneRevision::default()),
            Box::new(servable_commits::ServableCommits::default()),
            Box::new(left_behind::LeftBehind::default()),
            Box::new(load_claims::LoadClaims),
            Box::new(steady_count::SteadyCount::default()),
            Box::new(counted_changes::CountedChanges),
            Box::new(lease_deadline::LeaseDeadline::default()),
            Box::new(one_cluster::OneCluster::default()),
            Box::new(rewinds::Rewinds::default()),
            Box::new(words::Words::default()),
            Box::new(quiet::Quiet::default()),
        ])
    }

    pub(crate) fn see(&mut self, world: &World, seen: &Seen<'_>) -> Result<(), Violation> {
        for check in &mut self.0 {
            check.see(world, seen).map_err(|what| Violation::safety(check.requirement(), what))?;
        }
        Ok(())
    }
}
