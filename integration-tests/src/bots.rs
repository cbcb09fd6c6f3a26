//! One bot each: its configuration file, its process, its API. Not what several of them do together.

mod postgres;

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use bots_core::{machine::Report, shell::Status};
use rustix::process::Signal;

use crate::{
    free_port,
    ground::Site,
    http::{Answer, Http},
    process::{Finished, Process, Program, lives, signal_pid, workspace_binary},
    scratch::{Account, Scratch},
    sql::Login,
};

pub use postgres::{Keeper, Passwords, PostgresBot, postgres_bin_dir};

/// The user of the API where it asks for one.
pub const API_USER: &str = "operator";

/// The folder of the step logs, below the scratch folder.
const STEP_LOGS: &str = "steps";

/// A bot that is given a bad configuration says so within this.
const REFUSAL_DEADLINE: Duration = Duration::from_secs(20);

/// A bot's program with its configuration, running or not.
#[derive(Debug)]
pub struct Bot {
    /// Its name.
    pub name: String,
    /// Its scope.
    pub scope: String,
    /// Where its API answers, without a path.
    pub api_url: String,
    /// Its configuration file.
    pub config: PathBuf,
    program: Program,
    logs: PathBuf,
    process: Option<Process>,
}

/// What every configuration is written from.
#[derive(Debug, Clone)]
pub struct Place<'s> {
    /// Where files go.
    pub scratch: &'s Scratch,
    /// Where logs go.
    pub logs: &'s Path,
    /// The members of etcd in one line.
    pub etcd: String,
    /// The length of leases, in seconds.
    pub ttl_s: u64,
    /// More lines of a Postgres cluster's first configuration, as they stand below `bootstrap.dcs`.
    pub dcs: &'s str,
    /// The password of the API where others than this machine can reach it; the user is [`API_USER`].
    pub api_password: &'s str,
    /// Where the bot and its server are.
    pub site: Site,
    /// Whether the bot writes a step log.
    pub step_logs: bool,
}

impl<'s> Place<'s> {
    /// On loopback, with leases of `TTL_S` seconds and nothing that is out of the ordinary.
    #[must_use]
    pub fn plain(scratch: &'s Scratch, logs: &'s Path, etcd: String) -> Self {
        Self { scratch, logs, etcd, ttl_s: TTL_S, dcs: "", api_password: "", site: Site::default(), step_logs: false }
    }
}

/// The length of leases where nobody says another, in seconds: the bots' own default.
const TTL_S: u64 = 5;

impl Bot {
    /// A bot of the workspace's `program`, with a configuration that begins with what all bots need and ends with
    /// `rest`. It is not started.
    ///
    /// # Errors
    /// If the program is not built or the file cannot be written.
    pub fn new(
        place: &Place<'_>,
        who: (&str, &str),
        program: &str,
        rest: &str,
        account: Option<Account>,
    ) -> Result<Self> {
        Self::of(place, who, workspace_binary(program)?, rest, account)
    }

