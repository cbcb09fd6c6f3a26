//! What must hold in every reachable state, checked after every step in tests and simulation.

use super::{Role, Route, State};

impl State {
    /// The sentence that names the broken invariant, if one is.
    pub(super) fn check(&self) -> Result<(), String> {
        let has_place = self.slots.serving_for().is_some() || self.slots.asking_for().is_some();
        match self.role {
            Role::Waking | Role::Serving if !has_place => {
                return Err(format!("{} without a place in the serving set", self.role));
            }
            Role::Initializing | Role::Preparing | Role::Idle | Role::Failed if self.route.sha().is_some() => {
                return Err(format!("{} and yet requests go to {:?}", self.role, self.route));
            }
            Role::Initializing | Role::Preparing | Role::Idle if self.app.is_kept() => {
                return Err(format!("{} and yet the app runs", self.role));
            }
            Role::Serving if self.route.sha().is_none() => {
                return Err(format!("serving and yet requests go to {:?}", self.route));
            }
            Role::Initializing
            | Role::Preparing
            | Role::Idle
            | Role::Waking
            | Role::Serving
            | Role::Draining
            | Role::Stopping
            | Role::Failed => {}
        }
        if !self.app.is_bounded() {
            return Err(String::from("two instances of the app beside the one that serves"));
        }
        if self.drain.is_some() != matches!(self.role, Role::Draining | Role::Stopping) {
            return Err(format!("{} and the drain is {:?}", self.role, self.drain));
        }
        if let Route::Static { sha, .. } = &self.route
            && !self.content.is_prepared(sha)
        {
            return Err(format!("requests go to {sha}, which is not prepared"));
        }
        self.scaling.invariants()
    }
}
