//! One `main` for every bot: arguments, configuration, logs, etcd, API, signals, the loop, and a clean end.

use std::{
    collections::BTreeMap,
    future::Future,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use axum::Router;
use futures_util::{StreamExt, future::join_all, stream::FuturesUnordered};
use serde::{Serialize, de::DeserializeOwned};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::Instrument;

use super::{
    api::{self, Api, Server},
    clock::Clock,
    config::{self, Common, SiteRules},
    dcs::{DcsHandle, DcsLine, DcsSink},
    entropy,
    metrics::Metrics,
    runtime::{Driver, Events, Exit, Pulse, Queue, Shell, queue},
    status::{Health, Identity, StateCell, StatusHub},
    step_log::StepLog,
    telemetry,
};
use crate::{
    dcs::DcsEvent,
    machine::{Machine, Time},
};

/// How long the last requests to etcd (the goodbye) may take once the machine has ended.
const GOODBYE_DEADLINE: Duration = Duration::from_secs(2);

/// What a program must say to be a bot; [`run`] does the rest.
pub trait Bot: Sized {
    /// The name of the program: `postgres-bot`.
    const PROGRAM: &'static str;
    /// Its version.
    const VERSION: &'static str;
    /// The whole configuration; flattens [`Common`].
    type Config: DeserializeOwned;
    /// The brain.
    type Machine: Machine<State: Send + 'static, Event: Send + 'static> + 'static;
    /// The hands.
    type Shell: Shell<Machine = Self::Machine>;

    /// For a kind of bot that may have several sites in one process.
    const SITES: Option<SiteRules> = None;

    /// The common part of the configuration.
    fn common(config: &Self::Config) -> &Common;

    /// Checks what the types cannot: for `--check`, and before anything else at start.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    fn check(_config: &Self::Config) -> Result<(), String> {
        Ok(())
    }

    /// Checks whether these can be sites of one process: what none of them can see alone. Their scopes differ.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    fn check_together(_sites: &[Self::Config]) -> Result<(), String> {
        Ok(())
    }

    /// Wraps an event of the store.
    fn dcs_event(event: DcsEvent) -> <Self::Machine as Machine>::Event;

    /// The event for SIGTERM and SIGINT.
    fn shutdown_requested() -> <Self::Machine as Machine>::Event;

    /// Builds the first state, the shell and the bot's own routes. Asynchronous because it may bind sockets.
    fn assemble(
        config: Self::Config,
        context: Context<<Self::Machine as Machine>::Event>,
    ) -> impl Future<Output = Result<Assembled<Self>, Exit>>;
}

/// What a bot is assembled with.
#[derive(Clone)]
pub struct Context<E> {
    /// The common part of the configuration.
    pub common: Common,
    /// What stands before the paths of the bot's routes: nothing, unless it shares the API with others.
    pub api_path: String,
    /// The file or directory that the configuration was read from, if any.
    pub config_path: Option<PathBuf>,
    /// What tells this process from any other of the same name.
    pub instance: String,
    /// The wall time at [`Time::ZERO`], in milliseconds since 1970.
    pub epoch_unix_ms: u64,
    /// The way into the machine's queue.
    pub events: Events<E>,
    /// The way to etcd.
    pub dcs: DcsHandle,
    /// What the bot is right now.
    pub status: StatusHub,
    /// When its loop turned last.
    pub pulse: Pulse,
    /// Where to register metrics.
    pub metrics: Metrics,
}

/// A bot, ready to run.
pub struct Assembled<B: Bot> {
    /// The first state.
    pub state: <B::Machine as Machine>::State,
    /// The hands.
    pub shell: B::Shell,
    /// The prefixes to watch in etcd.
    pub prefixes: Vec<String>,
    /// The bot's own routes, below its path of the API. Verbs that change something are behind basic authentication.
    pub routes: Router,
    /// Routes that check a signature of their own, such as webhooks: no basic authentication. They are merged into the API as
    /// they are: where several bots share it, each names its own.
    pub self_authenticated: Router,
    /// Where strangers reach the self-authenticated routes and nothing else, beside the API.
    pub strangers: Option<Strangers>,
    /// What the health checks answer, asked at every request.
    pub health: fn(&<B::Machine as Machine>::State, Time) -> Health,
}

