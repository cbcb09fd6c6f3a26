//! Commits that must not be on every page: stopped by a program, by a canary, and by an operator's hand; and caches in front.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use fleet::{
    Fleet,
    bots::{ContentBot, Serves},
    fleet::{SITE, WEB, plain_site},
    git::Origin,
    http::Http,
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
