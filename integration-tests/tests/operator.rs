//! What an operator asks of a fleet by `botctl web` and `botctl content`, and what comes of it: on real bots, through the program.

use std::{fs, os::unix::fs::PermissionsExt, time::Duration};

use anyhow::{Context, Result, ensure};
use fleet::{
    Fleet,
    bots::{ContentBot, OneSite, Serves},
    fleet::{SITE, WEB, plain_site},
    git::Origin,
    http::Http,
    process::Finished,
    wait::until,
};
use serde_json::{Value, json};

const STEP: Duration = Duration::from_secs(40);
/// The second site, which no web bot serves.
const DOCS: &str = "docs";
const WEB_BOTS: usize = 3;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_web_fleet_does_what_botctl_web_says() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    // A field that botctl knows nothing of stays.
    fleet.store.put(WEB, "config", r#"{"scaling":{"min":1,"max":1},"cdn_url":"http://cdn.example.org"}"#).await?;
    let seed = fleet.scratch.dir("seed", None)?;
    plain_site(&seed, "words of a fleet")?;
    fleet.add_content(&seed).await?;
    fleet.add_web(WEB_BOTS, &Serves::Files)?;
    exactly(&fleet, 1).await?;

    done(&fleet, &["web", "scale", WEB, "--min", "2", "--max", "2", "--target", "16"]).await?;
    exactly(&fleet, 2).await?;
    let scaling = json!({"min": 2, "max": 2, "target_in_flight": 16});
    ensure!(
        config(&fleet).await? == json!({"scaling": scaling, "cdn_url": "http://cdn.example.org"}),
        "the others stay"
    );
    let nothing = fleet.botctl(["web", "scale", WEB]).await?;
    ensure!(nothing.code == Some(2) && nothing.stderr.contains("--min"), "{nothing:?}");

    done(&fleet, &["web", "pin", WEB, "3"]).await?;
    exactly(&fleet, 3).await?;
    done(&fleet, &["web", "pin", WEB, "1"]).await?;
    let first = exactly(&fleet, 1).await?.remove(0);

    let read = fleet.botctl(["reload", &format!("{WEB}/{first}")]).await?;
    ensure!(read.code == Some(0) && read.stdout.contains("was read again: the app runs on"), "{read:?}");

    // Another takes the place of a bot that is drained, and the bot rests.
    done(&fleet, &["web", "drain", WEB, &first]).await?;
    until("another serves in its place", STEP, || async {
        let now = fleet.store.look(WEB).await?;
        let serving = now.serving();
        let is_other = serving.len() == 1 && serving.iter().all(|bot| bot.name != first);
        if is_other && is_resting(&now, &first) { Ok(()) } else { Err(now.summary()) }
    })
    .await?;
    // It rests, though there is a place for it.
    done(&fleet, &["web", "pin", WEB, "3"]).await?;
    let others = exactly(&fleet, 2).await?;
    ensure!(!others.contains(&first), "{first} is drained, and serves: {others:?}");
    let now = fleet.store.scope(WEB).await?;
    ensure!(now.below("load/").filter(|(slot, _)| slot.parse::<u32>().is_ok()).count() == 3, "{}", now.summary());

    // It takes the place once it may, and not before.
    done(&fleet, &["web", "wake", WEB, &first]).await?;
    ensure!(exactly(&fleet, 3).await?.contains(&first), "{first} serves again");
    ensure!(config(&fleet).await?["drain"] == json!({}), "nothing is left of the drain");
    let again = fleet.botctl(["web", "wake", WEB, &first]).await?;
    ensure!(again.code == Some(4) && again.stderr.contains("is not drained"), "{again:?}");
    fleet.stop().await
}

/// Waits until `count` bots serve and all others are idle; yields the names of the former.
async fn exactly(fleet: &Fleet, count: usize) -> Result<Vec<String>> {
    until(&format!("{count} bots serve and the others rest"), STEP, || async {
        let now = fleet.store.look(WEB).await?;
        let serving: Vec<String> = now.serving().into_iter().map(|bot| bot.name).collect();
        let idle = now.members().keys().filter(|name| is_idle(&now, name)).count();
        if serving.len() == count && idle == WEB_BOTS - count { Ok(serving) } else { Err(now.summary()) }
    })
    .await
}

fn is_idle(now: &fleet::store::ScopeNow, name: &str) -> bool {
    now.members().get(name).is_some_and(|member| member.head.node == "idle")
}