    /// The same of any program that reads such a configuration. One with a list of sites has no scope of its own: it is empty.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn of(
        place: &Place<'_>,
        who: (&str, &str),
        binary: PathBuf,
        rest: &str,
        account: Option<Account>,
    ) -> Result<Self> {
        let (scope, name) = who;
        let api = format!("{}:{}", place.site.host, free_port()?);
        let login = format!("  authentication:\n    username: {API_USER}\n    password: \"{}\"\n", place.api_password);
        let login = if place.site.is_loopback() { "" } else { &login };
        let steps = if place.step_logs {
            let folder = place.scratch.dir(STEP_LOGS, account)?;
            format!("  step_log: {}\n", folder.join(step_log_name(scope, name)).display())
        } else {
            String::new()
        };
        let own_scope = if scope.is_empty() { String::new() } else { format!("scope: {scope}\n") };
        let common = format!(
            "{own_scope}name: {name}\nnamespace: service\netcd3:\n  hosts: {etcd}\nrestapi:\n  listen: {api}\n{login}log:\n  level: INFO\n{steps}",
            etcd = place.etcd,
        );
        let label = label(scope, name);
        let config = place.scratch.file(&format!("{label}.yml"), &(common + rest), account)?;
        let program = Program::new(label, binary).args([config.to_string_lossy()]);
        let program = program.account(account).at(&place.site);
        let (name, scope, logs) = (name.to_owned(), scope.to_owned(), place.logs.to_owned());
        Ok(Self { name, scope, api_url: format!("http://{api}"), config, program, logs, process: None })
    }

    /// Starts it; it must not run.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(&mut self) -> Result<()> {
        ensure!(!self.is_running(), "{} runs already", self.name);
        self.process = Some(self.program.start(&self.logs)?);
        Ok(())
    }

    /// Runs it to its end, which must come soon: for configurations that it refuses.
    ///
    /// # Errors
    /// If it does not end.
    pub async fn run_to_end(&self) -> Result<Finished> {
        self.program.run(&self.logs, REFUSAL_DEADLINE).await
    }

    /// Whether its process lives.
    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(|p| p.exit().is_none())
    }

    /// Its process.
    ///
    /// # Errors
    /// If it does not run.
    pub fn process(&mut self) -> Result<&mut Process> {
        self.process.as_mut().with_context(|| format!("{} does not run", self.name))
    }

    /// Asks it to stop, and does not wait.
    pub fn ask_to_stop(&mut self) {
        if let Some(process) = &mut self.process {
            process.ask_to_stop();
        }
    }

    /// Asks it to stop and waits for its end; says whether it went by itself, cleanly.
    pub fn stop(&mut self) -> bool {
        let Some(mut process) = self.process.take() else { return true };
        process.stop() && process.exit().is_some_and(|status| status.success())
    }

    /// Kills its process, and nothing else.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Kills its process and the helpers that it runs: not the server, which has a process group of its own.
    pub fn kill_group(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill_group();
        }
    }

    /// Freezes it.
    ///
    /// # Errors
    /// If it does not run.
    pub fn freeze(&mut self) -> Result<()> {
        self.process()?.signal(Signal::STOP);
        Ok(())
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// If it does not run.
    pub fn thaw(&mut self) -> Result<()> {
        self.process()?.signal(Signal::CONT);
        Ok(())
    }

    /// What its API answers.
    ///
    /// # Errors
    /// If it does not.
    pub async fn get(&self, path: &str) -> Result<Answer> {
        Http::new().get(&format!("{}{path}", self.api_url)).await
    }

    /// What it says of itself.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn status(&self) -> Result<Status> {
        let answer = self.get("/status").await?;
        serde_json::from_str(&answer.text).with_context(|| format!("read the status of {}", self.name))
    }

    /// Its report.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn report(&self) -> Result<Report> {
        Ok(self.status().await?.report)
    }

    /// A figure that it counts.
    ///
    /// # Errors
    /// If it does not answer, or counts no such thing.
    pub async fn metric(&self, name: &str) -> Result<u64> {
        let answer = self.get("/metrics").await?;
        let line = answer.text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|figure| figure.trim().parse().ok()).with_context(|| format!("{} counts no {name}", self.name))
    }

    /// All that its processes have logged.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.logs.join(format!("{}.log", self.program.name))).unwrap_or_default()
    }

    /// Where its step log is, if it writes one.
    #[must_use]
    pub fn step_log(&self) -> PathBuf {
        self.config.with_file_name(STEP_LOGS).join(step_log_name(&self.scope, &self.name))
    }
}

/// What a bot's files are called.
fn label(scope: &str, name: &str) -> String {
    if scope.is_empty() { name.to_owned() } else { format!("{scope}-{name}") }
}

fn step_log_name(scope: &str, name: &str) -> String {
    format!("{}.jsonl", label(scope, name))
}