impl<B: Bot> Assembled<B> {
    /// A bot without routes of its own, watching `prefixes`.
    pub fn new(
        state: <B::Machine as Machine>::State,
        shell: B::Shell,
        prefixes: Vec<String>,
        health: fn(&<B::Machine as Machine>::State, Time) -> Health,
    ) -> Self {
        let (routes, self_authenticated) = (Router::new(), Router::new());
        Self { state, shell, prefixes, routes, self_authenticated, strangers: None, health }
    }

    /// Adds routes; verbs that change something are behind basic authentication.
    #[must_use]
    pub fn routes(mut self, routes: Router) -> Self {
        self.routes = self.routes.merge(routes);
        self
    }

    /// Adds routes that check a signature of their own.
    #[must_use]
    pub fn self_authenticated(mut self, routes: Router) -> Self {
        self.self_authenticated = self.self_authenticated.merge(routes);
        self
    }

    /// Serves the self-authenticated routes at an address of their own, too. Bots of one process may share it.
    #[must_use]
    pub fn strangers(mut self, strangers: Option<Strangers>) -> Self {
        self.strangers = strangers;
        self
    }
}

/// An address for strangers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Strangers {
    /// Where it stands in the configuration.
    pub field: &'static str,
    /// The address.
    pub listen: SocketAddr,
}

enum Command {
    Run(Option<PathBuf>),
    Check(Option<PathBuf>),
    Print(String),
}

/// The `main` of a bot.
#[must_use]
pub fn run<B: Bot>() -> ExitCode {
    let exit = match command::<B>(std::env::args().skip(1)) {
        Ok(Command::Print(text)) => {
            println!("{text}");
            return ExitCode::SUCCESS;
        }
        Ok(Command::Check(path)) => match configure_all::<B>(path.as_deref()) {
            Ok(_configs) => {
                println!("{}: the configuration is good", B::PROGRAM);
                return ExitCode::SUCCESS;
            }
            Err(exit) => exit,
        },
        Ok(Command::Run(path)) => {
            configure_all::<B>(path.as_deref()).and_then(|all| start::<B>(all, path)).unwrap_or_else(|exit| exit)
        }
        Err(exit) => exit,
    };
    if exit.code != 0 {
        eprintln!("{}: {}", B::PROGRAM, exit.message);
    }
    ExitCode::from(exit.code)
}

fn command<B: Bot>(arguments: impl Iterator<Item = String>) -> Result<Command, Exit> {
    let (mut check, mut path) = (false, None);
    for argument in arguments {
        match argument.as_str() {
            "--version" | "-V" => return Ok(Command::Print(format!("{} {}", B::PROGRAM, B::VERSION))),
            "--help" | "-h" => return Ok(Command::Print(help::<B>())),
            "--check" | "--validate-config" => check = true,
            flag if flag.starts_with('-') => {
                return Err(Exit::usage(format!("unknown option {flag}: see {} --help", B::PROGRAM)));
            }
            _ if path.is_some() => return Err(Exit::usage("give one configuration file or directory, not several")),
            _ => path = Some(PathBuf::from(argument)),
        }
    }
    Ok(if check { Command::Check(path) } else { Command::Run(path) })
}

fn help<B: Bot>() -> String {
    format!(
        "Usage: {} [--check] [CONFIG]\n\n\
         CONFIG     a YAML file, or a directory whose *.yml and *.yaml are merged in the order of their names\n\
         --check    read and check the configuration, then end\n\
         --version  print the version\n\n\
         Every field can come from the environment, which wins over files: BOT_SCOPE, BOT_NAME, BOT_ETCD3_HOSTS,\n\
         BOT_RESTAPI_LISTEN, ... (PATRONI_ instead of BOT_ works too), the whole document from BOT_CONFIGURATION.",
        B::PROGRAM
    )
}

/// Reads and checks the configuration of a bot that has one site: whenever it is to be read again.
///
/// # Errors
/// Code 2, with one line that names the field and the fix.
pub fn configure<B: Bot>(path: Option<PathBuf>) -> Result<B::Config, Exit> {
    let mut all = configure_all::<B>(path.as_deref())?;
    all.pop().filter(|_| all.is_empty()).ok_or_else(|| Exit::usage("sites: there are several where one is expected"))
}

