//! The hands: performs what the machine asks for. Work with git blocks, so it runs beside the loop and ends as an event.

use std::{
    ops::ControlFlow,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bots_core::{
    dcs::Revision,
    machine::Machine,
    shell::{Clock, DcsHandle, Events, Exit, Shell, probe_instance},
};
use prometheus_client::metrics::counter::Counter;
use tokio::{sync::Semaphore, task::JoinHandle};
use tracing::Instrument;

use super::{
    callers::{self, Purging},
    export::Exporter,
    guard::Stop,
    metrics::ContentMetrics,
    mirror::Mirror,
    origin::Limits,
};
use crate::machine::{Action, ContentMachine, Event, FetchResult, JobId, PollResult, Role, State};

/// Work with git at once. One look and one fetch are usual; more means that old ones hang in the kernel.
const WORK_MAX: usize = 4;

/// libgit2 looks at our limits only when data comes in; this long after them we go on without it.
const GRACE: Duration = Duration::from_secs(30);

/// Whom the hands call.
#[derive(Debug, Clone, Default)]
pub struct Callees {
    /// The pages of a canary.
    pub canary_paths: Vec<String>,
    /// The caches in front.
    pub purging: Purging,
    /// Where a call may leave a file for a moment.
    pub scratch: PathBuf,
}

/// The hands of a content bot.
pub struct Hands {
    events: Events<Event>,
    dcs: DcsHandle,
    mirror: Arc<Mirror>,
    limits: Limits,
    stop: Stop,
    metrics: ContentMetrics,
    role: Arc<Mutex<Role>>,
    work: Arc<Semaphore>,
    callees: Arc<Callees>,
    exporter: Option<Arc<Exporter>>,
    /// The publication whose flip was counted last.
    flipped: Option<Revision>,
}

impl Hands {
    /// Hands with nothing to do yet.
    #[must_use]
    pub fn new(
        events: Events<Event>,
        dcs: DcsHandle,
        mirror: Arc<Mirror>,
        limits: Limits,
        stop: Stop,
        metrics: ContentMetrics,
        role: Arc<Mutex<Role>>,
    ) -> Self {
        Self {
            events,
            dcs,
            mirror,
            limits,
            stop,
            metrics,
            role,
            work: Arc::new(Semaphore::new(WORK_MAX)),
            callees: Arc::default(),
            exporter: None,
            flipped: None,
        }
    }

    /// The same hands, that know whom to call.
    #[must_use]
    pub fn calling(mut self, callees: Callees) -> Self {
        self.callees = Arc::new(callees);
        self
    }

    /// The same hands, that put the live commit on disk.
    #[must_use]
    pub fn exporting(mut self, exporter: Option<Exporter>) -> Self {
        self.exporter = exporter.map(Arc::new);
        self
    }

    fn export(&self, job: JobId, sha: String) {
        let Some(exporter) = self.exporter.clone() else { return };
        let (mirror, commit) = (Arc::clone(&self.mirror), sha.clone());
        let put = self.blocking(self.limits.fetch, move || exporter.put(&mirror, &commit));
        let (events, metrics) = (self.events.clone(), self.metrics.clone());
        spawn(async move {
            let (damaged, result) = match put.await {
                Ok(Ok(())) => (false, Ok(())),
                Ok(Err(fault)) => (fault.is_damage(), Err(fault.to_string())),
                Err(why) => (false, Err(why)),
            };
            let result = result.map_err(|why| format!("cannot export {}: {why}", sha.get(..8).unwrap_or(&sha)));
            metrics.exports.inc();
            match &result {
                Ok(()) => tracing::info!(sha, "a commit is exported"),
                Err(why) => {
                    metrics.exports_failed.inc();
                    tracing::warn!(sha, why, "a commit could not be exported");
                }
            }
            if damaged {
                events.send(Event::CommitDamaged { sha }).await;
            }
            events.send(Event::TreeExported { job, result }).await;
        });
    }

    fn tell(&self, job: JobId, sha: String) {
        let (Some(exporter), stop) = (self.exporter.clone(), self.stop.clone()) else { return };
        let (commit, teller) = (sha.clone(), Arc::clone(&exporter));
        let ran = self.blocking(exporter.tell_deadline(), move || teller.run_hook(&commit, stop));
        let events = self.events.clone();
        spawn(async move {
            let result = match ran.await {
                Ok(Ok(())) => exporter.call(&sha).await,
                Ok(Err(why)) | Err(why) => Err(why),
            };
            if let Err(why) = &result {
                tracing::warn!(sha, why, "not all were told of an exported commit");
            }
            events.send(Event::ToldOfTree { job, result }).await;
        });
    }

    fn look(&self, job: JobId) {
        let (mirror, stop, patience) = (Arc::clone(&self.mirror), self.stop.clone(), self.limits.look);
        let looked = self.blocking(patience, move || mirror.origin().look(stop, patience));
        let (events, metrics) = (self.events.clone(), self.metrics.clone());
        spawn(async move {
            let result = looked.await.unwrap_or_else(|why| PollResult::Failed { why });
            metrics.looks.inc();
            match &result {
                PollResult::Found { .. } | PollResult::Missing => {
                    metrics.last_answer_seconds.set(i64::try_from(Clock::unix_ms() / 1_000).unwrap_or(i64::MAX));
                }
                PollResult::Failed { why } => {
                    metrics.looks_failed.inc();
                    tracing::warn!(why, "the origin could not be looked at");
                }
            }
            events.send(Event::Polled { job, result }).await;
        });
    }

    fn fetch(&self, job: JobId, sha: String) {
        let (mirror, commit, patience) = (Arc::clone(&self.mirror), sha.clone(), self.limits.fetch);
        let fetched = self.blocking(patience, move || {
            let result = mirror.fetch(&commit);
            (mirror.holds(), result)
        });
        let (events, metrics, mirror) = (self.events.clone(), self.metrics.clone(), Arc::clone(&self.mirror));
        let tidied = Arc::clone(&self.mirror);
        spawn(async move {
            let began = Clock::now();
            let (holds, result) = match fetched.await {
                Ok(ended) => ended,
                Err(why) => {
                    let holds = spawn_blocking(move || mirror.holds()).await;
                    (holds.unwrap_or_default(), FetchResult::Failed { why })
                }
            };
            metrics.fetches.inc();
            let ms = Clock::now().since(began).as_millis();
            match &result {
                FetchResult::Complete => tracing::info!(sha, ms, "a commit is fetched and verified"),
                FetchResult::Unfit { reason: why } => tracing::warn!(sha, why, "a commit is unfit"),
                FetchResult::Doubtful { reason: why } => tracing::warn!(sha, why, "a commit is in doubt"),
                FetchResult::Vanished => tracing::warn!(sha, "the origin does not give out a commit"),
                FetchResult::Failed { why } => tracing::warn!(sha, why, "a commit could not be fetched"),
            }
            if result != FetchResult::Complete {
                metrics.fetches_failed.inc();
            }
            events.send(Event::FetchEnded { job, holds, result }).await;
            let _tidied = spawn_blocking(move || tidied.tidy()).await;
        });
    }

    /// Runs `work` on a thread where it may block, and waits for it a little longer than it may take.
    fn blocking<T, W>(&self, patience: Duration, work: W) -> impl Future<Output = Result<T, String>> + Send + use<T, W>
    where
        T: Send + 'static,
        W: FnOnce() -> T + Send + 'static,
    {
        let place = Arc::clone(&self.work).try_acquire_owned();
        let task = place.map(|place| {
            spawn_blocking(move || {
                let _place = place;
                work()
            })
        });
        async move {
            let Ok(task) = task else { return Err(format!("{WORK_MAX} operations of git hang already")) };
            match tokio::time::timeout(patience + GRACE, task).await {
                Ok(Ok(done)) => Ok(done),
                Ok(Err(_panicked)) => Err(String::from("an operation of git panicked: see the log")),
                Err(_elapsed) => Err(format!("git did not answer within {:?}", patience + GRACE)),
            }
        }
    }
}

impl Drop for Hands {
    fn drop(&mut self) {
        self.stop.now();
    }
}

/// Work beside the loop, which the log names the site of as it does for the loop.
fn spawn(work: impl Future<Output = ()> + Send + 'static) {
    tokio::spawn(work.in_current_span());
}

/// The same for work that blocks.
fn spawn_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let span = tracing::Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work))
}

