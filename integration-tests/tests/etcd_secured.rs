//! A Postgres cluster on an etcd that speaks TLS, asks for certificates, and has users: it elects a leader, outlives a restart
//! of etcd that forgets every login, and is operated by botctl.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use fleet::{Fleet, fleet::MAIN, sql::Writer, wait::until};

const STEP: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_lives_on_an_etcd_with_tls_and_users() -> Result<()> {
    let mut fleet = Fleet::with_secured_etcd().await?;
    fleet.add_postgres(2)?;
    let primary = fleet.postgres_up(Duration::from_secs(90)).await?;
    let listed = fleet.botctl(["list"]).await?;
    ensure!(listed.code == Some(0) && listed.stdout.contains(&primary), "botctl list: {listed:?}");
    only_who_may_look_does(&fleet).await?;

    let writer = Writer::start(&fleet.superuser()).await?;
    let restarted = Instant::now();
    fleet.etcd.kill_member(0);
    fleet.etcd.start_member(0)?;
    // A restarted etcd gives every lease its time anew: longer than that, and somebody has not found back.
    tokio::time::sleep(Duration::from_secs(2 * fleet.ttl_s)).await;
    let gap = writer.longest_gap_since(restarted);
    println!("etcd restarted: {gap} ms without a write");
    let now = fleet.store.scope(MAIN).await?;
    ensure!(now.primary() == Some(primary.as_str()), "the primary was {primary}: {}", now.summary());
    ensure!(now.members().len() == 2 && writer.refused() == 0, "a member or a write is lost: {}", now.summary());

    let switched = fleet.botctl(["switchover", MAIN, "--force"]).await?;
    ensure!(switched.code == Some(0), "botctl switchover: {switched:?}");
    fleet.new_primary(&primary, STEP).await?;
    fleet.postgres_up(STEP).await?;
    let tally = writer.finish().await?;
    ensure!(tally.lost == 0, "acknowledged writes are lost: {tally:?}");
    let password = fleet.etcd.access().password.map(|password| password.expose().to_owned()).unwrap_or_default();
    for bot in &fleet.postgres {
        let log = bot.bot.log();
        ensure!(!log.contains(&password), "{} writes its password down", bot.bot.name);
        ensure!(!log.contains("ERROR"), "{} has something to complain of: {log}", bot.bot.name);
    }
    fleet.stop().await
}

async fn only_who_may_look_does(fleet: &Fleet) -> Result<()> {
    let guessed = fleet.scratch.file("guessed", "guessed", None)?;
    let stranger = fleet.operator()?.env("BOTCTL_ETCD_PASSWORD_FILE", guessed.to_string_lossy());
    let said = stranger.args(["list"]).run(fleet.logs(), STEP).await?;
    let expected = "etcd refuses: the login as `bots` fails: authentication failed, invalid user ID or password: correct \
                    --etcd-username or --etcd-password-file";
    ensure!(said.code == Some(1) && said.stderr.contains(expected), "botctl with a wrong password: {said:?}");
    let missing = fleet.operator()?.env("BOTCTL_ETCD_KEY", "/nowhere").args(["list"]).run(fleet.logs(), STEP).await?;
    let expected = "botctl: --etcd-key: cannot read /nowhere: ";
    ensure!(missing.code == Some(2) && missing.stderr.starts_with(expected), "botctl without its key: {missing:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bot_that_is_not_let_in_says_why_and_comes_in_once_it_is() -> Result<()> {
    let mut fleet = Fleet::with_secured_etcd().await?;
    fleet.add_postgres(1)?;
    fleet.postgres_up(Duration::from_secs(90)).await?;
    let bot = &mut fleet.postgres[0].bot;
    ensure!(bot.stop(), "it ends cleanly");
    let good = std::fs::read_to_string(&bot.config)?;
    std::fs::write(&bot.config, good.replace("  username: bots\n", "  username: nobody\n"))?;
    bot.start()?;
    until("the bot says that it is not let in", STEP, || async {
        let report = bot.report().await.map_err(|e| format!("{e:#}"))?;
        let is_told = report.troubles.iter().any(|t| t.contains("refuses: the login as `nobody` fails"));
        if is_told { Ok(()) } else { Err(format!("{report:?}")) }
    })
    .await?;
    ensure!(bot.stop(), "it ends cleanly");
    std::fs::write(&bot.config, good)?;
    bot.start()?;
    fleet.postgres_up(STEP).await?;
    fleet.stop().await
}
