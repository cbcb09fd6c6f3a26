//! Hung is dead: a primary whose postmaster stands still lives, answers nobody, and is replaced by one that does.

use std::{
    ffi::OsString,
    fs,
    io::Write,
    os::unix::fs::{MetadataExt, chown},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use fleet::{
    Fleet,
    bots::PostgresBot,
    disk::Disk,
    fleet::MAIN,
    skipped,
    wait::until,
    writers::{Writers, two_writable},
};
use rustix::process::Signal;

/// Room for a new cluster and its log, and not much more.
const DISK_MIB: u64 = 400;
const STEP: Duration = Duration::from_secs(60);
/// Ten questions until one over a new connection, three of them unanswered, the length of a lease, and a failover.
const REPLACED_WITHIN: Duration = Duration::from_secs(25);

/// Two seconds until the next write, two until it is called stalled, half a second until that is told, and a busy machine.
const SEEN_WITHIN: Duration = Duration::from_secs(8);

/// Two seconds until a write is called stalled, 15 s of patience, half a second until the server is killed, 5 s in which nothing of it
/// goes, the length of a lease, and a failover.
const STALLED_REPLACED_WITHIN: Duration = Duration::from_secs(40);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_whose_postmaster_stands_still_is_replaced() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(2)?;
    let primary = fleet.postgres_up(STEP).await?;
    let writers = Writers::start(&fleet.superuser(), STEP).await?;
    let postmaster = fleet.postgres_bot(&primary)?.postmaster().context("a postmaster")?;
    let frozen = Instant::now();
    fleet::process::signal_pid(postmaster, Signal::STOP);
    let new = fleet.new_primary(&primary, STEP).await?;
    let replaced = frozen.elapsed();
    println!("the postmaster of {primary} stands still: {new} leads after {} ms", replaced.as_millis());
    ensure!(replaced < REPLACED_WITHIN, "{replaced:?} until another led");
    ensure!(fleet.postgres_bot(&primary)?.postmaster() != Some(postmaster), "the hung server was left alive");
    comes_back(fleet, &primary, writers).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_primary_that_nobody_can_replace_is_left_as_it_is() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(1)?;
    let primary = fleet.postgres_up(STEP).await?;
    let postmaster = fleet.postgres_bot(&primary)?.postmaster().context("a postmaster")?;
    fleet::process::signal_pid(postmaster, Signal::STOP);
    tokio::time::sleep(REPLACED_WITHIN).await;
    ensure!(fleet.postgres_bot(&primary)?.postmaster() == Some(postmaster), "it was stopped for nobody");
    let why = fleet.postgres_bot(&primary)?.bot.report().await?;
    ensure!(why.troubles.iter().any(|t| t.contains("does not answer")), "its report does not say so: {why:?}");
    fleet::process::signal_pid(postmaster, Signal::CONT);
    let leads = fleet.postgres_up(STEP).await?;
    ensure!(leads == primary, "{leads} leads");
    fleet.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_whose_disk_is_full_is_replaced() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    let mut first = PostgresBot::new(&fleet.place(), MAIN, "pg-1", &fleet.passwords)?;
    let folder = first.data_dir.parent().context("a folder")?.to_owned();
    let Some(disk) = SmallDisk::mount(&folder)? else {
        skipped("a_primary_whose_disk_is_full_is_replaced", "a tmpfs can be mounted by root only");
        return Ok(());
    };
    first.bot.start()?;
    fleet.postgres.push(first);
    let primary = fleet.postgres_up(STEP).await?;
    fleet.add_postgres(1)?;
    fleet.postgres_up(STEP).await?;
    let writers = Writers::start(&fleet.superuser(), STEP).await?;
    let full = Instant::now();
    disk.fill()?;
    no_write_is_promised(&fleet, &primary).await?;
    let new = fleet.new_primary(&primary, STEP).await?;
    println!("the disk of {primary} is full: {new} leads after {} ms", full.elapsed().as_millis());
    disk.make_room()?;
    comes_back(fleet, &primary, writers).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_whose_pg_wal_is_on_a_disk_that_stalls_is_replaced() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.add_postgres(1)?;
    let primary = fleet.postgres_up(STEP).await?;
    let data_dir = fleet.postgres_bot(&primary)?.data_dir.clone();
    let folder = data_dir.with_file_name("wal");
    let disk = match Disk::mount(&fleet.scratch.path().join("wal.disk"), &folder) {
        Ok(disk) => disk,
        Err(error) => {
            skipped("a_primary_whose_pg_wal_is_on_a_disk_that_stalls_is_replaced", error);
            return Ok(());
        }
    };
    fleet.postgres_bot_mut(&primary)?.bot.stop();
    move_and_link(&data_dir.join("pg_wal"), &folder)?;
    fleet.postgres_bot_mut(&primary)?.bot.start()?;
    fleet.postgres_up(STEP).await?;
    fleet.add_postgres(1)?;
    fleet.postgres_up(STEP).await?;
    let writers = Writers::start(&fleet.superuser(), STEP).await?;
    let stalled = Instant::now();
    disk.stall()?;
    no_write_is_promised(&fleet, &primary).await?;
    let new = fleet.new_primary(&primary, STEP).await?;
    let replaced = stalled.elapsed();
    println!("the disk of pg_wal of {primary} stalls: {new} leads after {} ms", replaced.as_millis());
    ensure!(replaced < STALLED_REPLACED_WITHIN, "{replaced:?} until another led");
    disk.go_on()?;
    comes_back(fleet, &primary, writers).await
}