/// Calls `reload` whenever the process is sent SIGHUP, and says why in the log if that changes nothing.
pub async fn on_hangup<Reloaded: Future<Output = Result<(), String>>>(reload: impl Fn() -> Reloaded) {
    let Ok(mut hangups) = signal(SignalKind::hangup()) else {
        return tracing::error!("SIGHUP cannot be listened for: use POST /reload");
    };
    while hangups.recv().await.is_some() {
        if let Err(why) = reload().await {
            tracing::error!(why, "the configuration cannot be read again: nothing was changed");
        }
    }
}

/// Reads and checks the configuration of every site.
fn configure_all<B: Bot>(path: Option<&Path>) -> Result<Vec<B::Config>, Exit> {
    read::<B>(path, &config::process_env())
}

/// Reads and checks a configuration, with these variables as its environment.
///
/// # Errors
/// Code 2, with one line that names the field and the fix.
pub fn read<B: Bot>(path: Option<&Path>, env: &config::Env) -> Result<Vec<B::Config>, Exit> {
    // Whatever a file says is quoted on one line.
    checked::<B>(path, env).map_err(|why| Exit::usage(why.split_whitespace().collect::<Vec<_>>().join(" ")))
}

fn checked<B: Bot>(path: Option<&Path>, env: &config::Env) -> Result<Vec<B::Config>, String> {
    let configs: Vec<B::Config> = config::load_all(path, env, B::SITES.as_ref()).map_err(|e| e.to_string())?;
    let has_sites = configs.iter().any(|config| B::common(config).among_sites);
    let of_site = |index: usize, why: String| match B::SITES {
        Some(rules) if has_sites && !rules.shares(&why) => format!("sites.{index}.{why}"),
        Some(_) | None => why,
    };
    for (index, config) in configs.iter().enumerate() {
        let common = B::common(config);
        common.etcd3.endpoints().and_then(|_| common.etcd3.user())?;
        common.restapi.check()?;
        if let Some(credentials) = &common.restapi.authentication {
            credentials.secret("restapi.authentication")?;
        }
        if let Some(twin) = configs.iter().take(index).position(|other| B::common(other).scope == common.scope) {
            let scope = &common.scope;
            return Err(format!("sites.{index}.scope: {scope} is the scope of sites.{twin}: give it another"));
        }
        B::check(config).map_err(|why| of_site(index, why))?;
    }
    if has_sites {
        B::check_together(&configs)?;
    }
    Ok(configs)
}

fn start<B: Bot>(configs: Vec<B::Config>, path: Option<PathBuf>) -> Result<Exit, Exit> {
    let Some(common) = configs.first().map(|config| B::common(config).clone()) else {
        return Err(Exit::usage("sites: there is none"));
    };
    telemetry::init(&common.log);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Exit::failure(format!("cannot start the runtime: {e}")))?;
    let exit = runtime.block_on(Box::pin(live::<B>(common, configs, path)));
    // Blocking work that is still under way must not keep a bot from ending.
    runtime.shutdown_background();
    exit
}

/// One site before it is assembled.
struct Seat<B: Bot> {
    config: B::Config,
    scope: String,
    api_path: String,
    step_log: Option<PathBuf>,
    events: Events<<B::Machine as Machine>::Event>,
    queue: Queue<<B::Machine as Machine>::Event>,
    hub: StatusHub,
    pulse: Pulse,
    metrics: Metrics,
    /// Names the site in the log.
    span: tracing::Span,
}

/// One site at work.
struct Site<B: Bot> {
    driver: Driver<B::Shell>,
    dcs: DcsHandle,
    routes: Router,
    self_authenticated: Router,
    strangers: Option<Strangers>,
    prefixes: Vec<String>,
}

impl<B: Bot> Seat<B> {
    /// The seat of a site that has the process for itself.
    fn alone(config: B::Config, instance: &str, metrics: Metrics) -> Self {
        let common = B::common(&config);
        let (scope, step_log) = (common.scope.clone(), common.log.step_log.clone());
        let identity = Identity {
            name: common.name.clone(),
            scope: scope.clone(),
            namespace: common.namespace.clone(),
            kind: B::Machine::KIND.to_owned(),
            instance: instance.to_owned(),
            version: B::VERSION.to_owned(),
        };
        let ((events, queue), hub, pulse) = (queue(), StatusHub::new(identity), Pulse::new());
        let (api_path, span) = (String::new(), tracing::Span::none());
        Self { config, scope, api_path, step_log, events, queue, hub, pulse, metrics, span }
    }

