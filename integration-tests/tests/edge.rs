//! The edge: SQL and pages through a real HAProxy, while primaries move, bots die and etcd stops.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fleet::{
    Fleet,
    bots::{EdgeBot, Serves},
    clients::{Clients, Connects},
    fleet::{EDGE, MAIN, WEB, plain_site},
    http::{Http, Load},
    sql::Writer,
    wait::{millis, until},
};

const STEP: Duration = Duration::from_secs(60);
const SWITCHOVERS: usize = 5;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sql_finds_the_primary_wherever_it_is() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(3)?;
    let mut edge = EdgeBot::new(&fleet.place(), EDGE, "edge-1")?;
    edge.bot.start()?;
    let first = fleet.postgres_up(Duration::from_secs(90)).await?;
    ensure!(fleet.acknowledged(STEP).await? == first, "{first} leads");
    let login = fleet.superuser().at(edge.primary);
    login.execute("CREATE TABLE kept (word text); INSERT INTO kept VALUES ('first')").await?;
    fleet.superuser().at(edge.replicas).wait_for("SELECT pg_is_in_recovery()", "t", STEP).await?;
    fleet.superuser().at(edge.replicas).wait_for("SELECT word FROM kept", "first", STEP).await?;

    let second = switches_over(&fleet, &edge, &first).await?;
    a_killed_bot_keeps_the_routes(&fleet, &mut edge, &second).await?;
    let third = checks_find_the_primary_without_the_bot(&fleet, &mut edge, &second).await?;
    // All follow the new primary: one that is lost before that leaves a cluster that waits for an operator.
    fleet.postgres_up(STEP).await?;
    etcd_stops_and_the_routes_stay(&fleet, &edge).await?;
    loses_the_primarys_node(&mut fleet, &edge, &third).await?;

    let proxy = edge.proxy().context("the proxy lives")?;
    ensure!(edge.bot.stop(), "the edge bot stops cleanly");
    ensure!(edge.proxy() == Some(proxy), "the proxy outlives an orderly stop of its bot");
    ensure!(login.ask("SELECT word FROM kept LIMIT 1").await? == "first", "and routes on");
    drop(edge);
    fleet.stop().await
}

/// A planned switchover: who writes through the edge waits, and loses nothing.
async fn switches_over(fleet: &Fleet, edge: &EdgeBot, old: &str) -> Result<String> {
    let login = fleet.superuser().at(edge.primary);
    let writer = Writer::start(&login).await?;
    let to = fleet.postgres.iter().map(|p| p.bot.name.clone()).find(|n| n != old).context("another")?;
    fleet.caught_up(&to, STEP).await?;
    let began = Instant::now();
    let done = fleet.botctl(["switchover", MAIN, "--to", &to, "--force"]).await?;
    ensure!(done.code == Some(0), "botctl switchover ends with {:?}: {}{}", done.code, done.stdout, done.stderr);
    ensure!(fleet.new_primary(old, STEP).await? == to, "{to} leads");
    let led = Instant::now();
    ensure!(fleet.acknowledged(STEP).await? == to, "the edge routes to {to}");
    println!("acknowledged no later than {} ms after etcd showed the new primary", millis(led.elapsed()));
    writer.writes_after(Instant::now(), STEP).await?;
    let (gap, refused) = (writer.longest_gap_since(began), writer.refused());
    println!("switchover through the edge: {gap} ms without a write, {refused} attempts broken");
    let tally = writer.finish().await?;
    ensure!(tally.lost == 0, "a switchover lost writes: {tally:?}");
    ensure!(gap < 10_000, "{gap} ms without a write");
    Ok(to)
}

/// The bot is killed: nobody notices. It comes back: it changes nothing.
async fn a_killed_bot_keeps_the_routes(fleet: &Fleet, edge: &mut EdgeBot, primary: &str) -> Result<()> {
    settled(edge).await?;
    let proxy = edge.proxy().context("the proxy lives")?;
    let login = fleet.superuser().at(edge.primary);
    let writer = Writer::start(&login).await?;
    let killed = Instant::now();
    edge.bot.kill();
    until("its member key is gone", STEP, || async {
        let now = fleet.store.look(EDGE).await?;
        if now.members().is_empty() { Ok(()) } else { Err(now.summary()) }
    })
    .await?;
    login.execute("INSERT INTO kept VALUES ('without the bot')").await?;
    writer.writes_after(Instant::now(), STEP).await?;
    edge.bot.start()?;
    ensure!(fleet.acknowledged(STEP).await? == primary, "{primary} leads");
    let report = edge.bot.report().await?;
    ensure!(report.doing.contains("adopted"), "it has adopted the proxy: {report:?}");
    ensure!(edge.proxy() == Some(proxy), "the proxy is the same process");
    let commands = edge.bot.metric("edge_proxy_commands_total").await?;
    ensure!(commands == 0, "a restarted bot has sent {commands} commands to a proxy that was in order");
    let (gap, refused) = (writer.longest_gap_since(killed), writer.refused());
    println!("edge bot killed and restarted: {gap} ms without a write, {refused} attempts broken, {commands} commands");
    ensure!(refused == 0, "writes were refused, though nothing but the bot was away");
    ensure!(writer.finish().await?.lost == 0, "nothing is lost");
    Ok(())
}