/// A content bot.
#[derive(Debug)]
pub struct ContentBot {
    /// The bot.
    pub bot: Bot,
}

impl ContentBot {
    /// A bot that publishes the repository at `url` for `web_scopes`.
    ///
    /// # Errors
    /// If it cannot be set up.
    pub fn new(place: &Place<'_>, scope: &str, name: &str, url: &str, extra: &str) -> Result<Self> {
        Self::polling(place, (scope, name), url, 2, extra)
    }

    /// A bot that looks at the repository every `poll_interval_s` seconds, if it is not told before.
    ///
    /// # Errors
    /// If it cannot be set up.
    pub fn polling(
        place: &Place<'_>,
        (scope, name): (&str, &str),
        url: &str,
        poll_interval_s: u64,
        extra: &str,
    ) -> Result<Self> {
        let data_dir = place.scratch.dir(&format!("{scope}-{name}"), None)?;
        let rest = format!(
            "git:\n  url: {url}\n  ref: main\n  poll_interval_s: {poll_interval_s}\n{extra}data_dir: {}\nweb_scopes: [web]\nttl_s: {}\n",
            data_dir.display(),
            place.ttl_s,
        );
        Ok(Self { bot: Bot::new(place, (scope, name), "content-bot", &rest, None)? })
    }

    /// A bot that publishes several repositories.
    ///
    /// # Errors
    /// If it cannot be set up.
    pub fn of_sites(place: &Place<'_>, name: &str, sites: &[OneSite<'_>]) -> Result<Self> {
        let data_dir = place.scratch.dir(&format!("sites-{name}"), None)?;
        let mut rest = format!(
            "git:\n  ref: main\n  poll_interval_s: 2\ndata_dir: {}\nttl_s: {}\nsites:\n",
            data_dir.display(),
            place.ttl_s
        );
        for OneSite { scope, url, web, more } in sites {
            let _infallible = writeln!(rest, "- {{scope: {scope}, git: {{url: '{url}'}}, web_scopes: [{web}]{more}}}");
        }
        Ok(Self { bot: Bot::new(place, ("", name), "content-bot", &rest, None)? })
    }

    /// Tells it that something was pushed, unsigned: it believes this machine, unless it has a secret.
    ///
    /// # Errors
    /// If it does not take the word.
    pub async fn notify(&self) -> Result<()> {
        let url = format!("{}/push", self.bot.api_url);
        let answer = Http::new().send(hyper::Method::POST, &url, None, bytes::Bytes::new()).await?;
        ensure!(answer.status == 202, "POST /push answers {}: {}", answer.status, answer.text);
        Ok(())
    }
}

/// One of the sites of a content bot that has several.
#[derive(Debug, Clone)]
pub struct OneSite<'a> {
    /// Its scope.
    pub scope: &'a str,
    /// Where its repository is.
    pub url: String,
    /// The web fleet that serves it.
    pub web: &'a str,
    /// More fields, each behind a comma: `, verify: {}`.
    pub more: String,
}

/// A web bot.
#[derive(Debug)]
pub struct WebBot {
    /// The bot.
    pub bot: Bot,
    /// Where clients reach it.
    pub url: String,
}

/// An edge bot and its HAProxy.
#[derive(Debug)]
pub struct EdgeBot {
    /// The bot.
    pub bot: Bot,
    /// Where clients find the primary.
    pub primary: u16,
    /// Where clients find the replicas.
    pub replicas: u16,
    /// Where clients find the web bots.
    pub web: u16,
    data_dir: PathBuf,
}