/// Brings a counter to what the machine has counted.
fn count_up(counter: &Counter, counted: u64) {
    counter.inc_by(counted.saturating_sub(counter.get()));
}

impl Shell for Hands {
    type Machine = ContentMachine;

    fn perform(&mut self, action: Action) -> ControlFlow<Exit> {
        match action {
            Action::Dcs(action) => self.dcs.perform(action),
            Action::ProbeName { api_url } => {
                let (events, ours) = (self.events.clone(), self.dcs.identity().clone());
                spawn(async move {
                    let instance = probe_instance(&api_url, &ours).await;
                    events.send(Event::NameProbed { instance }).await;
                });
            }
            Action::PollOrigin { job } => self.look(job),
            Action::FetchCommit { job, sha } => self.fetch(job, sha),
            Action::ForgetCommit { sha } => {
                let mirror = Arc::clone(&self.mirror);
                let _on_its_own = spawn_blocking(move || mirror.forget(&sha));
            }
            Action::ReadCanary { job, url, sha } => {
                let (events, callees) = (self.events.clone(), Arc::clone(&self.callees));
                spawn(async move {
                    let (asked, failed, why) = callers::read_pages(&url, &callees.canary_paths, &sha).await;
                    events.send(Event::CanaryRead { job, asked, failed, why }).await;
                });
            }
            Action::PurgeCaches { job, sha } => {
                let (events, callees, metrics) = (self.events.clone(), Arc::clone(&self.callees), self.metrics.clone());
                spawn(async move {
                    let result = callees.purging.purge(&sha, &callees.scratch).await;
                    match &result {
                        Ok(()) => metrics.purges.inc(),
                        Err(_) => metrics.purges_failed.inc(),
                    };
                    if let Err(why) = &result {
                        tracing::warn!(sha, why, "caches could not be purged");
                    }
                    events.send(Event::Purged { job, result }).await;
                });
            }
            Action::ExportTree { job, sha } => self.export(job, sha),
            Action::TellOfTree { job, sha } => self.tell(job, sha),
            Action::RemoveTree { sha } => {
                if let Some(exporter) = self.exporter.clone() {
                    let _on_its_own = spawn_blocking(move || exporter.remove(&sha));
                }
            }
            Action::Exit { code, message } => return ControlFlow::Break(Exit { code, message }),
        }
        ControlFlow::Continue(())
    }

    fn stepped(&mut self, state: &State) {
        *self.role.lock().unwrap_or_else(PoisonError::into_inner) = ContentMachine::role(state);
        count_up(&self.metrics.webhook_missed, state.pushes_missed());
        count_up(&self.metrics.pushes_replayed, state.pushes_replayed());
        if let Some(flipped) = state.flipped().filter(|flipped| self.flipped != Some(flipped.revision)) {
            self.flipped = Some(flipped.revision);
            self.metrics.flip_seconds.observe(flipped.whole.to_std().as_secs_f64());
            self.metrics.flip_skew_seconds.observe(flipped.skew.to_std().as_secs_f64());
        }
    }
}
