//! The live commit as files on disk: whoever follows the link finds a whole tree, whenever the bot is killed.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use fleet::{Fleet, bots::ContentBot, fleet::SITE, git::Origin, torture::Tree, wait::until};

const STEP: Duration = Duration::from_secs(60);
const ROUNDS: u64 = 20;
/// A publication takes about this long.
const SPAN_MS: u64 = 400;

async fn repository(fleet: &Fleet) -> Result<Origin> {
    let seed = fleet.scratch.dir("seed", None)?;
    let origin = Origin::new(&fleet.scratch, fleet.logs(), "site", &seed).await?;
    Tree::of(1).write(&origin)?;
    origin.push("commit 1").await?;
    Ok(origin)
}

fn exporting(fleet: &Fleet, origin: &Origin, name: &str, more: &str) -> Result<(ContentBot, PathBuf)> {
    let root = fleet.scratch.dir(&format!("out-{name}"), None)?;
    let export = format!("export:\n  root: {}\n{more}", root.display());
    let bot = ContentBot::polling(&fleet.place(), (SITE, name), &origin.url(), 1, &export)?;
    Ok((bot, root.join("current")))
}

/// Follows the link once; says which commit's tree is there, if it is a whole one.
fn follow(link: &Path) -> Result<u64> {
    let tree = fs::canonicalize(link).context("follow the link")?;
    let page = fs::read_to_string(tree.join("index.html")).with_context(|| format!("read {}", tree.display()))?;
    let number = page.split(['>', '<', ' ']).find_map(|word| word.parse().ok()).context("a number on the page")?;
    let whole = Tree::of(number).is_at(&tree).map_err(anyhow::Error::msg)?;
    ensure!(whole, "{} is no whole tree of commit {number}", tree.display());
    Ok(number)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_names_a_whole_tree_whenever_the_bot_is_killed() -> Result<()> {
    let fleet = Fleet::with_etcd(1).await?;
    let origin = repository(&fleet).await?;
    let told = fleet.scratch.path().join("told");
    let hook = format!(
        "  grace_s: 5\n  exec_hook:\n    command: [sh, -c, 'echo $CONTENT_SHA > {0}.new && mv {0}.new {0}']\n",
        told.display()
    );
    let (mut bot, link) = exporting(&fleet, &origin, "content-1", &hook)?;
    bot.bot.start()?;
    until("a first tree", STEP, || async { follow(&link).map_err(|e| format!("{e:#}")) }).await?;
    let stop = Arc::new(AtomicBool::new(false));
    let reader = {
        let (stop, link) = (Arc::clone(&stop), link.clone());
        tokio::task::spawn_blocking(move || {
            let (mut newest, mut reads) = (0, 0_u32);
            while !stop.load(Ordering::Relaxed) {
                let number = follow(&link)?;
                ensure!(number >= newest, "commit {number} after {newest}");
                (newest, reads) = (number, reads + 1);
            }
            Ok::<_, anyhow::Error>(reads)
        })
    };
    let mut last = String::new();
    for round in 2..ROUNDS + 2 {
        Tree::of(round).write(&origin)?;
        last = origin.push(&format!("commit {round}")).await?;
        let _not_up_yet = bot.notify().await;
        // Spread over a publication, in no order.
        tokio::time::sleep(Duration::from_millis(round * 137 % SPAN_MS)).await;
        bot.bot.kill();
        bot.bot.start()?;
    }
    until("the last commit is linked and told", STEP, || async {
        let linked = fs::read_link(&link).map_err(|e| e.to_string())?;
        let said = fs::read_to_string(&told).unwrap_or_default();
        if linked.ends_with(&last) && said.trim() == last { Ok(()) } else { Err(format!("{linked:?}, told {said}")) }
    })
    .await?;
    until("old trees are gone", STEP, || async {
        let trees = link.with_file_name(".worktrees");
        let names = fs::read_dir(trees).map_err(|e| e.to_string())?.flatten().map(|e| e.file_name());
        let names: Vec<_> = names.filter(|name| name != ".lock").collect();
        if names.len() == 1 { Ok(()) } else { Err(format!("{names:?}")) }
    })
    .await?;
    stop.store(true, Ordering::Relaxed);
    let reads = reader.await.context("the reader does not panic")??;
    println!("{ROUNDS} kills, {reads} whole trees read");
    ensure!(bot.bot.stop(), "it stops");
    fleet.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bot_that_exports_once_ends_when_the_tree_is_there_or_says_why_not() -> Result<()> {
    let fleet = Fleet::with_etcd(1).await?;
    let origin = repository(&fleet).await?;
    let (bot, link) = exporting(&fleet, &origin, "content-1", "  one_time: true\n")?;
    let done = bot.bot.run_to_end().await?;
    ensure!(done.code == Some(0), "{done:?}");
    ensure!(follow(&link)? == 1, "the tree is there");
    let (bot, link) = exporting(&fleet, &origin, "content-2", "  one_time: true\n  one_time_timeout_s: 6\n")?;
    fs::create_dir_all(&link).context("a folder in the link's place")?;
    let done = bot.bot.run_to_end().await?;
    let said = format!("{}{}", done.stdout, done.stderr);
    ensure!(done.code == Some(1) && said.contains("nothing was exported within 6.0 s"), "{done:?}");
    ensure!(said.contains("is no symbolic link"), "{said}");
    fleet.stop().await
}
