//! The shell: performs the machine's actions on a real server and turns what happens into its events. Decides nothing.

pub mod binaries;
mod callbacks;
pub mod config;
mod conninfo;
mod copies;
mod disk;
mod figures;
mod files;
mod floor;
pub mod guard;
mod guard_news;
pub mod hands;
mod heeds;
pub mod inspect;
pub mod jobs;
mod kinship;
mod members;
pub mod node;
mod nudge;
pub mod observe;
mod peers;
pub mod postmaster;
pub mod processes;
mod quote;
mod reload;
pub mod report;
mod routes;
mod server;
mod slots;
mod sound;
mod timelines;
pub mod tool;
mod watchdog;

use std::{
    collections::BTreeMap,
    fs::File,
    net::{TcpListener, ToSocketAddrs},
    ops::ControlFlow,
    sync::Arc,
};

use bots_core::{
    dcs::DcsEvent,
    machine::Time,
    shell::{Assembled, Bot, Clock, Common, Context, DcsHandle, Events, Exit, Health, Shell, probe_instance},
};
use tokio::{sync::watch, task::AbortHandle};

use self::{
    binaries::Binaries, callbacks::Callbacks, config::Config, figures::Figures, hands::Hands, kinship::Kinship,
    members::Desk, node::Node, observe::Poke, postmaster::Life, processes::Marks, reload::Reload, report::Reporter,
    routes::Site,
};
use crate::machine::{Action, Event, JobId, PostgresBot, State, WatchdogMode};

/// The program `postgres-bot`.
#[derive(Debug)]
pub struct Program;

/// The hands of the machine.
pub struct PostgresShell {
    hands: Arc<Hands>,
    poke: Poke,
    events: Events<Event>,
    dcs: DcsHandle,
    jobs: BTreeMap<JobId, AbortHandle>,
    state: watch::Sender<Arc<State>>,
    figures: Figures,
    callbacks: Callbacks,
    /// Where other members' questions wait.
    desk: Arc<Desk>,
    /// What we show other members when we ask something of them.
    kinship: Kinship,
    /// See [`lock`].
    _lock: File,
}

impl Bot for Program {
    const PROGRAM: &'static str = "postgres-bot";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    type Config = Config;
    type Machine = PostgresBot;
    type Shell = PostgresShell;

    fn common(config: &Config) -> &Common {
        &config.common
    }

    fn check(config: &Config) -> Result<(), String> {
        config.check()
    }

    fn dcs_event(event: DcsEvent) -> Event {
        Event::Dcs(event)
    }

    fn shutdown_requested() -> Event {
        Event::ShutdownRequested
    }

    async fn assemble(config: Config, context: Context<Event>) -> Result<Assembled<Self>, Exit> {
        for warning in config.warnings().map_err(Exit::usage)? {
            tracing::warn!("{warning}");
        }
        let (node, lock) = prepare(&config)?;
        postmaster::adopt_orphans().map_err(|e| Exit::failure(format!("{e:#}")))?;
        let callbacks = Callbacks::new(config.callbacks().map_err(Exit::usage)?, &config.common.scope);
        let kinship = Kinship::of(&config, &node)?;
        let settings = config.settings(context.instance.clone(), Self::VERSION, context.epoch_unix_ms);
        let path = context.config_path.clone();
        let reload = Arc::new(Reload::new(path, config, context.instance.clone(), context.epoch_unix_ms));
        let prefixes = vec![settings.scope.prefix()];
        let state = State::new(settings);
        let reporter = Arc::new(Reporter::new(context.events.clone()));
        let hands = Arc::new(Hands::new(node, reporter));
        hands.postmaster.adopt(&hands.reporter).await;
        let poke = Poke::default();
        tokio::spawn(observe::run(Arc::clone(&hands), poke.clone()));
        tokio::spawn(Arc::clone(&hands).keep_applied());
        disk::watch(hands.node.data_dir.clone(), context.events.clone())
            .map_err(|e| Exit::failure(format!("no thread to watch the disk: {e}")))?;
        if state.settings().watchdog.mode == WatchdogMode::Off {
            watchdog::tell_of_unused(&hands.node.watchdog);
        } else {
            tokio::spawn(watchdog::look(hands.node.watchdog.clone(), context.events.clone()));
        }
        let (sender, receiver) = watch::channel(Arc::new(state.clone()));
        tokio::spawn(watchdog::tell_of_margin(receiver.clone()));
        tokio::spawn(Arc::clone(&reload).on_hangup(context.events.clone()));
        let desk = Arc::new(Desk::default());
        let site = Site::new(&context, receiver, (Arc::clone(&hands), reload), (Arc::clone(&desk), kinship.clone()));
        let (routes, self_authenticated) = site.router();
        let guard_fences = hands.postmaster.guard_fences().clone();
        let shell = PostgresShell {
            hands,
            poke,
            events: context.events,
            dcs: context.dcs,
            jobs: BTreeMap::new(),
            state: sender,
            figures: Figures::new(&context.metrics, guard_fences),
            callbacks,
            desk,
            kinship,
            _lock: lock,
        };
        Ok(Assembled::new(state, shell, prefixes, health).routes(routes).self_authenticated(self_authenticated))
    }
}

