//! The world: machines, a network, etcd, disks, servers, a git repository and clients, on one thread and one clock.
//!
//! One loop: take the next thing that happens, let it happen, look whether all is still well. Nothing here decides for a
//! bot; the machines are the real ones, and everything they ask for is carried out by what surrounds them here.

mod client;
mod driver;
mod edges;
mod faults;
mod life;
mod modes;
mod network;
mod node;
mod store;
mod users;
mod word;

use bots_core::machine::{Span, Time};

pub use self::{
    client::Client,
    network::{Cut, Network},
    node::{Body, BotEvent, Brain, Frozen, Node, NodeId},
    store::{Applied, Store},
    word::Questions,
};
pub(crate) use self::{
    client::{Reply, Request},
    faults::ChaosItem,
    life::GUARD_LATE,
    modes::mode_in,
    users::UserItem,
};
use crate::{
    check::{Checks, Seen, Violation},
    content::{ContentItem, Origin},
    coverage::Coverage,
    ledger::Ledger,
    plan::Plan,
    plant::Plant,
    postgres::ServerItem,
    queue::Queue,
    rng::Rng,
    trace::Trace,
    web::{Load, WebItem},
};

/// How long after the last fault the fleet may take until all is as it should be. Back-offs reach 30 s; a member may need
/// two of them in a row, and a clone.
pub const CONVERGE_WITHIN: Span = Span::from_secs(120);

/// All must be well for this long, so that a passing moment does not count.
const STABLE_FOR: Span = Span::from_secs(3);

/// What is delivered twice comes again within this time.
const REPEATED_WITHIN_MS: u64 = 2_000;

/// How often the world is looked at while it heals.
const LOOK_EVERY: Span = Span::from_millis(500);

/// More things than this happen in no seed: it is a storm, and no bot may cause one.
const THINGS_MAX: u64 = 2_000_000;

/// Something that happens.
#[derive(Debug)]
pub(crate) enum Item {
    /// A bot is told something.
    Event { node: NodeId, life: u64, event: BotEvent },
    /// A bot's deadline has passed.
    Timer { node: NodeId, life: u64, armed: u64 },
    /// etcd's answer reaches a bot's machine.
    Reply { node: NodeId, life: u64, rpc: u64, reply: Reply },
    /// A bot's request has waited long enough.
    GiveUp { node: NodeId, life: u64, rpc: u64 },
    /// A lease is to be asked for or renewed.
    Renew { node: NodeId, life: u64, serial: u64 },
    /// A prefix is to be listed and watched again.
    Relist { node: NodeId, life: u64, prefix: String },
    /// Changes reach a watcher.
    Show { node: NodeId, life: u64, prefix: String, serial: u64 },
    /// A watcher notices that it hears nothing any more.
    Silent { node: NodeId, life: u64, prefix: String, serial: u64 },
    /// A request reaches etcd.
    Arrive { node: NodeId, life: u64, rpc: u64, request: Request },
    /// A Postgres server or a job on it comes to something.
    Server { node: NodeId, item: ServerItem },
    /// Work of a content bot comes to an end.
    Content { node: NodeId, life: u64, item: ContentItem },
    /// Work of a web bot comes to an end.
    Web { node: NodeId, life: u64, item: WebItem },
    /// A bot is started.
    Start { node: NodeId, power: u64 },
    /// A machine moves again.
    Thaw { node: NodeId, power: u64, freeze: u64 },
    /// A watchdog device is not kept alive: it resets the machine, unless the guard has moved again.
    Reset { node: NodeId, power: u64, run: u64 },
    /// A member's answer to another's question, or its silence.
    Word { serial: u64, answer: Result<(), String> },
    /// A fault begins or ends.
    Chaos(ChaosItem),
    /// Somebody outside the fleet does something.
    User(UserItem),
    /// No more faults.
    Heal,
    /// Is all well?
    Look,
}

/// Where something happens: what stands still there, and what ends with a bot's life.
enum Place {
    Bot(NodeId, u64),
    Machine(NodeId),
    Anywhere,
}

impl Item {
    fn place(&self) -> Place {
        match self {
            Self::Event { node, life, .. }
            | Self::Timer { node, life, .. }
            | Self::Reply { node, life, .. }
            | Self::GiveUp { node, life, .. }
            | Self::Renew { node, life, .. }
            | Self::Relist { node, life, .. }
            | Self::Show { node, life, .. }
            | Self::Silent { node, life, .. }
            | Self::Content { node, life, .. }
            | Self::Web { node, life, .. } => Place::Bot(*node, *life),
            Self::Server { node, .. } => Place::Machine(*node),
            Self::Arrive { .. }
            | Self::Word { .. }
            | Self::Start { .. }
            | Self::Thaw { .. }
            | Self::Reset { .. }
            | Self::Chaos(_)
            | Self::User(_)
            | Self::Heal
            | Self::Look => Place::Anywhere,
        }
    }
}