/// Moves a folder onto a disk, and leaves a link to it behind.
fn move_and_link(folder: &Path, disk: &Path) -> Result<()> {
    let owner = fs::metadata(folder)?;
    chown(disk, Some(owner.uid()), Some(owner.gid()))?;
    let there = disk.join("pg_wal");
    fleet::process::run_now("cp", &["--archive", &folder.to_string_lossy(), &there.to_string_lossy()])?;
    fs::remove_dir_all(folder)?;
    std::os::unix::fs::symlink(&there, folder).context("link to the disk")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_whose_disk_stalls_is_replaced_though_it_cannot_be_killed() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    let mut first = PostgresBot::new(&fleet.place(), MAIN, "pg-1", &fleet.passwords)?;
    let folder = first.data_dir.parent().context("a folder")?.to_owned();
    let below = fs::read_dir(&folder)?.count();
    ensure!(below == 0, "{} things would be hidden below a disk", below);
    let owner = fs::metadata(&folder)?;
    let disk = match Disk::mount(&fleet.scratch.path().join("pg-1.disk"), &folder) {
        Ok(disk) => disk,
        Err(error) => {
            skipped("a_primary_whose_disk_stalls_is_replaced_though_it_cannot_be_killed", error);
            return Ok(());
        }
    };
    chown(&folder, Some(owner.uid()), Some(owner.gid()))?;
    first.bot.start()?;
    fleet.postgres.push(first);
    let primary = fleet.postgres_up(STEP).await?;
    fleet.add_postgres(1)?;
    fleet.postgres_up(STEP).await?;
    let writers = Writers::start(&fleet.superuser(), STEP).await?;
    let stalled = Instant::now();
    disk.stall()?;
    let new = fleet.new_primary(&primary, STEP).await?;
    let replaced = stalled.elapsed();
    println!("the disk of {primary} stalls: {new} leads after {} ms", replaced.as_millis());
    ensure!(replaced < STALLED_REPLACED_WITHIN, "{replaced:?} until another led");
    disk.go_on()?;
    comes_back(fleet, &primary, writers).await
}

/// Before anybody else leads, no client is sent for writes to a primary that cannot take any.
async fn no_write_is_promised(fleet: &Fleet, primary: &str) -> Result<()> {
    until("a primary with a bad disk fails its health check", SEEN_WITHIN, || async {
        let bot = &fleet.postgres_bot(primary).map_err(|e| e.to_string())?.bot;
        let answers = [bot.get("/primary").await, bot.get("/read-write").await];
        let codes = answers.map(|answer| answer.map_or(0, |answer| answer.status));
        if codes == [503, 503] { Ok(()) } else { Err(format!("{codes:?}")) }
    })
    .await
}

/// The old primary follows the new one, and there were never two.
async fn comes_back(fleet: Fleet, primary: &str, writers: Writers) -> Result<()> {
    until("the old primary streams", STEP, || async {
        let now = fleet.store.look(MAIN).await?;
        if now.streaming().contains(&primary) { Ok(()) } else { Err(now.summary()) }
    })
    .await?;
    let both = two_writable(&writers.finish().await?);
    ensure!(both == Duration::ZERO, "two servers took writes for {both:?}");
    fleet.stop().await
}

/// A file system of its own below a folder that keeps its owner; unmounted when dropped.
struct SmallDisk {
    folder: PathBuf,
}

impl SmallDisk {
    /// Nothing if this user may not mount.
    fn mount(folder: &Path) -> Result<Option<Self>> {
        let before = fs::metadata(folder).context("look at the folder")?;
        let options = format!("size={DISK_MIB}m,mode=700,uid={},gid={}", before.uid(), before.gid());
        // What a bot has written there already stays below the mount.
        let files: Vec<(OsString, Vec<u8>)> = fs::read_dir(folder)?
            .filter_map(|entry| Some((entry.ok()?.file_name(), ())))
            .filter_map(|(name, ())| Some((name.clone(), fs::read(folder.join(name)).ok()?)))
            .collect();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(folder).output()?;
        if !mounted.status.success() {
            eprintln!("mount: {}", String::from_utf8_lossy(&mounted.stderr).trim());
            return Ok(None);
        }
        for (name, text) in files {
            fs::write(folder.join(&name), text)?;
            chown(folder.join(name), Some(before.uid()), Some(before.gid()))?;
        }
        Ok(Some(Self { folder: folder.to_owned() }))
    }

    fn fill(&self) -> Result<()> {
        let mut file = fs::File::create(self.folder.join("filler"))?;
        let page = vec![0; 64 * 1024];
        // Until there is no room.
        while file.write_all(&page).is_ok() {}
        Ok(())
    }

    fn make_room(&self) -> Result<()> {
        fs::remove_file(self.folder.join("filler")).context("remove what fills the disk")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _best_effort = Command::new("umount").arg("--lazy").arg(&self.folder).status();
    }
}
