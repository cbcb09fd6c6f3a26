//! A fleet: etcd, and the bots of each kind, on loopback under one scratch folder.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::{
    bots::{API_USER, Bot, ContentBot, EdgeBot, Keeper, Passwords, Place, PostgresBot, Serves, WebBot},
    cache::Cache,
    etcd::{EtcdCluster, member_name},
    git::Origin,
    ground::{Ground, Site},
    process::{Finished, Program, workspace_binary},
    scratch::Scratch,
    sql::Login,
    store::{Serving, Store},
    wait::until,
};

/// How long a whole fleet may take from nothing to healthy, on two busy cores.
pub const UP_DEADLINE: Duration = Duration::from_secs(90);

/// The Postgres cluster's scope.
pub const MAIN: &str = "main";
/// The content site's scope.
pub const SITE: &str = "site";
/// The web fleet's scope.
pub const WEB: &str = "web";
/// The edge's scope.
pub const EDGE: &str = "edge";

/// A running fleet. Dropping it stops everything.
pub struct Fleet {
    /// The edge bots.
    pub edge: Vec<EdgeBot>,
    /// The web bots.
    pub web: Vec<WebBot>,
    /// The content bots.
    pub content: Vec<ContentBot>,
    /// The Postgres bots.
    pub postgres: Vec<PostgresBot>,
    /// etcd.
    pub etcd: EtcdCluster,
    /// A client of etcd.
    pub store: Store,
    /// The site's repository.
    pub origin: Option<Origin>,
    /// A cache in front of the web fleet, if there is one: it ends with the fleet.
    pub cache: Option<Cache>,
    /// The passwords of the Postgres cluster.
    pub passwords: Passwords,
    /// The guestbook's own password.
    app_password: String,
    /// The password of the bots' APIs, where they ask for one.
    api_password: String,
    /// What pushes are signed with, where the content bots ask for it.
    pub push_secret: String,
    /// The length of every lease, in seconds.
    pub ttl_s: u64,
    /// More lines of the Postgres cluster's first configuration, as they stand below `bootstrap.dcs`.
    pub dcs: String,
    /// Whether bots that are added write step logs.
    pub step_logs: bool,
    logs: PathBuf,
    /// What nodes stand on.
    pub ground: Ground,
    /// Where everything is.
    pub scratch: Scratch,
}

impl Fleet {
    /// Starts etcd, and nothing else yet.
    ///
    /// # Errors
    /// If it does not come up.
    pub async fn with_etcd(members: usize) -> Result<Self> {
        Self::on(Ground::default(), members).await
    }

    /// The same on a ground that gives each node more than a port.
    ///
    /// # Errors
    /// If etcd does not come up.
    pub async fn on(mut ground: Ground, members: usize) -> Result<Self> {
        let scratch = Scratch::new()?;
        let logs = scratch.dir("logs", None)?;
        let sites = (0..members).map(|i| ground.add(&member_name(i), None)).collect::<Result<Vec<_>>>()?;
        let etcd = EtcdCluster::start(&scratch, &logs, &sites)?;
        let store = Store::new(&etcd.hosts())?;
        let fleet = Self {
            edge: Vec::new(),
            web: Vec::new(),
            content: Vec::new(),
            postgres: Vec::new(),
            etcd,
            store,
            origin: None,
            cache: None,
            passwords: Passwords::new(),
            app_password: bots_core::shell::instance_id(),
            api_password: bots_core::shell::instance_id(),
            push_secret: bots_core::shell::instance_id(),
            ttl_s: 5,
            dcs: String::new(),
            step_logs: false,
            logs,
            ground,
            scratch,
        };
        until("etcd answers", UP_DEADLINE, || async { fleet.store.look(MAIN).await }).await?;
        Ok(fleet)
    }

