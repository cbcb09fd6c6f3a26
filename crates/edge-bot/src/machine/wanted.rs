//! What etcd asks for: a reading of the view, no memory.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use bots_core::{
    dcs::{Revision, Scope, View},
    leadership,
    wire::{Kind, Member, PostgresFacts, WebFacts},
};
use serde::Serialize;

use super::{Backend, Settings, names::Names};

/// The share of a server that is no busier than others.
pub const WEIGHT_FULL: u32 = 100;

/// Weights are multiples of this, the least one included, and a weight stays until the share has gone a whole step away from
/// it: load that wobbles around a border does not make commands.
pub const WEIGHT_STEP: u32 = 25;

/// Postgres' port, if a URL has none.
const POSTGRES_PORT: u16 = 5432;
/// HTTP's port, if a URL has none.
const HTTP_PORT: u16 = 80;

/// The leader to whom connections for the primary go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Leader {
    pub(super) name: String,
    /// See [`leadership::generation`].
    pub(super) generation: Revision,
    /// It is about to hand over: new connections wait for the next one.
    pub(super) hands_over: bool,
}

/// What a server should have of the connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum Door {
    /// New ones.
    Open,
    /// No new ones; those that it has come to their end by themselves.
    Closing,
    /// None.
    Shut,
}

/// A server that should stand in a backend.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Target {
    pub(super) name: String,
    pub(super) serve: SocketAddr,
    pub(super) check: SocketAddr,
    /// Its share by load, of [`WEIGHT_FULL`].
    pub(super) share: u32,
    /// Primary: open for the leader alone. Elsewhere always.
    pub(super) door: Door,
}

/// Everything that etcd asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Wanted {
    /// The leader, once it says that it accepts writes.
    pub(super) leader: Option<Leader>,
    /// Why there is no leader to route to, one line.
    pub(super) held_because: Option<String>,
    pub(super) targets: BTreeMap<Backend, Vec<Target>>,
    /// Where web bots serve that take no new requests for now, and finish or hold those that they have.
    pub(super) finishing: BTreeSet<SocketAddr>,
}

#[derive(Clone)]
struct Url {
    host: String,
    port: u16,
}

struct Candidate {
    name: String,
    serve: Url,
    check: Url,
    share: u32,
    backend: Backend,
    door: Door,
}

impl Wanted {
    /// Reads the view. Members whose names have no address yet are left out.
    pub(super) fn read(settings: &Settings, view: &View, names: &Names) -> Self {
        let mut wanted = Self::default();
        if let Some(scope) = &settings.postgres {
            match leader(scope, view) {
                Ok(leader) => wanted.leader = Some(leader),
                Err(why) => wanted.held_because = Some(why),
            }
        }
        let address = |url: &Url| Some(SocketAddr::new(names.address(&url.host)?, url.port));
        wanted.finishing = finishing(settings, view).iter().filter_map(address).collect();
        for candidate in candidates(settings, view, wanted.leader.as_ref()) {
            let (Some(serve), Some(check)) = (address(&candidate.serve), address(&candidate.check)) else { continue };
            let Candidate { name, share, backend, door, .. } = candidate;
            let targets = wanted.targets.entry(backend).or_default();
            let target = Target { name, serve, check, share, door };
            match targets.iter_mut().find(|t| t.serve == serve) {
                None => targets.push(target),
                // Two members that claim one address: the leader has it, whatever key a dead one has left there, or else the
                // first by name.
                Some(other) if other.door == Door::Shut && target.door != Door::Shut => *other = target,
                Some(_first) => {}
            }
        }
        wanted
    }

    /// Whether connections are held for the leader of this generation.
    pub(super) fn closes(&self, generation: Revision) -> bool {
        self.leader.as_ref().is_some_and(|leader| leader.hands_over && leader.generation == generation)
    }

    /// Takes the leader for one that leads on.
    pub(super) fn release(&mut self) {
        if let Some(leader) = &mut self.leader {
            leader.hands_over = false;
        }
        let targets = self.targets.get_mut(&Backend::Primary).into_iter().flatten();
        targets.filter(|t| t.door == Door::Closing).for_each(|t| t.door = Door::Open);
    }

    /// What should stand in a backend.
    pub(super) fn of(&self, backend: Backend) -> &[Target] {
        self.targets.get(&backend).map_or(&[], Vec::as_slice)
    }
}

/// The hosts that members give.
pub(super) fn hosts(settings: &Settings, view: &View) -> BTreeSet<String> {
    let all = candidates(settings, view, None).into_iter();
    let finishing = finishing(settings, view).into_iter().map(|url| url.host);
    all.flat_map(|c| [c.serve.host, c.check.host]).chain(finishing).collect()
}

