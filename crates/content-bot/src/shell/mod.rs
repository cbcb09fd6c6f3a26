//! The effects of a content bot: configuration, git, the mirror, the routes. Not a place for decisions.

pub mod api;
mod base64;
mod bucket;
pub mod callers;
pub mod config;
pub mod export;
pub mod fault;
pub mod gates;
pub mod guard;
mod hands;
pub mod known_hosts;
mod metrics;
pub mod mirror;
pub mod origin;
mod packs;
mod prune;
mod signature;
mod signers;
pub mod source;
pub mod submodules;
mod tidy;
mod tool;
mod turnstile;
pub mod verify;
pub mod webhook;

use std::sync::{Arc, Mutex};

use bots_core::{
    dcs::DcsEvent,
    machine::Time,
    shell::{Assembled, Bot, Common, Context, Exit, Health, SiteRules},
};

use self::{
    api::{Doors, Front, PushDoor},
    config::Config,
    export::Exporter,
    guard::Stop,
    hands::Hands,
    metrics::ContentMetrics,
    mirror::Mirror,
    origin::Origin,
};
use crate::machine::{ContentMachine, Event, Reference, Role, State};

/// The content bot.
#[derive(Debug, Clone, Copy)]
pub struct ContentBot;

impl Bot for ContentBot {
    const PROGRAM: &'static str = "content-bot";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");

    type Config = Config;
    type Machine = ContentMachine;
    type Shell = Hands;

    const SITES: Option<SiteRules> =
        Some(SiteRules { shared: &["name", "namespace", "etcd3", "etcd", "restapi", "log"], folders: &["data_dir"] });

    fn common(config: &Config) -> &Common {
        &config.common
    }

    fn check(config: &Config) -> Result<(), String> {
        config.check()
    }

    fn check_together(sites: &[Config]) -> Result<(), String> {
        config::check_together(sites)
    }

    fn dcs_event(event: DcsEvent) -> Event {
        Event::Dcs(event)
    }

    fn shutdown_requested() -> Event {
        Event::ShutdownRequested
    }

    async fn assemble(config: Config, context: Context<Event>) -> Result<Assembled<Self>, Exit> {
        let settings = config.settings(&context.instance, &context.api_path).map_err(Exit::usage)?;
        let source = config.source().map_err(Exit::usage)?;
        let credentials = config.credentials().map_err(Exit::usage)?;
        let door = push_door(&config).map_err(Exit::usage)?;
        let reference = Reference::parse(&config.git.reference);
        let (site, is_alone) = (config.common.scope.clone(), context.api_path.is_empty());
        let front = Front { site, is_alone, reference, door };
        let callees = config.callees().map_err(Exit::usage)?;
        let (limits, stop) = (config.limits(), Stop::default());
        let origin = Origin::new(source, Reference::parse(&config.git.reference), credentials).reached(config.reach());
        let mirror = Mirror::open(&config.data_dir, origin, limits, stop.clone())?;
        let mirror = mirror.behind(config.verify.gates()).following(config.git.submodules);
        let mirror = Arc::new(mirror.finding(config.git.lfs_pointers));
        let prefixes = State::prefixes(&settings);
        let exporter = config.export.as_ref().map(|export| export.exporter(&config.data_dir)).transpose()?;
        let trees = exporter.as_ref().map(Exporter::trees).unwrap_or_default();
        let state = State::new(settings, mirror.holds(), context.epoch_unix_ms).with_trees(trees);
        let metrics = ContentMetrics::registered(&context.metrics);
        let role = Arc::new(Mutex::new(Role::Initializing));
        let doors = Arc::new(Doors::new(
            front,
            context.events.clone(),
            Arc::clone(&mirror),
            metrics.clone(),
            context.status,
            Arc::clone(&role),
        ));
        let hands = Hands::new(context.events, context.dcs, mirror, limits, stop, metrics, role)
            .calling(callees)
            .exporting(exporter);
        Ok(Assembled::new(state, hands, prefixes, health)
            .routes(api::routes(Arc::clone(&doors)))
            .self_authenticated(api::push_routes(doors))
            .strangers(config.push.strangers()))
    }
}

fn health(state: &State, now: Time) -> Health {
    Health { healthy: state.is_ready(), alive: true, ready: state.is_ready() && !state.is_stale(now) }
}

fn push_door(config: &Config) -> Result<PushDoor, String> {
    if config.push.is_signed() {
        let push = config.push.clone();
        return Ok(PushDoor::Signed(Box::new(move || push.secrets())));
    }
    if config.common.restapi.listen.ip().is_loopback() {
        return Ok(PushDoor::Loopback);
    }
    tracing::warn!(
        listen = %config.common.restapi.listen,
        "push.secret is missing and the API can be reached from other machines: pushes are seen at the next poll only"
    );
    Ok(PushDoor::Closed)
}
