//! The app: one instance that serves, at most one beside it that starts to replace it or runs on the candidate, and those that
//! are being stopped.
//!
//! Restart is start-new, wait until healthy, switch, drain-old. What goes into an instance (commit, database hosts, CDN)
//! is fixed for its life; a change of any of them is a new instance.

use std::collections::{BTreeMap, BTreeSet};

use bots_core::{
    dcs::{Scope, View},
    machine::{Deadline, Span, Time},
    wire::{Member, PostgresFacts},
};
use serde::Serialize;

use super::{
    Action, Live,
    content::backoff,
    proof::{PROOF_BACKOFF_MIN, Proof},
};

/// How long a stopped app may take from SIGTERM to its end before it is killed.
pub const APP_STOP_GRACE: Span = Span::from_secs(5);

/// An app that dies after it was healthy for this long starts a new count of failures.
pub const APP_PROVEN_AFTER: Span = Span::from_secs(30);

/// The pause after a second failure in a row; doubled with each further one. The first restart waits for nothing.
pub const RESTART_BACKOFF_MIN: Span = Span::from_millis(500);

/// The longest pause between two starts.
pub const RESTART_BACKOFF_MAX: Span = Span::from_secs(30);

/// An app that dies this often in a row is somebody else's to try: the load message goes back.
pub const CRASHES_HELD_MAX: u32 = 3;

/// An app that fails this often in a row to come up on the live commit, beside one on an older commit, leaves the site to the bots
/// that have come up on it. Fewer, and one start in a bad moment would have it leave.
pub const STARTS_FAILED_MAX: u32 = 3;

/// How long a changed list of database hosts must stand before the app is restarted for it: members of a new cluster
/// appear one after another.
pub const DATABASE_SETTLE: Span = Span::from_secs(3);

/// How many processes of the app a bot has at most where connections to the database are counted: one that serves, and one
/// that comes or goes.
pub(super) const INSTANCES_MAX: u64 = 2;

/// So many processes there may be at a time, those that are being stopped included.
pub(super) fn instances_max(live: &Live) -> Option<u64> {
    live.connections.map(|_| INSTANCES_MAX)
}

/// What an instance is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Recipe {
    pub(super) sha: String,
    pub(super) database_hosts: Vec<String>,
    pub(super) cdn_url: Option<String>,
    /// An operator's wish for a new instance: whichever number, another one than before.
    pub(super) restart: u64,
    /// How it is run, of the ways that the bot's own configuration has said so far.
    pub(super) configuration: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Instance {
    id: u64,
    recipe: Recipe,
    /// While it starts: until when it must be healthy. Afterwards: since when it is.
    mark: Time,
    /// It hangs and is to be replaced.
    given_up: bool,
    /// Its requests have had their time to end.
    drained: bool,
}

/// Failures in a row, and what they were failures of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Failures {
    count: u32,
    recipe: Recipe,
    retry_at: Time,
    /// Another bot may do better: the load message should go back.
    hopeless: bool,
    /// One line, until an instance is healthy again.
    why: Option<String>,
}

/// The sub-machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct App {
    /// How many processes there may be at a time, those that are being stopped included.
    instances_max: Option<u64>,
    current: Option<Instance>,
    next: Option<Instance>,
    /// Runs on the candidate, until that goes live.
    held: Option<Instance>,
    pub(super) proof: Option<Proof>,
    /// Instances that nothing is sent to any more and that are to be stopped, in this step.
    leaving: Vec<Instance>,
    /// Instances that are being stopped, with their commits.
    retiring: BTreeMap<u64, String>,
    last_id: u64,
    failures: Option<Failures>,
    /// The hosts of the database scope, as last seen; an empty view does not make us forget.
    hosts: Vec<String>,
    hosts_since: Time,
}

/// What the bot finds when it looks after its app.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Condition {
    /// An instance is healthy and serves.
    Up,
    /// One is starting, or will be after a pause.
    Coming,
    /// It has failed so early or so often that the load message should go to another bot.
    Hopeless,
}

