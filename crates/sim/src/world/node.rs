//! A machine with one bot on it: the bot's mind, its connections, and the body that it looks after.

use std::collections::VecDeque;

use bots_core::{
    dcs::{DcsEvent, Scope},
    machine::{Span, Time},
    wire::Kind,
};
use content_bot::machine as content;
use postgres_bot::machine as postgres;
use web_bot::machine as web;

use super::{Client, Item};
use crate::{
    clock::NodeClock,
    content::ContentBody,
    plan::Plan,
    postgres::PostgresBody,
    rng::Rng,
    web::{STABLE_WINDOW_S, WebBody},
};

/// The namespace of all keys.
pub(super) const NAMESPACE: &str = "service";
/// The Postgres cluster.
pub(super) const POSTGRES: &str = "main";
/// The content site.
pub(super) const CONTENT: &str = "site";
/// The web fleet.
pub(super) const WEB: &str = "web";

/// Which machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeId(pub usize);

/// A bot's mind: the state of the real machine.
#[derive(Debug)]
pub enum Brain {
    /// Of a postgres bot.
    Postgres(Box<postgres::State>),
    /// Of a content bot.
    Content(Box<content::State>),
    /// Of a web bot.
    Web(Box<web::State>),
}

/// An event for one kind of bot.
#[derive(Debug, Clone)]
pub enum BotEvent {
    /// For a postgres bot.
    Postgres(postgres::Event),
    /// For a content bot.
    Content(content::Event),
    /// For a web bot.
    Web(web::Event),
}

impl BotEvent {
    /// Whether its sender may have sent it twice, or who carried it: what is asked of others, and what they answer. What a bot is told by
    /// its own machine is told once.
    pub(super) const fn may_be_repeated(&self) -> bool {
        matches!(
            self,
            Self::Postgres(
                postgres::Event::Dcs(DcsEvent::Answered { .. })
                    | postgres::Event::PeersProbed { .. }
                    | postgres::Event::MemberAsked { .. }
                    | postgres::Event::MemberAnswered { .. }
                    | postgres::Event::NameProbed { .. }
            ) | Self::Content(
                content::Event::Dcs(DcsEvent::Answered { .. })
                    | content::Event::NameProbed { .. }
                    | content::Event::PushReceived(_)
            ) | Self::Web(web::Event::Dcs(DcsEvent::Answered { .. }) | web::Event::NameProbed { .. })
        )
    }

    /// Wraps what etcd says.
    #[must_use]
    pub const fn dcs(kind: Kind, event: DcsEvent) -> Self {
        match kind {
            Kind::Postgres | Kind::Edge => Self::Postgres(postgres::Event::Dcs(event)),
            Kind::Content => Self::Content(content::Event::Dcs(event)),
            Kind::Web => Self::Web(web::Event::Dcs(event)),
        }
    }

    /// The request to end.
    #[must_use]
    pub const fn shutdown(kind: Kind) -> Self {
        match kind {
            Kind::Postgres | Kind::Edge => Self::Postgres(postgres::Event::ShutdownRequested),
            Kind::Content => Self::Content(content::Event::ShutdownRequested),
            Kind::Web => Self::Web(web::Event::ShutdownRequested),
        }
    }

    pub(super) const fn timer(kind: Kind) -> Self {
        match kind {
            Kind::Postgres | Kind::Edge => Self::Postgres(postgres::Event::TimerFired),
            Kind::Content => Self::Content(content::Event::TimerFired),
            Kind::Web => Self::Web(web::Event::TimerFired),
        }
    }

    pub(super) const fn name_probed(kind: Kind, instance: Option<String>) -> Self {
        match kind {
            Kind::Postgres | Kind::Edge => Self::Postgres(postgres::Event::NameProbed { instance }),
            Kind::Content => Self::Content(content::Event::NameProbed { instance }),
            Kind::Web => Self::Web(web::Event::NameProbed { instance }),
        }
    }
}

/// What a bot looks after; it outlives the bot, as far as disks and processes do.
#[derive(Debug)]
pub enum Body {
    /// A Postgres server and its data directory.
    Postgres(Box<PostgresBody>),
    /// A mirror of the git repository.
    Content(ContentBody),
    /// The data plane of a web bot.
    Web(WebBody),
}

/// What stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Frozen {
    /// Nothing.
    #[default]
    No,
    /// The bot's process.
    Bot,
    /// The guard of its server.
    Guard,
    /// Every process.
    Machine,
}

impl Frozen {
    /// Whether the bot stands still.
    #[must_use]
    pub const fn holds_bot(self) -> bool {
        matches!(self, Self::Bot | Self::Machine)
    }

