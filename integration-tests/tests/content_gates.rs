//! Commits that must not be on every page: stopped by a program, by a canary, and by an operator's hand; and caches in front.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use fleet::{
    Fleet,
    bots::{ContentBot, Serves},
    fleet::{SITE, WEB, plain_site},
    git::Origin,
    http::{Http, Load},
    wait::until,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

const STEP: Duration = Duration::from_secs(40);

/// A cache that takes down what it is told. It answers one request a connection.
async fn cache() -> Result<(String, Arc<Mutex<Vec<String>>>)> {
    let listener = TcpListener::bind("127.0.0.1:0").await.context("bind")?;
    let address = listener.local_addr().context("its address")?;
    let told = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&told);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut buffer = vec![0; 4096];
            let read = stream.read(&mut buffer).await.unwrap_or_default();
            heard.lock().expect("not poisoned").push(String::from_utf8_lossy(&buffer[..read]).into_owned());
            let _gone = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
        }
    });
    Ok((format!("http://{address}"), told))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_commit_is_stopped_and_a_good_one_can_be_gone_back_to() -> Result<()> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.store.put(WEB, "config", r#"{"scaling":{"min":2,"max":2}}"#).await?;
    let seed = fleet.scratch.dir("seed", None)?;
    plain_site(&seed, "the first words")?;
    let origin = Origin::new(&fleet.scratch, fleet.logs(), "site", &seed).await?;
    let check = fleet.scratch.path().join("check-site");
    fs::write(&check, "#!/bin/sh\n! grep -q forbidden index.html || { echo a forbidden word; exit 1; }\n")?;
    fs::set_permissions(&check, fs::Permissions::from_mode(0o755))?;
    let (cache, told) = cache().await?;
    let key = fleet.scratch.path().join("cache-key");
    fs::write(&key, "a secret of the cache\n")?;
    let more = format!(
        "verify: {{command: ['{}']}}\ncanary: {{observe_s: 1, timeout_s: 20, paths: [/, /css/site.css]}}\n\
         purge: {{again_after_s: 1, requests: [{{method: BAN, url: '{cache}/all?{{sha}}', header_files: {{x-key: '{}'}}}}]}}\n",
        check.display(),
        key.display(),
    );
    let mut content = ContentBot::polling(&fleet.place(), (SITE, "content-1"), &origin.url(), 2, &more)?;
    content.bot.start()?;
    fleet.content.push(content);
    fleet.origin = Some(origin);
    fleet.add_web(2, &Serves::Files)?;
    fleet.serving(2, STEP).await?;
    let first = fleet.store.scope(SITE).await?.live().context("a revision is live")?.sha;

    // A program of the operator's says no.
    let bad = push(&fleet, "a forbidden word").await?;
    wait_quarantined(&fleet, &bad, "a forbidden word").await?;
    // A good one is tried on one bot, and then all serve it; the cache is told twice.
    let good = push(&fleet, "good words").await?;
    fleet.content[0].notify().await?;
    wait_live(&fleet, &good).await?;
    until("the cache is told twice", STEP, || async {
        let wanted = format!("BAN /all?{good} HTTP/1.1");
        let heard = told.lock().expect("not poisoned").clone();
        let rounds = heard.iter().filter(|one| one.starts_with(&wanted) && one.contains("a secret of the cache"));
        if rounds.count() >= 2 { Ok(()) } else { Err(format!("{heard:?}")) }
    })
    .await?;
    // One whose pages are missing does not get beyond its canary; the other bot never shows it.
    fs::remove_file(fleet.origin()?.work().join("css/site.css"))?;
    let missing = fleet.origin()?.push("a page is gone").await?;
    fleet.content[0].notify().await?;
    wait_quarantined(&fleet, &missing, "its canary, failed: /css/site.css: it answers 404").await?;
    fleet.serving(2, STEP).await?;
    let page = Http::new().page(&format!("{}/", fleet.web[1].url)).await?;
    ensure!(page.revision() == good && page.text.contains("good words"), "{page:?}");

    // The operator goes back, and a push does not undo that.
    let back = fleet.botctl(["content", "rollback", SITE, "--force"]).await?;
    ensure!(back.code == Some(0), "{back:?}");
    wait_live(&fleet, &first).await?;
    let next = push(&fleet, "the next words").await?;
    fleet.content[0].notify().await?;
    let list = fleet.botctl(["content", "list", SITE]).await?;
    ensure!(list.stdout.contains("pinned") && list.stdout.contains("quarantined"), "{}", list.stdout);
    let why = fleet.botctl(["content", "why", SITE, &bad[..7]]).await?;
    ensure!(why.stdout.contains("a forbidden word"), "{why:?}");
    let unpinned = fleet.botctl(["content", "unpin", SITE]).await?;
    ensure!(unpinned.code == Some(0), "{unpinned:?}");
    wait_live(&fleet, &next).await?;
    fleet.stop().await
}

