//! The watchdog section of the configuration, Patroni's, and the eye on the device while nobody has opened it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bots_core::shell::Events;
use rustix::fs::{Access, access};
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::watch;

use crate::machine::{self, Event, State, WatchdogMode};

/// The device unless told otherwise.
const DEVICE: &str = "/dev/watchdog";

/// The longest path that fits on a line to the guard.
const PATH_LEN_MAX: usize = 128;

/// How often a device is looked at: an operator loads a driver or gives rights to it once in a machine's life.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// What resets the machine if it stands still.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Watchdog {
    /// `off`, `automatic` or `required`. YAML reads a bare `off` as no.
    pub mode: Value,
    /// The device.
    pub device: PathBuf,
    /// So many seconds less than a lease the device waits; -1 is half of it.
    pub safety_margin: Option<i64>,
}

impl Default for Watchdog {
    fn default() -> Self {
        Self { mode: Value::Bool(false), device: DEVICE.into(), safety_margin: None }
    }
}

impl Watchdog {
    fn mode(&self) -> Result<WatchdogMode, String> {
        match &self.mode {
            Value::Bool(false) => Ok(WatchdogMode::Off),
            Value::String(mode) if mode == "off" => Ok(WatchdogMode::Off),
            Value::String(mode) if mode == "automatic" => Ok(WatchdogMode::Automatic),
            Value::String(mode) if mode == "required" => Ok(WatchdogMode::Required),
            other => {
                let other = other.as_str().map_or_else(|| other.to_string(), str::to_owned);
                Err(format!("watchdog.mode: `{other}` is none of off, automatic, required"))
            }
        }
    }

    /// # Errors
    /// One line that names the field and the fix.
    pub(super) fn check(&self) -> Result<(), String> {
        self.mode()?;
        let text = self.device.to_str().filter(|path| path.len() <= PATH_LEN_MAX && !path.contains(char::is_control));
        if !self.device.is_absolute() || text.is_none() {
            return Err(format!(
                "watchdog.device: `{}` is not the path of a device, such as {DEVICE}",
                self.device.display()
            ));
        }
        match self.safety_margin {
            Some(margin) if margin < -1 => {
                Err(format!("watchdog.safety_margin: {margin} is neither a number of seconds nor -1, half of the ttl"))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// For the machine.
    pub(super) fn settings(&self) -> machine::Watchdog {
        machine::Watchdog { mode: self.mode().unwrap_or_default(), safety_margin: self.safety_margin }
    }
}

/// Says once that this machine has a device, and that nobody uses it: unlike Patroni, the bot does not do so unasked.
pub(super) fn tell_of_unused(device: &Path) {
    if device.exists() {
        tracing::warn!(
            device = %device.display(),
            "this machine has a watchdog device, and watchdog.mode is off: a machine that stands still as a whole is not reset; \
             set it to automatic, or to required"
        );
    }
}

/// Says once, as soon as the cluster's `ttl` is known, that the margin does not do what whoever wrote it may expect of it.
pub(super) async fn tell_of_margin(mut states: watch::Receiver<Arc<State>>) {
    let Ok(state) = states.wait_for(|state| state.dynamic().is_known()).await.map(|state| Arc::clone(&state)) else {
        return;
    };
    if let Some(why) = state.margin_without_effect() {
        tracing::warn!("{why}");
    }
}

/// Looks for as long as the process lives, and tells what has changed.
pub(super) async fn look(device: PathBuf, events: Events<Event>) {
    let mut told = None;
    loop {
        let seen = may_open(&device);
        if told.as_ref() != Some(&seen) {
            events.send(Event::WatchdogSeen(seen.clone())).await;
            told = Some(seen);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Without opening it: that would arm it.
fn may_open(device: &Path) -> Result<(), String> {
    access(device, Access::WRITE_OK).map_err(|error| {
        format!(
            "{} cannot be written to: {error}: load its driver, and give the bot's user the right",
            device.display()
        )
    })
}
