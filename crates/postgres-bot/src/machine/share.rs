//! Rules 2 and 3: the member key's value, and the report.

use bots_core::{
    machine::{Report, Time},
    membership::MembershipAction,
    wire::{Kind, Member, MemberHead, PostgresFacts},
};

use super::{
    phase::{Bootstrap, DemoteWhy, Phase, Suspect},
    postgres::{Postgres, Server},
    state::State,
    turn::Turn,
};

/// Shares the state: at once if it is another, within a second if only its figures are.
pub(super) fn publish(s: &mut State, now: Time, out: &mut Vec<MembershipAction>) {
    if matches!(s.phase, Phase::Initializing) && s.data.is_none() {
        // What the earlier life of this bot has said of its server may well be true still.
        return;
    }
    let (head, mut facts) = (head(s), facts(s));
    let mut shown = head.clone();
    if let Some(copy) = facts.copying.filter(|_| shown.state == CREATING) {
        // For `patronictl list`, which knows no better place for it.
        shown.state = format!("{CREATING} ({} %)", copy.percent);
    }
    let full = Member::new(shown, &facts).to_json();
    facts.copying = None;
    facts.xlog_location = None;
    facts.receive_lsn = None;
    facts.replay_lsn = None;
    let bare = Member::new(head, &facts).to_json();
    if s.shared_head.as_ref() == Some(&bare) {
        s.membership.publish_soft(now, full, out);
    } else {
        s.shared_head = Some(bare);
        s.membership.publish(now, full, out);
    }
}

/// Patroni's word for a member whose data is being copied.
const CREATING: &str = "creating replica";

fn head(s: &State) -> MemberHead {
    let (state, role) = words(s);
    MemberHead {
        kind: Kind::Postgres,
        state: state.to_owned(),
        role: role.to_owned(),
        version: s.settings.version.clone(),
        api_url: s.settings.api_url.clone(),
        instance: s.settings.instance.clone(),
        node: s.role().to_string(),
        since_unix_ms: s.settings.epoch_unix_ms + s.since.as_millis(),
    }
}

/// Patroni's words for the state of the server and the role of the member.
fn words(s: &State) -> (&'static str, &'static str) {
    match &s.phase {
        // Nobody is to notice that its bot was started again.
        Phase::Initializing | Phase::Recovering { .. } if s.is_kept(true) => ("running", "primary"),
        Phase::Initializing | Phase::Starting { .. } if s.is_kept(false) => ("running", "replica"),
        Phase::Waiting if s.is_reinitializing() => (CREATING, "replica"),
        Phase::Initializing | Phase::Waiting => ("stopped", "uninitialized"),
        Phase::Bootstrapping(_) => ("initializing new cluster", "uninitialized"),
        Phase::Cloning { .. } => (CREATING, "replica"),
        Phase::Starting { .. } if s.pause.left_down => ("stopped", "replica"),
        Phase::Starting { .. } => ("starting", "replica"),
        Phase::Replica { .. } | Phase::Candidate(_) => match s.postgres {
            Postgres::Up(_) => ("running", "replica"),
            Postgres::Down => ("stopped", "replica"),
            Postgres::Starting | Postgres::Silent => ("starting", "replica"),
        },
        Phase::Promoting { .. } => ("running", "promoted"),
        Phase::Primary(_) => match s.postgres {
            Postgres::Up(_) | Postgres::Silent => ("running", "primary"),
            Postgres::Starting => ("starting", "primary"),
            Postgres::Down => ("crashed", "primary"),
        },
        Phase::Restarting { primary: true, .. } => ("restarting", "primary"),
        Phase::Restarting { primary: false, .. } => ("restarting", "replica"),
        Phase::Recovering { .. } if s.is_restarting() => ("restarting", "primary"),
        Phase::Recovering { .. } => ("crashed", "primary"),
        Phase::Demoting { .. } if s.is_about_to_hand_over() => ("running", "primary"),
        Phase::Demoting { .. } => ("stopping", "demoted"),
        Phase::Rejoining { .. } if s.is_reinitializing() => (CREATING, "replica"),
        Phase::Rejoining { .. } => ("stopped", "replica"),
        Phase::Stopping { .. } => ("stopping", "replica"),
    }
}

