//! A permanent logical slot on real servers: its consumer goes on at the next leader and misses nothing; and where that cannot be
//! promised, the slot is made anew, and the leader says so.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use fleet::{Fleet, http::Http, sql::Login};
use hyper::Method;
use serde_json::{Value, json};

const STEP: Duration = Duration::from_secs(60);

/// A copy becomes good once its consumer has confirmed what lies behind two of the records of running transactions that a busy primary
/// writes every 15 s, or at a checkpoint.
const GOOD_WITHIN: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_misses_nothing_over_a_failover() -> Result<()> {
    let (mut fleet, first, second) = fleet_with_slot().await?;
    let server = login(&fleet, &first)?;
    server.execute("CREATE TABLE words (n int)").await?;
    let mut written = 0;
    let mut seen = BTreeSet::new();

    // The replica restarts for the file; then the copy becomes good as the consumer gets on.
    let there = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'changes'";
    login(&fleet, &second)?.wait_for(there, "1", STEP).await?;
    let began = std::time::Instant::now();
    while !is_good(&fleet, &second).await? {
        ensure!(began.elapsed() < GOOD_WITHIN, "the copy is not good yet: {}", troubles(&fleet, &second).await?);
        written += 1;
        server.execute(&format!("INSERT INTO words VALUES ({written})")).await?;
        seen.extend(consume(&server).await?);
        // What the catalog has lost since must not be needed for what is decoded later.
        server.execute("CREATE TABLE passing (n int); DROP TABLE passing").await?;
        for statement in ["VACUUM pg_class", "VACUUM pg_attribute", "VACUUM pg_type", "CHECKPOINT"] {
            server.execute(statement).await?;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    ensure!(restarts(&fleet, &second)? == 1, "{second} was restarted {} times", restarts(&fleet, &second)?);

    // Written, and not consumed, when the leader is lost.
    let unseen: BTreeSet<u64> = (written + 1..=written + 20).collect();
    for n in &unseen {
        server.execute(&format!("INSERT INTO words VALUES ({n})")).await?;
    }
    fleet.caught_up(&second, STEP).await?;
    fleet.postgres_bot_mut(&first)?.kill_node();
    ensure!(fleet.new_primary(&first, STEP).await? == second, "the only one that lives leads");
    let server = login(&fleet, &second)?;
    server.execute("INSERT INTO words VALUES (1000000)").await?;
    seen.extend(consume(&server).await?);
    let missed: Vec<&u64> = unseen.difference(&seen).collect();
    ensure!(missed.is_empty(), "the consumer missed {missed:?}");
    let wanted: BTreeSet<u64> = (1..=written + 20).chain([1_000_000]).collect();
    ensure!(seen == wanted, "the consumer saw {seen:?}");
    ensure!(!troubles(&fleet, &second).await?.contains("made anew"), "nothing was made anew");

    // The old leader comes back, and copies the slot of the new one.
    fleet.postgres_bot_mut(&first)?.bot.start()?;
    fleet.caught_up(&first, STEP).await?;
    login(&fleet, &first)?.wait_for(there, "1", STEP * 2).await?;
    fleet.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_may_lack_something_is_not_used() -> Result<()> {
    let (mut fleet, first, second) = fleet_with_slot().await?;
    let server = login(&fleet, &first)?;
    server.execute("CREATE TABLE words (n int)").await?;
    let there = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'changes'";
    login(&fleet, &second)?.wait_for(there, "1", STEP).await?;
    // Nobody consumes: nothing proves the copy.
    fleet::wait::until("the replica says that the copy is not good", STEP, || async {
        let told = troubles(&fleet, &second).await.map_err(|e| format!("{e:#}"))?;
        if told.contains("[changes] would not outlive a failover") { Ok(()) } else { Err(told) }
    })
    .await?;
    server.execute("INSERT INTO words VALUES (1)").await?;
    fleet.caught_up(&second, STEP).await?;
    fleet.postgres_bot_mut(&first)?.kill_node();
    ensure!(fleet.new_primary(&first, STEP).await? == second, "the only one that lives leads");
    let server = login(&fleet, &second)?;
    server.wait_for(there, "1", STEP).await?;
    fleet::wait::until("the leader says what was missed", STEP, || async {
        let told = troubles(&fleet, &second).await.map_err(|e| format!("{e:#}"))?;
        if told.contains("the logical slots [changes] were made anew here") { Ok(()) } else { Err(told) }
    })
    .await?;
    server.execute("INSERT INTO words VALUES (2)").await?;
    let seen = consume(&server).await?;
    ensure!(seen == BTreeSet::from([2]), "the new slot shows {seen:?}");
    fleet.stop().await
}

/// Two servers that decode, with a permanent slot `changes`; the leader's name first.
async fn fleet_with_slot() -> Result<(Fleet, String, String)> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(2)?;
    let first = fleet.postgres_up(Duration::from_secs(90)).await?;
    let second = fleet.postgres.iter().map(|p| p.bot.name.clone()).find(|name| *name != first).context("a replica")?;
    let decoding = json!({"postgresql": {"parameters": {"wal_level": "logical"}}});
    configure(&fleet, &first, &decoding).await?;
    for name in [&second, &first] {
        let restart = json!({"restart_pending": true});
        fleet::wait::until(&format!("{name} restarts"), STEP, || async {
            let answer = ask(&fleet, name, Method::POST, "/restart", &restart).await.map_err(|e| format!("{e:#}"))?;
            if answer == 200 { Ok(()) } else { Err(answer.to_string()) }
        })
        .await?;
    }
    fleet.caught_up(&second, STEP).await?;
    let slots = json!({"slots": {"changes": {"type": "logical", "database": "postgres", "plugin": "test_decoding"}}});
    configure(&fleet, &first, &slots).await?;
    let there = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'changes'";
    login(&fleet, &first)?.wait_for(there, "1", STEP).await?;
    Ok((fleet, first, second))
}

/// Takes what the slot has, and confirms it.
async fn consume(login: &Login) -> Result<BTreeSet<u64>> {
    let query = "SELECT coalesce(string_agg(substring(data FROM 'words: INSERT: n\\[integer\\]:(\\d+)'), ','), '') \
                   FROM pg_logical_slot_get_changes('changes', NULL, NULL)";
    let rows = login.ask(query).await?;
    rows.split(',').filter(|n| !n.is_empty()).map(|n| n.parse().context("a number")).collect()
}

/// The copy is proven, and its server follows.
async fn is_good(fleet: &Fleet, name: &str) -> Result<bool> {
    let report = fleet.postgres_bot(name)?.bot.report().await?;
    let bad = report.troubles.iter().any(|told| told.contains("would not outlive a failover"));
    Ok(report.role == "replica" && !bad)
}

async fn troubles(fleet: &Fleet, name: &str) -> Result<String> {
    let report = fleet.postgres_bot(name)?.bot.report().await?;
    Ok(report.troubles.join("; "))
}

/// How often a replica was restarted for a slot's file.
fn restarts(fleet: &Fleet, name: &str) -> Result<usize> {
    Ok(fleet.postgres_bot(name)?.bot.log().matches("a copy of a logical slot was put in place").count())
}

fn login(fleet: &Fleet, name: &str) -> Result<Login> {
    Ok(fleet.superuser().at(fleet.postgres_bot(name)?.port))
}

async fn configure(fleet: &Fleet, member: &str, change: &Value) -> Result<()> {
    let status = ask(fleet, member, Method::PATCH, "/config", change).await?;
    ensure!(status == 200, "PATCH /config answers {status}");
    Ok(())
}

async fn ask(fleet: &Fleet, member: &str, method: Method, path: &str, body: &Value) -> Result<u16> {
    let url = format!("{}{path}", fleet.postgres_bot(member)?.bot.api_url);
    let body = Bytes::from(body.to_string());
    Ok(Http::new().send(method, &url, Some("application/json"), body).await?.status)
}
