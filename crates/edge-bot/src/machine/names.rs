//! Host names: members may give names where the proxy takes addresses. What is known stays known until it is looked up anew.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use bots_core::machine::{Deadline, Span, Time};
use serde::Serialize;

use super::Action;

/// How long an address is taken for good. A machine that comes back with a new one is found within this.
pub const RESOLVE_AGAIN: Span = Span::from_secs(30);

/// How soon a name that was not found is looked up again.
pub const RESOLVE_RETRY: Span = Span::from_secs(2);

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Entry {
    address: Option<IpAddr>,
    asking: bool,
    ask_at: Time,
}

/// The names that are in use.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Names {
    entries: BTreeMap<String, Entry>,
}

impl Names {
    /// The address of a host.
    pub(super) fn address(&self, host: &str) -> Option<IpAddr> {
        host.parse().ok().or_else(|| self.entries.get(host)?.address)
    }

    /// Asks for the names that are in use and not known, or not known for sure any more; forgets the others.
    pub(super) fn want(&mut self, now: Time, hosts: &BTreeSet<String>, out: &mut Vec<Action>) {
        self.entries.retain(|host, _| hosts.contains(host));
        for host in hosts.iter().filter(|host| host.parse::<IpAddr>().is_err()) {
            let entry =
                self.entries.entry(host.clone()).or_insert(Entry { address: None, asking: false, ask_at: Time::ZERO });
            if !entry.asking && now >= entry.ask_at {
                entry.asking = true;
                out.push(Action::ResolveHost { host: host.clone() });
            }
        }
    }

    /// Takes in an answer. A name that is not found any more keeps the address that it had.
    pub(super) fn resolved(&mut self, now: Time, host: &str, address: Option<IpAddr>) {
        let Some(entry) = self.entries.get_mut(host) else { return };
        entry.asking = false;
        entry.ask_at = now + if address.is_some() { RESOLVE_AGAIN } else { RESOLVE_RETRY };
        entry.address = address.or(entry.address);
    }

    /// Names without an address.
    pub(super) fn unknown(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().filter(|(_, e)| e.address.is_none()).map(|(host, _)| host.as_str())
    }

    pub(super) fn deadline(&self) -> Option<Deadline> {
        let next = self.entries.values().filter(|e| !e.asking).map(|e| e.ask_at).min()?;
        Some(Deadline { at: next, reason: String::from("look up a host name again") })
    }
}