    /// Whether the guard of a server does.
    #[must_use]
    pub const fn holds_guard(self) -> bool {
        matches!(self, Self::Guard | Self::Machine)
    }
}

/// A machine.
#[derive(Debug)]
pub struct Node {
    /// The bot's name, and the machine's.
    pub name: String,
    /// The kind of bot.
    pub kind: Kind,
    /// The machine's clock.
    pub clock: NodeClock,
    /// Grows with every start and every end of the bot: what was meant for another life does not arrive.
    pub life: u64,
    /// The life that made the last step.
    pub(super) stepped: u64,
    /// Grows with every loss of power.
    pub power: u64,
    /// The bot; nothing while it does not run.
    pub brain: Option<Brain>,
    /// Its `instance`.
    pub instance: String,
    /// Its connections to etcd.
    pub client: Client,
    /// What stands still.
    pub frozen: Frozen,
    /// When the whole machine moved again last.
    pub(super) thawed: Option<Time>,
    /// How often it, or a part of it, has begun to stand still.
    pub(super) freezes: u64,
    /// What it looks after.
    pub body: Body,
    /// What will happen when the machine moves again.
    pub(super) waiting: Vec<Item>,
    /// What the bot has not looked at yet.
    pub(super) inbox: VecDeque<BotEvent>,
    pub(super) busy_until: Time,
    /// The local time that the timer is armed for.
    pub(super) timer: Option<Time>,
    pub(super) armed: u64,
    pub(super) fired: Option<Time>,
}

impl Node {
    /// The cluster, site or fleet of a kind of bot.
    #[must_use]
    pub fn scope_of(kind: Kind) -> Scope {
        let name = match kind {
            Kind::Postgres | Kind::Edge => POSTGRES,
            Kind::Content => CONTENT,
            Kind::Web => WEB,
        };
        Scope::new(NAMESPACE, name).expect("the names are legal")
    }

    /// The bot's scope.
    #[must_use]
    pub fn scope(&self) -> Scope {
        Self::scope_of(self.kind)
    }

    /// Where its API answers.
    #[must_use]
    pub fn api_url(&self) -> String {
        let path = if self.kind == Kind::Postgres { "patroni" } else { "status" };
        format!("http://{}:8008/{path}", self.name)
    }

    /// Whether the bot's process runs and moves.
    #[must_use]
    pub const fn bot_moves(&self) -> bool {
        self.brain.is_some() && !self.frozen.holds_bot()
    }

    /// The Postgres server and its data, on a machine that has one.
    #[must_use]
    pub const fn postgres(&self) -> Option<&PostgresBody> {
        match &self.body {
            Body::Postgres(body) => Some(body),
            Body::Content(_) | Body::Web(_) => None,
        }
    }

    /// The same, to change it.
    pub(crate) const fn postgres_mut(&mut self) -> Option<&mut PostgresBody> {
        match &mut self.body {
            Body::Postgres(body) => Some(body),
            Body::Content(_) | Body::Web(_) => None,
        }
    }

    /// The postgres bot's mind.
    #[must_use]
    pub fn postgres_state(&self) -> Option<&postgres::State> {
        match &self.brain {
            Some(Brain::Postgres(state)) => Some(state),
            Some(Brain::Content(_) | Brain::Web(_)) | None => None,
        }
    }

    /// The content bot's mind.
    #[must_use]
    pub fn content_state(&self) -> Option<&content::State> {
        match &self.brain {
            Some(Brain::Content(state)) => Some(state),
            Some(Brain::Postgres(_) | Brain::Web(_)) | None => None,
        }
    }

    /// The web bot's mind.
    #[must_use]
    pub fn web_state(&self) -> Option<&web::State> {
        match &self.brain {
            Some(Brain::Web(state)) => Some(state),
            Some(Brain::Postgres(_) | Brain::Content(_)) | None => None,
        }
    }
}

/// The machines of a plan.
pub(super) fn cast(plan: &Plan, rng: &mut Rng) -> Vec<Node> {
    let mut nodes = Vec::new();
    let mut add = |kind: Kind, prefix: &str, count: u64, body: fn() -> Body| {
        for n in 1..=count {
            nodes.push(Node {
                name: format!("{prefix}{n}"),
                kind,
                clock: NodeClock::draw(rng, plan.drift),
                life: 0,
                stepped: 0,
                power: 0,
                brain: None,
                instance: String::new(),
                client: Client::default(),
                frozen: Frozen::No,
                thawed: None,
                freezes: 0,
                body: body(),
                waiting: Vec::new(),
                inbox: VecDeque::new(),
                busy_until: Time::ZERO,
                timer: None,
                armed: 0,
                fired: None,
            });
        }
    };
    add(Kind::Postgres, "pg", plan.cast.postgres, || Body::Postgres(Box::default()));
    add(Kind::Content, "content", plan.cast.content, || Body::Content(ContentBody::default()));
    add(Kind::Web, "web", plan.cast.web, || Body::Web(WebBody::default()));
    nodes
}