    /// The seat of one among several.
    fn among_others(config: B::Config, instance: &str, metrics: &Metrics) -> Self {
        let metrics = metrics.of_site(&B::common(&config).scope);
        let seat = Self::alone(config, instance, metrics);
        let (api_path, step_log) = (format!("/sites/{}", seat.scope), seat.step_log.as_deref());
        let step_log = step_log.map(|path| path.with_extension(format!("{}.jsonl", seat.scope)));
        Self { span: tracing::info_span!("site", scope = seat.scope), api_path, step_log, ..seat }
    }

    async fn assembled(self, line: &DcsLine, config_path: Option<PathBuf>) -> Result<Site<B>, Exit> {
        let Self { config, api_path, events, queue, hub, pulse, metrics, .. } = self;
        let common = B::common(&config).clone();
        for field in common.unknown.keys() {
            tracing::warn!(field, "a configuration field that this bot does not know is ignored");
        }
        let dcs = line.handle(DcsSink::new(events.clone(), B::dcs_event), pulse.clone(), hub.clone());
        let context = Context {
            common,
            api_path,
            config_path,
            instance: hub.identity().instance.clone(),
            epoch_unix_ms: Clock::epoch_unix_ms(),
            events,
            dcs: dcs.clone(),
            status: hub.clone(),
            pulse: pulse.clone(),
            metrics: metrics.clone(),
        };
        let Assembled { state, shell, prefixes, routes, self_authenticated, strangers, health } =
            B::assemble(config, context).await?;
        let log = self.step_log.map(|path| step_log(&path, &state)).transpose()?;
        let cell = StateCell::new(state);
        hub.attach::<B::Machine>(cell.clone(), health);
        let driver = Driver { cell, shell, queue, pulse, hub, metrics, log };
        Ok(Site { driver, dcs, routes, self_authenticated, strangers, prefixes })
    }
}

/// From the configuration to the end.
async fn live<B: Bot>(common: Common, configs: Vec<B::Config>, config_path: Option<PathBuf>) -> Result<Exit, Exit> {
    let api = Api::bind(&common.restapi).await?;
    let (instance, metrics) = (entropy::instance_id(), Metrics::new());
    let is_alone = !common.among_sites;
    let seat = |config: B::Config| {
        if is_alone {
            Seat::<B>::alone(config, &instance, metrics.clone())
        } else {
            Seat::<B>::among_others(config, &instance, &metrics)
        }
    };
    let seats: Vec<Seat<B>> = configs.into_iter().map(seat).collect();
    for seat in &seats {
        let (program, version, scope, name) = (B::PROGRAM, B::VERSION, &seat.scope, &common.name);
        tracing::info!(program, version, scope, name, instance, "starting");
    }
    let hubs: Vec<StatusHub> = seats.iter().map(|seat| seat.hub.clone()).collect();
    let events: Vec<_> = seats.iter().map(|seat| seat.events.clone()).collect();
    let line = DcsLine::open(&common.etcd3, hubs.clone(), metrics.clone()).map_err(|e| Exit::usage(e.to_string()))?;
    let (mut shared, mut own, mut signed) = (Router::new(), Router::new(), Router::new());
    let mut doors = Doors::default();
    if !is_alone {
        shared = api::overview(hubs.clone(), &metrics);
    }
    let (mut drivers, mut ways) = (Vec::new(), Vec::new());
    for seat in seats {
        let (path, span) = (seat.api_path.clone(), seat.span.clone());
        let site = Box::pin(seat.assembled(&line, config_path.clone())).instrument(span.clone()).await?;
        let routes = api::router(&site.driver.hub, &metrics);
        if is_alone {
            (shared, own) = (routes, site.routes);
        } else {
            (shared, own) = (shared.nest(&path, routes), own.nest(&path, site.routes));
        }
        doors.add(site.strangers, &site.self_authenticated);
        signed = signed.merge(site.self_authenticated);
        ways.push((site.dcs, site.prefixes));
        drivers.push((site.driver, span));
    }
    let mut servers = doors.open(&hubs).await?;
    servers.push(api.serve(shared, own, signed));
    let watch = |(dcs, prefixes): (DcsHandle, Vec<String>)| {
        dcs.watch(prefixes);
        dcs
    };
    let ways: Vec<DcsHandle> = ways.into_iter().map(watch).collect();
    notify(&[sd_notify::NotifyState::Ready]);
    let signals = signals::<B>(&events);
    tokio::pin!(signals);
    // Whoever asks twice does not want to wait, neither for the machine nor for the goodbye.
    let exit = tokio::select! {
        exit = Box::pin(ended::<B>(drivers, &events)) => exit,
        exit = &mut signals => return Ok(exit),
        why = line.failed() => {
            // The machine goes by what is no more: no goodbye, so that nothing is stopped or handed over for it. Whoever supervises
            // the process starts another, which finds everything as it is.
            tracing::error!(code = 1, reason = why, "ended");
            return Ok(Exit::failure(why));
        }
    };
    let goodbye = async {
        notify(&[sd_notify::NotifyState::Stopping]);
        join_all(ways.iter().map(|dcs| dcs.drain(GOODBYE_DEADLINE))).await;
        join_all(servers.into_iter().map(Server::stop)).await;
    };
    tokio::select! {
        () = goodbye => {}
        exit = &mut signals => return Ok(exit),
    }
    match exit.code {
        0 => tracing::info!(code = exit.code, reason = exit.message, "ended"),
        // Nobody starts it again before somebody has looked at it.
        _ => tracing::error!(code = exit.code, reason = exit.message, "ended"),
    }
    Ok(exit)
}