/// A fleet with one content bot and two web bots that both serve.
async fn site(serves: &Serves) -> Result<Fleet> {
    let mut fleet = Fleet::with_etcd(1).await?;
    fleet.store.put(WEB, "config", r#"{"scaling":{"min":2,"max":2}}"#).await?;
    let seed = fleet.scratch.dir("seed", None)?;
    plain_site(&seed, "the first words")?;
    fleet.add_content(&seed).await?;
    fleet.add_web(2, serves)?;
    fleet.serving(2, STEP).await?;
    Ok(fleet)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_web_bot_can_serve_does_not_go_live() -> Result<()> {
    let mut fleet = site(&Serves::Files).await?;
    let first = fleet.store.scope(SITE).await?.live().context("a revision is live")?.sha;
    let pages = fleet.web.iter().map(|web| format!("{}/", web.url)).collect();
    let visitors = Load::start(4, Duration::from_millis(5), pages);
    fleet.origin()?.write("_redirects", "/a /b 299\n")?;
    let bad = fleet.origin()?.push("a rule that nobody can read").await?;
    fleet.content[0].notify().await?;
    wait_quarantined(&fleet, &bad, "_redirects").await?;
    let tally = visitors.finish().await;
    ensure!(tally.failed == 0, "{tally:?}");
    ensure!(tally.by_revision.keys().eq([&first]), "{tally:?}");

    // Who starts anew has what was live, and no memory of anything else.
    ensure!(fleet.web[0].bot.stop(), "the web bot stops");
    fleet.web[0].bot.start()?;
    let serving = fleet.serving(2, STEP).await?;
    ensure!(serving.iter().all(|bot| bot.sha == first), "{serving:?}");
    let page = Http::new().page(&format!("{}/", fleet.web[0].url)).await?;
    ensure!(page.revision() == first && page.text.contains("the first words"), "{page:?}");

    fs::remove_file(fleet.origin()?.work().join("_redirects"))?;
    let good = push(&fleet, "better words").await?;
    fleet.content[0].notify().await?;
    wait_live(&fleet, &good).await?;
    fleet.serving(2, STEP).await?;
    fleet.stop().await
}

/// Not a test of its own: the app that [`an_app_that_does_not_come_up_does_not_go_live`] runs.
#[test]
fn stand_in_app() -> Result<()> {
    let (Ok(content), Ok(port)) = (std::env::var("CONTENT_DIR"), std::env::var("PORT")) else { return Ok(()) };
    let page = fs::read_to_string(Path::new(&content).join("index.html")).context("read the page")?;
    ensure!(!page.contains("mistake"), "it cannot start on this page");
    let listener = std::net::TcpListener::bind(format!("127.0.0.1:{port}")).context("bind")?;
    for stream in listener.incoming() {
        let (mut stream, page) = (stream.context("accept")?, page.clone());
        std::thread::spawn(move || {
            let _head = stream.read(&mut [0; 4096]);
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", page.len());
            let _gone = stream.write_all((head + &page).as_bytes());
        });
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_that_does_not_come_up_does_not_go_live() -> Result<()> {
    let program = std::env::current_exe().context("this program")?.display().to_string();
    let command = [program.as_str(), "--exact", "stand_in_app", "--nocapture"].map(str::to_owned);
    let fleet = site(&Serves::App(command.to_vec())).await?;
    let first = fleet.store.scope(SITE).await?.live().context("a revision is live")?.sha;
    let pages = fleet.web.iter().map(|web| format!("{}/", web.url)).collect();
    let visitors = Load::start(4, Duration::from_millis(5), pages);
    let bad = push(&fleet, "a mistake").await?;
    fleet.content[0].notify().await?;
    wait_quarantined(&fleet, &bad, "the app ended before it was healthy").await?;
    let serving = fleet.serving(2, STEP).await?;
    ensure!(serving.iter().all(|bot| bot.sha == first), "{serving:?}");

    // A good one is up on every bot before it goes live.
    let good = push(&fleet, "good words").await?;
    fleet.content[0].notify().await?;
    wait_live(&fleet, &good).await?;
    fleet.serving(2, STEP).await?;
    until("visitors see it", STEP, || async {
        let tally = visitors.tally();
        if tally.by_revision.contains_key(&good) { Ok(()) } else { Err(format!("{tally:?}")) }
    })
    .await?;
    let tally = visitors.finish().await;
    ensure!(tally.failed == 0, "{tally:?}");
    ensure!(tally.by_revision.len() == 2 && !tally.by_revision.contains_key(&bad), "{tally:?}");
    fleet.stop().await
}

async fn push(fleet: &Fleet, words: &str) -> Result<String> {
    let origin = fleet.origin()?;
    plain_site(origin.work(), words)?;
    origin.push(words).await
}

async fn wait_live(fleet: &Fleet, sha: &str) -> Result<()> {
    until(&format!("{sha} is live"), STEP, || async {
        let live = fleet.store.look(SITE).await?.live();
        if live.as_ref().is_some_and(|l| l.sha == sha) { Ok(()) } else { Err(format!("{live:?}")) }
    })
    .await
}

async fn wait_quarantined(fleet: &Fleet, sha: &str, why: &str) -> Result<()> {
    until(&format!("{sha} is quarantined"), STEP, || async {
        let done = fleet.botctl(["content", "why", SITE, sha]).await.map_err(|e| format!("{e:#}"))?;
        if done.stdout.contains("is quarantined") && done.stdout.contains(why) { Ok(()) } else { Err(done.stdout) }
    })
    .await
}
