//! The user's web process: start it with what it needs to know, ask whether it is healthy, see its end, stop it. What it has started
//! itself, and has not moved to a process group of its own, ends with it.

mod port;

use std::{
    collections::BTreeMap,
    convert::Infallible,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bots_core::{
    machine::Span,
    shell::{
        Events, Secret, http,
        process::{Program, Running},
    },
};
use rustix::process::Signal;
use tokio::{sync::oneshot, time::MissedTickBehavior};

use self::port::Port;
use super::plane::{Backend, Meter};
use crate::machine::Event;

/// Between two questions to an app that is not healthy yet.
const HEALTH_INTERVAL: Duration = Duration::from_millis(50);

/// How long one answer to a health check may take.
const HEALTH_DEADLINE: Duration = Duration::from_secs(2);

/// An app that misses so many checks in a row hangs: one or two are missed by an app that collects its garbage, or on a
/// machine that is busy.
const MISSES_MAX: u64 = 3;

/// A host of the database that does not answer costs the app this much before it tries the next.
const CONNECT_TIMEOUT_S: u32 = 2;

/// Our own settings may stand in the environment, secrets among them: they are not for the app.
const PRIVATE_PREFIXES: [&str; 3] = ["BOT_", "PATRONI_", "NOTIFY_SOCKET"];

/// How the app is run.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Recipe {
    /// The program and its arguments.
    pub(crate) command: Vec<String>,
    /// Healthy is what answers below 500 there.
    pub(crate) health_path: String,
    /// Between two questions to a healthy app.
    pub(crate) health_interval: Duration,
    /// What stands in its environment, other than what the bot itself says there.
    pub(crate) env: BTreeMap<String, Secret>,
    /// The account in the database.
    pub(crate) database: Option<DatabaseLogin>,
}

/// The ways in which the app was to be run since the bot was started, by number: those that instances run in, and the newest.
#[derive(Clone)]
pub(crate) struct Recipes(Arc<Mutex<BTreeMap<u64, Arc<Recipe>>>>);

impl Recipes {
    /// The way that the bot begins with has the number 0.
    pub(crate) fn new(first: Recipe) -> Self {
        Self(Arc::new(Mutex::new([(0, Arc::new(first))].into())))
    }

    /// Takes a way to run the app as the newest. Yields its number, and whether it is another one than that before.
    pub(crate) fn note(&self, recipe: Recipe) -> (u64, bool) {
        let mut known = self.known();
        match known.last_key_value() {
            Some((number, newest)) if **newest == recipe => (*number, false),
            newest => {
                let number = newest.map_or(0, |(number, _)| number + 1);
                known.insert(number, Arc::new(recipe));
                (number, true)
            }
        }
    }

    /// The number of the newest.
    pub(crate) fn newest(&self) -> u64 {
        self.known().last_key_value().map_or(0, |(number, _)| *number)
    }

    fn of(&self, number: u64) -> Option<Arc<Recipe>> {
        self.known().get(&number).cloned()
    }

    /// Forgets what is older than `oldest`.
    fn forget_before(&self, oldest: u64) {
        let mut known = self.known();
        *known = known.split_off(&oldest);
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Recipe>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The app's account in the database.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct DatabaseLogin {
    pub(crate) dbname: String,
    pub(crate) username: String,
    pub(crate) password: Password,
}

/// What the account shows of itself.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Password {
    None,
    Given(Secret),
    /// Read at each start of an instance: one that is rotated reaches the next.
    File {
        path: PathBuf,
        /// What it held when the configuration was read, to tell another one.
        held: Option<Secret>,
    },
}

/// What differs from instance to instance.
#[derive(Debug, Clone)]
pub(crate) struct Launch {
    pub(crate) instance: u64,
    pub(crate) sha: String,
    pub(crate) content_dir: PathBuf,
    pub(crate) database_hosts: Vec<String>,
    pub(crate) cdn_url: Option<String>,
    /// The number of the way in which it is run.
    pub(crate) configuration: u64,
}

