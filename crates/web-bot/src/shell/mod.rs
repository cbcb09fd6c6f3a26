//! The shell: performs what the machine asks for and tells it what happened. Decides nothing.

mod app;
mod config;
mod content;
mod database;
mod plane;
mod pressure;
mod reload;

use std::{
    net::{SocketAddr, TcpListener},
    ops::ControlFlow,
    sync::Arc,
    time::Duration,
};

use axum::{
    Json, Router,
    routing::{get, post},
};
use bots_core::{
    dcs::DcsEvent,
    machine::{Machine, Time},
    shell::{Assembled, Bot, Common, Context, DcsHandle, Events, Exit, Health, Secret, Shell, probe_instance},
};

pub use self::config::WebConfig;
use self::{
    app::{Apps, DatabaseLogin, Launch, Password, Recipe, Recipes},
    content::{ContentError, Library, Shelving, Wanted},
    plane::{Doors, Hold, Plane, Target, TlsFiles},
    reload::Reload,
};
use crate::machine::{Action, Event, Role, Route, State, WebMachine};

/// How long a client may take to send the head of its next request, and to read something of what is sent to it.
const CLIENT_PATIENCE: Duration = Duration::from_secs(60);

/// The web bot's program.
#[derive(Debug, Clone, Copy)]
pub struct WebBot;

impl Bot for WebBot {
    const PROGRAM: &'static str = "web-bot";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    type Config = WebConfig;
    type Machine = WebMachine;
    type Shell = WebShell;

    fn common(config: &WebConfig) -> &Common {
        &config.common
    }

    fn check(config: &WebConfig) -> Result<(), String> {
        config.check()
    }

    fn dcs_event(event: DcsEvent) -> Event {
        Event::Dcs(event)
    }

    fn shutdown_requested() -> Event {
        Event::ShutdownRequested
    }

    async fn assemble(config: WebConfig, context: Context<Event>) -> Result<Assembled<Self>, Exit> {
        let doors = doors(&config)?;
        let bound = doors.plain.local_addr().map_err(|e| Exit::failure(format!("web.listen: {e}")))?;
        let settings = config.settings(bound, Self::VERSION).map_err(Exit::usage)?;
        let site_path = config.site_path().map_err(Exit::usage)?;
        let shelving = Shelving {
            mode: config.web.mode,
            site_path,
            size_max: config.content.size_max_bytes,
            memory_max: config.web.memory_max_bytes,
            name: context.common.name.clone(),
        };
        let library = Library::open(&config.data_dir, shelving)
            .map_err(|e| Exit::usage(format!("data_dir: {e}: choose a folder that the bot may write to")))?;
        let (events, name) = (context.events.clone(), &context.common.name);
        let plane = Plane::start(doors, name, events.clone(), &context.metrics).map_err(Exit::usage)?;
        tracing::info!(listen = %bound, mode = ?config.web.mode, "the web server listens");
        let recipes = Recipes::new(recipe(&config));
        let apps = Apps::new(recipes.clone(), events.clone());
        let reload = Arc::new(Reload::new(context.config_path, config, recipes, events.clone()));
        tokio::spawn(Arc::clone(&reload).on_hangup());
        let routes = routes(&plane, library.clone()).route("/reload", post(move || Arc::clone(&reload).answer()));
        let stalls = context
            .metrics
            .counter("web_processor_stalls", "Times that the kernel told of work waiting for a processor");
        tokio::spawn(pressure::follow(events.clone(), stalls));
        let state = State::new(settings, context.instance, context.epoch_unix_ms);
        let prefixes = state.prefixes();
        let shell = WebShell { dcs: context.dcs, events, library, plane, apps };
        Ok(Assembled::new(state, shell, prefixes, health).routes(routes))
    }
}

/// Binds the web server's ports, before anything else is touched.
fn doors(config: &WebConfig) -> Result<Doors, Exit> {
    let plain = bind("web.listen", config.listen().map_err(Exit::usage)?)?;
    let tls = match (&config.web.tls, config.tls_listen().map_err(Exit::usage)?) {
        (Some(tls), Some(listen)) => {
            let files = TlsFiles { certificate: tls.certificate.clone(), key: tls.key.clone() };
            Some((bind("web.tls.listen", listen)?, files))
        }
        (Some(_), None) | (None, _) => None,
    };
    let app_answer_timeout = Duration::from_secs(config.web.app_answer_timeout_s);
    let (access_log, trusted) = (config.web.access_log.clone(), config.web.trusted_proxies.clone());
    let hold = Hold {
        timeout: Duration::from_secs(config.web.hold_timeout_s),
        requests_max: usize::try_from(config.web.hold_max).unwrap_or(usize::MAX),
    };
    let body_max = usize::try_from(config.web.body_max_bytes).unwrap_or(usize::MAX);
    Ok(Doors { plain, tls, access_log, app_answer_timeout, trusted, patience: CLIENT_PATIENCE, hold, body_max })
}

fn bind(field: &str, listen: SocketAddr) -> Result<TcpListener, Exit> {
    TcpListener::bind(listen).map_err(|e| match e.kind() {
        std::io::ErrorKind::AddrInUse => {
            Exit::missing(format!("{field}: {listen} is in use: stop the program that has it or choose another port"))
        }
        _ => Exit::usage(format!("{field}: cannot listen on {listen}: {e}")),
    })
}