/// What a run may be told beyond its seed.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Keep the record of what happens.
    pub trace: bool,
    /// Make this mistake.
    pub plant: Option<Plant>,
    /// Whatever the seed says, there is a synchronous Postgres cluster and nothing else.
    pub synchronous: bool,
    /// The same, and the mode changes all the time.
    pub changing: bool,
    /// Whatever the seed says, there is a Postgres cluster and nothing else, and guards stand still when their bots come back.
    pub tired_guards: bool,
    /// Whatever the seed says, there is a site and nothing else, and an operator pins its commits.
    pub pins: bool,
    /// Do not look at the requirements that begin with this: to see what else would catch a mistake.
    pub skip: Option<&'static str>,
}

/// Everything there is.
#[derive(Debug)]
pub struct World {
    /// The true time.
    pub now: Time,
    /// What the seed stands for.
    pub plan: Plan,
    /// The machines with their bots.
    pub nodes: Vec<Node>,
    /// etcd.
    pub store: Store,
    /// Who can reach whom.
    pub network: Network,
    /// The git repository.
    pub origin: Origin,
    /// What clients were promised.
    pub ledger: Ledger,
    /// The load on the site.
    pub load: Load,
    /// Which edges were taken.
    pub coverage: Coverage,
    /// What happened.
    pub trace: Trace,
    /// The mistake that is made on purpose.
    pub plant: Option<Plant>,
    /// What members ask of each other.
    pub questions: Questions,
    pub(crate) rng: Rng,
    queue: Queue<Item>,
    checks: Checks,
    healed: Option<Time>,
    well_since: Option<Time>,
    violation: Option<Violation>,
    things: u64,
    is_over: bool,
}

impl World {
    /// The world of a seed.
    #[must_use]
    pub fn new(seed: u64, options: Options) -> Self {
        let mut rng = Rng::new(seed);
        let plan = Plan::draw(&mut rng.fork());
        let synchronous = options.synchronous || options.plant.is_some_and(Plant::wants_synchronous);
        let changing = options.changing || options.plant.is_some_and(Plant::wants_changing);
        let plan = if synchronous || changing { plan.made_synchronous() } else { plan };
        let plan = if changing { plan.made_changing() } else { plan };
        let tired = options.tired_guards || options.plant.is_some_and(Plant::wants_tired_guards);
        let plan = if tired { plan.made_with_tired_guards() } else { plan };
        let pins = options.pins || options.plant.is_some_and(Plant::wants_pins);
        let plan = if pins { plan.made_with_pins() } else { plan };
        let nodes = node::cast(&plan, &mut rng.fork());
        let mut world = Self {
            now: Time::ZERO,
            nodes,
            store: Store::new(),
            network: Network::default(),
            origin: Origin::new(&mut rng),
            ledger: Ledger::default(),
            load: Load::default(),
            coverage: Coverage::default(),
            trace: if options.trace { Trace::kept() } else { Trace::default() },
            plant: options.plant,
            questions: Questions::default(),
            rng,
            queue: Queue::default(),
            checks: Checks::all_but(options.skip),
            healed: None,
            well_since: None,
            violation: None,
            things: 0,
            is_over: false,
            plan,
        };
        let plan = format!("seed {seed}: {:?}", world.plan);
        world.say(format_args!("{plan}"));
        world.begin();
        world
    }

    fn begin(&mut self) {
        for node in self.ids() {
            let delay = self.rng.span(0, 1_500);
            self.after(delay, Item::Start { node, power: 0 });
        }
        self.begin_faults();
        self.begin_users();
        let chaos = self.plan.chaos;
        self.after(chaos, Item::Heal);
    }

    /// Runs to the end: all well again after the last fault, or something broken.
    ///
    /// # Errors
    /// What was broken, and which requirement says so.
    pub fn run(&mut self) -> Result<(), Violation> {
        while let Some(next) = self.queue.next_at() {
            // A lease that runs out may bring things about that come before that.
            let expired = self.expire_lease_before(next);
            if !expired && let Some((at, item)) = self.queue.pop() {
                self.turn_to(at, item)?;
                if self.is_over {
                    return Ok(());
                }
            }
            if let Some(violation) = self.violation.take() {
                self.say(format_args!("VIOLATION {violation}"));
                return Err(violation);
            }
        }
        Ok(())
    }

    fn turn_to(&mut self, at: Time, item: Item) -> Result<(), Violation> {
        debug_assert!(at >= self.now, "time runs forwards");
        self.now = at;
        self.things += 1;
        if self.things > THINGS_MAX {
            return Err(Violation::storm(self.things));
        }
        if matches!(item, Item::Look) {
            self.is_over = self.look()?;
        } else {
            self.happen(item);
            self.see(&Seen::Moment);
        }
        Ok(())
    }

