//! Watchdog devices under real bots: a machine that stands still as a whole is reset before another leads, a guard that lives acts
//! first, and who must have a device and has none does not lead.

mod device;

use std::{
    fs::{self, OpenOptions, Permissions},
    io::Write,
    os::unix::fs::PermissionsExt,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use device::Device;
use fleet::{
    Fleet,
    bots::PostgresBot,
    fleet::MAIN,
    skipped,
    wait::{millis, until},
    writers::{Writers, longest_gap, two_writable},
};

const STEP: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_stands_still_is_reset_before_another_leads() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    let Some(device) = Device::new(&fleet.scratch.path().join("watchdog"))? else {
        skipped("a_machine_that_stands_still_is_reset_before_another_leads", "only root can mount a device");
        return fleet.stop().await;
    };
    add(&mut fleet, "pg-1", "required", device.path())?;
    let primary = fleet.postgres_up(STEP).await?;
    fleet.add_postgres(1)?;
    fleet.postgres_up(STEP).await?;
    ensure!(device.seen().open && device.seen().timeout_s == Some(3), "{:?}", device.seen());

    // A bot that is started again finds the device in the guard's hand, and one that does not come back never meets it.
    let bot = &mut fleet.postgres_bot_mut(&primary)?.bot;
    bot.kill();
    bot.start()?;
    fleet.postgres_up(STEP).await?;
    tokio::time::sleep(Duration::from_secs(2 * fleet.ttl_s)).await;
    let seen = device.seen();
    ensure!(seen.open && seen.reset.is_none() && seen.disarmed == 0, "a primary that is well: {seen:?}");
    println!("kept alive {} times", seen.kept);
    fleet.postgres_bot_mut(&primary)?.bot.kill();
    let other = fleet.new_primary(&primary, STEP).await?;
    let seen = device.seen();
    ensure!(!seen.open && seen.reset.is_none() && seen.disarmed == 1, "the guard acts first: {seen:?}");

    // Back to the member with the device, and then its machine stands still.
    fleet.postgres_bot_mut(&primary)?.bot.start()?;
    fleet.postgres_up(STEP).await?;
    let switched = fleet.botctl(["switchover", MAIN, "--to", primary.as_str(), "--force"]).await?;
    ensure!(switched.code == Some(0), "{switched:?}");
    until("the device is open", STEP, || async {
        let seen = device.seen();
        if seen.open { Ok(()) } else { Err(format!("{seen:?}")) }
    })
    .await?;
    fleet.postgres_up(STEP).await?;
    let writers = Writers::start(&fleet.superuser(), STEP).await?;
    let (moment, frozen) = (writers.now(), Instant::now());
    device.stands_for(fleet.postgres_bot_mut(&primary)?.freeze_node()?);
    let port = fleet.postgres_bot(&other)?.port;
    writers.acknowledged_by(Some(port), moment, STEP).await?;
    let led = frozen.elapsed();
    let reset = device.seen().reset.context("the machine was not reset")?.saturating_duration_since(frozen);
    println!(
        "machine frozen: reset after {} ms, the next one's first write after {} ms",
        reset.as_millis(),
        led.as_millis()
    );
    ensure!(reset < led, "another led before the machine was reset");
    ensure!(reset < Duration::from_secs(fleet.ttl_s), "the lease could have run out before");
    let acknowledged = writers.finish().await?;
    println!("{} ms without a write", millis(longest_gap(&acknowledged, moment)));
    ensure!(two_writable(&acknowledged) == Duration::ZERO, "two servers took writes");
    // The machine comes back.
    fleet.postgres_bot_mut(&primary)?.bot.start()?;
    fleet.postgres_up(STEP).await?;
    drop(device);
    fleet.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_must_have_a_device_and_has_none_does_not_lead() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(1)?;
    let primary = fleet.postgres_up(STEP).await?;
    let file = fleet.scratch.path().join("no-device");
    add(&mut fleet, "pg-2", "required", &file)?;
    fleet.postgres_up(STEP).await?;
    fleet.postgres_bot_mut(&primary)?.kill_node();
    // Nothing is there.
    says(&fleet, "pg-2", "cannot be written to").await?;
    // A file that anybody may write to is there, which is no device: this shows when it is opened.
    fs::write(&file, "")?;
    fs::set_permissions(&file, Permissions::from_mode(0o666))?;
    says(&fleet, "pg-2", "is no watchdog device").await?;
    let status = fleet.postgres_bot("pg-2")?.bot.get("/patroni").await?.text;
    let status: serde_json::Value = serde_json::from_str(&status)?;
    ensure!(status["watchdog_failed"] == true, "{status}");
    ensure!(fs::read(&file)?.is_empty(), "it was written to");
    fleet.postgres_bot_mut(&primary)?.bot.start()?;
    let leads = fleet.postgres_up(STEP).await?;
    ensure!(leads == primary, "{leads} leads");

    // Who need not have one goes on without.
    add(&mut fleet, "pg-3", "automatic", &file)?;
    fleet.postgres_up(STEP).await?;
    let switched = fleet.botctl(["switchover", MAIN, "--to", "pg-3", "--force"]).await?;
    ensure!(switched.code == Some(0), "{switched:?}");
    let report = fleet.postgres_bot("pg-3")?.bot.report().await?;
    ensure!(report.troubles.iter().any(|trouble| trouble.contains("no watchdog device")), "{report:?}");
    fleet.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_waits_too_long_is_closed_again() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    let Some(device) = Device::new(&fleet.scratch.path().join("watchdog"))? else {
        skipped("a_device_that_waits_too_long_is_closed_again", "only root can mount a device");
        return fleet.stop().await;
    };
    device.insist(4);
    add(&mut fleet, "pg-1", "automatic", device.path())?;
    fleet.postgres_up(STEP).await?;
    let report = fleet.postgres_bot("pg-1")?.bot.report().await?;
    ensure!(report.troubles.iter().any(|t| t.contains("waits 4 s; at most 3 s are safe")), "{report:?}");
    let seen = device.seen();
    ensure!(!seen.open && seen.disarmed == 1 && seen.reset.is_none(), "{seen:?}");
    drop(device);
    fleet.stop().await
}

/// Another member, with a device.
fn add(fleet: &mut Fleet, name: &str, mode: &str, device: &Path) -> Result<()> {
    let mut bot = PostgresBot::new(&fleet.place(), MAIN, name, &fleet.passwords)?;
    let mut config = OpenOptions::new().append(true).open(&bot.bot.config).context("open the configuration")?;
    writeln!(config, "watchdog:\n  mode: {mode}\n  device: {}", device.display())?;
    bot.bot.start()?;
    fleet.postgres.push(bot);
    Ok(())
}

/// Waits until a member says so of why it does not lead.
async fn says(fleet: &Fleet, name: &str, what: &str) -> Result<()> {
    let bot = &fleet.postgres_bot(name)?.bot;
    until(&format!("{name} says why it does not lead"), STEP, || async {
        let report = bot.report().await.map_err(|error| format!("{error:#}"))?;
        let said = report.why_not.iter().any(|why| why.alternative == "promote" && why.because.contains(what));
        if said { Ok(()) } else { Err(format!("{report:?}")) }
    })
    .await
}
