//! Effects: etcd, clocks, HTTP, configuration, logs. Not a place for decisions: every `if` about policy is a machine's.

pub mod api;
pub mod boot;
pub mod clock;
pub mod config;
pub mod dcs;
pub mod entropy;
pub mod http;
pub mod metrics;
mod networks;
mod places;
pub mod process;
pub mod runtime;
pub mod status;
mod step_log;
pub mod telemetry;
pub mod testing;

pub use boot::{Assembled, Bot, Context, Strangers, run};
pub use clock::Clock;
pub use config::{Common, Secret, SiteRules};
pub use dcs::{DcsHandle, Etcd};
pub use entropy::{instance_id, jitter};
pub use http::probe_instance;
pub use metrics::Metrics;
pub use networks::{NetworkError, Networks};
pub use runtime::{Events, Exit, Pulse, Shell};
pub use status::{Health, Status, StatusHub};
pub use step_log::{ReplayError, Replayed, replay};
