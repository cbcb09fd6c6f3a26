//! The git repository, and what a content bot's shell does with it: look, fetch, keep.

use std::collections::BTreeMap;

use bots_core::machine::Span;
use content_bot::machine::{Action, Commit, Event, FetchResult, JobId, PollResult};

use crate::{
    plant::Plant,
    rng::Rng,
    world::{Body, BotEvent, Item, NodeId, World},
};

#[derive(Debug, Clone, Copy)]
struct Pushed {
    /// It breaks no rule for content.
    fit: bool,
    /// A force-push has left nothing that leads to it.
    vanished: bool,
}

/// The git repository.
#[derive(Debug)]
pub struct Origin {
    commits: BTreeMap<String, Pushed>,
    head: String,
    /// It does not answer.
    pub(crate) down: bool,
}

impl Origin {
    /// A repository with one commit.
    pub(crate) fn new(rng: &mut Rng) -> Self {
        let mut origin = Self { commits: BTreeMap::new(), head: String::new(), down: false };
        origin.push(rng, true);
        origin
    }

    /// A new commit on the branch.
    pub(crate) fn push(&mut self, rng: &mut Rng, fit: bool) {
        let sha = format!("{:016x}{:016x}{:08x}", rng.draw(), rng.draw(), rng.draw() >> 32);
        self.commits.insert(sha.clone(), Pushed { fit, vanished: false });
        self.head = sha;
    }

    /// The branch is moved to a new commit that does not descend from its old one.
    pub(crate) fn force_push(&mut self, rng: &mut Rng) {
        if let Some(old) = self.commits.get_mut(&self.head) {
            old.vanished = true;
        }
        self.push(rng, true);
    }

    /// All commits that were ever pushed.
    pub(crate) fn commits(&self) -> Vec<String> {
        self.commits.keys().cloned().collect()
    }

    /// The commit that the branch points at.
    #[must_use]
    pub fn head(&self) -> &str {
        &self.head
    }

    /// Whether the commit must not be published.
    #[must_use]
    pub fn is_unfit(&self, sha: &str) -> bool {
        self.commits.get(sha).is_none_or(|commit| !commit.fit)
    }

    /// Whether the commit breaks a rule that shows only when it is served, where a canary can show it.
    #[must_use]
    pub fn is_sick(&self, sha: &str) -> bool {
        self.is_unfit(sha) && !self.is_refused(sha) && sha.bytes().last().is_some_and(|digit| digit % 2 == 0)
    }

    /// Whether the commit passes for good with content bots, and no web bot can ever serve it.
    #[must_use]
    pub fn is_refused(&self, sha: &str) -> bool {
        self.is_unfit(sha) && sha.bytes().next().is_some_and(|digit| digit % 2 == 0)
    }

    /// Whether it gives out the commit at this moment.
    #[must_use]
    pub fn gives(&self, sha: &str) -> bool {
        !self.down && self.commits.get(sha).is_some_and(|commit| !commit.vanished)
    }
}

/// A mirror on disk.
#[derive(Debug, Default)]
pub struct ContentBody {
    holds: Vec<Commit>,
}

impl ContentBody {
    /// The commits that are there whole, oldest first.
    #[must_use]
    pub fn holds(&self) -> Vec<Commit> {
        self.holds.clone()
    }

    /// Whether a pack of the commit may be had here.
    #[must_use]
    pub fn has(&self, sha: &str) -> bool {
        self.holds.iter().any(|commit| commit.sha == sha)
    }
}

/// Work that ends.
#[derive(Debug)]
pub(crate) enum ContentItem {
    Polled { job: JobId },
    Read { job: JobId, url: String, sha: String },
    Purged { job: JobId },
    Fetched { job: JobId, sha: String },
}