/// How the app is run.
fn recipe(config: &WebConfig) -> Recipe {
    Recipe {
        command: config.web.command.clone(),
        health_path: config.web.health_path.clone(),
        health_interval: Duration::from_secs(config.web.health_interval_s),
        env: config.web.env.clone().into_iter().map(|(name, value)| (name, value.0)).collect(),
        database: login(config),
    }
}

fn login(config: &WebConfig) -> Option<DatabaseLogin> {
    config.database.as_ref().map(|database| DatabaseLogin {
        dbname: database.dbname.clone(),
        username: database.username.clone(),
        password: match (&database.password, &database.password_file) {
            (_, Some(file)) => Password::File { path: file.clone(), held: Secret::from_file(file).ok() },
            (Some(password), None) => Password::Given(password.clone()),
            (None, None) => Password::None,
        },
    })
}

/// `GET /load`: how busy the bot is.
fn routes(plane: &Plane, library: Library) -> Router {
    let (meter, load) = (plane.meter().clone(), plane.load());
    let answer = move || {
        let (load, (in_flight, total)) = (*load.borrow(), meter.counts());
        let memory_bytes = library.memory_used();
        async move {
            Json(serde_json::json!({
                "in_flight": in_flight,
                "in_flight_milli": load.in_flight_milli,
                "rps": load.rps,
                "p99_us": load.p99_us,
                "total": total,
                "memory_bytes": memory_bytes,
            }))
        }
    };
    Router::new().route("/load", get(answer))
}

fn health(state: &State, _now: Time) -> Health {
    let role = WebMachine::role(state);
    Health { healthy: matches!(role, Role::Idle | Role::Serving), alive: true, ready: state.takes_requests() }
}

/// The hands of the web bot.
pub struct WebShell {
    dcs: DcsHandle,
    events: Events<Event>,
    library: Library,
    plane: Plane,
    apps: Apps,
}

impl Shell for WebShell {
    type Machine = WebMachine;

    fn perform(&mut self, action: Action) -> ControlFlow<Exit> {
        match action {
            Action::Dcs(action) => self.dcs.perform(action),
            Action::ProbeName { api_url } => {
                let ours = self.dcs.identity().clone();
                self.later(async move { Event::NameProbed { instance: probe_instance(&api_url, &ours).await } })
            }
            Action::PrepareContent { id, sha, pack_urls, origin, reference } => {
                self.prepare(id, Wanted { sha, pack_urls, origin, reference });
            }
            Action::RetainContent { shas } => drop(tokio::task::spawn_blocking(self.library.retain(shas))),
            Action::StartApp { instance, sha, database_hosts, cdn_url, configuration } => {
                let content_dir = self.library.files_of(&sha);
                self.apps.start(Launch { instance, sha, content_dir, database_hosts, cdn_url, configuration });
            }
            Action::StopApp { instance, drain, grace } => self.apps.stop(instance, drain, grace),
            Action::ProbeDatabase { id, address } => {
                self.later(async move { Event::DatabaseProbed { id, answers: database::answers(&address).await } });
            }
            Action::SetRoute(route) => {
                if let Some(commit) = route.sha() {
                    tracing::info!(commit, "requests are answered from this commit");
                }
                self.plane.set_target(self.target(route));
            }
            Action::AwaitInFlight { id } => {
                let finished = self.plane.finish();
                self.later(async move {
                    finished.await;
                    Event::InFlightEnded { id }
                });
            }
            Action::Exit { code, message } => return ControlFlow::Break(Exit::new(code, message)),
        }
        ControlFlow::Continue(())
    }
}

impl WebShell {
    /// Queues what comes of `work`, whenever that is.
    fn later(&self, work: impl Future<Output = Event> + Send + 'static) {
        let events = self.events.clone();
        tokio::spawn(async move { events.send(work.await).await });
    }

    fn prepare(&self, id: u64, wanted: Wanted) {
        self.library.retain_also(&wanted.sha);
        let (library, sha) = (self.library.clone(), wanted.sha.clone());
        self.later(async move {
            match Box::pin(library.prepare(wanted)).await {
                Ok(()) => {
                    tracing::info!(commit = sha, "content prepared");
                    Event::ContentPrepared { id, sha }
                }
                Err(ContentError::Refused(why)) => {
                    tracing::warn!(commit = sha, why, "content can never be served");
                    Event::ContentRefused { id, sha, why }
                }
                Err(error) => {
                    tracing::warn!(commit = sha, %error, "content cannot be prepared");
                    Event::ContentFailed { id, sha, why: error.to_string() }
                }
            }
        });
    }

    /// The route with what it takes to follow it. What is gone by now is about to be told to the machine.
    fn target(&self, route: Route) -> Target {
        let gone = || Target::Hold;
        match route {
            Route::Refuse { state } => Target::Refuse { state },
            Route::Hold => Target::Hold,
            Route::Static { sha, closing } => {
                self.library.site_of(&sha).map_or_else(gone, |site| Target::Static { site, closing })
            }
            Route::App { instance, sha: _, closing } => {
                self.apps.backend(instance).map_or_else(gone, |backend| Target::App { backend, closing })
            }
        }
    }
}
