//! The demo's fleet: what `demo` shows, `tour` drives and `bench-idle` measures. One of everything that a small shop has.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::{
    bots::Serves,
    cache::Cache,
    fleet::{Fleet, MAIN, SITE, UP_DEADLINE, WEB, sample_site},
    http::Http,
    store::Serving,
    wait::until,
};

/// How many of each kind there are.
const ETCD_MEMBERS: usize = 3;
const POSTGRES_BOTS: usize = 3;
const WEB_BOTS: usize = 4;

/// How many web bots serve when nobody asks for anything.
pub const SERVING_MIN: usize = 2;

/// The web fleet's dynamic configuration: small figures, so that one person's load makes it move.
const WEB_CONFIG: &str =
    r#"{"scaling":{"min":2,"max":4,"target_in_flight":4,"stable_window_s":8},"cdn_url":"http://cdn.example.org"}"#;

/// Starts the whole fleet and waits until all of it is healthy. `say` gets a line for every stage.
///
/// # Errors
/// If something does not come up.
pub async fn start(mut say: impl FnMut(&str)) -> Result<Fleet> {
    say(&format!("{ETCD_MEMBERS} members of etcd"));
    let mut fleet = Fleet::with_etcd(ETCD_MEMBERS).await?;
    fleet.store.put(WEB, "config", WEB_CONFIG).await?;
    say(&format!("{POSTGRES_BOTS} Postgres bots: one makes the cluster, the others clone it"));
    fleet.add_postgres(POSTGRES_BOTS)?;
    say("a git repository with the sample site, a content bot that watches it, and a cache that it purges");
    let purge = fleet.cache.insert(Cache::start().await?).purge();
    let more = fleet.signed_pushes()? + &purge;
    fleet.add_content_with(&sample_site(), &more).await?;
    announce_pushes(&fleet)?;
    fleet.postgres_up(UP_DEADLINE).await?;
    fleet.create_guestbook_database().await?;
    say(&format!("{WEB_BOTS} web bots with the guestbook: {SERVING_MIN} serve, the others wait for load"));
    fleet.add_web(WEB_BOTS, &Serves::guestbook(fleet.guestbook()))?;
    say("an edge bot with a HAProxy: clients find the primary, the replicas and the guestbook at one port each");
    fleet.add_edge()?;
    cache(&fleet)?.put_before(edge_page(&fleet)?.trim_end_matches('/'));
    healthy(&mut fleet).await?;
    Ok(fleet)
}

/// Waits until everything is as it is when nothing happens.
///
/// # Errors
/// If it does not become so in time.
pub async fn healthy(fleet: &mut Fleet) -> Result<()> {
    fleet.postgres_up(UP_DEADLINE).await?;
    let serving = fleet.serving(SERVING_MIN, UP_DEADLINE).await?;
    let count = fleet.web.len();
    until("all web bots serve or are idle", UP_DEADLINE, || async {
        let now = fleet.store.look(WEB).await?;
        let settled = |m: &&bots_core::wire::Member| matches!(m.head.state.as_str(), "serving" | "idle");
        if now.members().values().filter(settled).count() == count { Ok(()) } else { Err(now.summary()) }
    })
    .await?;
    fleet.acknowledged(UP_DEADLINE).await?;
    let first = serving.first().context("somebody serves")?.page();
    let http = Http::new();
    for page in [first, edge_page(fleet)?] {
        until("the guestbook's page", UP_DEADLINE, || async {
            http.page(&page).await.map(drop).map_err(|error| format!("{error:#}"))
        })
        .await?;
    }
    Ok(())
}

/// Every push is told to the content bot at once, signed.
fn announce_pushes(fleet: &Fleet) -> Result<()> {
    let bot = fleet.content.first().context("the fleet has a content bot")?;
    fleet.origin()?.notify(bot.bot.api_url.trim_start_matches("http://"), &fleet.push_secret_file()?)
}

