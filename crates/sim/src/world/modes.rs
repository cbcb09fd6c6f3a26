//! An operator who changes whom commits wait for while the cluster runs: the mode, its strictness, how many standbys. Some
//! take their word back at once.

use bots_core::{
    machine::Span,
    wire::{
        Kind,
        config::{SyncMode, sync_mode, whole_number},
    },
};
use serde_json::{Value, json};

use super::{Item, World, faults::ChaosItem, node::Node};

/// What `synchronous_mode` may say.
const MODES: [&str; 3] = ["off", "on", "quorum"];
/// So many changes of the mode out of a thousand are taken back.
const TAKEN_BACK: u64 = 400;
/// One that is taken back has stood for at most so long: long enough for etcd to be asked for something because of it.
const STANDS_MS_MAX: u64 = 600;

/// The `synchronous_mode` in a value of the `config` key.
pub(crate) fn mode_in(config: &str) -> SyncMode {
    let config = serde_json::from_str::<Value>(config).unwrap_or_default();
    config.get("synchronous_mode").and_then(sync_mode).unwrap_or(SyncMode::Off)
}

/// The `synchronous_node_count` in a value of the `config` key.
pub(crate) fn node_count_in(config: &str) -> usize {
    let config = serde_json::from_str::<Value>(config).unwrap_or_default();
    let count = config.get("synchronous_node_count").and_then(whole_number).unwrap_or(1);
    usize::try_from(count).unwrap_or(usize::MAX).max(1)
}

impl World {
    pub(super) fn change_mode(&mut self) {
        let Some(config) = self.cluster_config() else { return };
        let (setting, value) = match self.rng.below(10) {
            0..=1 => ("synchronous_mode_strict", json!(config["synchronous_mode_strict"] != json!(true))),
            2..=3 => ("synchronous_node_count", json!(self.rng.between(1, 2))),
            _mode => {
                let now = config["synchronous_mode"].as_str().unwrap_or(MODES[0]).to_owned();
                let others: Vec<&str> = MODES.into_iter().filter(|mode| *mode != now).collect();
                let mode = self.rng.pick(&others).copied().unwrap_or(MODES[0]);
                if self.rng.chance(TAKEN_BACK) {
                    let stands = self.rng.between(1, STANDS_MS_MAX);
                    self.after(Span::from_millis(stands), Item::Chaos(ChaosItem::TakeBackMode(now)));
                }
                ("synchronous_mode", json!(mode))
            }
        };
        self.set_in_config(setting, value);
    }

    pub(super) fn take_back_mode(&mut self, mode: String) {
        self.set_in_config("synchronous_mode", json!(mode));
    }

    /// The cluster's settings, if it has any and etcd answers.
    fn cluster_config(&self) -> Option<Value> {
        let text = self.store.value(&Node::scope_of(Kind::Postgres).config()).filter(|_| self.store.answers())?;
        serde_json::from_str(text).ok()
    }

    /// Writes one of the cluster's settings.
    pub(super) fn set_in_config(&mut self, setting: &str, value: Value) {
        let Some(mut config) = self.cluster_config() else { return };
        config[setting] = value;
        self.write_by_hand(Node::scope_of(Kind::Postgres).config(), config.to_string());
    }
}