/// Makes sure that the bot can work on this machine at all.
fn prepare(config: &Config) -> Result<(Node, File), Exit> {
    if rustix::process::geteuid().is_root() {
        return Err(Exit::missing(
            "PostgreSQL refuses to run as root: run the bot as the user that owns postgresql.data_dir, with User= in a \
             systemd unit, or: setpriv --reuid=postgres --regid=postgres --init-groups postgres-bot CONFIG",
        ));
    }
    let data_dir = config.data_dir().map_err(Exit::usage)?;
    let binaries = Binaries::find(config.postgresql.bin_dir.as_deref(), &data_dir).map_err(Exit::missing)?;
    tracing::info!(version = %binaries.version(), postgres = %binaries.program("postgres").display(), "PostgreSQL found");
    let node = config.node(binaries).map_err(Exit::usage)?;
    files::private_dir(&node.run_dir).map_err(|e| {
        Exit::usage(format!(
            "postgresql.data_dir: {e:#}: the directory above it must be writable by the user that runs the bot"
        ))
    })?;
    files::append_only(&node.log_file)
        .map_err(|e| Exit::usage(format!("postgresql.log_directory: {e:#}: choose a directory that can be written")))?;
    let lock = lock(&node)?;
    port_is_free(&node)?;
    Ok((node, lock))
}

/// Keeps any other bot off the data directory for as long as this process lives: it would stop our server as one that was
/// left behind.
fn lock(node: &Node) -> Result<File, Exit> {
    let path = node.run_dir.join("lock");
    let failed = |e: std::io::Error| Exit::usage(format!("postgresql.data_dir: cannot lock {}: {e}", path.display()));
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Exit::conflict(format!(
            "postgresql.data_dir: another bot works on {} already: give this one a directory of its own",
            node.data_dir.display()
        ))),
        Err(e) => Err(failed(e.into())),
    }
}

/// Says early and clearly what the server would say late and in its log.
fn port_is_free(node: &Node) -> Result<(), Exit> {
    // A server that an earlier life of the bot left behind is not "something else": the machine stops it.
    let left = Marks::of_program(&node.binaries.program("postgres")).find(&[&node.data_dir]);
    if !left.is_ok_and(|left| left.is_empty()) {
        return Ok(());
    }
    let port = node.listen.port;
    for host in node.listen.addresses.split(',') {
        let host = if host == "*" { "0.0.0.0" } else { host };
        let resolved = (host, port).to_socket_addrs();
        let addresses = resolved.map_err(|e| {
            Exit::usage(format!("postgresql.listen: `{host}` cannot be resolved: {e}: use an address of this machine"))
        })?;
        for address in addresses {
            match TcpListener::bind(address) {
                Ok(_free_again_at_once) => {}
                Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
                    return Err(Exit::missing(format!(
                        "postgresql.listen: {address} is in use by another program: stop it or choose another port"
                    )));
                }
                Err(e) => return Err(Exit::usage(format!("postgresql.listen: cannot listen on {address}: {e}"))),
            }
        }
    }
    Ok(())
}

fn health(state: &State, now: Time) -> Health {
    let streaming = state.server().is_some_and(|server| server.in_recovery && server.streaming);
    // Whoever gets this has been answered by a bot that works; whether its loop turns is looked at for `/liveness` itself.
    Health { healthy: state.server().is_some(), alive: true, ready: state.accepts_writes(now) || streaming }
}

