//! etcd fails: one member of three is nothing; all of them stop the primary before its lease can run out, and it comes
//! back with them; a fleet may also start before its etcd does.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use fleet::{Fleet, sql::Writer, wait::until};

const STEP: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_stops_before_its_lease_can_run_out_and_comes_back() -> Result<()> {
    let mut fleet = Fleet::with_etcd(3).await?;
    fleet.add_postgres(2)?;
    let primary = fleet.postgres_up(STEP).await?;
    let writer = Writer::start(&fleet.superuser()).await?;

    // Its leader: nothing is renewed until the others have chosen another.
    let leader = fleet.etcd.leader().await?;
    let killed = Instant::now();
    fleet.etcd.kill_member(leader);
    tokio::time::sleep(Duration::from_secs(2 * fleet.ttl_s)).await;
    let gap = writer.longest_gap_since(killed);
    println!("the leader of three etcd members killed: {gap} ms without a write");
    let refused = writer.refused();
    ensure!(refused == 0, "{refused} writes were refused, though a majority of etcd lives: {}", writer.last_error());
    ensure!(gap < 1_000 * fleet.ttl_s, "the loss of one member of etcd stopped the writer for {gap} ms");
    fleet.etcd.start_member(leader)?;

    let frozen = Instant::now();
    fleet.etcd.freeze();
    let own = fleet.superuser().at(fleet.postgres_bot(&primary)?.port);
    let client = own.any().await?;
    // The lease was renewed before the freeze at the latest, so it ends within ttl of it.
    let lease = Duration::from_secs(fleet.ttl_s);
    until("the primary takes no more writes", lease * 2, || async {
        match client.simple_query("CREATE TABLE IF NOT EXISTS after_the_freeze (x int)").await {
            Ok(_) => Err(String::from("it still writes")),
            Err(_refused) => Ok(()),
        }
    })
    .await?;
    let stopped = frozen.elapsed();
    println!("all of etcd frozen: the primary stops writing after {} ms", stopped.as_millis());
    ensure!(stopped < lease, "the primary wrote for {stopped:?} after the freeze: its lease may be another's by then");
    let why = fleet.postgres_bot(&primary)?.bot.report().await?;
    ensure!(why.troubles.iter().any(|t| t.contains("etcd")), "its report does not name etcd: {why:?}");

    let thawed = Instant::now();
    fleet.etcd.thaw();
    let back = writer.writes_after(thawed, STEP).await?;
    println!("etcd back: writable after {back} ms");
    fleet.postgres_up(STEP).await?;
    let tally = writer.finish().await?;
    ensure!(tally.lost == 0, "an outage of etcd alone lost writes: {tally:?}");
    fleet.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bot_that_starts_before_etcd_waits_and_says_so() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.etcd.kill_member(0);
    fleet.add_postgres(1)?;
    let bot = &fleet.postgres[0].bot;
    until("the bot says that etcd does not answer", STEP, || async {
        let report = bot.report().await.map_err(|e| format!("{e:#}"))?;
        if report.troubles.iter().any(|t| t.contains("etcd")) { Ok(()) } else { Err(format!("{report:?}")) }
    })
    .await?;
    ensure!(bot.get("/liveness").await?.status == 200, "it lives");
    ensure!(bot.get("/primary").await?.status == 503, "it is no primary");
    fleet.etcd.start_member(0)?;
    fleet.postgres_up(STEP).await?;
    fleet.stop().await
}
