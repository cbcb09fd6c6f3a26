//! What an edge bot counts.

use bots_core::shell::Metrics;
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};

/// The counters; clones share.
#[derive(Debug, Clone, Default)]
pub struct EdgeMetrics {
    /// Commands that were sent to the proxy.
    pub commands: Counter,
    /// Conversations with the proxy that brought no answer.
    pub unanswered: Counter,
    /// Starts of the proxy.
    pub starts: Counter,
    /// The generation of the leader that is routed to; 0 while connections are held.
    pub generation: Gauge,
}

impl EdgeMetrics {
    /// Counters that stand in the bot's registry.
    #[must_use]
    pub fn registered(metrics: &Metrics) -> Self {
        let own = Self::default();
        metrics.with(|r| {
            r.register("edge_proxy_commands", "Commands that were sent to the proxy", own.commands.clone());
            r.register(
                "edge_proxy_unanswered",
                "Conversations with the proxy that brought no answer",
                own.unanswered.clone(),
            );
            r.register("edge_proxy_starts", "Starts of the proxy", own.starts.clone());
            r.register(
                "edge_leader_generation",
                "The generation of the leader that is routed to; 0 while connections are held",
                own.generation.clone(),
            );
        });
        own
    }
}