/// The leader that accepts writes, or why there is none.
fn leader(scope: &Scope, view: &View) -> Result<Leader, String> {
    let Some(key) = view.get(&scope.leader()) else { return Err(format!("{} has no leader", scope.name())) };
    let name = &key.value;
    let Some(member) = view.json::<Member>(&scope.member(name)) else {
        return Err(format!("{name} leads {} and is no member", scope.name()));
    };
    // Patroni before 4.0 calls it `master`.
    if matches!(member.head.role.as_str(), "primary" | "master") && member.head.state == "running" {
        let hands_over = member.facts::<PostgresFacts>().is_some_and(|facts| facts.handing_over);
        Ok(Leader { name: name.clone(), generation: leadership::generation(key), hands_over })
    } else {
        Err(format!("{name} leads {} and is {} {}", scope.name(), member.head.role, member.head.state))
    }
}

fn candidates(settings: &Settings, view: &View, leader: Option<&Leader>) -> Vec<Candidate> {
    let mut found = Vec::new();
    for (name, member) in members(settings.postgres.as_ref(), view, Kind::Postgres) {
        let Some(facts) = member.facts::<PostgresFacts>() else { continue };
        let urls = || Some((url(&facts.conn_url, POSTGRES_PORT)?, url(&member.head.api_url, HTTP_PORT)?));
        let Some((serve, check)) = urls() else { continue };
        let leads = leader.is_some_and(|l| l.name == name);
        let no_balance = facts.tags.get("noloadbalance").is_some_and(|v| *v == true);
        let reads = settings.replicas && !leads && member.head.role == "replica" && !no_balance;
        if reads && matches!(member.head.state.as_str(), "running" | "streaming" | "in archive recovery") {
            let (serve, check) = (serve.clone(), check.clone());
            let (share, backend) = (WEIGHT_FULL, Backend::Replicas);
            found.push(Candidate { name: name.to_owned(), serve, check, share, backend, door: Door::Open });
        }
        let (share, backend) = (WEIGHT_FULL, Backend::Primary);
        let door = match leader.filter(|_| leads) {
            Some(leader) if leader.hands_over => Door::Closing,
            Some(_) => Door::Open,
            None => Door::Shut,
        };
        found.push(Candidate { name: name.to_owned(), serve, check, share, backend, door });
    }
    found.extend(web(settings, view));
    found
}

/// The web bots that serve. While none does, the one that is nearest to it, if any: requests wait there, or wake it.
fn web(settings: &Settings, view: &View) -> Vec<Candidate> {
    let all = members(settings.web.as_ref(), view, Kind::Web);
    let all = all.filter_map(|(name, member)| Some((name, member.facts::<WebFacts>()?, member)));
    let (serving, others): (Vec<_>, Vec<_>) = all.partition(|(_, _, member)| member.head.state == "serving");
    let bots = if serving.is_empty() {
        let known = others.into_iter().filter_map(|bot| Some((distance(&bot.2)?, bot)));
        // The first by name of several: all requests go to one, so that one wakes.
        known.min_by_key(|(distance, _)| *distance).map(|(_, bot)| bot).into_iter().collect()
    } else {
        serving
    };
    let loads: Vec<u64> = bots.iter().filter_map(|(_, facts, _)| facts.load).map(|l| l.in_flight_milli).collect();
    let candidate = |(name, facts, member): &(&str, WebFacts, Member)| {
        let (serve, check) = (url(&facts.url, HTTP_PORT)?, url(&member.head.api_url, HTTP_PORT)?);
        let share = share(facts.load.map_or(0, |l| l.in_flight_milli), &loads);
        let name = (*name).to_owned();
        Some(Candidate { name, serve, check, share, backend: Backend::Web, door: Door::Open })
    };
    bots.iter().filter_map(candidate).collect()
}

/// Where those web bots are that say themselves that they leave, or that their app is about to be back: their check is bad,
/// and what they have been sent is answered all the same.
fn finishing(settings: &Settings, view: &View) -> Vec<Url> {
    let all = members(settings.web.as_ref(), view, Kind::Web);
    let busy = all.filter(|(_, member)| matches!(member.head.state.as_str(), "waking" | "draining" | "stopping"));
    busy.filter_map(|(_, member)| url(&member.facts::<WebFacts>()?.url, HTTP_PORT)).collect()
}

/// How far a bot that does not serve is from answering a request: one that wakes holds it until it does; one that drains
/// answers for a moment yet; one that is idle holds it if the whole site sleeps, and refuses it otherwise. One that could not
/// serve says another word (`resting`): it would refuse, and a site would sleep on while others could wake.
fn distance(member: &Member) -> Option<u8> {
    match member.head.state.as_str() {
        "waking" => Some(0),
        "draining" => Some(1),
        "idle" => Some(2),
        _ => None,
    }
}

fn members<'v>(scope: Option<&Scope>, view: &'v View, kind: Kind) -> impl Iterator<Item = (&'v str, Member)> {
    let entries = scope.map(|scope| view.entries_below(&scope.members_prefix())).unwrap_or_default();
    let read = entries.into_iter().filter_map(|(name, kv)| Some((name, Member::from_json(&kv.value)?)));
    read.filter(move |(_, member)| member.head.kind == kind)
}