impl World {
    pub(crate) fn perform_content(&mut self, node: NodeId, action: Action) {
        let life = self.nodes[node.0].life;
        match action {
            Action::Dcs(action) => self.ask_store(node, action),
            Action::ProbeName { api_url } => self.probe_name(node, &api_url),
            Action::PollOrigin { job } => {
                let delay = self.origin_delay(20, 600);
                self.after(delay, Item::Content { node, life, item: ContentItem::Polled { job } });
            }
            Action::FetchCommit { job, sha } => {
                let delay = self.origin_delay(30, 2_000);
                self.after(delay, Item::Content { node, life, item: ContentItem::Fetched { job, sha } });
            }
            Action::ForgetCommit { sha } => self.mirror(node).retain(|commit| commit.sha != sha),
            Action::ReadCanary { job, url, sha } => {
                let delay = self.rng.span(2, 60);
                self.after(delay, Item::Content { node, life, item: ContentItem::Read { job, url, sha } });
            }
            Action::PurgeCaches { job, sha: _ } => {
                let delay = self.rng.span(2, 60);
                self.after(delay, Item::Content { node, life, item: ContentItem::Purged { job } });
            }
            // No bot here has an export: it changes nothing that others see.
            Action::ExportTree { .. } | Action::TellOfTree { .. } | Action::RemoveTree { .. } => {}
            Action::Exit { code, message } => self.exited(node, code, &message),
        }
    }

    /// A server that does not answer costs the whole deadline.
    fn origin_delay(&mut self, low: u64, high: u64) -> Span {
        if self.origin.down { Span::from_secs(5) } else { self.rng.span(low, high) }
    }

    fn mirror(&mut self, node: NodeId) -> &mut Vec<Commit> {
        match &mut self.nodes[node.0].body {
            Body::Content(body) => &mut body.holds,
            Body::Postgres(_) | Body::Web(_) => unreachable!("only asked of content bots"),
        }
    }

    pub(crate) fn content_item(&mut self, node: NodeId, item: ContentItem) {
        let event = match item {
            ContentItem::Polled { job } => {
                let result = if self.origin.down {
                    PollResult::Failed { why: String::from("git does not answer") }
                } else {
                    PollResult::Found { sha: self.origin.head().to_owned() }
                };
                Event::Polled { job, result }
            }
            ContentItem::Fetched { job, sha } => {
                let result = self.fetch(node, &sha);
                Event::FetchEnded { job, holds: self.mirror(node).clone(), result }
            }
            ContentItem::Read { job, url, sha } => {
                let well = self.plant == Some(Plant::CanaryAlwaysWell) || self.is_well(node, &url, &sha);
                let why = (!well).then(|| String::from("it answers 500"));
                Event::CanaryRead { job, asked: 1, failed: u64::from(!well), why }
            }
            ContentItem::Purged { job } => {
                let fail = self.plan.jobs_fail;
                let failed = !self.is_healed() && self.rng.chance(fail);
                let result = if failed { Err(String::from("the cache does not answer")) } else { Ok(()) };
                Event::Purged { job, result }
            }
        };
        self.tell(node, Span::ZERO, BotEvent::Content(event));
    }

    /// Whether the page of a web bot is there, and of that commit, and good.
    fn is_well(&self, node: NodeId, url: &str, sha: &str) -> bool {
        let host = self.host_in(url);
        host.is_some_and(|web| {
            let serves = matches!(&self.nodes[web.0].body, Body::Web(body) if body.served() == Some(sha));
            serves && self.nodes[web.0].bot_moves() && self.network.peers_meet(node, web) && !self.origin.is_sick(sha)
        })
    }

    fn fetch(&mut self, node: NodeId, sha: &str) -> FetchResult {
        let fail = self.plan.jobs_fail;
        if self.origin.down || (!self.is_healed() && self.rng.chance(fail)) {
            return FetchResult::Failed { why: String::from("git does not answer") };
        }
        if !self.origin.gives(sha) {
            return FetchResult::Vanished;
        }
        let seen_later = self.origin.is_refused(sha) || (self.plan.canary && self.origin.is_sick(sha));
        if self.origin.is_unfit(sha) && !seen_later {
            return FetchResult::Unfit { reason: String::from("the site is over the size limit") };
        }
        let mirror = self.mirror(node);
        mirror.retain(|commit| commit.sha != sha);
        mirror.push(Commit { sha: sha.to_owned(), subject: String::from("a change") });
        FetchResult::Complete
    }
}
