//! `make chaos` for two minutes: nothing that must not happen does, and the fleet comes to rest.

use std::time::Duration;

use anyhow::{Result, ensure};
use fleet::{
    chaos::{self, Wish},
    skipped,
};

const LENGTH: Duration = Duration::from_secs(120);
const SEED: u64 = 1;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_minutes_of_chaos_leave_one_primary_at_a_time() -> Result<()> {
    let outcome = chaos::run(&Wish::new(SEED, LENGTH), |line| println!("{line}")).await?;
    println!("{outcome:#?}");
    outcome.left_out.iter().for_each(|what| skipped("faults of two_minutes_of_chaos", what));
    ensure!(outcome.faults.values().sum::<u64>() > 10, "hardly anything befell it: {:?}", outcome.faults);
    outcome.check()
}