/// The pages of all bots that serve.
///
/// # Errors
/// If the store does not answer.
pub async fn serving_pages(fleet: &Fleet) -> Result<Vec<String>> {
    Ok(fleet.store.scope(WEB).await?.serving().iter().map(Serving::page).collect())
}

/// The guestbook's page at the edge.
///
/// # Errors
/// If there is no edge.
pub fn edge_page(fleet: &Fleet) -> Result<String> {
    Ok(format!("http://127.0.0.1:{}/", fleet.edge()?.web))
}

/// The cache in front of the edge.
///
/// # Errors
/// If there is none.
pub fn cache(fleet: &Fleet) -> Result<&Cache> {
    fleet.cache.as_ref().context("this fleet has no cache")
}

/// Writes an entry into the guestbook, at whichever bot takes it, as a patient visitor does.
///
/// # Errors
/// If nobody takes it in time.
pub async fn sign(fleet: &Fleet, http: &Http, text: &str, deadline: Duration) -> Result<()> {
    until("the guestbook takes an entry", deadline, || async {
        let mut seen = String::from("nobody serves");
        for page in serving_pages(fleet).await.map_err(|e| format!("{e:#}"))? {
            match http.post_form(&format!("{page}entries"), &[("name", "tour"), ("text", text)]).await {
                Ok(answer) if answer.status < 400 => return Ok(()),
                Ok(answer) => seen = format!("{page} answers {}: {}", answer.status, answer.text.trim()),
                Err(error) => seen = format!("{error:#}"),
            }
        }
        Err(seen)
    })
    .await
}

/// Waits until every serving bot's page has all of `texts`; yields how many bots that are.
///
/// # Errors
/// If one has not in time.
pub async fn shown_everywhere(fleet: &Fleet, http: &Http, texts: &[String], deadline: Duration) -> Result<usize> {
    until("every serving bot's page has every entry", deadline, || async {
        let all = async {
            let pages = serving_pages(fleet).await?;
            ensure!(!pages.is_empty(), "nobody serves");
            for page in &pages {
                let answer = http.page(page).await?;
                if let Some(missing) = texts.iter().find(|text| !answer.text.contains(text.as_str())) {
                    bail!("{page} does not show `{missing}`");
                }
            }
            Ok(pages.len())
        };
        all.await.map_err(|error| format!("{error:#}"))
    })
    .await
}

/// What a person may try, in lines for the terminal.
///
/// # Errors
/// If a part of the fleet is missing.
pub fn introduction(fleet: &Fleet) -> Result<String> {
    let edge = fleet.edge()?;
    let botctl = crate::process::workspace_binary("botctl")?;
    let botctl = botctl.display();
    let urls = fleet.web.iter().map(|w| format!("{}/", w.url)).collect::<Vec<_>>().join(" ");
    let data = fleet.postgres.first().map(|p| p.data_dir.display().to_string()).unwrap_or_default();
    Ok(format!(
        "\
guestbook   {page}
            (through the edge; the bots behind it: {urls}
            an idle one answers 503 until load wakes it)
cache       {cache}/
            (in front of the edge: it keeps every page until the content bot purges it, after each push)
database    psql '{primary}'    who accepts writes, wherever that is
            psql '{replicas}'    who follows
push        cd {work} && $EDITOR index.html && git commit -am 'New words' && git push
look        export BOTCTL_ETCD={etcd}
            {botctl} list --watch
            {botctl} why pg-1
hand over   {botctl} switchover {MAIN} --force
break       kill -9 $(head -1 {data}/postmaster.pid)
logs        {logs}/
revisions   {botctl} history {SITE}
",
        page = edge_page(fleet)?,
        cache = cache(fleet)?.url,
        primary = fleet.guestbook().at(edge.primary).url(),
        replicas = fleet.guestbook().at(edge.replicas).plain_url(),
        work = fleet.origin()?.work().display(),
        etcd = fleet.etcd.hosts(),
        logs = fleet.logs().display(),
    ))
}
