//! The way of facts about the server into the machine, in an order that makes sense: no observation made before a job's
//! end or the server's death is told after it.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use bots_core::{shell::Events, wire::Lsn};

use crate::machine::{Event, JobError, JobId, JobResult, Postgres};

/// Tells the machine of the server.
#[derive(Debug)]
pub struct Reporter {
    events: Events<Event>,
    told: Mutex<Told>,
}

#[derive(Debug, Default)]
struct Told {
    /// Grows with every fact that makes older observations worthless.
    epoch: Epoch,
    postgres: Postgres,
}

/// When an observation began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Epoch(u64);

impl Reporter {
    /// Tells through `events`.
    pub fn new(events: Events<Event>) -> Self {
        Self { events, told: Mutex::default() }
    }

    /// To be taken before the server is asked.
    pub fn epoch(&self) -> Epoch {
        self.told().epoch
    }

    /// The server was asked: tells it if it is news, or if the machine `asked`.
    pub async fn observed(&self, since: Epoch, postgres: Postgres, asked: bool) {
        let news = {
            let mut told = self.told();
            if told.epoch != since {
                return;
            }
            let news = told.postgres != postgres;
            told.postgres = postgres.clone();
            news
        };
        if news || asked {
            self.events.send(Event::PostgresObserved(postgres)).await;
        }
    }

    /// A copy has come this far.
    pub async fn copied(&self, bytes_done: u64, bytes_total: u64) {
        self.events.send(Event::CopyProgressed { bytes_done, bytes_total }).await;
    }

    /// The guard says how the watchdog device stands.
    pub async fn watchdog_used(&self, used: Result<u64, String>) {
        self.events.send(Event::WatchdogUsed(used)).await;
    }

    /// The guard answers, or does not.
    pub async fn guard_observed(&self, answers: bool) {
        self.events.send(Event::GuardObserved { answers }).await;
    }

    /// The server does not take these parameters; told from a thread that works on the disk.
    pub fn parameters_refused(&self, refused: BTreeMap<String, String>) {
        let events = self.events.clone();
        tokio::runtime::Handle::current().spawn(async move { events.send(Event::ParametersRefused(refused)).await });
    }

    /// The server is down but for its archiver.
    pub async fn closed(&self, shutdown_checkpoint: Lsn) {
        self.events.send(Event::PostgresClosed { shutdown_checkpoint }).await;
    }

    /// No process of the server is left.
    pub async fn exited(&self, how: String) {
        self.supersede(Postgres::Down);
        self.events.send(Event::PostgresExited { how }).await;
    }

    /// A server is being started: what was known of an earlier one is worthless.
    pub fn starting(&self) {
        self.supersede(Postgres::Starting);
    }

    /// A job ended.
    pub async fn job_ended(&self, id: JobId, result: Result<JobResult, JobError>) {
        match &result {
            Ok(JobResult::Started(server) | JobResult::Promoted { server, .. }) => {
                self.supersede(Postgres::Up(server.clone()));
            }
            Ok(JobResult::Stopped { .. }) => self.supersede(Postgres::Down),
            Ok(JobResult::Done | JobResult::Initialized { .. }) | Err(_) => {}
        }
        self.events.send(Event::JobEnded { id, result }).await;
    }

    fn supersede(&self, postgres: Postgres) {
        let mut told = self.told();
        told.epoch.0 += 1;
        told.postgres = postgres;
    }

    fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