impl Shell for PostgresShell {
    type Machine = PostgresBot;

    fn perform(&mut self, action: Action) -> ControlFlow<Exit> {
        match action {
            Action::Dcs(action) => self.dcs.perform(action),
            Action::ProbeName { api_url } => {
                let (events, ours) = (self.events.clone(), self.dcs.identity().clone());
                tokio::spawn(async move {
                    let instance = probe_instance(&api_url, &ours).await;
                    events.send(Event::NameProbed { instance }).await;
                });
            }
            Action::InspectData => {
                let (events, hands) = (self.events.clone(), Arc::clone(&self.hands));
                tokio::spawn(async move { events.send(inspect::inspect(&hands).await).await });
            }
            Action::Observe => self.poke.ask(),
            Action::Configure { parameters, rules } => {
                self.hands.configure(parameters, rules);
                self.hands.apply_soon();
            }
            Action::ChangeSlots { changes } => {
                let (hands, poke) = (Arc::clone(&self.hands), self.poke.clone());
                tokio::spawn(async move {
                    slots::change(&hands, changes).await;
                    poke.look_at_slots();
                });
            }
            Action::LookAtSlots { id, leader, own, names, fetch } => {
                let (hands, events) = (Arc::clone(&self.hands), self.events.clone());
                tokio::spawn(async move {
                    let seen = copies::look(&hands, &leader, &own, &names, &fetch).await;
                    let seen = seen.map_err(|error| format!("{error:#}"));
                    if let Err(why) = &seen {
                        tracing::warn!(why, leader = leader.name, "the leader does not tell of its logical slots");
                    }
                    events.send(Event::LeaderSlotsSeen { id, seen }).await;
                });
            }
            Action::SetFence { at, watchdog } => self.hands.postmaster.set_fence(at, watchdog),
            Action::Run { id, job } => self.run(id, job),
            Action::Cancel { id } => {
                if let Some(task) = self.jobs.remove(&id) {
                    task.abort();
                }
            }
            Action::ProbePeers { id, peers, deadline } => {
                let events = self.events.clone();
                let scope = self.state.borrow().settings().scope.name().to_owned();
                tokio::spawn(async move {
                    let answers = peers::probe(&scope, peers, deadline.to_std()).await;
                    events.send(Event::PeersProbed { id, answers }).await;
                });
            }
            Action::AskMembers { id, ask, members, deadline } => {
                members::ask(id, &ask, members, &self.kinship, deadline.to_std(), &self.events);
            }
            Action::AnswerMember { id, answer } => self.desk.answer(id, answer),
            Action::Exit { code, message } => {
                if self.hands.postmaster.life() != Life::Down {
                    tracing::warn!("Postgres runs on in the care of its guard");
                }
                self.callbacks.finish();
                return ControlFlow::Break(Exit::new(code, message));
            }
        }
        ControlFlow::Continue(())
    }

    fn stepped(&mut self, state: &State) {
        self.figures.note(state, Clock::now());
        self.callbacks.note(state, self.hands.reloads());
        self.state.send_replace(Arc::new(state.clone()));
    }
}

impl PostgresShell {
    /// Starts a job on the thread of the loop: what it starts dies with that thread.
    fn run(&mut self, id: JobId, job: crate::machine::Job) {
        self.jobs.retain(|_, task| !task.is_finished());
        let (hands, poke) = (Arc::clone(&self.hands), self.poke.clone());
        let task = tokio::spawn(async move {
            tracing::info!(job = ?job, "job started");
            let result = jobs::run(&hands, job).await;
            match &result {
                Ok(result) => tracing::info!(?result, "job done"),
                Err(error) => tracing::warn!(why = error.why, "job failed"),
            }
            let started = matches!(result, Ok(crate::machine::JobResult::Started(_)));
            hands.reporter.job_ended(id, result).await;
            poke.look();
            // What it was started with may be more than what is asked for: the files say so again, and that a restart is due.
            if started && hands.take_raised() {
                hands.apply_soon();
            }
        });
        self.jobs.insert(id, task.abort_handle());
    }
}
