//! A real Varnish in front of a web bot: what it keeps is old until the content bot purges it, and the site does not wait for a
//! cache that is away. Only where Varnish is not installed does the test stand aside, and says so.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bots_core::wire::Purged;
use fleet::{
    Fleet,
    bots::{ContentBot, Serves},
    fleet::{SITE, WEB, plain_site},
    git::Origin,
    http::{Answer, Http},
    process::system_binary,
    skipped,
    varnish::Varnish,
    wait::{millis, until},
};

const STEP: Duration = Duration::from_secs(40);

/// What the site asks of caches.
const KEEP: &str = "/*\n  Cache-Control: public, s-maxage=3600\n";

/// A page of each way to be purged, and one that nobody purges.
const BY_PURGE: &str = "/";
const BY_BAN: &str = "/css/site.css";
const BY_NOBODY: &str = "/kept.txt";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_varnish_keeps_is_purged_after_a_publication_and_a_varnish_that_is_away_delays_none() -> Result<()> {
    let Some(mut stand) = Stand::start().await? else { return Ok(()) };
    let first = stand.fleet.store.scope(SITE).await?.live().context("a revision is live")?.sha;
    for page in [BY_PURGE, BY_BAN, BY_NOBODY] {
        stand.page(page).await?;
        let kept = stand.page(page).await?;
        ensure!(is_kept(&kept) && kept.revision() == first, "{page} comes from the cache: {kept:?}");
    }

    let second = stand.push("the second words").await?;
    stand.new_in_the_cache(&second).await?;
    let kept = stand.page(BY_NOBODY).await?;
    ensure!(is_kept(&kept) && kept.revision() == first, "what nobody purges is old still: {kept:?}");
    stand.purged_twice().await?;
    ensure!(stand.trouble().await?.is_none(), "{:?}", stand.trouble().await?);

    // One that is away is told of when it is back; it may have been off, or only have stood still with all that it keeps.
    let off = stand.push_past_a_cache_that_is(Away::Off).await?;
    let frozen = stand.push_past_a_cache_that_is(Away::Frozen).await?;
    ensure!(off != frozen && stand.purges_failed().await? >= 2, "both were counted");
    ensure!(stand.varnish.stop(), "varnish stops");
    stand.fleet.stop().await
}

/// How a cache is away.
#[derive(Debug, Clone, Copy)]
enum Away {
    Off,
    Frozen,
}

struct Stand {
    fleet: Fleet,
    varnish: Varnish,
    http: Http,
}

