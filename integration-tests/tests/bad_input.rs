//! Wrong configuration: exit code 2, one line that names the field and what to do, and nothing is touched.

use std::fs;

use anyhow::{Context, Result, ensure};
use fleet::{
    Fleet,
    bots::{Bot, ContentBot, EdgeBot, PostgresBot, Serves, WebBot},
    process::{Program, workspace_binary},
};

/// A change to a good configuration, and what the complaint must name.
struct Case {
    replace: &'static str,
    by: &'static str,
    names: &'static str,
}

const fn case(replace: &'static str, by: &'static str, names: &'static str) -> Case {
    Case { replace, by, names }
}

/// What every bot must refuse.
const COMMON: &[Case] = &[
    case("scope: ", "scoop: ", "scope"),
    case("name: ", "name: bad/", "name"),
    case("namespace: service", "namespace: \"a b\"", "namespace"),
    case("  hosts: ", "  hosts: []\n  unused: ", "etcd3.hosts"),
    case("  level: INFO", "  level: LOUD", "log.level"),
    case("  listen: 127.0.0.1:", "  listen: nowhere:", "listen"),
    case("restapi:", "restapi: [", "line"),
];

const POSTGRES: &[Case] = &[
    case("  data_dir: ", "  data_dir_: ", "BOT_POSTGRESQL_DATA_DIR"),
    case("postgresql:\n  listen", "postgres:\n  listen", "postgresql"),
    case("    superuser:\n", "    superuser: 7\n    unused:\n", "postgresql.authentication.superuser"),
];

const CONTENT: &[Case] = &[
    case("  url: ", "  link: ", "git.link"),
    case("  poll_interval_s: 2", "  poll_interval_s: often", "git.poll_interval_s"),
    case("data_dir: ", "data_dir_: ", "data_dir"),
];

const WEB: &[Case] = &[
    case("  mode: static", "  mode: magic", "web.mode"),
    case("  mode: static", "  mode: app", "web.command"),
    case("content:\n  scope: site", "content:\n  scope: \"a b\"", "content.scope"),
];

const EDGE: &[Case] = &[
    case("  primary: 127.0.0.1:", "  primary: here:", "postgres.primary"),
    case("  scope: main", "  scope: edge", "postgres.scope"),
    case("  places: 8", "  places: 0", "proxy.places"),
    case("  hold_s: 20", "  hold: 20", "proxy.hold"),
    case("data_dir: ", "data_dir_: ", "data_dir"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_wrong_field_is_named() -> Result<()> {
    let fleet = Fleet::with_etcd(1).await?;
    let place = fleet.place();
    let mut wrong = Vec::new();
    let postgres = PostgresBot::new(&place, "main", "pg-1", &fleet.passwords)?;
    try_all(&postgres.bot, POSTGRES, &mut wrong).await?;
    let content = ContentBot::new(&place, "site", "content-1", "file:///nowhere.git", "")?;
    try_all(&content.bot, CONTENT, &mut wrong).await?;
    let web = WebBot::new(&place, "web", "web-1", &Serves::Files)?;
    try_all(&web.bot, WEB, &mut wrong).await?;
    let edge = EdgeBot::new(&place, "edge", "edge-1")?;
    try_all(&edge.bot, EDGE, &mut wrong).await?;
    ensure!(wrong.is_empty(), "{} complaints are not right:\n{}", wrong.len(), wrong.join("\n"));
    for scope in ["main", "site", "web", "edge"] {
        let now = fleet.store.scope(scope).await?;
        ensure!(now.members().is_empty(), "a bot with a wrong configuration has joined {scope}");
    }
    ensure!(!postgres.data_dir.exists(), "a data folder was made");
    fleet.stop().await
}

async fn try_all(bot: &Bot, own: &[Case], wrong: &mut Vec<String>) -> Result<()> {
    let good = fs::read_to_string(&bot.config)?;
    for Case { replace, by, names } in COMMON.iter().chain(own) {
        ensure!(good.contains(replace), "the configuration of {} has no `{replace}`", bot.name);
        fs::write(&bot.config, good.replacen(replace, by, 1))?;
        let ended = bot.run_to_end().await.with_context(|| format!("{} with {by}", bot.name))?;
        let lines: Vec<&str> = ended.stderr.lines().collect();
        if ended.code != Some(2) || lines.len() != 1 || !lines[0].contains(names) {
            wrong.push(format!("{} with `{by}`: exit {:?}, {names} in: {}", bot.name, ended.code, ended.stderr.trim()));
        }
    }
    fs::write(&bot.config, good)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_file_and_a_wrong_option_are_named() -> Result<()> {
    let fleet = Fleet::with_etcd(1).await?;
    for program in ["postgres-bot", "content-bot", "web-bot", "edge-bot"] {
        for (args, code, names) in [
            (vec!["/nonexistent/bot.yml"], 2, "/nonexistent/bot.yml"),
            (vec!["--nonsense"], 2, "--nonsense"),
            (vec![], 2, "scope"),
            (vec!["--version"], 0, ""),
            (vec!["--help"], 0, ""),
        ] {
            let run = Program::new(program, workspace_binary(program)?).args(args.clone());
            let ended = run.run(fleet.logs(), std::time::Duration::from_secs(10)).await?;
            let right = ended.code == Some(code) && ended.stderr.contains(names);
            ensure!(right, "{program} {args:?}: exit {:?}: {}{}", ended.code, ended.stdout, ended.stderr);
        }
    }
    fleet.stop().await
}