/// The instances of the app.
pub(crate) struct Apps {
    recipes: Recipes,
    events: Events<Event>,
    running: BTreeMap<u64, Handle>,
}

struct Handle {
    backend: Arc<Backend>,
    configuration: u64,
    stop: Option<oneshot::Sender<Stop>>,
}

struct Stop {
    drain: Span,
    grace: Span,
}

impl Apps {
    pub(crate) const fn new(recipes: Recipes, events: Events<Event>) -> Self {
        Self { recipes, events, running: BTreeMap::new() }
    }

    /// Starts an instance. What comes of it are events.
    pub(crate) fn start(&mut self, launch: Launch) {
        self.running.retain(|_, handle| handle.stop.as_ref().is_some_and(|stop| !stop.is_closed()));
        let (instance, configuration) = (launch.instance, launch.configuration);
        let in_use = self.running.values().map(|handle| handle.configuration);
        self.recipes.forget_before(in_use.fold(configuration, u64::min));
        // Nothing newer than what was read is asked for, and nothing older than what runs.
        let Some(recipe) = self.recipes.of(configuration) else {
            return tracing::error!(instance, configuration, "there is no such way to run the app");
        };
        match spawn(&recipe, &launch) {
            Ok((running, port, backend)) => {
                tracing::info!(instance, pid = running.pid(), port = backend.port, commit = launch.sha, "app started");
                let (stop, stopped) = oneshot::channel();
                let health_url = format!("http://127.0.0.1:{}{}", backend.port, recipe.health_path);
                let supervisor = Supervisor {
                    instance,
                    running,
                    _port: port,
                    backend: Arc::clone(&backend),
                    health_url,
                    health_interval: recipe.health_interval,
                    events: self.events.clone(),
                };
                tokio::spawn(supervisor.run(stopped));
                self.running.insert(instance, Handle { backend, configuration, stop: Some(stop) });
            }
            Err(error) => {
                let program = recipe.command.first().cloned().unwrap_or_default();
                let how = format!("cannot start {program}: {error}{}", way_out(&error));
                let events = self.events.clone();
                tokio::spawn(async move { events.send(Event::AppNotStarted { instance, how }).await });
            }
        }
    }

    /// Stops an instance: its requests may end, then SIGTERM, then SIGKILL.
    pub(crate) fn stop(&mut self, instance: u64, drain: Span, grace: Span) {
        if let Some(stop) = self.running.get_mut(&instance).and_then(|handle| handle.stop.take()) {
            // If it has ended by itself, its event is on its way.
            let _ended = stop.send(Stop { drain, grace });
        }
    }

    /// Where requests for an instance go, if it was started.
    pub(crate) fn backend(&self, instance: u64) -> Option<Arc<Backend>> {
        self.running.get(&instance).map(|handle| Arc::clone(&handle.backend))
    }
}

fn spawn(recipe: &Recipe, launch: &Launch) -> std::io::Result<(Running, Port, Arc<Backend>)> {
    let port = Port::draw()?;
    let (program, args) = recipe.command.split_first().ok_or_else(|| std::io::Error::other("the command is empty"))?;
    let mut program = Program::new("app", program).args(args.iter().cloned()).dies_with_us();
    program.clear_env = true;
    let inherited = std::env::vars_os().filter(|(name, _)| {
        let name = name.to_string_lossy();
        !PRIVATE_PREFIXES.iter().any(|private| name.starts_with(private))
    });
    program.env.extend(inherited);
    for (name, value) in &recipe.env {
        program = program.env(name, value.expose());
    }
    program = program
        .env("PORT", port.number().to_string())
        .env("REVISION", &launch.sha)
        .env("CONTENT_DIR", &launch.content_dir)
        .env("CDN_URL", launch.cdn_url.as_deref().unwrap_or_default());
    if let Some(login) = &recipe.database {
        let url = database_url(login, &launch.database_hosts).map_err(std::io::Error::other)?;
        program = program.env("DATABASE_URL", url);
    }
    let backend = Backend { port: port.number(), sha: launch.sha.clone(), meter: Meter::new() };
    Ok((program.spawn()?, port, Arc::new(backend)))
}

