//! What is to be killed in which round, and when: all of it from the seed.

use std::time::Duration;

use super::stage::Stage;
use crate::random::Random;

/// How many web bots serve.
pub(super) const WEB_BOTS: usize = 3;

/// The longest wait between a stage that was seen and the kill: the steps between two stages take about this long.
const AFTER_STAGE_MS_MAX: u64 = 25;

/// The longest time that a killed bot stays away. Longer than the leases now and then, so that another takes over.
const AWAY_MS_MAX: u64 = 3_000;

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// The content bot that is elected.
    ContentLeader,
    /// The other content bot.
    ContentStandby,
    /// A web bot.
    Web(usize),
}

impl Victim {
    /// What it is called in the report.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::ContentLeader => "content-leader",
            Self::ContentStandby => "content-standby",
            Self::Web(_) => "web",
        }
    }
}

/// When.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// This share of the length of a publish after the push begins, in thousandths.
    Share(u64),
    /// So long after the fleet was seen in this stage.
    Seen(Stage, Duration),
}

/// One round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Round {
    /// Who: one or two.
    pub victims: Vec<Victim>,
    /// When.
    pub moment: Moment,
    /// How long they stay away.
    pub away: Duration,
}

/// The rounds.
#[must_use]
pub fn plan(seed: u64, rounds: usize) -> Vec<Round> {
    let mut random = Random::new(seed);
    (0..rounds).map(|_| round(&mut random)).collect()
}

fn round(random: &mut Random) -> Round {
    let mut victims = vec![victim(random)];
    if random.next().is_multiple_of(3) {
        let other = victim(random);
        if !victims.contains(&other) {
            victims.push(other);
        }
    }
    let moment = match random.next().is_multiple_of(2) {
        true => Moment::Share(random.between((0, 1_000))),
        false => {
            let stage = Stage::BEFORE_THE_END[random.index(Stage::BEFORE_THE_END.len())];
            Moment::Seen(stage, Duration::from_millis(random.between((0, AFTER_STAGE_MS_MAX))))
        }
    };
    // Most come back at once.
    let away = match random.next().is_multiple_of(4) {
        true => random.pause((0, AWAY_MS_MAX)),
        false => Duration::from_millis(random.between((0, 20))),
    };
    Round { victims, moment, away }
}

fn victim(random: &mut Random) -> Victim {
    match random.index(5) {
        0 | 1 => Victim::ContentLeader,
        2 => Victim::ContentStandby,
        _ => Victim::Web(random.index(WEB_BOTS)),
    }
}

#[cfg(test)]
mod tests {
    use super::{Moment, Stage, plan};

    #[test]
    fn a_seed_gives_one_plan_with_every_stage() {
        let one = plan(3, 500);
        assert_eq!(one, plan(3, 500));
        assert_ne!(one, plan(4, 500));
        for stage in Stage::BEFORE_THE_END {
            assert!(
                one.iter().any(|round| matches!(round.moment, Moment::Seen(seen, _) if seen == stage)),
                "{stage:?}"
            );
        }
    }
}