    fn happen(&mut self, item: Item) {
        match item.place() {
            Place::Bot(node, life) => {
                if self.nodes[node.0].life != life {
                    return;
                }
                if self.nodes[node.0].frozen.holds_bot() {
                    self.nodes[node.0].waiting.push(item);
                    return;
                }
            }
            Place::Machine(node) => {
                if self.nodes[node.0].frozen == Frozen::Machine {
                    self.nodes[node.0].waiting.push(item);
                    return;
                }
            }
            Place::Anywhere => {}
        }
        match item {
            Item::Event { node, life: _, event } => self.step(node, event),
            Item::Timer { node, life: _, armed } => self.timer(node, armed),
            Item::Reply { node, life: _, rpc, reply } => self.replied(node, rpc, reply),
            Item::GiveUp { node, life: _, rpc } => self.gave_up(node, rpc),
            Item::Renew { node, life: _, serial } => self.renew(node, serial),
            Item::Relist { node, life: _, prefix } => self.relist(node, &prefix),
            Item::Show { node, life: _, prefix, serial } => self.show(node, &prefix, serial),
            Item::Silent { node, life: _, prefix, serial } => self.silent(node, &prefix, serial),
            Item::Arrive { node, life, rpc, request } => self.arrive(node, life, rpc, request),
            Item::Server { node, item } => self.server_item(node, item),
            Item::Content { node, life: _, item } => self.content_item(node, item),
            Item::Web { node, life: _, item } => self.web_item(node, item),
            Item::Start { node, power } => self.start(node, power),
            Item::Thaw { node, power, freeze } => self.thaw(node, power, freeze),
            Item::Reset { node, power, run } => self.reset(node, power, run),
            Item::Word { serial, answer } => self.word(serial, answer),
            Item::Chaos(item) => self.chaos(item),
            Item::User(item) => self.user(item),
            Item::Heal => self.heal(),
            Item::Look => {}
        }
    }

    /// Decides that something happens later.
    pub(crate) fn after(&mut self, delay: Span, item: Item) {
        self.queue.push(self.now + delay, item);
    }

    pub(crate) fn at(&mut self, at: Time, item: Item) {
        self.queue.push(at.max(self.now), item);
    }

    /// A bot is told something after a while, if it still lives then.
    pub(crate) fn tell(&mut self, node: NodeId, delay: Span, event: BotEvent) {
        let life = self.nodes[node.0].life;
        if event.may_be_repeated() && self.happens(self.plan.repeated) {
            let later = delay + self.rng.span(0, REPEATED_WITHIN_MS);
            self.after(later, Item::Event { node, life, event: event.clone() });
        }
        self.after(delay, Item::Event { node, life, event });
    }

    /// True so many times out of a thousand for as long as there are faults. Worlds without this one draw nothing for it.
    pub(crate) const fn happens(&mut self, permille: u64) -> bool {
        !self.is_healed() && permille > 0 && self.rng.chance(permille)
    }

    /// All machines.
    pub(crate) fn ids(&self) -> impl Iterator<Item = NodeId> + use<> {
        (0..self.nodes.len()).map(NodeId)
    }

    /// The machine whose bot has this name.
    pub(crate) fn named(&self, name: &str) -> Option<NodeId> {
        self.nodes.iter().position(|node| node.name == name).map(NodeId)
    }

    /// The machine in a URL of ours: names are host names here.
    pub(crate) fn host_in(&self, url: &str) -> Option<NodeId> {
        let authority = url.split_once("://").map_or(url, |(_, rest)| rest).split('/').next()?;
        self.named(authority.split(':').next()?)
    }

    pub(crate) fn say(&mut self, text: std::fmt::Arguments<'_>) {
        if self.trace.is_kept() {
            self.trace.line(self.now, text);
        }
    }

    /// Whether faults are over.
    pub(crate) const fn is_healed(&self) -> bool {
        self.healed.is_some()
    }

    /// Shows the checks what has happened.
    pub(crate) fn see(&mut self, seen: &Seen<'_>) {
        if self.violation.is_some() {
            return;
        }
        let mut checks = std::mem::take(&mut self.checks);
        self.violation = checks.see(self, seen).err();
        self.checks = checks;
    }

    pub(crate) fn broken(&mut self, violation: Violation) {
        self.violation.get_or_insert(violation);
    }

    fn heal(&mut self) {
        self.say(format_args!("-- all faults end --"));
        self.healed = Some(self.now);
        self.end_faults();
        self.after(LOOK_EVERY, Item::Look);
    }

    /// Whether all has been well for long enough.
    fn look(&mut self) -> Result<bool, Violation> {
        let healed = self.healed.unwrap_or(self.now);
        match crate::check::liveness::unmet(self) {
            None => {
                let since = *self.well_since.get_or_insert(self.now);
                if self.now.since(since) >= STABLE_FOR {
                    self.say(format_args!("all is well"));
                    return Ok(true);
                }
            }
            Some(unmet) => {
                self.well_since = None;
                if self.now.since(healed) > CONVERGE_WITHIN {
                    self.say_reports();
                    self.say(format_args!("STUCK {unmet}"));
                    return Err(Violation::liveness(unmet));
                }
            }
        }
        self.after(LOOK_EVERY, Item::Look);
        Ok(false)
    }

    /// How many things happened.
    #[must_use]
    pub const fn things(&self) -> u64 {
        self.things
    }

    pub(crate) fn deferred(&mut self, node: NodeId) {
        for item in std::mem::take(&mut self.nodes[node.0].waiting) {
            self.queue.push(self.now, item);
        }
    }
}
