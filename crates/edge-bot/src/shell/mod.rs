//! The effects of an edge bot: configuration, the proxy's socket and process, host names. Not a place for decisions.

pub mod config;
pub mod launch;
pub mod metrics;
pub mod socket;

use std::{net::IpAddr, ops::ControlFlow, path::PathBuf, time::Duration};

use bots_core::{
    dcs::{DcsEvent, Revision},
    machine::Time,
    shell::{
        Assembled, Bot, Common, Context, DcsHandle, Events, Exit, Health, Shell, probe_instance,
        process::{exit_of, send_signal},
    },
};
use rustix::process::Signal;

use self::{config::Config, launch::Launch, metrics::EdgeMetrics};
use crate::machine::{Action, Command, EdgeMachine, Event, JobId, Look, Started, State};

/// How long a name server may take; its own time-outs are longer than anybody wants to wait for a route.
const RESOLVE_DEADLINE: Duration = Duration::from_secs(3);

/// The edge bot.
#[derive(Debug, Clone, Copy)]
pub struct EdgeBot;

impl Bot for EdgeBot {
    const PROGRAM: &'static str = "edge-bot";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");

    type Config = Config;
    type Machine = EdgeMachine;
    type Shell = Hands;

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
        let settings = config.settings(&context.instance).map_err(Exit::usage)?;
        let mut launch = config.launch().map_err(Exit::usage)?;
        if let Some(launch) = &mut launch {
            launch.binary = config::find_binary(&launch.binary).map_err(Exit::missing)?;
            std::fs::create_dir_all(&launch.data_dir).map_err(|e| {
                Exit::usage(format!("data_dir: cannot make {}: {e}: choose another", launch.data_dir.display()))
            })?;
        }
        let prefixes = State::prefixes(&settings);
        let state = State::new(settings, context.epoch_unix_ms);
        let hands = Hands {
            events: context.events,
            dcs: context.dcs,
            socket: config.socket(),
            launch,
            metrics: EdgeMetrics::registered(&context.metrics),
            routed: None,
        };
        Ok(Assembled::new(state, hands, prefixes, health))
    }
}

fn health(state: &State, _now: Time) -> Health {
    Health { healthy: state.is_ready(), alive: true, ready: state.is_ready() }
}

/// The hands of an edge bot.
pub struct Hands {
    events: Events<Event>,
    dcs: DcsHandle,
    socket: PathBuf,
    launch: Option<Launch>,
    metrics: EdgeMetrics,
    /// Who was routed to after the last step.
    routed: Option<(String, Revision)>,
}

impl Hands {
    /// Queues what comes of `work`, whenever that is.
    fn later(&self, work: impl Future<Output = Event> + Send + 'static) {
        let events = self.events.clone();
        tokio::spawn(async move { events.send(work.await).await });
    }

    fn converse(&self, job: JobId, commands: Vec<Command>) {
        self.metrics.commands.inc_by(u64::try_from(commands.len()).unwrap_or(u64::MAX));
        let (socket, unanswered) = (self.socket.clone(), self.metrics.unanswered.clone());
        self.later(async move {
            let look = socket::converse(&socket, &commands).await;
            match &look {
                Look::Up { complaints, .. } => {
                    for complaint in complaints {
                        tracing::warn!(complaint, "the proxy refuses a command");
                    }
                }
                Look::Absent { .. } | Look::Silent { .. } => {
                    unanswered.inc();
                }
            }
            Event::ProxyObserved { job, look }
        });
    }

    fn start(&self, job: JobId) {
        let launch = self.launch.clone();
        self.metrics.starts.inc();
        self.later(async move {
            let result = match launch {
                Some(launch) => launch.start().await,
                None => Started::Failed { why: String::from("proxy.start is false") },
            };
            match &result {
                Started::Done => tracing::info!("the proxy is started"),
                Started::Failed { why } => tracing::warn!(why, "the proxy cannot be started"),
            }
            Event::ProxyStarted { job, result }
        });
    }