impl Brain {
    /// A mind that has just been woken, with the prefixes that it wants watched.
    pub(super) fn new(node: &Node, plan: &Plan) -> (Self, Vec<String>) {
        match &node.body {
            Body::Postgres(_) => {
                let state = postgres::State::new(postgres_settings(node, plan));
                (Self::Postgres(Box::new(state)), vec![node.scope().prefix()])
            }
            Body::Content(body) => {
                let settings = content_settings(node, plan);
                let prefixes = content::State::prefixes(&settings);
                let state = content::State::new(settings, body.holds(), node.clock.epoch_unix_ms());
                (Self::Content(Box::new(state)), prefixes)
            }
            Body::Web(_) => {
                let state = web::State::new(web_settings(node, plan), &node.instance, node.clock.epoch_unix_ms());
                let prefixes = state.prefixes();
                (Self::Web(Box::new(state)), prefixes)
            }
        }
    }
}

fn postgres_settings(node: &Node, plan: &Plan) -> postgres::Settings {
    postgres::Settings {
        scope: node.scope(),
        name: node.name.clone(),
        instance: node.instance.clone(),
        version: String::from("0.1.0"),
        api_url: node.api_url(),
        conn_url: format!("postgres://{}:5432/postgres", node.name),
        epoch_unix_ms: node.clock.epoch_unix_ms(),
        tags: postgres::Tags::default(),
        parameters: std::collections::BTreeMap::new(),
        bootstrap_config: serde_json::json!({
            "ttl": plan.ttl_s,
            "maximum_lag_on_failover": plan.lag_max,
            "primary_start_timeout": plan.start_timeout_s,
            "synchronous_mode": plan.sync.unwrap_or("off"),
            "synchronous_mode_strict": plan.strict,
            "synchronous_node_count": plan.sync_count,
            "takeover": plan.takeover,
            "failsafe_mode": plan.failsafe,
        }),
        rules: postgres::Rules::default(),
        use_pg_rewind: Some(plan.rewind),
        remove_data: postgres::RemoveData::default(),
        watchdog: postgres::Watchdog { mode: postgres::WatchdogMode::Automatic, safety_margin: None },
    }
}

fn content_settings(node: &Node, plan: &Plan) -> content::Settings {
    let (observe, timeout) = (Span::from_secs(1), Span::from_secs(20));
    content::Settings {
        scope: node.scope(),
        web_scopes: [Node::scope_of(Kind::Web)].into(),
        name: node.name.clone(),
        instance: node.instance.clone(),
        version: String::from("0.1.0"),
        api_url: node.api_url(),
        pack_url: format!("http://{}:8008", node.name),
        origin: String::from("https://git.example/site.git"),
        reference: content::Reference::Named(String::from("main")),
        ttl: Span::from_secs(5),
        poll_interval: Span::from_secs(10),
        prepare_timeout: Span::from_secs(10),
        canary: plan.canary.then_some(content::CanarySettings { observe, timeout, failures_percent_max: 10 }),
        purge: plan.canary.then_some(content::PurgeSettings { again_after: Span::from_secs(3) }),
        export: None,
        stale_after: None,
        pushes_expected: true,
    }
}

fn web_settings(node: &Node, plan: &Plan) -> web::Settings {
    web::Settings {
        scope: node.scope(),
        content: Node::scope_of(Kind::Content),
        database: (plan.app && plan.cast.postgres > 0).then(|| Node::scope_of(Kind::Postgres)),
        name: node.name.clone(),
        version: String::from("0.1.0"),
        api_url: node.api_url(),
        url: format!("http://{}:8080", node.name),
        mode: if plan.app { web::Mode::App } else { web::Mode::Static },
        ttl: Span::from_secs(5),
        live: web::Live {
            configuration: 0,
            app_start_timeout: Span::from_secs(10),
            drain_timeout: Span::from_secs(5),
            cdn_url: None,
            connections: None,
            scaling: web::ScalingSettings { min: 1, max: 3, target_in_flight: 8, stable_window_s: STABLE_WINDOW_S },
        },
    }
}