/// The bot is dead while the primary moves: the proxy's own checks find the new one.
async fn checks_find_the_primary_without_the_bot(fleet: &Fleet, edge: &mut EdgeBot, old: &str) -> Result<String> {
    edge.bot.kill();
    let login = fleet.superuser().at(edge.primary);
    let writer = Writer::start(&login).await?;
    let began = Instant::now();
    let done = fleet.botctl(["switchover", MAIN, "--force"]).await?;
    ensure!(done.code == Some(0), "botctl switchover ends with {:?}: {}{}", done.code, done.stdout, done.stderr);
    let new = fleet.new_primary(old, STEP).await?;
    writer.writes_after(Instant::now(), STEP).await?;
    println!("switchover without the edge bot: {} ms without a write", writer.longest_gap_since(began));
    ensure!(writer.finish().await?.lost == 0, "nothing is lost");
    edge.bot.start()?;
    ensure!(fleet.acknowledged(STEP).await? == new, "{new} leads");
    Ok(new)
}

/// etcd stops: the bot changes nothing, and says so; replicas answer through it. No primary may write for longer than its lease.
async fn etcd_stops_and_the_routes_stay(fleet: &Fleet, edge: &EdgeBot) -> Result<()> {
    settled(edge).await?;
    let before = edge.bot.metric("edge_proxy_commands_total").await?;
    fleet.etcd.freeze();
    keeps(edge).await?;
    tokio::time::sleep(Duration::from_secs(2 * fleet.ttl_s)).await;
    let replicas = fleet.superuser().at(edge.replicas);
    ensure!(replicas.ask("SELECT word FROM kept LIMIT 1").await? == "first", "a replica answers through the edge");
    let after = edge.bot.metric("edge_proxy_commands_total").await?;
    ensure!(before == after, "{} commands without etcd", after - before);
    fleet.etcd.thaw();
    let login = fleet.superuser().at(edge.primary);
    until("writes go on once etcd is back", STEP, || async {
        login.execute("INSERT INTO kept VALUES ('after etcd')").await.map_err(|e| format!("{e:#}"))
    })
    .await
}

/// Waits until the bot says that it keeps its routes, for etcd is gone.
async fn keeps(edge: &EdgeBot) -> Result<()> {
    until("the bot keeps its routes", STEP, || async {
        let report = edge.bot.report().await.map_err(|e| format!("{e:#}"))?;
        if report.role == "keeping" { Ok(()) } else { Err(format!("{report:?}")) }
    })
    .await
}

/// The primary's machine is lost: who connects meanwhile is held until another accepts writes.
async fn loses_the_primarys_node(fleet: &mut Fleet, edge: &EdgeBot, old: &str) -> Result<()> {
    // What etcd shows right after an outage may be about to expire: only what lasts beyond a lease counts.
    settled(edge).await?;
    fleet.postgres_up(STEP).await?;
    let leader = fleet.acknowledged(STEP).await?;
    println!("before the loss {leader} leads ({old} led before etcd stopped)");
    let writer = Writer::start(&fleet.superuser().at(edge.primary)).await?;
    let killed = Instant::now();
    fleet.postgres_bot_mut(&leader)?.kill_node();
    fleet.new_primary(&leader, STEP).await?;
    let led = Instant::now();
    writer.writes_after(led, STEP).await?;
    println!(
        "loss of the primary's node: {} ms without a write through the edge; another led after {} ms",
        writer.longest_gap_since(killed),
        millis(led - killed)
    );
    fleet.acknowledged(STEP).await?;
    writer.finish().await?;
    fleet.postgres_bot_mut(&leader)?.bot.start()?;
    fleet.postgres_up(STEP).await?;
    Ok(())
}

