//! One `main` for every bot: arguments, configuration, logs, etcd, API, signals, the loop, and a clean end.

use std::{future::Future, path::PathBuf, process::ExitCode, time::Duration};

use serde::{Serialize, de::DeserializeOwned};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{
    api::{self, Api},
    clock::Clock,
    config::{self, Common},
    dcs::{DcsHandle, DcsSink},
    entropy,
    metrics::Metrics,
    runtime::{Driver, Events, Exit, Pulse, Shell, queue},
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

    /// The common part of the configuration.
    fn common(config: &Self::Config) -> &Common;

    /// Checks what the types cannot: for `--check`, and before anything else at start.
    ///
    /// # Errors
    /// One line that names the field and the fix.
    fn check(_config: &Self::Config) -> Result<(), String> {
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
    /// The bot's own routes, merged into the API. Verbs that change something are behind basic authentication.
    pub routes: axum::Router,
    /// Routes that check a signature of their own, such as webhooks: no basic authentication.
    pub self_authenticated: axum::Router,
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
        Self { state, shell, prefixes, routes: axum::Router::new(), self_authenticated: axum::Router::new(), health }
    }

    /// Adds routes; verbs that change something are behind basic authentication.
    #[must_use]
    pub fn routes(mut self, routes: axum::Router) -> Self {
        self.routes = self.routes.merge(routes);
        self
    }

    /// Adds routes that check a signature of their own.
    #[must_use]
    pub fn self_authenticated(mut self, routes: axum::Router) -> Self {
        self.self_authenticated = self.self_authenticated.merge(routes);
        self
    }
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
        Ok(Command::Check(path)) => match configure::<B>(path) {
            Ok(_config) => {
                println!("{}: the configuration is good", B::PROGRAM);
                return ExitCode::SUCCESS;
            }
            Err(exit) => exit,
        },
        Ok(Command::Run(path)) => {
            configure::<B>(path.clone()).and_then(|config| start::<B>(config, path)).unwrap_or_else(|exit| exit)
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

/// Reads and checks the configuration: at the start, and whenever it is to be read again.
///
/// # Errors
/// Code 2, with one line that names the field and the fix.
pub fn configure<B: Bot>(path: Option<PathBuf>) -> Result<B::Config, Exit> {
    let config: B::Config =
        config::load(path.as_deref(), &config::process_env()).map_err(|e| Exit::usage(e.to_string()))?;
    let common = B::common(&config);
    common.etcd3.endpoints().and_then(|_| common.etcd3.user()).map_err(Exit::usage)?;
    if let Some(credentials) = &common.restapi.authentication {
        credentials.secret("restapi.authentication").map_err(Exit::usage)?;
    }
    B::check(&config).map_err(Exit::usage)?;
    Ok(config)
}

fn start<B: Bot>(config: B::Config, path: Option<PathBuf>) -> Result<Exit, Exit> {
    telemetry::init(&B::common(&config).log);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Exit::failure(format!("cannot start the runtime: {e}")))?;
    let exit = runtime.block_on(Box::pin(live::<B>(config, path)));
    // Blocking work that is still under way must not keep a bot from ending.
    runtime.shutdown_background();
    exit
}

/// From the configuration to the end.
async fn live<B: Bot>(config: B::Config, config_path: Option<PathBuf>) -> Result<Exit, Exit> {
    let common = B::common(&config).clone();
    for field in common.unknown.keys() {
        tracing::warn!(field, "a configuration field that this bot does not know is ignored");
    }
    let api = Api::bind(&common.restapi).await?;
    let instance = entropy::instance_id();
    let identity = Identity {
        name: common.name.clone(),
        scope: common.scope.clone(),
        namespace: common.namespace.clone(),
        kind: B::Machine::KIND.to_owned(),
        instance: instance.clone(),
        version: B::VERSION.to_owned(),
    };
    tracing::info!(
        program = B::PROGRAM,
        version = B::VERSION,
        scope = common.scope,
        name = common.name,
        instance,
        "starting"
    );
    let (events, queue) = queue();
    let (hub, metrics, pulse) = (StatusHub::new(identity), Metrics::new(), Pulse::new());
    let sink = DcsSink::new(events.clone(), B::dcs_event);
    let dcs = DcsHandle::start(&common.etcd3, sink, pulse.clone(), hub.clone(), metrics.clone())
        .map_err(|e| Exit::usage(e.to_string()))?;
    let context = Context {
        common: common.clone(),
        config_path,
        instance,
        epoch_unix_ms: Clock::epoch_unix_ms(),
        events: events.clone(),
        dcs: dcs.clone(),
        status: hub.clone(),
        metrics: metrics.clone(),
    };
    let assembled = B::assemble(config, context).await?;
    let log = match &common.log.step_log {
        Some(path) => Some(step_log(path, &assembled.state)?),
        None => None,
    };
    let cell = StateCell::new(assembled.state);
    hub.attach::<B::Machine>(cell.clone(), assembled.health);
    let server = api.serve(api::router(&hub, &metrics), assembled.routes, assembled.self_authenticated);
    dcs.watch(assembled.prefixes);
    notify(&[sd_notify::NotifyState::Ready]);
    let driver = Driver::<B::Shell> { cell, shell: assembled.shell, queue, pulse, hub, metrics, log };
    let signals = signals::<B>(&events);
    tokio::pin!(signals);
    // Whoever asks twice does not want to wait, neither for the machine nor for the goodbye.
    let exit = tokio::select! {
        exit = driver.run() => exit.unwrap_or_else(|e| Exit::failure(format!("the event loop: {e}"))),
        exit = &mut signals => return Ok(exit),
    };
    let goodbye = async {
        notify(&[sd_notify::NotifyState::Stopping]);
        dcs.drain(GOODBYE_DEADLINE).await;
        server.stop().await;
    };
    tokio::select! {
        () = goodbye => {}
        exit = &mut signals => return Ok(exit),
    }
    tracing::info!(code = exit.code, reason = exit.message, "ended");
    Ok(exit)
}

fn step_log<S: Serialize>(path: &std::path::Path, state: &S) -> Result<StepLog, Exit> {
    StepLog::create(path, state)
        .map_err(|e| Exit::usage(format!("log.step_log: cannot write {}: {e}: choose another path", path.display())))
}

/// The first signal asks the machine to end; the second ends the process.
async fn signals<B: Bot>(events: &Events<<B::Machine as Machine>::Event>) -> Exit {
    let both = signal(SignalKind::terminate()).and_then(|t| Ok((t, signal(SignalKind::interrupt())?)));
    let (mut terminate, mut interrupt) = match both {
        Ok(both) => both,
        Err(e) => return Exit::failure(format!("cannot listen for signals: {e}")),
    };
    either(&mut terminate, &mut interrupt).await;
    tracing::info!("a signal asks for the end");
    notify(&[sd_notify::NotifyState::Stopping]);
    events.send(B::shutdown_requested()).await;
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
