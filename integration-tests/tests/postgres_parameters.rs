//! Parameters that Postgres does not take: they are left out and named, and keep nothing else from working.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use fleet::{Fleet, http::Http};
use hyper::Method;
use serde_json::json;

const STEP: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_misspelt_parameter_keeps_nothing_else_from_working() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(2)?;
    let first = fleet.postgres_up(Duration::from_secs(90)).await?;
    let second = fleet.postgres.iter().map(|p| p.bot.name.clone()).find(|name| *name != first).context("a replica")?;
    let parameters = json!({"max_conections": "5", "work_mem": "lots", "log_min_duration_statement": "7s"});
    let change = json!({"synchronous_mode": true, "postgresql": {"parameters": parameters}}).to_string();
    let url = format!("{}/config", fleet.postgres_bot(&first)?.bot.api_url);
    let answer = Http::new().send(Method::PATCH, &url, Some("application/json"), Bytes::from(change)).await?;
    ensure!(answer.status == 200, "PATCH /config answers {}", answer.status);

    for name in [&first, &second] {
        // The good one of the three is in force.
        let server = fleet.superuser().at(fleet.postgres_bot(name)?.port);
        server.wait_for("SELECT current_setting('log_min_duration_statement')", "7s", STEP).await?;
        let report = fleet.postgres_bot(name)?.bot.report().await?;
        for told in
            ["max_conections is left out: Postgres says: unrecognized", "work_mem is left out: Postgres says: invalid"]
        {
            let troubles = report.troubles.join("; ");
            ensure!(troubles.contains(told), "{name} does not say that {told}: {troubles}");
        }
    }

    // The next leader takes in whom to wait for, and acknowledges.
    let done = fleet.botctl(["switchover", "main", "--to", &second, "--force"]).await?;
    ensure!(done.code == Some(0), "switchover: {done:?}");
    let server = fleet.superuser().at(fleet.postgres_bot(&second)?.port);
    server.wait_for("SELECT current_setting('synchronous_standby_names') LIKE '%pg-%'", "t", STEP).await?;
    tokio::time::timeout(STEP, server.execute("CREATE TABLE acknowledged (n int)")).await.context("no commit")??;
    fleet.stop().await
}