/// What strangers find, by address.
#[derive(Default)]
struct Doors(BTreeMap<SocketAddr, (&'static str, Router)>);

impl Doors {
    fn add(&mut self, strangers: Option<Strangers>, routes: &Router) {
        let Some(Strangers { field, listen }) = strangers else { return };
        let (_, door) = self.0.entry(listen).or_insert_with(|| (field, Router::new()));
        *door = std::mem::take(door).merge(routes.clone());
    }

    async fn open(self, hubs: &[StatusHub]) -> Result<Vec<Server>, Exit> {
        let mut servers = Vec::new();
        for (address, (field, routes)) in self.0 {
            let listener = api::listen(field, address).await?;
            tracing::info!(%address, "strangers are served here, and nothing of the API");
            servers.push(api::serve_strangers(listener, routes, hubs.to_vec()));
        }
        Ok(servers)
    }
}

/// Turns all loops until the last has ended. One that fails takes the others with it, each with its goodbye: whoever
/// supervises the process must learn of it.
async fn ended<B: Bot>(
    drivers: Vec<(Driver<B::Shell>, tracing::Span)>,
    events: &[Events<<B::Machine as Machine>::Event>],
) -> Exit {
    let mut loops: FuturesUnordered<_> =
        drivers.into_iter().map(|(driver, span)| driver.run().instrument(span)).collect();
    let mut first_failure = None;
    let mut last = Exit::clean("there was nothing to do");
    while let Some(exit) = loops.next().await {
        last = exit.unwrap_or_else(|e| Exit::failure(format!("the event loop: {e}")));
        if last.code != 0 && first_failure.is_none() {
            first_failure = Some(last.clone());
            for events in events {
                let events = events.clone();
                tokio::spawn(async move { events.send(B::shutdown_requested()).await });
            }
        }
    }
    first_failure.unwrap_or(last)
}

fn step_log<S: Serialize>(path: &std::path::Path, state: &S) -> Result<StepLog, Exit> {
    StepLog::create(path, state)
        .map_err(|e| Exit::usage(format!("log.step_log: cannot write {}: {e}: choose another path", path.display())))
}

/// The first signal asks the machine to end; the second ends the process.
async fn signals<B: Bot>(events: &[Events<<B::Machine as Machine>::Event>]) -> Exit {
    let both = signal(SignalKind::terminate()).and_then(|t| Ok((t, signal(SignalKind::interrupt())?)));
    let (mut terminate, mut interrupt) = match both {
        Ok(both) => both,
        Err(e) => return Exit::failure(format!("cannot listen for signals: {e}")),
    };
    either(&mut terminate, &mut interrupt).await;
    tracing::info!("a signal asks for the end");
    notify(&[sd_notify::NotifyState::Stopping]);
    join_all(events.iter().map(|events| events.send(B::shutdown_requested()))).await;
    either(&mut terminate, &mut interrupt).await;
    Exit::failure("a second signal: ended without a goodbye")
}

async fn either(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

fn notify(states: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "systemd cannot be notified");
    }
}