/// The one task that knows an instance's process.
struct Supervisor {
    instance: u64,
    running: Running,
    /// Nobody else's until the process has ended.
    _port: Port,
    backend: Arc<Backend>,
    health_url: String,
    health_interval: Duration,
    events: Events<Event>,
}

impl Supervisor {
    async fn run(mut self, stopped: oneshot::Receiver<Stop>) {
        let instance = self.instance;
        let pulse = follow_health(instance, self.health_url.clone(), self.health_interval, self.events.clone());
        tokio::pin!(pulse, stopped);
        let how = tokio::select! {
            biased;
            ended = self.running.ended_with_group() => describe(ended),
            stop = &mut stopped => self.stop(stop.unwrap_or(Stop { drain: Span::ZERO, grace: Span::ZERO })).await,
            never = &mut pulse => match never {},
        };
        tracing::info!(instance, how, "app ended");
        self.events.send(Event::AppExited { instance, how }).await;
    }

    async fn stop(&mut self, stop: Stop) -> String {
        tokio::select! {
            ended = self.running.ended_with_group() => return describe(ended),
            () = self.backend.meter.still() => {}
            () = tokio::time::sleep(stop.drain.to_std()) => {}
        }
        // The leader knows how its own children are to end.
        self.check(self.running.signal(Signal::TERM));
        if let Ok(ended) = tokio::time::timeout(stop.grace.to_std(), self.running.ended_with_group()).await {
            return describe(ended);
        }
        self.check(self.running.signal_group(Signal::KILL));
        describe(self.running.ended_with_group().await)
    }

    fn check(&self, signalled: std::io::Result<()>) {
        if let Err(error) = signalled {
            tracing::warn!(%error, instance = self.instance, "the app cannot be signalled");
        }
    }
}

/// What to do about an app that cannot be started, where it is known.
fn way_out(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::PermissionDenied => ": correct web.command",
        _ => "",
    }
}

fn describe(ended: std::io::Result<bots_core::shell::process::Ended>) -> String {
    match ended {
        Ok(ended) => ended.to_string(),
        Err(error) => format!("its end was missed: {error}"),
    }
}

/// Asks an app until it is healthy, and then for as long as it runs, and tells what changes.
async fn follow_health(instance: u64, url: String, interval: Duration, events: Events<Event>) -> Infallible {
    while ask(&url).await.is_err() {
        tokio::time::sleep(HEALTH_INTERVAL).await;
    }
    events.send(Event::AppReady { instance }).await;
    let mut misses: u64 = 0;
    let mut turns = tokio::time::interval(interval);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    turns.tick().await;
    loop {
        turns.tick().await;
        match ask(&url).await {
            Ok(()) => {
                if misses >= MISSES_MAX {
                    tracing::info!(instance, "the app answers its health check again");
                    events.send(Event::AppReady { instance }).await;
                }
                misses = 0;
            }
            Err(how) => {
                misses += 1;
                if misses == MISSES_MAX {
                    tracing::warn!(instance, how, "the app hangs");
                }
                if misses.is_multiple_of(MISSES_MAX) {
                    events.send(Event::AppHung { instance, how }).await;
                }
            }
        }
    }
}

/// Healthy is an answer below 500: a path that the app does not know is an answer, too. Else one line says what came of it.
async fn ask(url: &str) -> Result<(), String> {
    match http::get(url, HEALTH_DEADLINE).await {
        Ok((..500, _body)) => Ok(()),
        Ok((status, _body)) => Err(format!("its health check was answered with {status}")),
        Err(error) => Err(format!("its health check failed: {error}")),
    }
}

