//! `make torture` for a few rounds: bots are killed in the middle of publications, and nobody reads half of anything.

use anyhow::Result;
use fleet::torture::{self, Wish};

const ROUNDS: usize = 8;
const SEED: u64 = 1;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bots_that_are_killed_in_a_publication_leave_nothing_half() -> Result<()> {
    let outcome = torture::run(Wish { seed: SEED, rounds: ROUNDS }, |line| println!("{line}")).await?;
    println!("{outcome:#?}");
    outcome.check()
}