/// Waits until the bot has found nothing to do for as long as it takes the proxy's checks to come to a result.
async fn settled(edge: &EdgeBot) -> Result<()> {
    const QUIET: Duration = Duration::from_secs(5);
    let mut last = (edge.bot.metric("edge_proxy_commands_total").await?, Instant::now());
    let began = Instant::now();
    while last.1.elapsed() < QUIET {
        ensure!(began.elapsed() < STEP, "the bot never comes to rest");
        let commands = edge.bot.metric("edge_proxy_commands_total").await?;
        if commands != last.0 {
            last = (commands, Instant::now());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

/// etcd is gone for several leases, and through the edge pages are read, a replica is asked, and, in failsafe mode, rows are
/// written, all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_etcd_the_edge_serves_pages_and_sql() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.dcs = String::from("    failsafe_mode: true\n");
    fleet.store.put(WEB, "config", r#"{"scaling":{"min":2,"max":2}}"#).await?;
    fleet.add_postgres(2)?;
    fleet.add_edge()?;
    let seed = fleet.scratch.dir("seed", None)?;
    plain_site(&seed, "words without etcd")?;
    fleet.add_content(&seed).await?;
    fleet.add_web(2, &Serves::Files)?;
    let primary = fleet.postgres_up(Duration::from_secs(90)).await?;
    let vouchers = fleet.postgres.len();
    until("every member is on the failsafe roll", STEP, || async {
        let now = fleet.store.look(MAIN).await?;
        let roll = now.value("failsafe").map_or(0, |roll| roll.matches("pg-").count());
        if roll == vouchers { Ok(()) } else { Err(format!("{roll} members")) }
    })
    .await?;
    fleet.serving(2, STEP).await?;
    fleet.acknowledged(STEP).await?;
    let edge = fleet.edge()?;
    let page = format!("http://127.0.0.1:{}/", edge.web);
    until("pages come through the edge", STEP, || async {
        Http::new().page(&page).await.map(drop).map_err(|e| format!("{e:#}"))
    })
    .await?;
    settled(edge).await?;
    let writer = Writer::start(&fleet.superuser().at(edge.primary)).await?;
    let replicas = fleet.superuser().at(edge.replicas);
    replicas.wait_for("SELECT count(*) > 0 FROM fleet_writes", "t", STEP).await?;
    let commands = edge.bot.metric("edge_proxy_commands_total").await?;
    let refused = writer.refused();

    fleet.etcd.freeze();
    let visitors = Load::start(2, Duration::from_millis(20), vec![page.clone()]);
    keeps(edge).await?;
    tokio::time::sleep(Duration::from_secs(3 * fleet.ttl_s)).await;
    // Every lease has ended by now, and etcd has not said a word.
    let alone = Instant::now();
    ensure!(fleet.store.look(MAIN).await.is_err(), "etcd answers");
    ensure!(Http::new().page(&page).await?.text.contains("words without etcd"), "a page through the edge");
    ensure!(replicas.ask("SELECT pg_is_in_recovery()").await? == "t", "the port for replicas leads to one");
    let written = writer.writes_after(alone, STEP).await?;
    println!("three leases without etcd: a row is written through the edge after {written} ms");
    // What was just written has come to the replica, too.
    let last = fleet.superuser().at(edge.primary).ask("SELECT max(id) FROM fleet_writes").await?;
    replicas.wait_for(&format!("SELECT max(id) >= {last} FROM fleet_writes"), "t", STEP).await?;
    let tally = visitors.finish().await;
    ensure!(tally.answered > 0 && tally.failed == 0, "visitors without etcd: {tally:?}");
    ensure!(writer.refused() == refused, "a write was refused: {}", writer.last_error());
    let sent = edge.bot.metric("edge_proxy_commands_total").await? - commands;
    ensure!(sent == 0, "{sent} commands without etcd");

    fleet.etcd.thaw();
    // The leases have ended meanwhile: for a moment etcd shows no leader.
    let now = fleet.acknowledged(STEP).await?;
    ensure!(now == primary, "{now} leads, and {primary} did all the time");
    let edge = fleet.edge()?;
    settled(edge).await?;
    ensure!(writer.finish().await?.lost == 0, "nothing is lost");
    fleet.stop().await
}

/// Clients that know of the edge alone and retry nothing lose no transaction in planned switchovers; pools lose none to speak
/// of; an edge bot that stands still costs a bounded time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_switchover_through_the_edge_fails_no_transaction() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(3)?;
    fleet.add_edge()?;
    fleet.postgres_up(Duration::from_secs(90)).await?;
    let mut leader = fleet.acknowledged(STEP).await?;
    let login = fleet.superuser().at(fleet.edge()?.primary);
    let each = Clients::start(&login, 4, Connects::EachTime).await?;
    let pooled = Clients::start(&login, 4, Connects::Pooled).await?;
    for _ in 0..SWITCHOVERS {
        let began = Instant::now();
        leader = hands_over(&fleet, &leader).await?;
        each.commit_after(Instant::now(), STEP).await?;
        println!("{leader} leads; {} ms without a commit through the edge", each.longest_gap_since(began));
        // All follow, so that the next one is ready at once.
        fleet.postgres_up(STEP).await?;
    }
    let (each, pooled) = (each.finish().await?, pooled.finish().await?);
    println!("a connection for each transaction: {each:?}\na pool that looks before it uses one: {pooled:?}");
    ensure!(each.failed == 0, "transactions failed: {each:?}");
    ensure!(pooled.failed <= 4 * SWITCHOVERS, "a pooled connection fails once a switchover at most: {pooled:?}");

    fleet.edge[0].bot.freeze()?;
    let began = Instant::now();
    hands_over(&fleet, &leader).await?;
    let took = millis(began.elapsed());
    fleet.edge[0].bot.thaw()?;
    println!("with an edge bot that stands still, a switchover takes {took} ms");
    ensure!(took < 6_000, "an edge bot that stands still holds a switchover up for {took} ms");
    fleet.acknowledged(STEP).await?;
    fleet.stop().await
}

async fn hands_over(fleet: &Fleet, old: &str) -> Result<String> {
    let done = fleet.botctl(["switchover", MAIN, "--force"]).await?;
    ensure!(done.code == Some(0), "botctl switchover ends with {:?}: {}{}", done.code, done.stdout, done.stderr);
    fleet.new_primary(old, STEP).await
}

/// Web bots come and go behind the edge, and no request is dropped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_come_from_whoever_serves() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.store.put(WEB, "config", r#"{"scaling":{"min":2,"max":2}}"#).await?;
    let mut edge = EdgeBot::new(&fleet.place(), EDGE, "edge-1")?;
    edge.bot.start()?;
    let seed = fleet.scratch.dir("seed", None)?;
    plain_site(&seed, "words through the edge")?;
    fleet.add_content(&seed).await?;
    fleet.add_web(3, &Serves::Files)?;
    let serving = fleet.serving(2, STEP).await?;
    let page = format!("http://127.0.0.1:{}/", edge.web);
    let http = Http::new();
    let mut names = std::collections::BTreeSet::new();
    until("pages come from both", STEP, || {
        let (http, page) = (Http::new(), page.clone());
        let asked = async move { http.get(&page).await.map_err(|e| format!("{e:#}")) };
        async { asked.await.and_then(|a| if a.status == 200 { Ok(()) } else { Err(a.status.to_string()) }) }
    })
    .await?;
    let visitors = Load::start(4, Duration::from_millis(2), vec![page.clone()]);
    let began = Instant::now();
    while names.len() < 2 && began.elapsed() < STEP {
        names.insert(http.page(&page).await?.header("x-bots-name").to_owned());
    }
    ensure!(names.len() == 2, "pages come from {names:?}");

    let leaves = serving.first().context("one serves")?.name.clone();
    let bot = fleet.web.iter_mut().find(|w| w.bot.name == leaves).context("that bot")?;
    let stopped = Instant::now();
    ensure!(bot.bot.stop(), "{leaves} stops cleanly");
    until("another has taken its place", STEP, || async {
        let now = fleet.store.look(WEB).await?.serving();
        if now.len() == 2 && now.iter().all(|b| b.name != leaves) { Ok(()) } else { Err(format!("{now:?}")) }
    })
    .await?;
    println!("a web bot left, another took its place: {} ms", millis(stopped.elapsed()));
    let tally = visitors.finish().await;
    println!("{} requests through the edge, {} failed", tally.answered, tally.failed);
    ensure!(tally.failed == 0, "requests failed: {:?}", tally.first_failure);
    drop(edge);
    fleet.stop().await
}

/// While a site sleeps, the edge has a bot to ask: the first request is held there, and answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sleeping_site_wakes_through_the_edge() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.store.put(WEB, "config", r#"{"scaling":{"min":0,"max":2}}"#).await?;
    let mut edge = EdgeBot::new(&fleet.place(), EDGE, "edge-1")?;
    edge.bot.start()?;
    let seed = fleet.scratch.dir("seed", None)?;
    plain_site(&seed, "words from a sleeper")?;
    fleet.add_content(&seed).await?;
    fleet.add_web(2, &Serves::Files)?;
    until("both sleep", STEP, || async {
        let now = fleet.store.look(WEB).await?;
        let idle = now.members().values().filter(|m| m.head.state == "idle").count();
        if idle == 2 { Ok(()) } else { Err(now.summary()) }
    })
    .await?;
    // Longer than the proxy's checks need to take away one that refuses.
    settled(&edge).await?;
    let asked = Instant::now();
    let page = Http::new().page(&format!("http://127.0.0.1:{}/", edge.web)).await?;
    println!("the first page of a sleeping site came after {} ms", millis(asked.elapsed()));
    ensure!(page.text.contains("words from a sleeper"), "the page: {}", page.text);
    let serving = fleet.serving(1, STEP).await?;
    ensure!(serving.iter().any(|bot| bot.name == page.header("x-bots-name")), "it came from the one that woke");
    drop(edge);
    fleet.stop().await
}
