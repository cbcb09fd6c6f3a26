//! Mistakes made on purpose, each a change of what the machines are told or of what they ask for, never of the machines:
//! they prove that the checks would catch the like. The list is the net's own test.

use bots_core::dcs::{
    Change, Compare, DcsAction, DcsEvent, KeyValue, Outcome, RequestId, Revision, Transaction, Write,
};
use bots_core::wire::{Lsn, PostgresStatus, SyncRecord};
use postgres_bot::machine::{self as postgres, Action, Job, Role, StopMode};

use content_bot::machine as content;
use web_bot::machine as web;

use crate::{
    web::SERVING_MAX,
    world::{BotEvent, NodeId, World},
};

/// A mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Plant {
    /// A lease is counted from the answer instead of from the sending.
    LeaseFromReply,
    /// The leader lock is taken without looking whether it is free.
    LockWithoutCompare,
    /// A refused lock counts as won: promotion without the key.
    PromoteWithoutLock,
    /// A candidate promotes because its view shows no leader, without asking etcd.
    ViewIsTruth,
    /// Stops that fence are not carried out.
    FenceIgnored,
    /// A switchover gives the lock away before the server is down.
    YieldBeforeStop,
    /// A lost answer counts as a good one.
    UnknownIsDone,
    /// Steps under a lock do not carry the lock.
    UnguardedWrites,
    /// A load message is claimed without looking whether it is free.
    ClaimWithoutCompare,
    /// The right to make the cluster is taken without looking whether there is one.
    InitializeWithoutCompare,
    /// A broken watch is not noticed.
    NeverListAgain,
    /// A diverged data directory is taken for a good one.
    RewindSkipped,
    /// Positions of peers and of the last leader are not looked at.
    AnyReplicaWill,
    /// The guard does not act at the fence.
    GuardSleeps,
    /// A bot that was started anew does not know when the guard of its server is to act, and leaves it to it.
    EarlierFenceUnknown,
    /// The fence is set later than the lease allows.
    FenceTooLate,
    /// The watchdog device of a machine does not act.
    DeviceSleeps,
    /// A bot that was just started does not wait until what it may have promised is over.
    PromiseForgotten,
    /// A candidate does not ask the members of the failsafe key, and goes on as if all supported it.
    CandidateDoesNotAsk,
    /// A member's API vouches for a primary, and its machine hears nothing of it.
    PromiseByShell,
    /// A member that does not answer a primary is taken to vouch for it.
    SilenceIsYes,
    /// Content counts as prepared when its fetch begins.
    ReadyBeforeWhole,
    /// A claim stays when the lease of its claimant runs out.
    ClaimOutlivesBot,
    /// Who takes the lock of a web scope begins the count anew.
    LeaderCountsAnew,
    /// A web leader does not see what its predecessors have spent of the hour's budget.
    ChangesForgotten,
    /// A web bot does not hear what others serve.
    OthersUnseen,
    /// Whatever the canary's pages are like, they count as good.
    CanaryAlwaysWell,
    /// A content bot takes a web bot's refusal for its readiness.
    RefusalIsReadiness,
    /// A content bot that lists the store does not hear which commits are quarantined, and none asks when it acts.
    QuarantineUnheard,
    /// A content bot goes by the pin that it has seen last, and none asks when it acts.
    PinUncompared,
    /// Postgres is said to wait for whom it shall wait for before it does.
    NamesInForceAtOnce,
    /// A new synchronous standby counts before it has what was acknowledged earlier.
    CountedBeforeCaughtUp,
    /// The position of a voter counts though it may have more.
    EveryVoteCounts,
    /// A write of the `sync` key is said to be done, and is not.
    SyncKeyUnwritten,
    /// The `sync` key that a candidate sees asks for no votes.
    NoVotesNeeded,
    /// Any member may stand, as if there were no `sync` key.
    SyncKeyUnread,
    /// A member that promises to receive nothing goes on receiving.
    PromiseNotKept,
    /// What voters have promised counts for any term, and without being asked for again.
    PromiseUncompared,
    /// Once a synchronous mode is switched off, Postgres waits for nobody before the `sync` key is gone.
    NamesGoBeforeKey,
    /// A standby loses its upstream when etcd blinks, and is said to follow its leader (patroni#3717, #3686, #2094).
    UpstreamForgotten,
    /// The watchdog device is closed as soon as the bot is gone or a stop has begun, while the server lives (patroni#3639).
    DeviceClosedTooSoon,
    /// Times are those of the wall clock, which is set back now and then (patroni#3560).
    ClockSetBack,
    /// The last position of the leader that candidates compare with is ahead of what any of them can have (patroni#1849, #2151, #3703).
    OptimeAhead,
    /// A rewind that fails is the end of it: nothing else is tried (patroni#962, #2302).
    FailedRewindIsFinal,
}