    /// What configurations of more bots are written from.
    #[must_use]
    pub fn place(&self) -> Place<'_> {
        self.place_at(Site::default())
    }

    fn place_at(&self, site: Site) -> Place<'_> {
        let Self { scratch, logs, dcs, api_password, .. } = self;
        let (etcd, ttl_s, step_logs) = (self.etcd.hosts(), self.ttl_s, self.step_logs);
        Place { scratch, logs, etcd, ttl_s, dcs, api_password, site, step_logs }
    }

    /// Where the logs are.
    #[must_use]
    pub fn logs(&self) -> &Path {
        &self.logs
    }

    /// Leaves the logs, and all else below the scratch folder, behind.
    pub fn keep_logs(&mut self) -> &Path {
        self.scratch.keep();
        &self.logs
    }

    /// Starts `count` more Postgres bots.
    ///
    /// # Errors
    /// If one cannot be started.
    pub fn add_postgres(&mut self, count: usize) -> Result<()> {
        self.add_postgres_kept_by(&Keeper::Bot, count)
    }

    /// Starts `count` more members of the Postgres cluster, with their keepers.
    ///
    /// # Errors
    /// If one cannot be started.
    pub fn add_postgres_kept_by(&mut self, keeper: &Keeper, count: usize) -> Result<()> {
        for _ in 0..count {
            let name = format!("pg-{}", self.postgres.len() + 1);
            let folder = self.scratch.path().join(format!("{MAIN}-{name}"));
            let site = self.ground.add(&name, Some(&folder))?;
            let mut bot = PostgresBot::kept_by(keeper, &self.place_at(site), (MAIN, &name), &self.passwords)?;
            bot.bot.start()?;
            self.postgres.push(bot);
        }
        Ok(())
    }

    /// Makes the site's repository out of `seed` and starts a content bot on it.
    ///
    /// # Errors
    /// If git fails or the bot cannot be started.
    pub async fn add_content(&mut self, seed: &Path) -> Result<()> {
        self.add_content_with(seed, "").await
    }

    /// The same, with `more` lines of its configuration.
    ///
    /// # Errors
    /// If git fails or the bot cannot be started.
    pub async fn add_content_with(&mut self, seed: &Path, more: &str) -> Result<()> {
        let origin = Origin::new(&self.scratch, &self.logs, "site", seed).await?;
        let name = format!("content-{}", self.content.len() + 1);
        let mut bot = ContentBot::new(&self.place(), SITE, &name, &origin.url(), more)?;
        bot.bot.start()?;
        self.content.push(bot);
        self.origin = Some(origin);
        Ok(())
    }

    /// The file that holds what pushes are signed with.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn push_secret_file(&self) -> Result<PathBuf> {
        self.scratch.file("push-secret", &self.push_secret, None)
    }

    /// The lines of a content bot's configuration by which it takes signed announcements alone.
    ///
    /// # Errors
    /// If the secret cannot be written.
    pub fn signed_pushes(&self) -> Result<String> {
        Ok(format!("push:\n  secret_file: {}\n", self.push_secret_file()?.display()))
    }

    /// Starts `count` more web bots.
    ///
    /// # Errors
    /// If one cannot be started.
    pub fn add_web(&mut self, count: usize, serves: &Serves) -> Result<()> {
        for _ in 0..count {
            let name = format!("web-{}", self.web.len() + 1);
            let mut bot = WebBot::new(&self.place(), WEB, &name, serves)?;
            bot.bot.start()?;
            self.web.push(bot);
        }
        Ok(())
    }

    /// Starts another edge bot, in front of the Postgres cluster and of the web fleet.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn add_edge(&mut self) -> Result<()> {
        let name = format!("edge-{}", self.edge.len() + 1);
        let mut edge = EdgeBot::new(&self.place(), EDGE, &name)?;
        edge.bot.start()?;
        self.edge.push(edge);
        Ok(())
    }

    /// The edge bot.
    ///
    /// # Errors
    /// If this fleet has none.
    pub fn edge(&self) -> Result<&EdgeBot> {
        self.edge.first().context("this fleet has no edge bot")
    }

    /// Waits until every edge bot that lives acknowledges the generation of the leader that etcd shows; yields the leader's name.
    ///
    /// # Errors
    /// If they do not in time.
    pub async fn acknowledged(&self, deadline: Duration) -> Result<String> {
        until("the edge routes to the leader", deadline, || async {
            let (main, edge) = (self.store.look(MAIN).await?, self.store.look(EDGE).await?);
            let leader = main.primary().ok_or_else(|| main.summary())?;
            for name in edge.members().keys() {
                let facts = edge.edge(name).unwrap_or_default();
                if facts.leader.as_deref() != Some(leader) || facts.generation != main.generation() {
                    return Err(format!("{name}: {facts:?}; {} of {:?}", main.summary(), main.generation()));
                }
            }
            if edge.members().is_empty() { Err(String::from("there is no edge bot")) } else { Ok(leader.to_owned()) }
        })
        .await
    }

    /// The site's repository.
    ///
    /// # Errors
    /// If this fleet has none.
    pub fn origin(&self) -> Result<&Origin> {
        self.origin.as_ref().context("this fleet has no repository")
    }

    /// Waits until one Postgres bot is primary and all others that run stream from it; yields the primary's name.
    ///
    /// # Errors
    /// If they do not in time.
    pub async fn postgres_up(&mut self, deadline: Duration) -> Result<String> {
        let running = self.postgres.iter_mut().filter_map(|p| p.bot.is_running().then_some(())).count();
        let store = &self.store;
        until(&format!("a primary and {} replicas", running.saturating_sub(1)), deadline, || async {
            let now = store.look(MAIN).await?;
            match now.primary() {
                Some(primary) if now.streaming().len() + 1 >= running => Ok(primary.to_owned()),
                Some(_) | None => Err(now.summary()),
            }
        })
        .await
    }

    /// Waits until somebody else than `old` is primary; yields the name.
    ///
    /// # Errors
    /// If nobody is in time.
    pub async fn new_primary(&self, old: &str, deadline: Duration) -> Result<String> {
        until(&format!("a primary other than {old}"), deadline, || async {
            let now = self.store.look(MAIN).await?;
            now.primary().filter(|p| *p != old).map(str::to_owned).ok_or_else(|| now.summary())
        })
        .await
    }

    /// Waits until a member of the Postgres scope streams and has all that the primary has written.
    ///
    /// # Errors
    /// If it does not in time.
    pub async fn caught_up(&self, name: &str, deadline: Duration) -> Result<()> {
        let replica = self.postgres_bot(name)?;
        let written = self.superuser().writable().await?;
        let written =
            written.query_one("SELECT pg_current_wal_lsn()::text", &[]).await.context("ask for the position")?;
        let written: String = written.get(0);
        let login = self.superuser().at(replica.port);
        let query = format!("SELECT pg_is_in_recovery() AND pg_last_wal_replay_lsn() >= '{written}'::pg_lsn");
        login.wait_for(&query, "t", deadline).await?;
        until(&format!("{name} streams"), deadline, || async {
            let now = self.store.look(MAIN).await?;
            if now.streaming().contains(&name) { Ok(()) } else { Err(now.summary()) }
        })
        .await
    }

    /// A Postgres bot by name.
    ///
    /// # Errors
    /// If there is none.
    pub fn postgres_bot(&self, name: &str) -> Result<&PostgresBot> {
        self.postgres.iter().find(|p| p.bot.name == name).with_context(|| format!("no bot is called {name}"))
    }

    /// A Postgres bot by name, to act on.
    ///
    /// # Errors
    /// If there is none.
    pub fn postgres_bot_mut(&mut self, name: &str) -> Result<&mut PostgresBot> {
        self.postgres.iter_mut().find(|p| p.bot.name == name).with_context(|| format!("no bot is called {name}"))
    }

    /// The superuser's login.
    #[must_use]
    pub fn superuser(&self) -> Login {
        Login {
            ports: self.postgres.iter().map(|p| p.port).collect(),
            hosts: self.postgres.iter().map(|p| (p.port, p.host.clone())).collect(),
            user: String::from("postgres"),
            password: self.passwords.superuser.clone(),
            database: String::from("postgres"),
        }
    }

    /// The guestbook's login.
    #[must_use]
    pub fn guestbook(&self) -> Login {
        let (user, password) = (String::from("guestbook"), self.app_password.clone());
        Login { user, password, database: String::from("guestbook"), ..self.superuser() }
    }

    /// Makes the guestbook's user and database.
    ///
    /// # Errors
    /// If the cluster does not take them.
    pub async fn create_guestbook_database(&self) -> Result<()> {
        let login = self.superuser();
        login.execute(&format!("CREATE ROLE guestbook LOGIN PASSWORD '{}'", self.app_password)).await?;
        login.execute("CREATE DATABASE guestbook OWNER guestbook").await
    }

    /// Waits until at least `count` web bots serve the live revision.
    ///
    /// # Errors
    /// If they do not in time.
    pub async fn serving(&self, count: usize, deadline: Duration) -> Result<Vec<Serving>> {
        until(&format!("{count} web bots serve the live revision"), deadline, || async {
            let live = self.store.look(SITE).await?.live().map(|r| r.sha);
            let now = self.store.look(WEB).await?;
            let mut serving = now.serving();
            serving.retain(|bot| Some(&bot.sha) == live.as_ref());
            if serving.len() >= count { Ok(serving) } else { Err(format!("live {live:?}; {}", now.summary())) }
        })
        .await
    }

    /// Runs botctl to its end.
    ///
    /// # Errors
    /// If it is not built or does not end.
    pub async fn botctl<S: Into<String>>(&self, args: impl IntoIterator<Item = S>) -> Result<Finished> {
        self.operator()?.args(args).run(&self.logs, UP_DEADLINE).await
    }

    /// botctl with all that it needs to know of this fleet.
    ///
    /// # Errors
    /// If it is not built, or its password cannot be written.
    pub fn operator(&self) -> Result<Program> {
        let botctl = Program::new("botctl", workspace_binary("botctl")?).env("BOTCTL_ETCD", self.etcd.hosts());
        let password = self.scratch.file("api-password", &self.api_password, None)?;
        let botctl = botctl.env("BOTCTL_API_USERNAME", API_USER);
        Ok(botctl.env("BOTCTL_API_PASSWORD_FILE", password.to_string_lossy()))
    }

    /// Every bot.
    pub fn bots(&mut self) -> impl Iterator<Item = &mut Bot> {
        let web = self.web.iter_mut().map(|w| &mut w.bot);
        let content = self.content.iter_mut().map(|c| &mut c.bot);
        let edge = self.edge.iter_mut().map(|e| &mut e.bot);
        web.chain(content).chain(self.postgres.iter_mut().map(|p| &mut p.bot)).chain(edge)
    }

    /// Stops everything, and checks that nothing is left.
    ///
    /// # Errors
    /// If a bot had to be killed, or a process is left over.
    pub async fn stop(self) -> Result<()> {
        self.stop_and_tell().await.map(drop)
    }

    /// The same; yields how long it took until the last process had gone. To remove what they have left takes longer on a busy
    /// disk, and is not counted.
    ///
    /// # Errors
    /// If a bot had to be killed, or a process is left over.
    pub async fn stop_and_tell(mut self) -> Result<Stopped> {
        let start = Instant::now();
        let WoundDown { unclean, mut longest } = self.wind_down();
        ensure!(unclean.is_empty(), "did not stop cleanly: {}{}", unclean.join(", "), crate::process::log_tails());
        let folder = self.scratch.path();
        let (began, mut last) = (Instant::now(), String::new());
        until("every process has gone", UP_DEADLINE, || {
            let left = crate::scratch::processes_below(folder).join("; ");
            let gone = left.is_empty();
            if !gone {
                last.clone_from(&left);
            }
            async move { if gone { Ok(()) } else { Err(left) } }
        })
        .await?;
        if began.elapsed() > longest.1 {
            longest = (last, began.elapsed());
        }
        Ok(Stopped { took: start.elapsed(), longest })
    }

    /// Stops edge bots, web bots, content bots, replicas, the primary, etcd, in this order, so that nobody takes over from anybody
    /// who is about to go too.
    fn wind_down(&mut self) -> WoundDown {
        self.ground.heal();
        let mut down = WoundDown::default();
        for edge in &mut self.edge {
            down.wait(&edge.bot.name.clone(), || edge.bot.stop());
            edge.end_proxy();
        }
        let primaries = |bot: &PostgresBot| !bot.data_dir.join("standby.signal").exists();
        self.postgres.sort_by_key(primaries);
        // All are asked before any is waited for, but for the primary, which hands its last words to its replicas.
        for bot in self.web.iter_mut().map(|w| &mut w.bot).chain(self.content.iter_mut().map(|c| &mut c.bot)) {
            bot.ask_to_stop();
        }
        self.postgres.iter_mut().filter(|bot| !primaries(bot)).for_each(|bot| bot.bot.ask_to_stop());
        for bot in self.web.iter_mut().map(|w| &mut w.bot).chain(self.content.iter_mut().map(|c| &mut c.bot)) {
            down.wait(&bot.name.clone(), || bot.stop());
        }
        for postgres in &mut self.postgres {
            down.wait(&postgres.bot.name.clone(), || postgres.stop());
        }
        down.wait("etcd", || {
            self.etcd.stop();
            true
        });
        down
    }
}

