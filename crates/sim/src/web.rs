//! The data plane of a web bot: prepared commits on disk, the user's process, the route of requests, and the load.

use std::collections::{BTreeMap, BTreeSet};

use bots_core::{
    machine::{Span, Time},
    wire::{Kind, WebLoad},
};
use web_bot::machine::{Action, Event, Route};

use crate::{
    check::Seen,
    plant::Plant,
    world::{Body, BotEvent, Item, NodeId, World},
};

/// At most so many bots may serve.
pub const SERVING_MAX: u64 = 3;
/// How long load must have been lower before a bot is sent to rest.
pub const STABLE_WINDOW_S: u32 = 10;
/// The same as a length of time.
pub const STABLE_WINDOW: Span = Span::from_secs(10);
/// How many requests in flight one bot carries, in thousandths.
const EACH_CARRIES: u64 = 8_000;
/// How often the data plane says how busy it is.
const MEASURE_EVERY: Span = Span::from_millis(1_000);

/// The load on the site.
#[derive(Debug, Default)]
pub struct Load {
    /// Requests in flight over the whole fleet, in thousandths.
    pub in_flight_milli: u64,
}

impl Load {
    /// How many bots the load asks for.
    #[must_use]
    pub const fn bots_wanted(&self) -> u64 {
        let bots = self.in_flight_milli.div_ceil(EACH_CARRIES);
        if bots < 1 {
            1
        } else if bots > SERVING_MAX {
            SERVING_MAX
        } else {
            bots
        }
    }
}

/// What a web bot looks after.
#[derive(Debug)]
pub struct WebBody {
    /// The commits on disk, whole.
    prepared: BTreeSet<String>,
    /// The instances of the user's process that live, and whether each is healthy.
    apps: BTreeMap<u64, bool>,
    route: Route,
    /// Until when it can prepare nothing.
    starved_until: Time,
}

impl Default for WebBody {
    fn default() -> Self {
        let route = Route::Refuse { state: String::from("not running") };
        Self { prepared: BTreeSet::new(), apps: BTreeMap::new(), route, starved_until: Time::ZERO }
    }
}

impl WebBody {
    /// Whether the commit is there whole.
    #[must_use]
    pub fn has(&self, sha: &str) -> bool {
        self.prepared.contains(sha)
    }

    /// The commit that responses are from; nothing if there are none.
    #[must_use]
    pub fn served(&self) -> Option<&str> {
        match &self.route {
            Route::App { instance, .. } if !self.apps.contains_key(instance) => None,
            route => route.sha(),
        }
    }
}

/// Work that ends.
#[derive(Debug)]
pub(crate) enum WebItem {
    Prepared { id: u64, sha: String, pack_urls: Vec<String> },
    AppReady { instance: u64 },
    AppExited { instance: u64, how: &'static str },
    AppHung { instance: u64 },
    Drained { id: u64 },
    Measure,
}

impl World {
    pub(crate) fn web_body(&mut self, node: NodeId) -> &mut WebBody {
        match &mut self.nodes[node.0].body {
            Body::Web(body) => body,
            Body::Postgres(_) | Body::Content(_) => unreachable!("only asked of web bots"),
        }
    }

    fn web_after(&mut self, node: NodeId, delay: Span, item: WebItem) {
        let life = self.nodes[node.0].life;
        self.after(delay, Item::Web { node, life, item });
    }

    pub(crate) fn perform_web(&mut self, node: NodeId, action: Action) {
        match action {
            Action::Dcs(action) => self.ask_store(node, action),
            Action::ProbeName { api_url } => self.probe_name(node, &api_url),
            Action::PrepareContent { id, sha, pack_urls, origin: _, reference: _ } => {
                let delay = self.rng.span(5, 900);
                if self.plant == Some(Plant::ReadyBeforeWhole) {
                    let event = Event::ContentPrepared { id, sha: sha.clone() };
                    self.tell(node, Span::ZERO, BotEvent::Web(event));
                }
                self.web_after(node, delay, WebItem::Prepared { id, sha, pack_urls });
            }
            Action::RetainContent { shas } => self.web_body(node).prepared.retain(|sha| shas.contains(sha)),
            Action::StartApp { instance, sha, database_hosts: _, cdn_url: _, configuration: _ } => {
                let fails = !self.web_body(node).has(&sha) || self.app_fails() || self.never_comes_up(&sha);
                let delay = self.rng.span(50, 2_500);
                self.web_body(node).apps.insert(instance, false);
                let end = if fails {
                    WebItem::AppExited { instance, how: "exit status: 1" }
                } else {
                    WebItem::AppReady { instance }
                };
                self.web_after(node, delay, end);
            }
            Action::StopApp { instance, drain, grace } => {
                let delay = self.rng.span(5, drain.max(grace).as_millis());
                self.web_after(node, delay, WebItem::AppExited { instance, how: "signal: 15 (SIGTERM)" });
            }
            Action::ProbeDatabase { id, address } => {
                let server = self.host_in(&address).filter(|server| self.network.peers_meet(node, *server));
                let delay = self.rng.span(1, 1_000);
                let answers = server.is_some_and(|s| self.nodes[s.0].postgres().is_some_and(|p| p.facts().is_some()));
                self.tell(node, delay, BotEvent::Web(Event::DatabaseProbed { id, answers }));
            }
            Action::SetRoute(route) => {
                self.web_body(node).route = route;
                self.request(node);
            }
            Action::AwaitInFlight { id } => {
                if self.rng.chance(900) {
                    let delay = self.rng.span(1, 2_500);
                    self.web_after(node, delay, WebItem::Drained { id });
                }
            }
            Action::Exit { code, message } => self.exited(node, code, &message),
        }
    }