impl Stand {
    async fn start() -> Result<Option<Self>> {
        if let Err(error) = system_binary("varnishd", &[PathBuf::from("/usr/sbin")]) {
            skipped("purging a real Varnish", error);
            return Ok(None);
        }
        let mut fleet = Fleet::with_etcd(1).await?;
        fleet.store.put(WEB, "config", r#"{"scaling":{"min":1,"max":1}}"#).await?;
        fleet.add_web(1, &Serves::Files)?;
        let backend = fleet.web[0].url.rsplit(':').next().and_then(|port| port.parse().ok());
        let mut varnish = Varnish::new(&fleet.scratch, fleet.logs(), backend.context("the web bot's port")?)?;
        let seed = fleet.scratch.dir("seed", None)?;
        plain_site(&seed, "the first words")?;
        fs::write(seed.join("kept.txt"), "the first words")?;
        fs::write(seed.join("_headers"), KEEP)?;
        let origin = Origin::new(&fleet.scratch, fleet.logs(), "site", &seed).await?;
        let cache = format!("http://127.0.0.1:{}", varnish.port);
        // Visitors know the cache by another name than the bot does, as they do everywhere.
        let name = format!("localhost:{}", varnish.port);
        let more = format!(
            "purge:\n  again_after_s: 1\n  probe: ['{cache}/probe.txt']\n  requests:\n  \
             - {{method: PURGE, url: '{cache}/', headers: {{host: '{name}'}}}}\n  \
             - {{method: BAN, url: '{cache}/', headers: {{x-ban: '^/(css/|probe)'}}}}\n"
        );
        fs::write(origin.work().join("probe.txt"), "which commit is this from?")?;
        origin.push("a page to probe").await?;
        varnish.start()?;
        let mut content = ContentBot::polling(&fleet.place(), (SITE, "content-1"), &origin.url(), 2, &more)?;
        content.bot.start()?;
        fleet.content.push(content);
        fleet.origin = Some(origin);
        fleet.serving(1, STEP).await?;
        let stand = Self { fleet, varnish, http: Http::new() };
        stand.purged_twice().await?;
        Ok(Some(stand))
    }

    /// A page, as a visitor gets it.
    async fn page(&self, path: &str) -> Result<Answer> {
        self.http.page(&format!("http://localhost:{}{path}", self.varnish.port)).await
    }

    async fn push(&self, words: &str) -> Result<String> {
        let origin = self.fleet.origin()?;
        plain_site(origin.work(), words)?;
        let sha = origin.push(words).await?;
        self.fleet.content[0].notify().await?;
        Ok(sha)
    }

    async fn live(&self, sha: &str) -> Result<()> {
        until("the push is live and served", STEP, || async {
            let live = self.fleet.store.look(SITE).await?.live();
            let page = self.http.page(&format!("{}/", self.fleet.web[0].url)).await.map_err(|e| format!("{e:#}"))?;
            let fits = live.as_ref().is_some_and(|live| live.sha == sha) && page.revision() == sha;
            if fits { Ok(()) } else { Err(format!("{live:?}, {page:?}")) }
        })
        .await
    }

    /// Waits until a commit is live, and then until the cache has its pages. Says how long the latter took.
    async fn new_in_the_cache(&self, sha: &str) -> Result<()> {
        self.live(sha).await?;
        let began = Instant::now();
        for path in [BY_PURGE, BY_BAN] {
            until(&format!("{path} is new in the cache"), STEP, || async {
                let page = self.page(path).await.map_err(|e| format!("{e:#}"))?;
                if page.revision() == sha { Ok(()) } else { Err(format!("{page:?}")) }
            })
            .await?;
        }
        println!("served, then new in the cache after {} ms", millis(began.elapsed()));
        Ok(())
    }

    async fn purged_twice(&self) -> Result<()> {
        until("the caches were told twice", STEP, || async {
            let now = self.fleet.store.look(SITE).await?;
            let generation = now.live().map(|live| live.generation);
            let purged = now.value("revision/purged").and_then(|v| serde_json::from_str::<Purged>(v).ok());
            let done = purged.filter(|p| Some(p.generation) == generation && p.rounds == 2);
            done.map(|_twice| ()).ok_or_else(|| format!("live {generation:?}, {purged:?}"))
        })
        .await
    }

    /// What the bot says of the purge, if it is in trouble.
    async fn trouble(&self) -> Result<Option<String>> {
        let report = self.fleet.content[0].bot.report().await?;
        Ok(report.troubles.into_iter().find(|trouble| trouble.contains("purge")))
    }

    async fn purges_failed(&self) -> Result<u64> {
        let answer = self.fleet.content[0].bot.get("/metrics").await?;
        let line = answer.text.lines().find_map(|line| line.strip_prefix("content_purges_failed_total "));
        line.and_then(|figure| figure.trim().parse().ok()).context("the bot counts rounds that failed")
    }

    /// A push is live while the cache is away, and in the cache once it is back.
    async fn push_past_a_cache_that_is(&mut self, away: Away) -> Result<String> {
        match away {
            Away::Off => ensure!(self.varnish.stop(), "varnish stops"),
            Away::Frozen => self.varnish.freeze(),
        }
        let sha = self.push(&format!("words past a cache that is {away:?}")).await?;
        let began = Instant::now();
        self.live(&sha).await?;
        println!("{away:?}: live and served after {} ms", millis(began.elapsed()));
        until("the bot says that the purge fails", STEP, || async {
            match self.trouble().await.map_err(|e| format!("{e:#}"))? {
                Some(trouble) if trouble.contains(&self.varnish.port.to_string()) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await?;
        match away {
            Away::Off => self.varnish.start()?,
            Away::Frozen => self.varnish.thaw(),
        }
        self.new_in_the_cache(&sha).await?;
        self.purged_twice().await?;
        until("the trouble is over", STEP, || async {
            match self.trouble().await.map_err(|e| format!("{e:#}"))? {
                None => Ok(()),
                Some(trouble) => Err(trouble),
            }
        })
        .await?;
        Ok(sha)
    }
}

/// Whether an answer was in the cache: then Varnish names two requests, this one and the one that brought it.
fn is_kept(answer: &Answer) -> bool {
    answer.header("x-varnish").split(' ').count() == 2
}