/// Whether it is idle and says that it would not serve.
fn is_resting(now: &fleet::store::ScopeNow, name: &str) -> bool {
    is_idle(now, name) && now.members().get(name).is_some_and(|member| member.head.state == "resting")
}

async fn config(fleet: &Fleet) -> Result<Value> {
    let now = fleet.store.scope(WEB).await?;
    serde_json::from_str(now.value("config").context("a configuration")?).context("read the configuration")
}

/// Two sites of one content bot: what is asked of one is done to it, and nothing happens to the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_of_two_sites_does_what_botctl_content_says() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.store.put(WEB, "config", r#"{"scaling":{"min":2,"max":2}}"#).await?;
    let two = TwoSites::start(&mut fleet).await?;
    promotes_what_is_on_trial(&fleet, &two).await?;
    pins_what_the_branch_has_left(&fleet, &two).await?;
    tries_again_what_is_quarantined(&fleet, &two).await?;
    fleet.stop().await
}

struct TwoSites {
    site: Origin,
    docs: Origin,
    /// While this file is there, no word is forbidden.
    lenient: std::path::PathBuf,
}

impl TwoSites {
    /// `site` has a canary whose trial takes longer than this test; `docs` has a program that looks for a word.
    async fn start(fleet: &mut Fleet) -> Result<Self> {
        let seed = fleet.scratch.dir("seed", None)?;
        plain_site(&seed, "the first words")?;
        let site = Origin::new(&fleet.scratch, fleet.logs(), "site", &seed).await?;
        let docs = Origin::new(&fleet.scratch, fleet.logs(), "docs", &seed).await?;
        let (check, lenient) = (fleet.scratch.path().join("check-docs"), fleet.scratch.path().join("lenient"));
        let script = format!(
            "#!/bin/sh\n[ -e '{}' ] && exit 0\n! grep -q forbidden index.html || {{ echo a forbidden word; exit 1; }}\n",
            lenient.display()
        );
        fs::write(&check, script).context("write the check")?;
        fs::set_permissions(&check, fs::Permissions::from_mode(0o755)).context("make it executable")?;
        let canary = String::from(", canary: {observe_s: 600, timeout_s: 900, paths: [/]}");
        let verify = format!(", verify: {{command: ['{}']}}", check.display());
        let sites = [
            OneSite { scope: SITE, url: site.url(), web: WEB, more: canary },
            OneSite { scope: DOCS, url: docs.url(), web: "docs-web", more: verify },
        ];
        let mut bot = ContentBot::of_sites(&fleet.place(), "content-1", &sites)?;
        bot.bot.start()?;
        fleet.content.push(bot);
        let two = Self { site, docs, lenient };
        // Before there is anybody to try it on.
        for scope in [SITE, DOCS] {
            until("the first commit is live", STEP, || async {
                fleet.store.look(scope).await?.live().map(drop).ok_or_else(|| String::from("none"))
            })
            .await?;
        }
        fleet.add_web(2, &Serves::Files)?;
        fleet.serving(2, STEP).await?;
        Ok(two)
    }
}

async fn promotes_what_is_on_trial(fleet: &Fleet, two: &TwoSites) -> Result<()> {
    let first = live(fleet, SITE).await?;
    let docs = live(fleet, DOCS).await?;
    let sha = push(&two.site, "words on trial").await?;
    until("a web bot tries it", STEP, || async {
        let now = fleet.store.look(SITE).await?;
        let canary = now.value("revision/canary").unwrap_or("none").to_owned();
        if canary.contains(&sha) { Ok(()) } else { Err(canary) }
    })
    .await?;
    ensure!(live(fleet, SITE).await? == first, "it is live while it is tried");
    let list = done(fleet, &["content", "list", SITE]).await?.stdout;
    ensure!(list.contains("canary") && list.contains(&sha[..7]), "{list}");
    let other = done(fleet, &["content", "list", DOCS]).await?.stdout;
    ensure!(!other.contains(&sha[..7]) && other.contains(&docs[..7]), "{other}");
    let why = done(fleet, &["content", "why", DOCS]).await?.stdout;
    ensure!(why.starts_with("docs/content-1 "), "{why}");
    let nothing = fleet.botctl(["content", "promote", DOCS, "--force"]).await?;
    ensure!(nothing.code == Some(1) && nothing.stderr.contains("docs has no candidate"), "{nothing:?}");

    done(fleet, &["content", "promote", SITE, "--force"]).await?;
    ensure!(live(fleet, SITE).await? == sha, "what is promoted is live, six hundred seconds early");
    fleet.serving(2, STEP).await?;
    for web in &fleet.web {
        let page = Http::new().page(&format!("{}/", web.url)).await?;
        ensure!(page.revision() == sha && page.text.contains("words on trial"), "{page:?}");
    }
    ensure!(live(fleet, DOCS).await? == docs, "the other site stays as it was");
    Ok(())
}

