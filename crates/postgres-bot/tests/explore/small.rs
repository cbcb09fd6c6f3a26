//! The small world: the few things that may happen in it, each with what it changes.

use std::collections::BTreeMap;

use bots_core::{
    machine::Machine,
    wire::{PostgresFacts, Timeline},
};
use postgres_bot::machine::{Event, Postgres, PostgresBot};

use crate::{
    disk::Disk,
    world::{Fate, World, member, server},
};

/// One thing that may happen in the small world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Move {
    Answer(Fate),
    Watch,
    BreakWatch,
    Grant,
    LoseLease,
    StopRenewing,
    EndJob { good: bool },
    Inspect,
    Probe,
    Observe,
    Exit,
    Close,
    OtherLeads,
    NobodyLeads,
    OtherIsUp,
    Tick,
}

/// All of them.
pub(crate) const MOVES: &[Move] = &[
    Move::Answer(Fate::Answered),
    Move::Answer(Fate::AnswerLost),
    Move::Answer(Fate::QuestionLost),
    Move::Watch,
    Move::BreakWatch,
    Move::Grant,
    Move::LoseLease,
    Move::StopRenewing,
    Move::EndJob { good: true },
    Move::EndJob { good: false },
    Move::Inspect,
    Move::Probe,
    Move::Observe,
    Move::Exit,
    Move::Close,
    Move::OtherLeads,
    Move::NobodyLeads,
    Move::OtherIsUp,
    Move::Tick,
];

/// Makes a move; `false` if it is none in this state of the world.
pub(crate) fn make(a_move: Move, world: &mut World, disk: &mut Disk) -> bool {
    let leader = world.dcs.get("/service/main/leader").map(|kv| kv.value.clone());
    match a_move {
        Move::Answer(fate) => return world.answer(fate).is_some(),
        Move::Watch if !world.state.view().is_watched() => world.list(),
        Move::Watch if world.shown == world.dcs.revision() => return false,
        Move::Watch => world.watch(),
        Move::BreakWatch if world.state.view().is_watched() => world.break_watch(),
        Move::Grant if world.granting.is_some() => world.grant(),
        Move::LoseLease if world.state.membership().lease_id().is_some() => world.tell_lease_lost(),
        Move::StopRenewing if world.renewing => world.renewing = false,
        Move::EndJob { good } => {
            let Some((_, job)) = world.job.clone() else { return false };
            if good && !world.may_end_well() {
                return false;
            }
            disk.after(&job, good);
            if good {
                // Timelines are counted only as far as they matter here.
                disk.timeline = disk.timeline.min(3);
                world.job_done(disk.timeline, disk.position, true);
            } else {
                world.job_failed("no such luck");
            }
        }
        Move::Inspect if std::mem::take(&mut world.inspecting) => {
            world.step(Event::DataInspected(disk.inspected(world.shown_running())));
        }
        Move::Probe => {
            let Some(id) = world.probe.take() else { return false };
            world.step(Event::PeersProbed { id, answers: BTreeMap::new() });
        }
        Move::Observe if world.running && !world.closed => {
            world.observe(Postgres::Up(server(!world.takes_writes(), disk.timeline, disk.position)));
        }
        Move::Exit if world.running => world.server_exits("signal 9"),
        Move::Close if world.may_close() => world.server_closes(disk.position),
        Move::OtherLeads if leader.is_none() => world.put("leader", "pg2"),
        Move::NobodyLeads if leader.as_deref() == Some("pg2") => world.delete("leader"),
        Move::OtherIsUp if world.dcs.get("/service/main/members/pg2").is_none() => {
            let facts = PostgresFacts { timeline: Some(Timeline(disk.timeline)), ..PostgresFacts::default() };
            world.put("members/pg2", &member("pg2", "primary", "running", facts).to_json());
        }
        Move::Tick => {
            let Some(next) = PostgresBot::deadline(&world.state) else { return false };
            world.pass(next.at.since(world.now));
        }
        Move::BreakWatch
        | Move::Grant
        | Move::LoseLease
        | Move::StopRenewing
        | Move::Inspect
        | Move::Observe
        | Move::Close
        | Move::Exit
        | Move::OtherLeads
        | Move::NobodyLeads
        | Move::OtherIsUp => return false,
    }
    true
}