impl EdgeBot {
    /// A bot that routes to the scopes `main` and `web`.
    ///
    /// # Errors
    /// If it cannot be set up.
    pub fn new(place: &Place<'_>, scope: &str, name: &str) -> Result<Self> {
        let (primary, replicas, web) = (free_port()?, free_port()?, free_port()?);
        let data_dir = place.scratch.dir(&format!("{scope}-{name}"), None)?;
        let rest = format!(
            "postgres:\n  scope: main\n  primary: 127.0.0.1:{primary}\n  replicas: 127.0.0.1:{replicas}\nweb:\n  scope: web\n  \
             listen: 127.0.0.1:{web}\nproxy:\n  places: 8\n  hold_s: 20\ndata_dir: {}\nttl_s: {}\n",
            data_dir.display(),
            place.ttl_s,
        );
        let bot = Bot::new(place, (scope, name), "edge-bot", &rest, None)?;
        Ok(Self { bot, primary, replicas, web, data_dir })
    }

    /// The proxy's process, if it lives: by the file that it writes.
    #[must_use]
    pub fn proxy(&self) -> Option<u32> {
        let pid = fs::read_to_string(self.data_dir.join("haproxy.pid")).ok()?.trim().parse().ok()?;
        // The file may be left over, and its number another process's by now.
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let ours = String::from_utf8_lossy(&command).contains(&*self.data_dir.to_string_lossy());
        (ours && lives(pid)).then_some(pid)
    }

    /// Ends the proxy, which outlives its bot.
    pub fn end_proxy(&self) {
        if let Some(pid) = self.proxy() {
            signal_pid(pid, Signal::KILL);
        }
    }
}

impl Drop for EdgeBot {
    fn drop(&mut self) {
        self.bot.stop();
        self.end_proxy();
    }
}

/// How many connections one guestbook holds at most, as its own source says.
pub const GUESTBOOK_CONNECTIONS: u32 = 5;

/// What a web bot serves.
#[derive(Debug, Clone)]
pub enum Serves {
    /// The files of the revision.
    Files,
    /// The guestbook, which keeps its entries in a database.
    Guestbook {
        /// How it logs in there.
        login: Login,
        /// How many connections one bot is told that its app may hold.
        connections: u32,
    },
    /// An app without a database: a program and its arguments.
    App(Vec<String>),
}

impl Serves {
    /// The guestbook as it is.
    #[must_use]
    pub const fn guestbook(login: Login) -> Self {
        Self::Guestbook { login, connections: GUESTBOOK_CONNECTIONS }
    }
}

impl WebBot {
    /// A bot that serves the revision of the scope `site`.
    ///
    /// # Errors
    /// If it cannot be set up.
    pub fn new(place: &Place<'_>, scope: &str, name: &str, serves: &Serves) -> Result<Self> {
        let listen = format!("127.0.0.1:{}", free_port()?);
        let data_dir = place.scratch.dir(&format!("{scope}-{name}"), None)?;
        let (data_dir, ttl_s) = (data_dir.display(), place.ttl_s);
        let common = format!("data_dir: {data_dir}\nttl_s: {ttl_s}\ncontent:\n  scope: site\n");
        let rest = match serves {
            Serves::Files => format!("{common}web:\n  listen: {listen}\n  mode: static\n"),
            Serves::App(command) => {
                let command: Vec<String> = command.iter().map(|part| format!("'{part}'")).collect();
                let command = command.join(", ");
                format!("{common}web:\n  listen: {listen}\n  mode: app\n  command: [{command}]\n")
            }
            Serves::Guestbook { login, connections } => {
                let app = workspace_binary("guestbook")?;
                format!(
                    "{common}web:\n  listen: {listen}\n  mode: app\n  command: [{app}]\ndatabase:\n  scope: main\n  dbname: {}\n  \
                     username: {}\n  password: \"{}\"\n  connections_per_bot: {connections}\n",
                    login.database,
                    login.user,
                    login.password,
                    app = app.display(),
                )
            }
        };
        let bot = Bot::new(place, (scope, name), "web-bot", &rest, None)?;
        Ok(Self { bot, url: format!("http://{listen}") })
    }
}

impl Drop for Bot {
    fn drop(&mut self) {
        self.stop();
    }
}