/// All that are known to be caught, with their names on the command line.
pub const PLANTS: [(Plant, &str); 44] = [
    (Plant::LeaseFromReply, "lease-from-reply"),
    (Plant::LockWithoutCompare, "lock-without-compare"),
    (Plant::PromoteWithoutLock, "promote-without-lock"),
    (Plant::ViewIsTruth, "view-is-truth"),
    (Plant::FenceIgnored, "fence-ignored"),
    (Plant::YieldBeforeStop, "yield-before-stop"),
    (Plant::UnknownIsDone, "unknown-is-done"),
    (Plant::UnguardedWrites, "unguarded-writes"),
    (Plant::ClaimWithoutCompare, "claim-without-compare"),
    (Plant::InitializeWithoutCompare, "initialize-without-compare"),
    (Plant::NeverListAgain, "never-list-again"),
    (Plant::RewindSkipped, "rewind-skipped"),
    (Plant::AnyReplicaWill, "any-replica-will"),
    (Plant::GuardSleeps, "guard-sleeps"),
    (Plant::EarlierFenceUnknown, "earlier-fence-unknown"),
    (Plant::FenceTooLate, "fence-too-late"),
    (Plant::DeviceSleeps, "device-sleeps"),
    (Plant::PromiseForgotten, "promise-forgotten"),
    (Plant::CandidateDoesNotAsk, "candidate-does-not-ask"),
    (Plant::PromiseByShell, "promise-by-shell"),
    (Plant::SilenceIsYes, "silence-is-yes"),
    (Plant::ReadyBeforeWhole, "ready-before-whole"),
    (Plant::ClaimOutlivesBot, "claim-outlives-bot"),
    (Plant::LeaderCountsAnew, "leader-counts-anew"),
    (Plant::ChangesForgotten, "changes-forgotten"),
    (Plant::OthersUnseen, "others-unseen"),
    (Plant::CanaryAlwaysWell, "canary-always-well"),
    (Plant::RefusalIsReadiness, "refusal-is-readiness"),
    (Plant::QuarantineUnheard, "quarantine-unheard"),
    (Plant::PinUncompared, "pin-uncompared"),
    (Plant::NamesInForceAtOnce, "names-in-force-at-once"),
    (Plant::CountedBeforeCaughtUp, "counted-before-caught-up"),
    (Plant::EveryVoteCounts, "every-vote-counts"),
    (Plant::SyncKeyUnwritten, "sync-key-unwritten"),
    (Plant::NoVotesNeeded, "no-votes-needed"),
    (Plant::SyncKeyUnread, "sync-key-unread"),
    (Plant::PromiseNotKept, "promise-not-kept"),
    (Plant::PromiseUncompared, "promise-uncompared"),
    (Plant::NamesGoBeforeKey, "names-go-before-key"),
    (Plant::UpstreamForgotten, "upstream-forgotten"),
    (Plant::DeviceClosedTooSoon, "device-closed-too-soon"),
    (Plant::ClockSetBack, "clock-set-back"),
    (Plant::OptimeAhead, "optime-ahead"),
    (Plant::FailedRewindIsFinal, "failed-rewind-is-final"),
];

impl Plant {
    /// The mistake of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        PLANTS.iter().find(|(_, n)| *n == name).map(|(plant, _)| *plant)
    }

    /// Whether it can do harm only where the mode changes, and seldom there: it is made in no other cluster.
    #[must_use]
    pub const fn wants_changing(self) -> bool {
        matches!(self, Self::NamesGoBeforeKey)
    }

    /// Whether it can do harm only where a guard stands still when its bot comes back, which is rare.
    #[must_use]
    pub const fn wants_tired_guards(self) -> bool {
        matches!(self, Self::EarlierFenceUnknown)
    }

    /// Whether it can do harm only where commits are pinned: it is made in no other world.
    #[must_use]
    pub const fn wants_pins(self) -> bool {
        matches!(self, Self::PinUncompared)
    }

    /// Whether it can do harm in a synchronous cluster only, and seldom there: it is made in no other.
    #[must_use]
    pub const fn wants_synchronous(self) -> bool {
        matches!(
            self,
            Self::NamesInForceAtOnce
                | Self::CountedBeforeCaughtUp
                | Self::EveryVoteCounts
                | Self::PromiseNotKept
                | Self::PromiseUncompared
        )
    }
}

/// Whether a transaction takes a leader lock.
pub(crate) fn takes_lock(transaction: &Transaction) -> bool {
    puts(transaction, "/leader")
}

fn puts(transaction: &Transaction, which: &str) -> bool {
    transaction.then.iter().any(|write| matches!(write, Write::Put { key, .. } if key.ends_with(which)))
}

/// What a transaction is about, as far as a mistake may be made with its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum About {
    /// A leader lock is taken.
    Lock,
    /// Anything else.
    Other,
}