    fn watch(&self, pid: u32) {
        tracing::info!(pid, "the proxy answers");
        let events = self.events.clone();
        tokio::spawn(async move {
            if let Some(event) = end_of(pid).await {
                events.send(event).await;
            }
        });
    }

    fn signal(pid: u32, signal: Signal) {
        if let Err(error) = send_signal(pid, signal) {
            tracing::warn!(%error, pid, "the proxy cannot be signalled");
        }
    }
}

impl Shell for Hands {
    type Machine = EdgeMachine;

    fn perform(&mut self, action: Action) -> ControlFlow<Exit> {
        match action {
            Action::Dcs(action) => self.dcs.perform(action),
            Action::ProbeName { api_url } => {
                let ours = self.dcs.identity().clone();
                self.later(async move { Event::NameProbed { instance: probe_instance(&api_url, &ours).await } });
            }
            Action::ObserveProxy { job } => self.converse(job, Vec::new()),
            Action::ApplyRoutes { job, commands } => self.converse(job, commands),
            Action::StartProxy { job } => self.start(job),
            Action::WatchProxy { pid } => self.watch(pid),
            Action::StopProxy { pid } => Self::signal(pid, Signal::USR1),
            Action::KillProxy { pid } => Self::signal(pid, Signal::TERM),
            Action::ResolveHost { host } => self.later(async move {
                let address = resolve(&host).await;
                Event::HostResolved { host, address }
            }),
            Action::Exit { code, message } => return ControlFlow::Break(Exit { code, message }),
        }
        ControlFlow::Continue(())
    }

    fn stepped(&mut self, state: &State) {
        let routed = state.routed().map(|(name, generation)| (name.to_owned(), generation));
        if routed == self.routed {
            return;
        }
        match &routed {
            Some((leader, generation)) => {
                tracing::info!(leader, generation = generation.0, "connections for the primary go to");
            }
            None => tracing::info!("connections for the primary are held"),
        }
        let generation = routed.as_ref().map_or(0, |(_, generation)| generation.0);
        self.metrics.generation.set(i64::try_from(generation).unwrap_or(i64::MAX));
        self.routed = routed;
    }
}

/// Waits for the end of the proxy's process; nothing if it cannot be watched, as from another container. It has answered, so
/// that this is no sign of its end, which the next look finds.
async fn end_of(pid: u32) -> Option<Event> {
    match exit_of(pid).await {
        Ok(_) => Some(Event::ProxyExited { pid }),
        Err(error) => {
            tracing::warn!(%error, pid, "the proxy's process cannot be watched: its end is seen at the next look");
            None
        }
    }
}

/// The first address of a host; IPv4 before IPv6, so that the answer does not change from time to time.
async fn resolve(host: &str) -> Option<IpAddr> {
    let looking = tokio::net::lookup_host((host, 0));
    match tokio::time::timeout(RESOLVE_DEADLINE, looking).await {
        Ok(Ok(found)) => found.map(|socket| socket.ip()).min(),
        Ok(Err(error)) => {
            tracing::warn!(%error, host, "a host name is not found");
            None
        }
        Err(_elapsed) => {
            tracing::warn!(host, "a host name is not found in time");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use bots_core::shell::process::Program;

    use super::{Event, end_of};

    /// Linux gives no process a number above this (`PID_MAX_LIMIT`).
    const NO_PROCESS: u32 = (1 << 22) + 1;

    #[tokio::test]
    async fn a_proxy_that_cannot_be_watched_has_not_ended() {
        assert_eq!(end_of(NO_PROCESS).await, None);
        let mut ends = Program::new("a process that ends", "sleep").args(["0.2"]).spawn().expect("it starts");
        let pid = ends.pid();
        assert_eq!(end_of(pid).await, Some(Event::ProxyExited { pid }));
        ends.ended().await.expect("its end");
    }
}
