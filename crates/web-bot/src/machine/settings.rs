//! What the machine is told at its start, and what an operator may override in the store while it runs. Not the
//! configuration file: the shell reads that one and hands over the part that matters here.

use std::collections::BTreeMap;

pub use bots_core::wire::SLOTS_MAX;
use bots_core::{
    dcs::{Scope, View},
    machine::Span,
};
use serde::{Deserialize, Serialize};

/// How a bot answers requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The files of the revision, out of memory.
    Static,
    /// The user's own web process, behind a proxy.
    App,
}

/// How the number of serving bots follows the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScalingSettings {
    /// At least this many bots serve. With 0 the site sleeps while nobody asks for it, and the first request wakes it.
    pub min: u32,
    /// At most this many bots serve.
    pub max: u32,
    /// How many requests in flight one bot shall carry.
    pub target_in_flight: u32,
    /// How long load must have been lower before a bot is sent to rest.
    pub stable_window_s: u32,
}

impl Default for ScalingSettings {
    fn default() -> Self {
        Self { min: 1, max: 4, target_in_flight: 8, stable_window_s: 30 }
    }
}

impl ScalingSettings {
    /// What is wrong with the figures, naming the field and the way out.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        if self.max < self.min.max(1) || self.max > SLOTS_MAX {
            return Some(format!("scaling.max is {}: use {} to {SLOTS_MAX}", self.max, self.min.max(1)));
        }
        if self.target_in_flight == 0 {
            return Some(String::from("scaling.target_in_flight is 0: use at least 1"));
        }
        None
    }

    /// The stable window as a length of time.
    #[must_use]
    pub fn stable_window(&self) -> Span {
        Span::from_secs(u64::from(self.stable_window_s))
    }

    /// How many bots `in_flight_milli` thousandths of a request in flight call for, before minimum and maximum.
    #[must_use]
    pub fn bots_for(&self, in_flight_milli: u64) -> u32 {
        let each = u64::from(self.target_in_flight.max(1)) * 1_000;
        u32::try_from(in_flight_milli.div_ceil(each)).unwrap_or(u32::MAX)
    }

    /// How many bots shall serve under that load.
    #[must_use]
    pub fn desired(&self, in_flight_milli: u64) -> u32 {
        self.bots_for(in_flight_milli).clamp(self.min, self.max.max(self.min))
    }
}

/// All that the machine must know beyond what it sees in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Settings {
    /// The web fleet.
    pub scope: Scope,
    /// The content that it serves.
    pub content: Scope,
    /// The Postgres cluster that the app uses.
    pub database: Option<Scope>,
    /// The bot's name.
    pub name: String,
    /// The bot's version.
    pub version: String,
    /// Where its API answers.
    pub api_url: String,
    /// Where clients reach it.
    pub url: String,
    /// How it answers requests.
    pub mode: Mode,
    /// The length of its lease.
    pub ttl: Span,
    /// What may be another one while the bot runs.
    pub live: Live,
}

/// The part of the settings that a bot that runs can take over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Live {
    /// How the app is run (command, environment, health check, account in the database), as a number: another number, another way.
    pub configuration: u64,
    /// How long the app may take to become healthy.
    pub app_start_timeout: Span,
    /// How long requests in flight may take to end.
    pub drain_timeout: Span,
    /// The CDN's base URL, for the app.
    pub cdn_url: Option<String>,
    /// Scaling, unless the store says otherwise.
    pub scaling: ScalingSettings,
    /// What the fleet may have of the database's connections; with it, more bots than that is enough for never serve.
    pub connections: Option<ConnectionBudget>,
}

/// A fleet's part of the connections that a database gives away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ConnectionBudget {
    /// How many one instance of the app holds at most.
    pub per_instance: u32,
    /// The fleet's part of all of them, for there may be other fleets.
    pub share_percent: u32,
}

/// What holds at the moment: the settings with the operator's overrides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Effective {
    pub(super) scaling: ScalingSettings,
    pub(super) cdn_url: Option<String>,
    /// An operator wants this bot to rest.
    pub(super) drained: bool,
    /// Another number than before: an operator wants new instances of the app.
    pub(super) restart: u64,
    /// What is wrong with the overrides; what they were before stands then.
    pub(super) trouble: Option<String>,
}

/// What operators have asked for in the scope's `config` key, as far as it made sense: what does not takes nothing away of what was
/// asked for before, for the fleet must not shrink by a slip of the finger.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct Overrides {
    scaling: Option<ScalingSettings>,
    others: OtherOverrides,
    trouble: Option<String>,
}

/// The part of the key that web bots read; other fields are others'.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Written {
    scaling: serde_json::Value,
    #[serde(flatten)]
    others: OtherOverrides,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct OtherOverrides {
    cdn_url: Option<String>,
    /// The bots that an operator wants to rest, by name.
    drain: BTreeMap<String, bool>,
    restart: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ScalingOverrides {
    min: Option<u32>,
    max: Option<u32>,
    target_in_flight: Option<u32>,
    stable_window_s: Option<u32>,
}

impl Effective {
    /// The same, with no more bots than the database has connections for. Somebody has to serve in any case.
    pub(super) fn within(mut self, bots_max: Option<u32>) -> Self {
        let Some(bots_max) = bots_max.map(|bots| bots.max(1)) else { return self };
        if bots_max < self.scaling.max {
            let asked = self.scaling.max;
            self.scaling.max = bots_max;
            self.scaling.min = self.scaling.min.min(bots_max);
            self.trouble.get_or_insert_with(|| {
                format!(
                    "scaling.max is {asked}, and the database has connections for {bots_max} bots while each is replaced: \
                     raise max_connections or database.share_percent"
                )
            });
        }
        self
    }

    pub(super) fn of(settings: &Settings, overrides: &Overrides) -> Self {
        let Overrides { scaling, others, trouble } = overrides;
        Self {
            scaling: scaling.unwrap_or(settings.live.scaling),
            cdn_url: others.cdn_url.clone().or_else(|| settings.live.cdn_url.clone()),
            drained: others.drain.get(&settings.name) == Some(&true),
            restart: others.restart,
            trouble: trouble.clone(),
        }
    }
}

impl Overrides {
    /// Reads the key.
    pub(super) fn observe(&mut self, settings: &Settings, view: &View) {
        let key = settings.scope.config();
        let Some(value) = view.value(&key) else {
            *self = Self::default();
            return;
        };
        self.trouble = None;
        let Written { scaling, others } = match serde_json::from_str(value) {
            Ok(written) => written,
            Err(error) => {
                self.trouble = Some(format!("{key} cannot be read, and all stays as it was: {error}"));
                return;
            }
        };
        self.others = others;
        match scaling_of(settings.live.scaling, scaling) {
            Ok(scaling) => self.scaling = Some(scaling),
            Err(fault) => self.trouble = Some(format!("{key}: scaling stays as it was: {fault}")),
        }
    }
}

/// The figures of the file with those that are written in the store, or what is wrong with them.
fn scaling_of(own: ScalingSettings, written: serde_json::Value) -> Result<ScalingSettings, String> {
    let asked: Option<ScalingOverrides> = serde_json::from_value(written).map_err(|error| error.to_string())?;
    let asked = asked.unwrap_or_default();
    let scaling = ScalingSettings {
        min: asked.min.unwrap_or(own.min),
        max: asked.max.unwrap_or(own.max),
        target_in_flight: asked.target_in_flight.unwrap_or(own.target_in_flight),
        stable_window_s: asked.stable_window_s.unwrap_or(own.stable_window_s),
    };
    scaling.fault().map_or(Ok(scaling), Err)
}