    /// Whether the app never comes up on the commit, for all that its files are good.
    pub(crate) fn never_comes_up(&self, sha: &str) -> bool {
        let odd = sha.as_bytes().get(1).is_some_and(|digit| digit % 2 == 1);
        self.plan.app && odd && self.origin.is_refused(sha)
    }

    fn app_fails(&mut self) -> bool {
        let fail = self.plan.jobs_fail;
        !self.is_healed() && self.rng.chance(fail)
    }

    /// A client asks the bot for a page.
    pub(crate) fn request(&mut self, node: NodeId) {
        if let Some(sha) = self.web_body(node).served().map(str::to_owned) {
            self.see(&Seen::Response { node, sha: &sha });
        }
    }

    pub(crate) fn begin_measuring(&mut self, node: NodeId) {
        self.web_after(node, MEASURE_EVERY, WebItem::Measure);
    }

    /// The bot died: its listener and its children did.
    pub(crate) fn web_loses_bot(&mut self, node: NodeId) {
        let body = self.web_body(node);
        body.apps.clear();
        body.route = Route::Refuse { state: String::from("not running") };
    }

    /// A fault: an instance of the user's process dies, or every third of them hangs.
    pub(crate) fn crash_app(&mut self, node: NodeId) {
        if let Some(instance) = self.web_body(node).apps.keys().next().copied() {
            let item = if instance.is_multiple_of(3) {
                WebItem::AppHung { instance }
            } else {
                WebItem::AppExited { instance, how: "signal: 9 (SIGKILL)" }
            };
            self.web_after(node, Span::ZERO, item);
        }
    }

    /// A fault: the bot can prepare nothing for a while.
    pub(crate) fn starve(&mut self, node: NodeId, length: Span) {
        let until = self.now + length;
        self.web_body(node).starved_until = until;
    }

    pub(crate) fn web_item(&mut self, node: NodeId, item: WebItem) {
        let event = match item {
            WebItem::Prepared { id, sha, pack_urls } => {
                if !self.can_prepare(node, &sha, &pack_urls) {
                    Event::ContentFailed { id, sha, why: String::from("neither a pack nor the origin can be had") }
                } else if self.origin.is_refused(&sha) && !self.never_comes_up(&sha) {
                    Event::ContentRefused { id, sha, why: String::from("_redirects, line 1: no status") }
                } else {
                    self.web_body(node).prepared.insert(sha.clone());
                    Event::ContentPrepared { id, sha }
                }
            }
            WebItem::AppReady { instance } => match self.web_body(node).apps.get_mut(&instance) {
                Some(healthy) => {
                    *healthy = true;
                    Event::AppReady { instance }
                }
                None => return,
            },
            WebItem::AppExited { instance, how } => match self.web_body(node).apps.remove(&instance) {
                Some(_) => Event::AppExited { instance, how: how.to_owned() },
                None => return,
            },
            WebItem::AppHung { instance } => match self.web_body(node).apps.get(&instance) {
                Some(true) => {
                    Event::AppHung { instance, how: String::from("its health check failed: no answer within 2s") }
                }
                Some(false) | None => return,
            },
            WebItem::Drained { id } => Event::InFlightEnded { id },
            WebItem::Measure => {
                self.web_after(node, MEASURE_EVERY, WebItem::Measure);
                let serving = self.serving();
                if !serving.contains(&node) {
                    return;
                }
                let share = self.load.in_flight_milli / u64::try_from(serving.len()).unwrap_or(1).max(1);
                Event::LoadMeasured(WebLoad {
                    in_flight_milli: share,
                    rps: share / 100,
                    p99_us: 2_000,
                    ..WebLoad::default()
                })
            }
        };
        self.tell(node, Span::ZERO, BotEvent::Web(event));
    }

    /// The machines that answer requests.
    pub(crate) fn serving(&self) -> Vec<NodeId> {
        let serves = |node: &NodeId| match &self.nodes[node.0].body {
            Body::Web(body) => body.served().is_some(),
            Body::Postgres(_) | Body::Content(_) => false,
        };
        self.ids().filter(|node| self.nodes[node.0].kind == Kind::Web).filter(serves).collect()
    }

    fn can_prepare(&mut self, node: NodeId, sha: &str, pack_urls: &[String]) -> bool {
        let fail = self.plan.jobs_fail;
        if !self.is_healed() && self.rng.chance(fail) {
            return false;
        }
        let starved_until = self.web_body(node).starved_until;
        if !self.is_healed() && self.now < starved_until {
            return false;
        }
        let holds = |peer: NodeId| {
            let n = &self.nodes[peer.0];
            let has = matches!(&n.body, Body::Content(body) if body.has(sha));
            has && n.bot_moves() && self.network.peers_meet(node, peer)
        };
        let from_pack = pack_urls.iter().filter_map(|url| self.host_in(url)).any(holds);
        self.nodes[node.0].web_state().is_some()
            && (from_pack || self.origin.gives(sha) || matches!(&self.nodes[node.0].body, Body::Web(b) if b.has(sha)))
    }
}
