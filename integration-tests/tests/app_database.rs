//! An app behind a web bot, and its database: after a failover its next connection lands on the new primary.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleet::{
    Fleet,
    bots::Serves,
    demo::sign,
    fleet::{WEB, sample_site},
    http::Http,
    wait::timed,
};

const STEP: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_apps_next_connection_after_a_failover_is_with_the_new_primary() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.store.put(WEB, "config", r#"{"scaling":{"min":1,"max":1}}"#).await?;
    fleet.add_postgres(2)?;
    let old = fleet.postgres_up(Duration::from_secs(90)).await?;
    fleet.create_guestbook_database().await?;
    fleet.add_content(&sample_site()).await?;
    fleet.add_web(1, &Serves::Guestbook(fleet.guestbook()))?;
    fleet.serving(1, STEP).await?;
    let http = Http::new();
    sign(&fleet, &http, "before", STEP).await?;
    ensure!(at(&fleet, &old, "before").await?, "the entry is at the primary");
    let replica = fleet.postgres.iter().map(|p| p.bot.name.clone()).find(|name| *name != old);
    fleet.caught_up(&replica.context("a replica")?, STEP).await?;

    // The node is lost, so that nothing of the old primary answers any more.
    fleet.postgres.iter_mut().filter(|p| p.bot.name == old).for_each(|p| p.kill_node());
    let new = fleet.new_primary(&old, STEP).await?;
    let ((), ms) = timed(sign(&fleet, &http, "after", STEP)).await?;
    println!("the first entry is written {ms} ms after {new} is primary");
    ensure!(at(&fleet, &new, "before").await? && at(&fleet, &new, "after").await?, "both entries are at {new}");
    let page = http.page(&format!("{}/", fleet.web[0].url)).await?;
    ensure!(page.text.contains("before") && page.text.contains("after"), "{}", page.text);
    fleet.stop().await
}

/// Whether a member's own server, asked as such, takes writes, has the entry, and has a connection of the app's.
async fn at(fleet: &Fleet, name: &str, message: &str) -> Result<bool> {
    let login = fleet.guestbook().at(fleet.postgres_bot(name)?.port);
    let query = format!(
        "SELECT NOT pg_is_in_recovery() AND EXISTS (SELECT FROM entries WHERE message = '{message}') AND \
         EXISTS (SELECT FROM pg_stat_activity WHERE usename = 'guestbook' AND pid <> pg_backend_pid())"
    );
    Ok(login.ask(&query).await? == "t")
}