/// The share of a bot with `load` requests in flight among all `loads`, in thousandths: the mean gets the full share, one
/// with twice the mean half of it. A request more or less than one at a time says nothing.
fn share(load: u64, loads: &[u64]) -> u32 {
    const ONE_REQUEST_MILLI: u64 = 1_000;
    let count = u64::try_from(loads.len()).unwrap_or(u64::MAX).max(1);
    let mean = loads.iter().fold(0, |sum: u64, l| sum.saturating_add(*l)) / count;
    let (mean, load) = (mean.max(ONE_REQUEST_MILLI), load.max(ONE_REQUEST_MILLI));
    let share = u64::from(WEIGHT_FULL).saturating_mul(mean) / load;
    u32::try_from(share).unwrap_or(u32::MAX).clamp(WEIGHT_STEP, WEIGHT_FULL)
}

impl Target {
    /// The weight for a place that comes to this server: the nearest to its share.
    pub(super) const fn weight(&self) -> u32 {
        (self.share + WEIGHT_STEP / 2) / WEIGHT_STEP * WEIGHT_STEP
    }

    /// The weight for a place that is this server's already, and has `shown`.
    pub(super) const fn weight_after(&self, shown: u32) -> u32 {
        let near = shown.abs_diff(self.share) < WEIGHT_STEP;
        let ours = shown >= WEIGHT_STEP && shown <= WEIGHT_FULL && shown.is_multiple_of(WEIGHT_STEP);
        if near && ours && self.share < WEIGHT_FULL { shown } else { self.weight() }
    }
}

/// Host and port of `scheme://user@host:port/path`; the first of several hosts.
fn url(text: &str, default_port: u16) -> Option<Url> {
    let (_scheme, rest) = text.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next()?;
    let hosts = authority.rsplit_once('@').map_or(authority, |(_user, hosts)| hosts);
    let first = hosts.split(',').next()?;
    let (host, port) = match first.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']')?;
            (host, rest.strip_prefix(':'))
        }
        None => first.rsplit_once(':').map_or((first, None), |(host, port)| (host, Some(port))),
    };
    let port = port.map_or(Some(default_port), |port| port.parse().ok())?;
    (!host.is_empty() && port > 0).then(|| Url { host: host.to_owned(), port })
}

#[cfg(test)]
mod tests {
    use super::{Door, Target, share, url};

    #[test]
    fn urls_of_members_are_read() {
        let read = |text: &str| url(text, 5432).map(|u| format!("{} {}", u.host, u.port));
        let check = |text: &str, wanted: Option<&str>| assert_eq!(read(text).as_deref(), wanted, "{text}");
        check("postgres://10.0.0.1:5433/postgres", Some("10.0.0.1 5433"));
        check("postgres://pg-1/postgres", Some("pg-1 5432"));
        check("postgresql://u:p%40@[::1]:6000/x?y=z", Some("::1 6000"));
        check("http://pg-1.example:8008/patroni", Some("pg-1.example 8008"));
        check("postgres://a:1,b:2/x", Some("a 1"));
        check("10.0.0.1:5432", None);
        check("postgres://:5432/x", None);
        check("postgres://a:port/x", None);
        check("", None);
    }

    #[test]
    fn who_is_busier_than_the_others_gets_less() {
        assert_eq!(share(0, &[0, 0]), 100, "idle bots share alike");
        assert_eq!(share(900, &[100, 900]), 100, "less than a request at a time says nothing");
        assert_eq!(share(8_000, &[8_000, 8_000, 8_000]), 100);
        assert_eq!(share(12_000, &[12_000, 4_000]), 66);
        assert_eq!(share(4_000, &[12_000, 4_000]), 100);
        assert_eq!(share(1_000_000, &[1_000_000, 0, 0, 0, 0, 0, 0, 0]), 25, "nobody is starved");
    }

    #[test]
    fn a_share_that_wobbles_around_a_border_moves_no_weight() {
        let address = "10.0.0.1:80".parse().expect("an address");
        let of =
            |share| Target { name: String::from("web-1"), serve: address, check: address, share, door: Door::Open };
        assert_eq!([of(100), of(80), of(66), of(55), of(26)].map(|t| t.weight()), [100, 75, 75, 50, 25]);
        let mut shown = 100;
        let mut seen = Vec::new();
        for share in [76, 74, 76, 74, 51, 49, 74, 75, 99, 100] {
            shown = of(share).weight_after(shown);
            seen.push(shown);
        }
        // Down when a whole step away, and back to the full share when there is no difference any more.
        assert_eq!(seen, [100, 75, 75, 75, 75, 50, 50, 75, 75, 100]);
        assert_eq!(of(80).weight_after(0), 75, "what somebody else has set is not kept");
    }
}