impl App {
    pub(super) const fn new(instances_max: Option<u64>) -> Self {
        Self {
            instances_max,
            current: None,
            next: None,
            held: None,
            proof: None,
            leaving: Vec::new(),
            retiring: BTreeMap::new(),
            last_id: 0,
            failures: None,
            hosts: Vec::new(),
            hosts_since: Time::ZERO,
        }
    }

    /// From now on there may be so many processes at a time. Those that are too many end when their time has come.
    pub(super) const fn bound(&mut self, instances_max: Option<u64>) {
        self.instances_max = instances_max;
    }

    /// The instance that serves, with its commit.
    pub(super) fn serving(&self) -> Option<(u64, &str)> {
        self.current.as_ref().map(|i| (i.id, i.recipe.sha.as_str()))
    }

    /// Whether no process of ours is left.
    pub(super) fn is_gone(&self) -> bool {
        !self.is_kept() && !self.has_leavers()
    }

    /// Whether processes are left that are to end.
    pub(super) fn has_leavers(&self) -> bool {
        !self.leaving.is_empty() || !self.retiring.is_empty()
    }

    /// Whether an instance runs or starts, other than those that are being stopped.
    pub(super) const fn is_kept(&self) -> bool {
        self.current.is_some() || self.next.is_some() || self.held.is_some()
    }

    /// The commits that some instance has its content from.
    pub(super) fn commits(&self) -> BTreeSet<String> {
        let kept = self.current.iter().chain(&self.next).chain(&self.held);
        let known = kept.chain(&self.leaving).map(|i| i.recipe.sha.clone());
        known.chain(self.retiring.values().cloned()).collect()
    }

    /// Trouble with the app, one line.
    pub(super) fn trouble(&self) -> Option<String> {
        let of_candidate = || self.proof.as_ref().and_then(Proof::trouble);
        self.failures.as_ref().and_then(|f| f.why.clone()).or_else(of_candidate)
    }

    /// What the instances are made of that answer requests, or could.
    pub(super) fn instances_up(&self) -> impl Iterator<Item = &Recipe> {
        self.current.iter().chain(&self.held).map(|instance| &instance.recipe)
    }

    /// Whether an instance serves, and none is beside it.
    pub(super) const fn is_free_for_proof(&self) -> bool {
        self.current.is_some() && self.next.is_none() && self.held.is_none()
    }

    /// Whether at most one instance is beside the one that serves, but for those that are being stopped.
    pub(super) const fn is_bounded(&self) -> bool {
        self.next.is_none() || self.held.is_none()
    }

    /// What serves is made of.
    pub(super) fn serving_recipe(&self) -> Option<Recipe> {
        self.current.as_ref().map(|i| i.recipe.clone())
    }

    /// What serves, or else starts in order to serve, is made of.
    pub(super) fn recipe(&self) -> Option<Recipe> {
        let starts = self.next.as_ref().filter(|next| !self.is_on_trial(&next.recipe));
        self.current.as_ref().or(starts).map(|i| i.recipe.clone())
    }

    fn is_on_trial(&self, recipe: &Recipe) -> bool {
        self.proof.as_ref().is_some_and(|proof| proof.recipe.sha == recipe.sha)
    }

    /// Whether it serves another commit than that one, on which it has failed to come up again and again.
    pub(super) fn falls_short_of(&self, sha: &str) -> bool {
        let fails = self.failures.as_ref().is_some_and(|f| f.recipe.sha == sha && f.count >= STARTS_FAILED_MAX);
        fails && self.serving().is_some_and(|(_, serving)| serving != sha)
    }

    /// The hosts of the database, as last seen.
    pub(super) fn hosts(&self) -> &[String] {
        &self.hosts
    }

    /// Whether a start of `wanted` may be tried: not during the pause after it has failed.
    pub(super) fn may_start(&self, now: Time, wanted: &Recipe) -> bool {
        self.failures.as_ref().is_none_or(|f| f.recipe != *wanted || f.retry_at <= now)
    }