/// How long a fleet took to stop.
#[derive(Debug)]
pub struct Stopped {
    /// Until the last process had gone.
    pub took: Duration,
    /// Who was waited for the longest, and for how long.
    pub longest: (String, Duration),
}

/// How the bots of a fleet went.
#[derive(Default)]
struct WoundDown {
    /// Those that had to be killed, or ended badly.
    unclean: Vec<String>,
    /// Who was waited for the longest, and for how long.
    longest: (String, Duration),
}

impl WoundDown {
    fn wait(&mut self, name: &str, stop: impl FnOnce() -> bool) {
        let began = Instant::now();
        if !stop() {
            self.unclean.push(name.to_owned());
        }
        let took = began.elapsed();
        if took >= self.longest.1 {
            self.longest = (name.to_owned(), took);
        }
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for name in self.wind_down().unclean {
            eprintln!("{name} had to be killed, or ended badly");
        }
    }
}

/// The sample site of the demo.
#[must_use]
pub fn sample_site() -> PathBuf {
    match std::env::var_os("BOTS_DEMO_SITE") {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/demo/site"),
    }
}

/// Writes a small site of plain files into `folder`, which says `text` on its page.
///
/// # Errors
/// If it cannot be written.
pub fn plain_site(folder: &Path, text: &str) -> Result<()> {
    fs::create_dir_all(folder.join("css")).context("make the site")?;
    let page = format!("<!doctype html><title>site</title><link rel=stylesheet href=css/site.css><p>{text}</p>\n");
    fs::write(folder.join("index.html"), page).context("write the page")?;
    fs::write(folder.join("css/site.css"), format!("/* {text} */\n")).context("write the style")
}
