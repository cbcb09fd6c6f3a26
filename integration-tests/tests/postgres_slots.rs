//! Replication slots on real servers: a member that was away comes back by streaming, also after a failover; permanent slots are
//! there whoever leads; and what nobody wants any more goes.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use fleet::{Fleet, http::Http, sql::Login};
use hyper::Method;
use serde_json::{Value, json};

const STEP: Duration = Duration::from_secs(60);

/// Every slot that a server has.
const SLOTS: &str =
    "SELECT coalesce(string_agg(slot_name::text, ',' ORDER BY slot_name), '') FROM pg_replication_slots";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_was_away_comes_back_by_streaming() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(3)?;
    let first = fleet.postgres_up(Duration::from_secs(90)).await?;
    let slots = json!({"backup": {"type": "physical"}});
    // Without slots, the log would be gone at once.
    let parameters = json!({"wal_keep_size": "0", "max_wal_size": "32MB", "min_wal_size": "32MB"});
    configure(&fleet, &first, &json!({"slots": slots, "postgresql": {"parameters": parameters}})).await?;
    for bot in &fleet.postgres {
        let others = fleet.postgres.iter().map(|other| other.bot.name.replace('-', "_"));
        let others = others.filter(|slot| *slot != bot.bot.name.replace('-', "_"));
        let wanted = std::iter::once(String::from("backup")).chain(others).collect::<Vec<_>>().join(",");
        login(&fleet, &bot.bot.name)?.wait_for(SLOTS, &wanted, STEP).await?;
    }
    let used = "SELECT count(*) FROM pg_replication_slots WHERE active AND slot_name::text LIKE 'pg\\_%'";
    login(&fleet, &first)?.wait_for(used, "2", STEP).await?;

    let mut replicas = fleet.postgres.iter().map(|p| p.bot.name.clone()).filter(|name| *name != first);
    let away = replicas.next().context("a replica")?;
    let second = replicas.next().context("another replica")?;
    let copies = copies_of(&fleet, &away)?;

    // Away while the leader goes on.
    fleet.postgres_bot_mut(&away)?.kill_node();
    write_much(&login(&fleet, &first)?).await?;
    fleet.postgres_bot_mut(&away)?.bot.start()?;
    fleet.caught_up(&away, STEP).await?;
    ensure!(copies_of(&fleet, &away)? == copies, "{away} was copied anew beside a slot of its own");

    // Away while the leader goes on, and is lost itself: the other replica has kept the log as well.
    fleet.postgres_bot_mut(&away)?.kill_node();
    write_much(&login(&fleet, &first)?).await?;
    fleet.caught_up(&second, STEP).await?;
    fleet.postgres_bot_mut(&first)?.kill_node();
    ensure!(fleet.new_primary(&first, STEP).await? == second, "the only one that lives leads");
    let kept = login(&fleet, &second)?.ask(SLOTS).await?;
    ensure!(kept.contains("backup"), "the permanent slot did not outlive the failover: {kept}");
    fleet.postgres_bot_mut(&away)?.bot.start()?;
    fleet.caught_up(&away, STEP).await?;
    ensure!(copies_of(&fleet, &away)? == copies, "{away} was copied anew after the failover");
    fleet.postgres_bot_mut(&first)?.bot.start()?;
    fleet.caught_up(&first, STEP).await?;

    // Gone for good.
    configure(&fleet, &second, &json!({"member_slots_ttl": 3})).await?;
    fleet.postgres_bot_mut(&away)?.kill_node();
    let slot = away.replace('-', "_");
    let gone = format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{slot}'");
    for name in [&second, &first] {
        login(&fleet, name)?.wait_for(&gone, "0", STEP * 2).await?;
    }
    let left = login(&fleet, &second)?.ask(SLOTS).await?;
    ensure!(left == format!("backup,{}", first.replace('-', "_")), "the leader has {left}");
    fleet.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_logical_slot_is_made_where_the_cluster_leads_and_strangers_are_left_alone() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(2)?;
    let first = fleet.postgres_up(Duration::from_secs(90)).await?;
    let second = fleet.postgres.iter().map(|p| p.bot.name.clone()).find(|name| *name != first).context("a replica")?;
    let logical = json!({"changes": {"type": "logical", "database": "postgres", "plugin": "pgoutput"}});
    let wishes = json!({
        "slots": logical, "ignore_slots": [{"name": "mine"}], "member_slots_ttl": 2,
        "postgresql": {"parameters": {"wal_level": "logical"}},
    });
    configure(&fleet, &first, &wishes).await?;
    for name in [&second, &first] {
        let restart = json!({"restart_pending": true});
        fleet::wait::until(&format!("{name} restarts"), STEP, || async {
            let answer = ask(&fleet, name, Method::POST, "/restart", &restart).await.map_err(|e| format!("{e:#}"))?;
            if answer == 200 { Ok(()) } else { Err(answer.to_string()) }
        })
        .await?;
    }
    let server = login(&fleet, &first)?;
    let there = "SELECT plugin FROM pg_replication_slots WHERE slot_name = 'changes'";
    server.wait_for(there, "pgoutput", STEP).await?;
    for stranger in ["mine", "nobodys"] {
        server.ask(&format!("SELECT pg_create_physical_replication_slot('{stranger}')")).await?;
    }
    let gone = "SELECT string_agg(slot_name::text, ',' ORDER BY slot_name) FROM pg_replication_slots";
    server.wait_for(gone, &format!("changes,mine,{}", second.replace('-', "_")), STEP).await?;

    // The replica streams again after the restart of its leader.
    fleet.postgres_up(STEP).await?;
    // It moves with the leader. Its position does not, which is said in the documents.
    let done = fleet.botctl(["switchover", "main", "--to", &second, "--force"]).await?;
    ensure!(done.code == Some(0), "switchover: {done:?}");
    login(&fleet, &second)?.wait_for(there, "pgoutput", STEP).await?;
    fleet.stop().await
}

/// More log than is kept without a slot, and a checkpoint that removes what may be removed.
async fn write_much(login: &Login) -> Result<()> {
    for _ in 0..6 {
        login.execute("CREATE TABLE IF NOT EXISTS much (word text); INSERT INTO much VALUES ('more')").await?;
        login.ask("SELECT pg_switch_wal()").await?;
    }
    for _ in 0..2 {
        login.execute("CHECKPOINT").await?;
    }
    Ok(())
}

/// How often a member was copied or rewound.
fn copies_of(fleet: &Fleet, name: &str) -> Result<usize> {
    let log = fleet.postgres_bot(name)?.bot.log();
    Ok(log.matches("pg_basebackup starts").count() + log.matches("pg_rewind starts").count())
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