    /// Looks at who is in the database scope. Members come and go with their leases; the list is only taken anew when it
    /// names a host that we do not know, because a host that does not answer costs the app less than a restart.
    pub(super) fn observe(&mut self, now: Time, database: Option<&Scope>, view: &View) {
        let Some(scope) = database else { return };
        let prefix = scope.members_prefix();
        let members = view.below(&prefix).filter_map(|kv| Member::from_json(&kv.value)?.facts::<PostgresFacts>());
        let found: BTreeSet<String> = members.filter_map(|facts| host_of(&facts.conn_url)).collect();
        if found.iter().any(|host| !self.hosts.contains(host)) {
            self.hosts = found.into_iter().collect();
            self.hosts_since = now;
        }
    }

    /// Starts and replaces instances so that one made of `wanted` serves.
    pub(super) fn advance(
        &mut self,
        now: Time,
        wanted: &Recipe,
        start_timeout: Span,
        out: &mut Vec<Action>,
    ) -> Condition {
        // What is to be served has nothing to prove any more, however it came to that.
        if self.is_on_trial(wanted) {
            self.proof = None;
        }
        if let Some(late) = self.next.take_if(|next| next.mark <= now) {
            self.start_failed(now, late.recipe.clone(), format!("the app was not healthy within {start_timeout}"));
            self.leaving.push(late);
        }
        if let Some(held) = self.held.take_if(|held| held.recipe.sha == wanted.sha) {
            self.serve_with(now, held);
        }
        let due = self.is_due(now, wanted);
        // The commit that it was started for is no longer the one to serve, or to be proven beside.
        let proven = self.proof.as_ref().map(|proof| proof.recipe.sha.as_str()).filter(|_| !due);
        let useless = |i: &mut Instance| {
            // What does not come up in a wrong way must not keep the corrected one waiting.
            let is_wanted = i.recipe.sha == wanted.sha && i.recipe.configuration >= wanted.configuration;
            !is_wanted && Some(i.recipe.sha.as_str()) != proven
        };
        self.leaving.extend(self.next.take_if(useless));
        self.leaving.extend(self.held.take_if(useless));
        if self.next.is_none() && due && self.has_room() {
            self.start(now, wanted, start_timeout, out);
        }
        let hopeless = self.is_hopeless(wanted);
        match (&self.current, &self.next) {
            (Some(_), _) => Condition::Up,
            (None, None) if hopeless => Condition::Hopeless,
            (None, _) => Condition::Coming,
        }
    }

    pub(super) fn has_room(&self) -> bool {
        let kept = self.current.iter().chain(&self.next).chain(&self.held).count();
        let all = kept + self.leaving.len() + self.retiring.len();
        self.instances_max.is_none_or(|max| u64::try_from(all).is_ok_and(|all| all < max))
    }

    /// Whether an instance made of `wanted` is to be started now, unless one starts already.
    pub(super) fn is_due(&self, now: Time, wanted: &Recipe) -> bool {
        !self.is_hopeless(wanted) && self.may_start(now, wanted) && self.must_start(now, wanted)
    }

    fn is_hopeless(&self, wanted: &Recipe) -> bool {
        self.failures.as_ref().is_some_and(|f| f.hopeless && f.recipe == *wanted)
    }

    fn must_start(&self, now: Time, wanted: &Recipe) -> bool {
        let Some(current) = &self.current else { return true };
        let settled = self.hosts_since + DATABASE_SETTLE <= now;
        current.given_up
            || current.recipe.sha != wanted.sha
            || current.recipe.cdn_url != wanted.cdn_url
            || current.recipe.restart != wanted.restart
            || current.recipe.configuration != wanted.configuration
            || (current.recipe.database_hosts != wanted.database_hosts && settled)
    }