impl About {
    pub(crate) fn of(transaction: &Transaction) -> Self {
        if takes_lock(transaction) { Self::Lock } else { Self::Other }
    }
}

/// What etcd's answer turns into on its way.
pub(crate) fn alter_outcome(plant: Option<Plant>, about: About, outcome: Outcome) -> Outcome {
    match (plant, outcome) {
        (Some(Plant::UnknownIsDone), Outcome::Unknown(_)) => Outcome::Done(Revision(u64::MAX)),
        (Some(Plant::PromoteWithoutLock), Outcome::Refused { revision, .. }) if about == About::Lock => {
            Outcome::Done(revision)
        }
        (_, outcome) => outcome,
    }
}

/// The answer that a bot makes up instead of asking etcd.
pub(crate) fn made_up(world: &World, node: NodeId, action: &DcsAction) -> Option<DcsEvent> {
    let DcsAction::Transact { id, transaction } = action else { return None };
    let state = world.nodes[node.0].postgres_state()?;
    if world.plant == Some(Plant::PromoteWithoutLock)
        && state.role() == Role::Candidate
        && puts(transaction, "/timelines")
    {
        return Some(DcsEvent::Answered { id: *id, outcome: Outcome::Done(Revision(u64::MAX)) });
    }
    let primary = state.role() == Role::Primary;
    if world.plant == Some(Plant::SyncKeyUnwritten) && primary && puts(transaction, "/sync") {
        let revision = state.view().revision(&world.nodes[node.0].scope().prefix());
        return Some(DcsEvent::Answered { id: *id, outcome: Outcome::Done(Revision(revision.0 + 1)) });
    }
    if world.plant != Some(Plant::ViewIsTruth) || !takes_lock(transaction) || state.role() != Role::Candidate {
        return None;
    }
    let revision = state.view().revision(&world.nodes[node.0].scope().prefix());
    Some(DcsEvent::Answered { id: *id, outcome: Outcome::Done(revision) })
}

/// What a machine asks of etcd turns into.
pub(crate) fn alter_request(plant: Option<Plant>, action: DcsAction) -> DcsAction {
    let DcsAction::Transact { id, mut transaction } = action else { return action };
    let claims = |write: &Write| matches!(write, Write::Put { key, .. } if key.ends_with("/claim"));
    let begins = |write: &Write| matches!(write, Write::Put { key, value, .. } if key.ends_with("/initialize") && value.is_empty());
    match plant {
        Some(Plant::LockWithoutCompare) if takes_lock(&transaction) => {
            // Neither at the lock itself nor at what only its holders write.
            transaction.compare.retain(|compare| compare.key().ends_with("/initialize"));
        }
        Some(Plant::ClaimWithoutCompare) if transaction.then.iter().any(claims) => transaction.compare.clear(),
        Some(Plant::InitializeWithoutCompare) if transaction.then.iter().any(begins) => transaction.compare.clear(),
        Some(Plant::LeaderCountsAnew) => {
            let lock = transaction.then.iter().find_map(|write| match write {
                Write::Put { key, .. } => key.strip_suffix("web/leader").map(str::to_owned),
                Write::Delete { .. } => None,
            });
            let rest =
                |namespace: String| (1..SERVING_MAX).map(move |n| Write::delete(format!("{namespace}web/load/{n:04}")));
            transaction.then.extend(lock.into_iter().flat_map(rest));
        }
        Some(Plant::UnguardedWrites) => transaction.compare.retain(|compare| match compare {
            Compare::CreatedAt(..) => false,
            Compare::LeaseIs(key, _) => !key.ends_with("/leader"),
            Compare::Absent(_) | Compare::Present(_) | Compare::ValueIs(..) | Compare::ModifiedAt(..) => true,
        }),
        Some(Plant::QuarantineUnheard) => transaction.compare.retain(|compare| !is_mark(compare.key())),
        Some(Plant::PinUncompared) => transaction.compare.retain(|compare| !compare.key().ends_with("/revision/pin")),
        Some(Plant::PromiseUncompared)
            if transaction.then.iter().any(|write| matches!(write, Write::Delete { .. })) =>
        {
            transaction.compare.retain(|compare| !compare.key().contains("/promises/"));
        }
        _no_change => {}
    }
    DcsAction::Transact { id, transaction }
}