/// The kind's own part of the member key.
pub(super) fn facts(s: &State) -> PostgresFacts {
    let server = s.server();
    let standby = server.filter(|server| server.in_recovery);
    PostgresFacts {
        conn_url: s.settings.conn_url.clone(),
        timeline: server.map(|server| server.timeline),
        xlog_location: server.map(|server| server.position),
        receive_lsn: standby.map(|server| server.received),
        replay_lsn: standby.map(|server| server.replayed),
        replication_state: standby.and_then(Server::replication_state).map(str::to_owned),
        pending_restart: server.is_some_and(|server| !server.pending_restart.is_empty()),
        pending_restart_reason: server.map(|server| server.pending_restart.clone()).unwrap_or_default(),
        scheduled_restart: s.scheduled_restart().cloned(),
        pause: s.dynamic.pause,
        copying: s.operator.copying,
        connections: server.filter(|server| !server.in_recovery).and_then(|server| server.connections),
        checkpoint_after_promote: match &s.phase {
            Phase::Primary(primary) if primary.checkpoint_due => Some(false),
            _any_other => None,
        },
        handing_over: s.is_handing_over(),
        tags: s.tags(),
    }
}

/// What am I, what do I wait for, since when, and why not something else?
pub(super) fn report(s: &State, now: Time) -> Report {
    let turn = Turn::new(s.clone(), now);
    let (doing, waiting_for) = story(s, now);
    let mut report = Report::new(s.role(), s.since, now).doing(doing).waiting_for(waiting_for).next(s.deadline(), now);
    match &s.phase {
        Phase::Replica { .. } | Phase::Candidate(_) => {
            let behind = match &s.phase {
                Phase::Candidate(candidate) => candidate.behind.clone(),
                _replica => None,
            };
            if let Some(because) = turn.bar_to_standing().or(behind) {
                report = report.why_not("promote", because);
            }
        }
        Phase::Rejoining { .. } if s.is_reinitializing() => {
            report = report.why_not("start", "an operator wants its data made anew");
        }
        Phase::Rejoining { suspect: Suspect::Maybe, failures: 0 } => {
            report = report.why_not("start", "its data may have left the leader's path");
        }
        Phase::Rejoining { suspect: Suspect::Maybe | Suspect::Hopeless, .. } => {
            report = report.why_not("start", "its data may be half rewound");
        }
        Phase::Waiting if s.settings.tags.nofailover() => {
            report = report.why_not("bootstrap", "its tag nofailover is set");
        }
        Phase::Waiting if s.bar_by_watchdog(now).is_some() => {
            report = report.why_not("bootstrap", s.bar_by_watchdog(now).unwrap_or_default());
        }
        Phase::Waiting if s.view.value(&s.settings.scope.initialize()).is_none() && s.knows_of_data() => {
            report = report.why_not("bootstrap", "a member has data of a cluster whose initialize key is gone");
        }
        Phase::Waiting if s.view.value(&s.settings.scope.initialize()).is_some() => {
            report = report.why_not("bootstrap", "the cluster exists, or another member is making it");
        }
        _any_other => {}
    }
    let troubles = [s.trouble.clone(), s.membership.trouble()].into_iter().flatten();
    let unwatched = (!s.view.is_watched()).then(|| String::from("etcd is not being watched: what is known may be old"));
    let silent = (s.postgres == Postgres::Silent).then(|| String::from("Postgres is alive and does not answer"));
    for trouble in troubles
        .chain(unwatched)
        .chain(silent)
        .chain(s.disk_trouble())
        .chain(s.watchdog_trouble())
        .chain(s.guard_trouble())
        .chain(s.slots_trouble(now))
        .chain(s.copies_trouble())
        .chain(
            s.refused
                .iter()
                .map(|(name, why)| format!("postgresql.parameters.{name} is left out: Postgres says: {why}")),
        )
        .chain(s.dynamic.complaints.clone())
    {
        report = report.trouble(trouble);
    }
    report
}