    pub(super) fn start(&mut self, now: Time, wanted: &Recipe, start_timeout: Span, out: &mut Vec<Action>) {
        self.last_id += 1;
        self.next = Some(Instance {
            id: self.last_id,
            recipe: wanted.clone(),
            mark: now + start_timeout,
            given_up: false,
            drained: false,
        });
        out.push(Action::StartApp {
            instance: self.last_id,
            sha: wanted.sha.clone(),
            database_hosts: wanted.database_hosts.clone(),
            cdn_url: wanted.cdn_url.clone(),
            configuration: wanted.configuration,
        });
    }

    /// An instance answers its health check: it serves from now on, or when its commit goes live, or is well again.
    pub(super) fn ready(&mut self, now: Time, instance: u64) {
        if let Some(current) = self.current.as_mut().filter(|current| current.id == instance) {
            current.given_up = false;
            self.failures = self.failures.take().map(|f| Failures { why: None, ..f });
        }
        let Some(next) = self.next.take_if(|next| next.id == instance) else { return };
        match self.trial_of(&next.recipe) {
            Some(proof) => {
                proof.came_up();
                self.held = Some(Instance { mark: now, ..next });
            }
            None => self.serve_with(now, next),
        }
    }

    /// A healthy instance takes the place of the one that serves.
    fn serve_with(&mut self, now: Time, next: Instance) {
        self.failures = self.failures.take().filter(|f| f.recipe == next.recipe).map(|f| Failures { why: None, ..f });
        self.leaving.extend(self.current.replace(Instance { mark: now, ..next }));
    }

    /// An instance lives and does not answer: that counts like its death. It serves on until another is healthy, but for one
    /// of several in a row: then another bot shall try.
    pub(super) fn hung(&mut self, now: Time, instance: u64, how: &str) {
        if let Some(held) = self.held.take_if(|held| held.id == instance) {
            self.held_failed(now, &held, format!("the app hung: {how}"));
            self.leaving.push(held);
        }
        let hung = self.current.as_mut().filter(|current| current.id == instance && !current.given_up);
        let Some(hung) = hung else { return };
        hung.given_up = true;
        let (recipe, healthy_since) = (hung.recipe.clone(), hung.mark);
        self.failed_at_work(now, recipe, healthy_since, format!("the app hung: {how}"));
        if self.failures.as_ref().is_some_and(|f| f.hopeless) {
            self.leaving.extend(self.current.take());
        }
    }

    /// An instance has ended, asked or not.
    pub(super) fn exited(&mut self, now: Time, instance: u64, how: &str) {
        self.retiring.remove(&instance);
        self.leaving.retain(|i| i.id != instance);
        if let Some(next) = self.next.take_if(|next| next.id == instance) {
            self.start_failed(now, next.recipe, format!("the app ended before it was healthy: {how}"));
        }
        if let Some(held) = self.held.take_if(|held| held.id == instance) {
            self.held_failed(now, &held, format!("the app died: {how}"));
        }
        let dead = self.current.take_if(|current| current.id == instance);
        // One that was given up is counted already.
        if let Some(dead) = dead.filter(|dead| !dead.given_up) {
            self.failed_at_work(now, dead.recipe, dead.mark, format!("the app died: {how}"));
        }
    }

    /// An instance could not be started, whatever its commit: for want of memory, say.
    pub(super) fn not_started(&mut self, now: Time, instance: u64, how: &str) {
        let next = self.next.as_ref().filter(|next| next.id == instance).map(|next| next.recipe.clone());
        match next.as_ref().and_then(|recipe| self.trial_of(recipe)) {
            Some(proof) => {
                proof.put_off(now, how.to_owned());
                self.next = None;
            }
            None => self.exited(now, instance, how),
        }
    }

    /// An instance on the candidate has failed after it was healthy.
    fn held_failed(&mut self, now: Time, held: &Instance, why: String) {
        if let Some(proof) = self.trial_of(&held.recipe).filter(|_| held.mark + APP_PROVEN_AFTER <= now) {
            proof.stayed_up();
        }
        self.start_failed(now, held.recipe.clone(), why);
    }

