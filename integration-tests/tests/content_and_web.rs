//! A site from commit to page: published by poll and by push, flipped without a dropped request, kept through an origin
//! that is away, that is too large, and that forgets a commit.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use fleet::{
    Fleet,
    bots::{ContentBot, Serves},
    fleet::{SITE, WEB, plain_site},
    git::Origin,
    http::{Http, Load},
    process::{Program, system_binary},
    wait::until,
};

const STEP: Duration = Duration::from_secs(40);

/// A content bot and two web bots that both serve the files of a small site.
async fn site() -> Result<Fleet> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.store.put(WEB, "config", r#"{"scaling":{"min":2,"max":2}}"#).await?;
    let seed = fleet.scratch.dir("seed", None)?;
    plain_site(&seed, "the first words")?;
    fleet.add_content(&seed).await?;
    fleet.add_web(2, &Serves::Files)?;
    fleet.serving(2, STEP).await?;
    Ok(fleet)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_is_on_every_page_and_no_request_is_dropped() -> Result<()> {
    let fleet = site().await?;
    let http = Http::new();
    let first = fleet.store.scope(SITE).await?.live().context("a revision is live")?;
    for web in &fleet.web {
        let page = http.page(&format!("{}/", web.url)).await?;
        ensure!(page.text.contains("the first words") && page.revision() == first.sha, "{page:?}");
        ensure!(page.header("x-bots-name") == web.bot.name, "{page:?}");
        ensure!(http.get(&format!("{}/nothing-here", web.url)).await?.status == 404, "a page that is not there");
        for secret in ["/.git/config", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd"] {
            ensure!(http.get(&format!("{}{secret}", web.url)).await?.status != 200, "{secret} is served");
        }
    }

    let pages = fleet.web.iter().map(|web| format!("{}/", web.url)).collect();
    let visitors = Load::start(6, Duration::from_millis(2), pages);
    let mut commits = vec![first.sha];
    for n in 2..=4 {
        let origin = fleet.origin()?;
        plain_site(origin.work(), &format!("words of push {n}"))?;
        let sha = origin.push(&format!("push {n}")).await?;
        let began = Instant::now();
        if n != 3 {
            // Without a word, the poll finds it.
            fleet.content[0].notify().await?;
        }
        until("every web bot serves the push", STEP, || async {
            let serving = fleet.store.look(WEB).await?.serving();
            let shas = serving.iter().map(|bot| bot.sha.clone()).collect::<Vec<_>>();
            if shas.len() == 2 && shas.iter().all(|s| *s == sha) { Ok(()) } else { Err(shas.join(", ")) }
        })
        .await?;
        println!(
            "push {n} ({}): served by all after {} ms",
            if n == 3 { "polled" } else { "told" },
            began.elapsed().as_millis()
        );
        commits.push(sha);
    }
    let tally = visitors.finish().await;
    ensure!(tally.failed == 0, "{} of {} requests failed: {:?}", tally.failed, tally.answered, tally.first_failure);
    ensure!(tally.by_revision.keys().all(|sha| commits.contains(sha)), "answers of other commits: {tally:?}");
    ensure!(tally.by_revision.len() == commits.len(), "answers of every commit: {tally:?}");
    println!("{} requests across three flips, none failed", tally.answered);
    fleet.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_site_outlives_a_bad_origin() -> Result<()> {
    let mut fleet = site().await?;
    let first = fleet.store.scope(SITE).await?.live().context("a revision is live")?;
    a_forgotten_commit_leaves_the_site_up(&fleet).await?;
    an_origin_that_is_away_is_retried(&fleet).await?;
    too_large_a_repository_is_refused(&mut fleet).await?;
    let live = fleet.store.scope(SITE).await?.live().context("a revision is live")?;
    ensure!(live.generation > first.generation, "generations only grow: {live:?}");
    fleet.stop().await
}

/// A commit is published and then dropped by a force-push: pages go on, and the branch's new end is published.
async fn a_forgotten_commit_leaves_the_site_up(fleet: &Fleet) -> Result<()> {
    let origin = fleet.origin()?;
    plain_site(origin.work(), "words to be regretted")?;
    let regretted = origin.push("regretted").await?;
    fleet.content[0].notify().await?;
    wait_live(fleet, &regretted).await?;
    origin.drop_last_commit().await?;
    plain_site(origin.work(), "better words")?;
    let better = origin.push("better").await?;
    fleet.content[0].notify().await?;
    wait_live(fleet, &better).await?;
    fleet.serving(2, STEP).await?;
    let page = Http::new().page(&format!("{}/", fleet.web[0].url)).await?;
    ensure!(page.text.contains("better words"), "{page:?}");
    Ok(())
}

async fn an_origin_that_is_away_is_retried(fleet: &Fleet) -> Result<()> {
    let origin = fleet.origin()?;
    let away = origin.bare().with_extension("away");
    fs::rename(origin.bare(), &away).context("take the origin away")?;
    until("why names the origin's trouble", STEP, || async {
        let report = fleet.content[0].bot.report().await.map_err(|e| format!("{e:#}"))?;
        if report.troubles.is_empty() { Err(format!("{report:?}")) } else { Ok(()) }
    })
    .await?;
    ensure!(Http::new().page(&format!("{}/", fleet.web[1].url)).await?.status == 200, "the site stays up");
    fs::rename(&away, origin.bare()).context("bring the origin back")?;
    plain_site(origin.work(), "words after the outage")?;
    let sha = origin.push("after the outage").await?;
    wait_live(fleet, &sha).await?;
    until("the trouble is over", STEP, || async {
        let report = fleet.content[0].bot.report().await.map_err(|e| format!("{e:#}"))?;
        if report.troubles.is_empty() { Ok(()) } else { Err(report.troubles.join("; ")) }
    })
    .await
}

async fn too_large_a_repository_is_refused(fleet: &mut Fleet) -> Result<()> {
    let origin = fleet.origin()?;
    let before = fleet.store.scope(SITE).await?.live().context("a revision is live")?;
    // A second content bot with a limit far below the site: it takes over as detector, and refuses.
    let mut small = ContentBot::new(&fleet.place(), SITE, "content-2", &origin.url(), "  size_max_bytes: 65536\n")?;
    // Bytes that do not compress, so that the pack is as large as the file.
    let noise: String = (0..20_000).map(|_| bots_core::shell::instance_id()).collect();
    fs::write(origin.work().join("noise.txt"), noise).context("write a large file")?;
    ensure!(fleet.content[0].bot.stop(), "the first content bot stops");
    fleet.origin()?.push("too large").await?;
    small.bot.start()?;
    until("why names the limit", STEP, || async {
        let report = small.bot.report().await.map_err(|e| format!("{e:#}"))?;
        let said = report.troubles.iter().any(|t| t.contains("65536") || t.contains("size_max_bytes"));
        if said { Ok(()) } else { Err(format!("{report:?}")) }
    })
    .await?;
    let now = fleet.store.scope(SITE).await?.live().context("a revision is live")?;
    ensure!(now == before, "the last good revision stays: {now:?}");
    ensure!(Http::new().page(&format!("{}/", fleet.web[0].url)).await?.status == 200, "the site stays up");
    ensure!(small.bot.stop(), "the second content bot stops");
    Ok(())
}

/// The origin packs a commit for the content bot, and for nobody else. Its server calls a program of ours for every pack.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_web_bots_cost_the_origin_one_fetch() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.store.put(WEB, "config", r#"{"scaling":{"min":4,"max":4}}"#).await?;
    let seed = fleet.scratch.dir("seed", None)?;
    plain_site(&seed, "the first words")?;
    let origin = Origin::new(&fleet.scratch, fleet.logs(), "site", &seed).await?;
    let folder = fleet.scratch.path().to_owned();
    let (packs, hook, config) = (folder.join("packs"), folder.join("count-packs"), folder.join("gitconfig"));
    fs::write(&hook, format!("#!/bin/sh\necho one >> '{}'\nexec \"$@\"\n", packs.display())).context("write a hook")?;
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).context("make the hook executable")?;
    let text = format!("[uploadpack]\n\tpackObjectsHook = {}\n[safe]\n\tdirectory = *\n", hook.display());
    fs::write(&config, text).context("write git's configuration")?;
    let port = fleet::free_port().context("find a port")?;
    let words = ["daemon", "--export-all", "--reuseaddr", "--listen=127.0.0.1"].map(str::to_owned);
    let server = Program::new("git-daemon", system_binary("git", &[])?)
        .args(words.into_iter().chain([format!("--port={port}"), format!("--base-path={}", folder.display())]))
        .env("GIT_CONFIG_GLOBAL", config.display().to_string())
        .env("GIT_CONFIG_NOSYSTEM", "1");
    let mut server = server.start(fleet.logs())?;
    let packed = || fs::read_to_string(&packs).unwrap_or_default().lines().count();

    let url = format!("git://127.0.0.1:{port}/site.git");
    let mut content = ContentBot::polling(&fleet.place(), (SITE, "content-1"), &url, 3_600, "")?;
    content.bot.start()?;
    fleet.content.push(content);
    fleet.origin = Some(origin);
    fleet.add_web(4, &Serves::Files)?;
    fleet.serving(4, STEP).await?;
    ensure!(packed() == 1, "the origin has packed the first commit {} times", packed());
    let origin = fleet.origin()?;
    plain_site(origin.work(), "the next words")?;
    let sha = origin.push("the next words").await?;
    fleet.content[0].notify().await?;
    until("every web bot serves the push", STEP, || async {
        let serving = fleet.store.look(WEB).await?.serving();
        let behind = serving.iter().filter(|bot| bot.sha != sha).count();
        if serving.len() == 4 && behind == 0 { Ok(()) } else { Err(format!("{behind} of {} do not", serving.len())) }
    })
    .await?;
    ensure!(packed() == 2, "the origin has made {} packs of two commits", packed());
    ensure!(server.stop(), "git's server stops");
    fleet.stop().await
}

async fn wait_live(fleet: &Fleet, sha: &str) -> Result<()> {
    until(&format!("{sha} is live"), STEP, || async {
        let live = fleet.store.look(SITE).await?.live();
        if live.as_ref().is_some_and(|l| l.sha == sha) { Ok(()) } else { Err(format!("{live:?}")) }
    })
    .await
}