async fn pins_what_the_branch_has_left(fleet: &Fleet, two: &TwoSites) -> Result<()> {
    let (first, site) = (live(fleet, DOCS).await?, live(fleet, SITE).await?);
    let second = push(&two.docs, "the second words").await?;
    wait_live(fleet, &second).await?;
    done(fleet, &["content", "pin", DOCS, &first[..7], "--force"]).await?;
    ensure!(live(fleet, DOCS).await? == first, "what is pinned is live");
    let third = push(&two.docs, "the third words").await?;
    // Two looks after the push have seen it, or would have.
    let looks = async || fleet.content[0].bot.metric(r#"content_looks_total{site="docs"}"#).await;
    let before = looks().await?;
    until("the bot has looked at the origin", STEP, || async {
        let now = looks().await.map_err(|e| format!("{e:#}"))?;
        if now >= before + 2 { Ok(()) } else { Err(format!("{} looks", now - before)) }
    })
    .await?;
    ensure!(live(fleet, DOCS).await? == first, "a pin holds against a push");
    let list = done(fleet, &["content", "list", DOCS]).await?.stdout;
    ensure!(list.contains("pinned"), "{list}");
    ensure!(fleet.store.scope(SITE).await?.value("revision/pin").is_none(), "the other site is not pinned");
    done(fleet, &["content", "unpin", DOCS]).await?;
    wait_live(fleet, &third).await?;
    ensure!(live(fleet, SITE).await? == site, "the other site stays as it was");
    Ok(())
}

async fn tries_again_what_is_quarantined(fleet: &Fleet, two: &TwoSites) -> Result<()> {
    let good = live(fleet, DOCS).await?;
    let bad = push(&two.docs, "a forbidden word").await?;
    until("it is quarantined", STEP, || async {
        let why = fleet.botctl(["content", "why", DOCS, &bad]).await.map_err(|e| format!("{e:#}"))?.stdout;
        if why.contains("is quarantined") && why.contains("a forbidden word") { Ok(()) } else { Err(why) }
    })
    .await?;
    let pinned = fleet.botctl(["content", "pin", DOCS, &bad[..7], "--force"]).await?;
    ensure!(pinned.code == Some(1) && pinned.stderr.contains("content unquarantine docs"), "{pinned:?}");
    let other = fleet.botctl(["content", "unquarantine", SITE, &bad[..7]]).await?;
    ensure!(other.code == Some(4), "the other site knows nothing of it: {other:?}");
    ensure!(live(fleet, DOCS).await? == good, "what is quarantined is not live");
    fs::write(&two.lenient, "").context("allow the word")?;
    done(fleet, &["content", "unquarantine", DOCS, &bad[..7]]).await?;
    wait_live(fleet, &bad).await
}

/// botctl, which must do what it is asked.
async fn done(fleet: &Fleet, args: &[&str]) -> Result<Finished> {
    let done = fleet.botctl(args.iter().copied()).await?;
    ensure!(done.code == Some(0), "botctl {}: {done:?}", args.join(" "));
    Ok(done)
}

async fn push(origin: &Origin, words: &str) -> Result<String> {
    plain_site(origin.work(), words)?;
    origin.push(words).await
}

async fn live(fleet: &Fleet, scope: &str) -> Result<String> {
    Ok(fleet.store.scope(scope).await?.live().context("a revision is live")?.sha)
}

/// Waits until `docs` has this commit live.
async fn wait_live(fleet: &Fleet, sha: &str) -> Result<()> {
    until(&format!("{sha} is live"), STEP, || async {
        let live = fleet.store.look(DOCS).await?.live();
        if live.as_ref().is_some_and(|live| live.sha == sha) { Ok(()) } else { Err(format!("{live:?}")) }
    })
    .await
}