    /// An instance that was healthy has failed.
    fn failed_at_work(&mut self, now: Time, recipe: Recipe, healthy_since: Time, why: String) {
        let proven = healthy_since + APP_PROVEN_AFTER <= now;
        let count = if proven { 1 } else { self.count_for(&recipe) + 1 };
        let pause = match count {
            1 => Span::ZERO,
            more => backoff(RESTART_BACKOFF_MIN, RESTART_BACKOFF_MAX, more - 1),
        };
        let hopeless = count >= CRASHES_HELD_MAX;
        self.failures = Some(Failures { count, recipe, retry_at: now + pause, hopeless, why: Some(why) });
    }

    fn start_failed(&mut self, now: Time, recipe: Recipe, why: String) {
        if let Some(proof) = self.trial_of(&recipe) {
            proof.failed(now, why);
            return;
        }
        let count = self.count_for(&recipe) + 1;
        // Beside one that serves there is time, and the database may be to blame: see there.
        let pause_min = if self.current.is_some() { PROOF_BACKOFF_MIN } else { RESTART_BACKOFF_MIN };
        let retry_at = now + backoff(pause_min, RESTART_BACKOFF_MAX, count);
        self.failures = Some(Failures { count, recipe, retry_at, hopeless: self.current.is_none(), why: Some(why) });
    }

    fn count_for(&self, recipe: &Recipe) -> u32 {
        self.failures.as_ref().filter(|f| f.recipe == *recipe).map_or(0, |f| f.count)
    }

    /// Nothing shall run any more. Requests had their time before, where there were any.
    pub(super) fn rest(&mut self) {
        let all = [self.current.take(), self.next.take(), self.held.take()];
        self.leaving.extend(all.into_iter().flatten().map(|instance| Instance { drained: true, ..instance }));
        self.proof = None;
        if let Some(failures) = &mut self.failures {
            failures.hopeless = false;
        }
    }

    /// Stops what nothing is sent to any more; to be called once the route says so. Requests in flight may take `drain`, once: the
    /// app is to have its time after SIGTERM whatever they do.
    pub(super) fn sweep(&mut self, drain: Span, out: &mut Vec<Action>) {
        for instance in std::mem::take(&mut self.leaving) {
            let drain = if instance.drained { Span::ZERO } else { drain };
            self.retiring.insert(instance.id, instance.recipe.sha);
            out.push(Action::StopApp { instance: instance.id, drain, grace: APP_STOP_GRACE });
        }
    }

    /// When the sub-machine wants a step of its own accord; `wanted` is what shall run, if anything.
    pub(super) fn deadline(&self, now: Time, wanted: Option<&Recipe>) -> Option<Deadline> {
        let due = |at, reason: &str| Deadline { at, reason: reason.to_owned() };
        let failures = self.failures.as_ref().filter(|f| Some(&f.recipe) == wanted && f.retry_at > now);
        let moved = |current: &Instance, wanted: &Recipe| current.recipe.database_hosts != wanted.database_hosts;
        let behind = self.current.as_ref().zip(wanted).filter(|(current, wanted)| moved(current, wanted));
        let settled = self.hosts_since + DATABASE_SETTLE;
        let idle = self.next.as_ref().is_none_or(|next| self.is_on_trial(&next.recipe));
        Deadline::earliest([
            self.next.as_ref().map(|next| due(next.mark, "the app must be healthy")),
            self.proof.as_ref().filter(|_| self.is_free_for_proof()).and_then(|proof| proof.deadline(now)),
            failures.filter(|_| idle).map(|f| due(f.retry_at, "start the app again")),
            behind.filter(|_| idle && settled > now).map(|_| due(settled, "restart the app for new database hosts")),
        ])
    }
}

/// `host:port` of a connection URL.
pub(super) fn host_of(conn_url: &str) -> Option<String> {
    let (_, rest) = conn_url.split_once("://")?;
    let authority = rest.split(['/', '?']).next()?;
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '[' | ']');
    (!host.is_empty() && host.chars().all(legal)).then(|| host.to_owned())
}