/// What a bot is told turns into.
pub(crate) fn alter_event(plant: Option<Plant>, leads: bool, mut event: BotEvent) -> BotEvent {
    if matches!(plant, Some(Plant::NoVotesNeeded | Plant::SyncKeyUnread))
        && !leads
        && let BotEvent::Postgres(postgres::Event::Dcs(event)) = &mut event
    {
        each_value(event, &|kv| {
            if kv.key.ends_with("/sync") {
                kv.value = match serde_json::from_str::<SyncRecord>(&kv.value) {
                    Ok(record) if plant == Some(Plant::NoVotesNeeded) => {
                        serde_json::to_string(&SyncRecord { quorum: 0, ..record }).unwrap_or_default()
                    }
                    Ok(_) | Err(_) => String::from("{}"),
                };
            }
        });
    }
    if plant == Some(Plant::ChangesForgotten)
        && let BotEvent::Web(web::Event::Dcs(event)) = &mut event
    {
        each_value(event, &|kv| {
            if kv.key.ends_with("/load/history") {
                kv.value = String::from("{}");
            }
        });
    }
    if plant == Some(Plant::OthersUnseen)
        && let BotEvent::Web(web::Event::Dcs(event)) = &mut event
    {
        each_value(event, &|kv| {
            if kv.key.contains("/web/members/") {
                kv.value = kv.value.replace("\"serving\":", "\"unheard\":");
            }
        });
    }
    if let BotEvent::Content(content::Event::Dcs(event)) = &mut event {
        alter_content(plant, event);
    }
    if plant == Some(Plant::OptimeAhead)
        && !leads
        && let BotEvent::Postgres(postgres::Event::Dcs(event)) = &mut event
    {
        each_value(event, &put_optime_ahead);
    }
    if plant == Some(Plant::AnyReplicaWill)
        && let BotEvent::Postgres(event) = &mut event
    {
        let forget = |kv: &mut KeyValue| {
            if kv.key.ends_with("/status") {
                kv.value = String::from("{}");
            }
        };
        match event {
            postgres::Event::PeersProbed { answers, .. } => answers.clear(),
            postgres::Event::Dcs(event) => each_value(event, &forget),
            _any_other => {}
        }
    }
    event
}

fn is_mark(key: &str) -> bool {
    key.contains("/revision/quarantine/")
}

/// What a content bot is told turns into.
fn alter_content(plant: Option<Plant>, event: &mut DcsEvent) {
    match (plant, event) {
        (Some(Plant::RefusalIsReadiness), event) => each_value(event, &accept),
        (Some(Plant::QuarantineUnheard), DcsEvent::Listed { entries, .. }) => entries.retain(|kv| !is_mark(&kv.key)),
        _any_other => {}
    }
}

/// A web bot's refusal of a commit, turned into its acknowledgement.
fn accept(kv: &mut KeyValue) {
    let Ok(mut value) = serde_json::from_str::<serde_json::Value>(&kv.value) else { return };
    let refused = value.as_object_mut().and_then(|fields| fields.remove("refused"));
    if let Some(sha) = refused.and_then(|refused| refused.get("sha").cloned()) {
        value["prepared"] = sha;
        kv.value = value.to_string();
    }
}

fn put_optime_ahead(kv: &mut KeyValue) {
    if kv.key.ends_with("/status")
        && let Ok(status) = serde_json::from_str::<PostgresStatus>(&kv.value)
    {
        kv.value = serde_json::to_string(&PostgresStatus { optime: Lsn(u64::MAX / 2), ..status }).unwrap_or_default();
    }
}

/// Changes every value that etcd shows.
fn each_value(event: &mut DcsEvent, alter: &dyn Fn(&mut KeyValue)) {
    match event {
        DcsEvent::Listed { entries, .. } => entries.iter_mut().for_each(alter),
        DcsEvent::Changed { changes, .. } => {
            for change in changes {
                if let Change::Put(kv) = change {
                    alter(kv);
                }
            }
        }
        _any_other => {}
    }
}

/// What a postgres bot asks for turns into.
pub(crate) fn alter_actions(world: &mut World, node: NodeId, from: Role, actions: Vec<Action>) -> Vec<Action> {
    let Some(plant) = world.plant else { return actions };
    let to = world.nodes[node.0].postgres_state().map(postgres::State::role);
    if plant == Plant::NamesGoBeforeKey {
        world.reload_if_names_differ(node);
    }
    let mut out = Vec::new();
    for action in actions {
        match (plant, action) {
            (Plant::FenceIgnored, Action::Run { job: Job::Stop { mode: StopMode::Immediate { .. } }, .. }) => {}
            (Plant::YieldBeforeStop, Action::Run { id, job: Job::Checkpoint })
                if from == Role::Primary && to == Some(Role::Demoting) =>
            {
                let leader = world.nodes[node.0].scope().leader();
                let holder = Compare::ValueIs(leader.clone(), world.nodes[node.0].name.clone());
                let transaction = Transaction::new(vec![holder], vec![Write::delete(leader)]);
                out.push(Action::Dcs(DcsAction::Transact { id: RequestId(u64::MAX), transaction }));
                out.push(Action::Run { id, job: Job::Checkpoint });
            }
            (_, action) => out.push(action),
        }
    }
    out
}
