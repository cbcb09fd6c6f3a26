//! An app behind a web bot, and its database: after a failover its next connection lands on the new primary, and the requests
//! that waited for that were no load; and no more bots serve than the database has connections for.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bots_core::wire::{Connections, LoadHistory};
use fleet::{
    Fleet,
    bots::Serves,
    demo::{serving_pages, sign},
    fleet::{MAIN, WEB, sample_site},
    http::{Http, Load},
    wait::{timed, until},
};

const STEP: Duration = Duration::from_secs(60);

/// Visitors of whom a fraction of one is in flight while the database answers, and all are while it does not: then they would
/// call for every bot that there is.
const VISITORS: usize = 8;
const PAUSE: Duration = Duration::from_millis(250);
const SCALING: &str = r#"{"scaling":{"min":1,"max":3,"target_in_flight":2}}"#;

/// What one bot carries by that, in thousandths of a request.
const CARRIED_MILLI: u64 = 2_000;

/// Longer than web bots hold still after a failover: what they would do late, they have done by then.
const AFTERMATH: Duration = Duration::from_secs(6);

/// More web bots than the database has connections for, and how many connections each says that its app may hold.
const WISHED: usize = 4;
const CONNECTIONS_EACH: u32 = 10;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_bots_serve_than_the_database_has_connections_for() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.store.put(WEB, "config", &format!(r#"{{"scaling":{{"min":{WISHED},"max":{WISHED}}}}}"#)).await?;
    fleet.add_postgres(1)?;
    let primary = fleet.postgres_up(Duration::from_secs(90)).await?;
    let told = until("the primary says how many connections it takes", STEP, || async {
        let facts = fleet.store.look(MAIN).await?.postgres(&primary);
        facts.as_ref().and_then(|facts| facts.connections).ok_or_else(|| format!("{facts:?}"))
    })
    .await?;
    let login = fleet.superuser();
    let shown = async |name: &str| login.ask(&format!("SHOW {name}")).await?.parse::<u32>().context("a number");
    let real =
        Connections { max: shown("max_connections").await?, reserved: shown("superuser_reserved_connections").await? };
    ensure!(told == real, "the bot says {told:?}, the server has {real:?}");
    // A flip replaces the apps of all bots at once: each has two then.
    let bots_max = usize::try_from((real.max - real.reserved) / CONNECTIONS_EACH / 2).context("a small number")?;
    ensure!((1..WISHED).contains(&bots_max), "{bots_max} bots: the figures of this test do not fit {real:?}");

    fleet.create_guestbook_database().await?;
    fleet.add_content(&sample_site()).await?;
    let serves = Serves::Guestbook { login: fleet.guestbook(), connections: CONNECTIONS_EACH };
    fleet.add_web(WISHED, &serves)?;
    fleet.serving(bots_max, STEP).await?;
    until("somebody says what is in the way", STEP, || async {
        let now = fleet.store.look(WEB).await?;
        let troubles: Vec<String> = now.members().keys().filter_map(|name| now.web(name)?.trouble).collect();
        let said = troubles.iter().any(|trouble| trouble.contains(&format!("connections for {bots_max} bots")));
        if said { Ok(()) } else { Err(format!("{troubles:?}; {}", now.summary())) }
    })
    .await?;
    let began = Instant::now();
    while began.elapsed() < AFTERMATH {
        let now = fleet.store.scope(WEB).await?;
        let places = now.below("load/").filter(|(slot, _)| slot.parse::<u32>().is_ok()).count();
        ensure!(places == bots_max && now.serving().len() == bots_max, "{places} places; {}", now.summary());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    sign(&fleet, &Http::new(), "within the budget", STEP).await?;
    fleet.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_apps_next_connection_after_a_failover_is_with_the_new_primary() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.store.put(WEB, "config", SCALING).await?;
    fleet.add_postgres(2)?;
    let old = fleet.postgres_up(Duration::from_secs(90)).await?;
    fleet.create_guestbook_database().await?;
    fleet.add_content(&sample_site()).await?;
    fleet.add_web(3, &Serves::guestbook(fleet.guestbook()))?;
    fleet.serving(1, STEP).await?;
    let http = Http::new();
    sign(&fleet, &http, "before", STEP).await?;
    ensure!(at(&fleet, &old, "before").await?, "the entry is at the primary");
    let replica = fleet.postgres.iter().map(|p| p.bot.name.clone()).find(|name| *name != old);
    fleet.caught_up(&replica.context("a replica")?, STEP).await?;

    let visitors = Load::start(VISITORS, PAUSE, serving_pages(&fleet).await?);
    let changes = count_changes(&fleet).await?;

    // The node is lost, so that nothing of the old primary answers any more.
    fleet.postgres.iter_mut().filter(|p| p.bot.name == old).for_each(|p| p.kill_node());
    until("the visitors who wait look like load", STEP, || async {
        let now = fleet.store.look(WEB).await?;
        let loads = now.members().keys().filter_map(|name| now.web(name)?.load);
        let milli: u64 = loads.map(|load| load.in_flight_milli).sum();
        if milli > 2 * CARRIED_MILLI { Ok(()) } else { Err(format!("{milli} thousandths in flight")) }
    })
    .await?;
    let new = fleet.new_primary(&old, STEP).await?;
    let ((), ms) = timed(sign(&fleet, &http, "after", STEP)).await?;
    println!("the first entry is written {ms} ms after {new} is primary");
    ensure!(at(&fleet, &new, "before").await? && at(&fleet, &new, "after").await?, "both entries are at {new}");
    tokio::time::sleep(AFTERMATH).await;
    visitors.finish().await;
    ensure!(count_changes(&fleet).await? == changes, "what waits for the database is not load");
    let first = serving_pages(&fleet).await?.into_iter().next().context("somebody serves")?;
    let page = http.page(&first).await?;
    ensure!(page.text.contains("before") && page.text.contains("after"), "{}", page.text);
    fleet.stop().await
}

/// How often the number of load messages was changed.
async fn count_changes(fleet: &Fleet) -> Result<usize> {
    let now = fleet.store.scope(WEB).await?;
    let history: LoadHistory = serde_json::from_str(now.value("load/history").context("a first message was posted")?)?;
    Ok(history.changes.len())
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