/// One URL for all hosts: clients try them in turn until one takes writes.
///
/// # Errors
/// One line: the file with the password cannot be read.
fn database_url(login: &DatabaseLogin, hosts: &[String]) -> Result<String, String> {
    let shown = |password: &Secret| format!(":{}", encoded(password.expose()));
    let password = match &login.password {
        Password::None => String::new(),
        Password::Given(password) => shown(password),
        Password::File { path, held: _ } => {
            shown(&Secret::from_file(path).map_err(|error| format!("database.password_file: {error}"))?)
        }
    };
    Ok(format!(
        "postgresql://{}{password}@{}/{}?target_session_attrs=read-write&connect_timeout={CONNECT_TIMEOUT_S}",
        encoded(&login.username),
        hosts.join(","),
        encoded(&login.dbname),
    ))
}

fn encoded(text: &str) -> String {
    let encode = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    text.bytes().map(encode).collect()
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use bots_core::shell::runtime;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// Starts `script` as an app with a request that does not end, stops it if so told, and yields how it ended.
    async fn end_of(dir: &Path, script: &str, stop: Option<Stop>) -> String {
        let (events, mut queue) = runtime::queue();
        let command = ["/bin/sh", "-c", script].map(String::from).to_vec();
        let health_interval = Duration::from_secs(5);
        let (health_path, env) = (String::from("/"), BTreeMap::new());
        let recipe = Recipe { command, health_path, health_interval, env, database: None };
        let mut apps = Apps::new(Recipes::new(recipe), events);
        let launch = Launch {
            instance: 1,
            sha: String::from("aaaa"),
            content_dir: dir.to_owned(),
            database_hosts: Vec::new(),
            cdn_url: None,
            configuration: 0,
        };
        apps.start(launch);
        // Somebody's request does not end.
        let _in_flight = apps.backend(1).expect("started").meter.begin();
        if let Some(Stop { drain, grace }) = stop {
            while !dir.join("ready").exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            apps.stop(1, drain, grace);
        }
        match tokio::time::timeout(PATIENCE, queue.next()).await {
            Ok(Some(Event::AppExited { instance: 1, how })) => how,
            other => panic!("{other:?}"),
        }
    }

    /// Waits until the process whose number stands in a file is gone; it is not our child, and may not be waited for by anybody.
    async fn is_gone(file: &Path) -> bool {
        let pid = fs::read_to_string(file).expect("its number");
        let lives = || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
            !stat.is_empty() && !stat.contains(") Z ")
        };
        let gone = async {
            while lives() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, gone).await.is_ok()
    }

    #[tokio::test]
    async fn what_an_app_has_started_ends_with_it_whichever_way_it_ends() {
        let stop = || Some(Stop { drain: Span::ZERO, grace: Span::from_millis(200) });
        for (first, then, stop, how) in [
            ("", "exit 3", None, "exit code 3"),
            ("", "kill -KILL $$", None, "signal 9"),
            ("", "wait", stop(), "signal 15"),
            ("trap '' TERM; ", "while :; do sleep 600; done", stop(), "signal 9"),
        ] {
            let dir = tempfile::tempdir().expect("a folder");
            let left = "sleep 600 & echo $! > $CONTENT_DIR/child; touch $CONTENT_DIR/ready";
            assert_eq!(end_of(dir.path(), &format!("{first}{left}; {then}"), stop).await, how, "{then}");
            assert!(is_gone(&dir.path().join("child")).await, "{then}: its child lives on");
        }
    }

    #[tokio::test]
    async fn an_app_with_a_request_that_does_not_end_has_its_time_after_sigterm() {
        let dir = tempfile::tempdir().expect("a folder");
        let script = "trap 'exit 7' TERM; touch $CONTENT_DIR/ready; while :; do sleep 0.01; done";
        let stop = Stop { drain: Span::ZERO, grace: Span::from_secs(15) };
        assert_eq!(end_of(dir.path(), script, Some(stop)).await, "exit code 7");
    }

    #[test]
    fn the_database_url_names_all_hosts_and_hides_nothing_wrong() {
        let login = DatabaseLogin {
            dbname: String::from("guest book"),
            username: String::from("web"),
            password: Password::Given(Secret::new("p@ss:/?#é")),
        };
        let hosts = [String::from("10.0.0.1:5432"), String::from("10.0.0.2:5433")];
        assert_eq!(
            database_url(&login, &hosts).as_deref(),
            Ok("postgresql://web:p%40ss%3A%2F%3F%23%C3%A9@10.0.0.1:5432,10.0.0.2:5433/guest%20book\
             ?target_session_attrs=read-write&connect_timeout=2")
        );
    }

    #[tokio::test]
    async fn a_rotated_password_reaches_the_next_instance() {
        let dir = tempfile::tempdir().expect("a folder");
        let (secret, seen) = (dir.path().join("secret"), dir.path().join("seen"));
        let login = DatabaseLogin {
            dbname: String::from("d"),
            username: String::from("u"),
            password: Password::File { path: secret.clone(), held: None },
        };
        let recipe = Recipe {
            command: ["/bin/sh", "-c", "printf %s \"$DATABASE_URL\" >\"$CONTENT_DIR/seen\""].map(String::from).to_vec(),
            health_path: String::from("/"),
            health_interval: HEALTH_INTERVAL,
            env: BTreeMap::new(),
            database: Some(login),
        };
        let launch = Launch {
            instance: 1,
            sha: String::from("aaaa"),
            content_dir: dir.path().to_owned(),
            database_hosts: vec![String::from("h:1")],
            cdn_url: None,
            configuration: 0,
        };
        for password in ["first", "second"] {
            std::fs::write(&secret, format!("{password}\n")).expect("write");
            let (mut running, _port, _backend) = spawn(&recipe, &launch).expect("started");
            running.ended().await.expect("its end");
            let url = std::fs::read_to_string(&seen).expect("what it saw");
            assert!(url.starts_with(&format!("postgresql://u:{password}@h:1/d?")), "{url}");
        }
        std::fs::remove_file(&secret).expect("remove");
        let error = spawn(&recipe, &launch).expect_err("not started").to_string();
        assert!(error.contains("database.password_file") && !error.contains('\n'), "{error}");
    }

    /// A way to run an app that goes by its command.
    fn way(command: &str, password: Password) -> Recipe {
        let (dbname, username) = (String::from("d"), String::from("u"));
        Recipe {
            command: vec![command.to_owned()],
            health_path: String::from("/"),
            health_interval: HEALTH_INTERVAL,
            env: BTreeMap::new(),
            database: Some(DatabaseLogin { dbname, username, password }),
        }
    }

    #[test]
    fn another_way_to_run_the_app_has_another_number_and_old_ones_go_with_their_instances() {
        let file = |held: &str| Password::File { path: PathBuf::from("p"), held: Some(Secret::new(held)) };
        let recipes = Recipes::new(way("a", file("first")));
        let noted = |command: &str, password| recipes.note(way(command, password));
        assert_eq!(noted("a", file("first")), (0, false));
        assert_eq!(noted("a", file("rotated")), (1, true));
        assert_eq!(noted("b", file("rotated")), (2, true));
        assert_eq!(noted("b", file("rotated")), (2, false));
        assert_eq!(noted("b", Password::None), (3, true));
        assert_eq!(recipes.newest(), 3);
        let known = || (0..5).filter(|number| recipes.of(*number).is_some()).collect::<Vec<_>>();
        assert_eq!(known(), [0, 1, 2, 3]);
        recipes.forget_before(2);
        assert_eq!(known(), [2, 3]);
    }
}