fn story(s: &State, now: Time) -> (String, String) {
    let leader = s.leader().unwrap_or("nobody");
    let asked = s.asks_for_release().then(|| format!("{leader} to wait for this standby no more"));
    let job = s.job.as_ref().map_or_else(|| String::from("etcd and the server"), |r| format!("the job: {}", r.job));
    let job = asked.unwrap_or(job);
    match &s.phase {
        Phase::Initializing => {
            let missing = if s.data.is_none() {
                "a look at the data directory"
            } else if !s.view.is_complete() {
                "a first look at etcd"
            } else {
                "a lease and the member key"
            };
            (String::from("starting up; nothing has been touched yet"), missing.to_owned())
        }
        Phase::Waiting => (
            String::from("there is no data to run on yet"),
            String::from("a leader to copy, or the chance to make the cluster"),
        ),
        Phase::Bootstrapping(Bootstrap::Racing(_)) => {
            (String::from("nobody has made the cluster yet: asking to be the one"), String::from("the answer of etcd"))
        }
        Phase::Bootstrapping(_) => (String::from("making a new cluster, as the only member that may"), job),
        Phase::Cloning { source } => {
            let how_far = s.operator.copying.map(|copy| format!(", {} % of {} bytes", copy.percent, copy.bytes_total));
            (format!("copying {source}{}", how_far.unwrap_or_default()), job)
        }
        Phase::Starting { .. } if s.pause.left_down => (
            String::from("stopped: Postgres ended in a pause of the cluster, and is left so"),
            String::from("an operator to restart it, or the end of the pause"),
        ),
        Phase::Starting { attempts } => (format!("starting Postgres read-only ({attempts} failed tries)"), job),
        Phase::Replica { .. } => {
            let streaming = s.server().is_some_and(|server| server.streaming);
            let how = if streaming { "streaming from" } else { "not streaming; the leader is" };
            (format!("read-only, {how} {leader}"), String::from("the leader key to change"))
        }
        Phase::Candidate(_) => {
            (String::from("the leader is gone: standing for leader"), String::from("the answers of peers and of etcd"))
        }
        Phase::Promoting { from, timeline, .. } => {
            (format!("holding the lock, leaving recovery at {from} for timeline {timeline}"), job)
        }
        Phase::Primary(_) if s.leads_by_word(now) => (
            format!("accepting writes without etcd, which [{}] vouch for", s.vouchers().join(", ")),
            String::from("etcd, and the members' word until then"),
        ),
        Phase::Primary(primary) => {
            let asked = s.view.get(&s.settings.scope.failover()).map(|kv| kv.modified);
            let refusing = primary.writing.is_some() || primary.answered == asked;
            let unready = !refusing && primary.unready.is_some_and(|(request, _)| asked == Some(request));
            let events = if unready { "a replica that is ready for the switchover" } else { "events" };
            (String::from("holding the lock, accepting writes"), events.to_owned())
        }
        Phase::Recovering { .. } if s.is_kept(true) => {
            (String::from("holding the lock, taking Postgres over as it runs"), job)
        }
        Phase::Restarting { .. } if s.is_restarted_for_guard() => {
            (String::from("restarting Postgres under a new guard"), job)
        }
        Phase::Restarting { .. } => (String::from("restarting Postgres, as an operator asked"), job),
        Phase::Recovering { .. } => (String::from("holding the lock, restarting Postgres in place"), job),
        Phase::Demoting { why, .. } => {
            let why = match why {
                DemoteWhy::Fenced(why) | DemoteWhy::Unfit(why) => why.clone(),
                DemoteWhy::Switchover { to: Some(to) } => format!("switchover to {to}"),
                DemoteWhy::Switchover { to: None } => String::from("switchover"),
            };
            match s.hand_over_waits_for() {
                Some(waited_for) if s.is_closed() => (format!("stopped but for its archiver: {why}"), waited_for),
                Some(waited_for) => (format!("about to stop Postgres: {why}"), waited_for),
                None => (format!("stopping Postgres: {why}"), job),
            }
        }
        Phase::Rejoining { .. } if s.shows_our_lock() => {
            (String::from("stopped; the lock is still ours"), String::from("the lease to be renewed, or to be lost"))
        }
        Phase::Rejoining { suspect, .. } => {
            let how = match suspect {
                _any if s.is_reinitializing() => "to delete its data and copy the leader, as an operator asked",
                Suspect::No => "to start following",
                Suspect::Maybe => "to rewind",
                Suspect::Hopeless => "to put its data aside and copy the leader",
            };
            (
                format!("stopped; {leader} leads; about {how}"),
                if s.job.is_some() || s.asks_for_release() {
                    job
                } else {
                    String::from("a leader that accepts writes")
                },
            )
        }
        Phase::Stopping { .. } if s.is_closed() => {
            (String::from("going away"), String::from("the archiver of Postgres to end"))
        }
        Phase::Stopping { .. } => (String::from("going away"), job),
    }
}
