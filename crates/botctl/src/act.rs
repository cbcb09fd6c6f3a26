//! The commands, carried out: reads, asks, prints, writes.

use std::{
    fmt::Write as _,
    io::{self, BufRead, IsTerminal, Write},
    process::Stdio,
    time::Duration,
};

use bots_core::{
    dcs::{Compare, Scope, Transaction, Write as DcsWrite},
    machine::{Span, Time},
    shell::{Clock, http},
};
use serde_json::{Value, json};

use crate::{
    args::{Args, Command, Config, Format},
    config,
    failure::{Failure, one_line},
    fleet::{Fleet, ScopeView},
    history, list,
    member::{self, Login},
    publish,
    store::Store,
    switchover::{Plan, Progress},
    text, web,
    why::{self, Status},
};

/// How long a bot may take to say what it is.
const STATUS_DEADLINE: Duration = Duration::from_secs(3);

/// A live view is drawn again after this, even if nothing has changed but the time.
pub(crate) const REDRAW_INTERVAL: Duration = Duration::from_secs(1);

/// Carries out a command.
pub(crate) async fn act(args: Args) -> Result<(), Failure> {
    let store = Store::new(&args)?;
    let login = Login::new(&args)?;
    let format = args.format;
    match args.command {
        Command::List { scope, watch: false } => list_once(&store, scope.as_deref(), format).await,
        Command::List { scope, watch: true } => list_live(&store, scope.as_deref(), format).await,
        Command::Why { bot } => explain(&store, &bot, format).await,
        Command::History { scope } => {
            let scope = store.scope(&scope)?;
            print(&history::render(scope.name(), &store.scope_view(&scope).await?, format)?)
        }
        Command::Switchover { scope, to, force, timeout } => {
            let scope = store.scope(&scope)?;
            Box::pin(switch_over(&store, &scope, to.as_deref(), force, Span::from_secs(timeout), format)).await
        }
        Command::Restart { bot, pending, timeout, force } => {
            member::restart(&store, &login, &bot, pending, timeout, force).await
        }
        Command::Reload { bot } => member::reload(&store, &login, &bot).await,
        Command::Reinit { bot, from_leader, force } => member::reinit(&store, &login, &bot, from_leader, force).await,
        Command::Config(Config::Show { scope }) => show_config(&store, &store.scope(&scope)?, format).await,
        Command::Config(Config::Edit { scope, set, unset, force }) => {
            edit_config(&store, &store.scope(&scope)?, &set, &unset, force).await
        }
        Command::Content(asked) => Box::pin(publish::act(&store, &asked, format)).await,
        Command::Web(asked) => {
            web::check(&asked, &store.scope_view(&store.scope(asked.scope())?).await?)?;
            let web::Edit { scope, set, unset } = web::edit(asked, Clock::unix_ms())?;
            edit_config(&store, &store.scope(&scope)?, &set, &unset, true).await
        }
        Command::Completions { .. } => Ok(()),
    }
}

async fn list_once(store: &Store, scope: Option<&str>, format: Format) -> Result<(), Failure> {
    let fleet = match scope {
        Some(name) => {
            let scope = store.scope(name)?;
            Fleet { scopes: [(name.to_owned(), store.scope_view(&scope).await?)].into() }
        }
        None => store.fleet().await?,
    };
    print(&list::render(&fleet, scope, Clock::unix_ms(), format))
}

async fn list_live(store: &Store, scope: Option<&str>, format: Format) -> Result<(), Failure> {
    // A first reading, so that an etcd that is away, or a scope that is none, is said at once.
    match scope {
        Some(name) => drop(store.scope_view(&store.scope(name)?).await?),
        None => drop(store.fleet().await?),
    }
    let mut followed = store.follow_all();
    let terminal = io::stdout().is_terminal();
    loop {
        let changed = followed.changed(REDRAW_INTERVAL).await;
        if !followed.is_known() || !(changed || terminal) {
            continue;
        }
        let mut frame = list::render(&followed.fleet(store), scope, Clock::unix_ms(), format);
        if !followed.is_fresh() {
            let _infallible = writeln!(frame, "\netcd does not answer: this is what it last said");
        }
        print(&if terminal { format!("\x1b[H\x1b[J{frame}") } else { format!("{frame}\n") })?;
    }
}

pub(crate) async fn explain(store: &Store, bot: &str, format: Format) -> Result<(), Failure> {
    let fleet = store.fleet().await?;
    let (scope, name, member) = match fleet.find(bot)[..] {
        [one] => one,
        [] => return Err(Failure::not_found(format!("no bot {bot} is alive: `botctl list` shows who is"))),
        ref several => {
            let names = several.iter().map(|(s, n, _)| format!("{s}/{n}")).collect::<Vec<_>>().join(" or ");
            return Err(Failure::usage(format!("{bot} is the name of several bots: say {names}")));
        }
    };
    let answer = match why::status_url(&member.head.api_url) {
        Some(url) => ask(&url).await,
        None => Err(format!("its api_url `{}` is no address", member.head.api_url)),
    };
    match answer {
        Ok(status) => print(&match format {
            Format::Json => text::json(&why::masked(&status)),
            Format::Yaml => text::yaml(&why::masked(&status)),
            Format::Table => {
                let status: Status = serde_json::from_value(status)
                    .map_err(|e| Failure::failed(format!("{scope}/{name} answers in another way: {e}")))?;
                why::answered(scope, name, member, &status)
            }
        }),
        Err(reason) => {
            print(&match format {
                Format::Table => why::unanswered(scope, name, member, Clock::unix_ms()),
                Format::Json => text::json(&why::silent(scope, name, member)),
                Format::Yaml => text::yaml(&why::silent(scope, name, member)),
            })?;
            Err(Failure::failed(format!("{scope}/{name} does not answer at {}: {reason}", member.head.api_url)))
        }
    }
}

async fn ask(url: &str) -> Result<Value, String> {
    let (status, body) = http::get(url, STATUS_DEADLINE).await.map_err(|e| causes(&e))?;
    if status != 200 {
        return Err(format!("it answers {status}"));
    }
    serde_json::from_slice(&body).map_err(|e| format!("it does not answer with JSON: {e}"))
}

/// An error and what caused it, on one line.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _infallible = write!(text, ": {error}");
        cause = error.source();
    }
    one_line(&text)
}

async fn switch_over(
    store: &Store,
    scope: &Scope,
    to: Option<&str>,
    force: bool,
    patience: Span,
    format: Format,
) -> Result<(), Failure> {
    let view = store.scope_view(scope).await?;
    let plan = Plan::new(scope, &view, to)?;
    let (name, from) = (scope.name(), plan.leader.as_str());
    let target = plan.to.as_deref().unwrap_or("the healthiest replica");
    if !force {
        confirm(&format!("Hand the lead of {name} from {from} to {target}?"))?;
    }
    let start = Clock::now();
    let changed = format!("{name} has changed in the meantime: nothing was asked; try again");
    let asked_at = store.write(&plan.transaction, &changed).await?;
    let deadline = start + patience;
    let mut followed = store.follow_scope(scope);
    loop {
        followed.changed(REDRAW_INTERVAL).await;
        let now = Clock::now();
        let fleet = followed.fleet(store);
        let seen = fleet.scopes.get(name).filter(|_| followed.revision() >= asked_at);
        match seen.map(|view| plan.progress(view)) {
            Some(Progress::Done(leader)) => return done(name, from, &leader, start, now, format),
            Some(Progress::Other(leader)) => {
                return Err(Failure::failed(format!(
                    "{leader} leads {name} in place of {from}, and not {target}: `botctl why {name}/{target}` may say what kept it"
                )));
            }
            Some(Progress::Refused) => return Err(refused(&fleet, name, from, target).await),
            Some(Progress::Under) | None if now >= deadline => {
                let leader = seen.and_then(|v| v.leader()).unwrap_or("nobody");
                return Err(Failure::failed(format!(
                    "{name} was not handed over within {patience}: {leader} leads; the request stands, see `botctl list {name}`"
                )));
            }
            Some(Progress::Under) | None => {}
        }
    }
}

fn done(name: &str, from: &str, leader: &str, start: Time, now: Time, format: Format) -> Result<(), Failure> {
    let took = now.since(start).as_millis();
    let result = json!({ "scope": name, "from": from, "to": leader, "milliseconds": took });
    print(&match format {
        Format::Table => format!("{leader} leads {name} in place of {from}, after {}\n", Span::from_millis(took)),
        Format::Json => text::json(&result),
        Format::Yaml => text::yaml(&result),
    })
}

/// Why a request was taken back: in the words of the leader that did so, if it answers.
async fn refused(fleet: &Fleet, name: &str, leader: &str, target: &str) -> Failure {
    let bots = fleet.find(&format!("{name}/{leader}"));
    let url = bots.first().and_then(|(_, _, member)| why::status_url(&member.head.api_url));
    let status = match url {
        Some(url) => ask(&url).await.ok().and_then(|s| serde_json::from_value::<Status>(s).ok()),
        None => None,
    };
    let reason = status.and_then(|s| {
        let report = s.report;
        report.troubles.into_iter().find(|trouble| trouble.contains("switchover"))
    });
    let reason = reason.unwrap_or_else(|| format!("it gives no reason; `botctl why {name}/{leader}` may"));
    Failure::failed(format!("{leader} did not hand {name} over to {target} and still leads: {reason}"))
}

async fn show_config(store: &Store, scope: &Scope, format: Format) -> Result<(), Failure> {
    let value = why::masked(&config_of(&store.scope_view(scope).await?)?);
    print(&match format {
        Format::Json => text::json(&value),
        Format::Table | Format::Yaml => text::yaml(&value),
    })
}

async fn edit_config(
    store: &Store,
    scope: &Scope,
    set: &[String],
    unset: &[String],
    force: bool,
) -> Result<(), Failure> {
    let view = store.scope_view(scope).await?;
    let old = config_of(&view)?;
    if !(set.is_empty() && unset.is_empty()) {
        // Who names the fields on the command line has already said what shall change.
        return write_config(store, scope, &view, &old, &config::apply(old.clone(), set, unset)?, None).await;
    }
    let draft = Draft::edited(&old).await?;
    let question = (!force).then(|| format!("Write this to {}?", scope.name()));
    let written = async {
        let new = config::unmasked(config::parse(&draft.text)?, &old)?;
        write_config(store, scope, &view, &old, &new, question.as_deref()).await
    };
    match written.await {
        Ok(()) => Ok(()),
        Err(failure) => Err(draft.kept(failure)),
    }
}

async fn write_config(
    store: &Store,
    scope: &Scope,
    view: &ScopeView,
    old: &Value,
    new: &Value,
    question: Option<&str>,
) -> Result<(), Failure> {
    // What was wrong before does not keep anybody from draining a bot, or from a pause.
    let known = bots_core::wire::config::misfits(old);
    let mut misfits = bots_core::wire::config::misfits(new);
    misfits.retain(|misfit| !known.contains(misfit));
    misfits.extend(web::faults(new, old));
    if !misfits.is_empty() {
        return Err(Failure::failed(format!("nothing was written: {}", misfits.join("; "))));
    }
    let diff = text::diff(&text::yaml(&why::masked(old)), &text::yaml(&why::masked(new)));
    if new == old {
        return print("nothing changes\n");
    }
    print(if diff.is_empty() { "  (a secret)\n" } else { &diff })?;
    if let Some(question) = question {
        confirm(question)?;
    }
    let key = scope.config();
    let unchanged = match view.keys.get("config") {
        Some(kv) => Compare::ModifiedAt(key.clone(), kv.modified),
        None => Compare::Absent(key.clone()),
    };
    let changed = "somebody else has changed the configuration in the meantime: nothing was written; try again";
    let transaction = Transaction::new(vec![unchanged], vec![DcsWrite::put(key, new.to_string())]);
    store.write(&transaction, changed).await?;
    print("written\n")
}

fn config_of(view: &ScopeView) -> Result<Value, Failure> {
    let text = view.value("config").filter(|text| !text.trim().is_empty()).unwrap_or("{}");
    serde_json::from_str(text).map_err(|e| Failure::failed(format!("what stands in the config key is no JSON: {e}")))
}

/// What an operator has made of a configuration in an editor.
struct Draft {
    file: tempfile::NamedTempFile,
    text: String,
}

impl Draft {
    /// Has `old` edited, with its secrets masked.
    async fn edited(old: &Value) -> Result<Self, Failure> {
        let editor = std::env::var("VISUAL").or_else(|_| std::env::var("EDITOR"));
        let editor = editor.ok().filter(|e| !e.trim().is_empty());
        let Some(editor) = editor else {
            return Err(Failure::usage("EDITOR is not set: name your editor there, or use --set and --unset"));
        };
        let failed = |what: &str, error: &dyn std::fmt::Display| Failure::failed(format!("{what}: {error}"));
        let file = tempfile::Builder::new().prefix("botctl-").suffix(".yaml").tempfile();
        let file = file.map_err(|e| failed("make a file for the editor", &e))?;
        std::fs::write(file.path(), text::yaml(&why::masked(old))).map_err(|e| failed("write for the editor", &e))?;
        // As git does it: EDITOR may hold arguments, and the shell splits them.
        let mut command = tokio::process::Command::new("sh");
        command.arg("-c").arg(format!("{editor} \"$1\"")).arg("botctl").arg(file.path());
        let status = command.stdin(Stdio::inherit()).status().await.map_err(|e| failed("start the editor", &e))?;
        if !status.success() {
            return Err(Failure::failed(format!("the editor `{editor}` failed: nothing was written")));
        }
        let text = std::fs::read_to_string(file.path()).map_err(|e| failed("read what the editor left", &e))?;
        Ok(Self { file, text })
    }

    /// Keeps what was edited, since it did not come to anything, and says where.
    fn kept(self, mut failure: Failure) -> Failure {
        if let Ok((_file, path)) = self.file.keep() {
            let _infallible = write!(failure.message, "; your edit is kept in {}", path.display());
        }
        failure
    }
}

/// Asks, and fails unless the answer is yes.
pub(crate) fn confirm(question: &str) -> Result<(), Failure> {
    if !io::stdin().is_terminal() {
        return Err(Failure::usage(format!("{question} Nobody is there to answer: add --force to mean yes")));
    }
    print(&format!("{question} [y/N] "))?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer).map_err(|e| Failure::failed(format!("read the answer: {e}")))?;
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(Failure::failed("nothing was changed")),
    }
}

pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    // A reader that has seen enough (`botctl list | head`) is no failure worth words.
    written.map_err(|e| Failure::failed(format!("cannot print: {e}")))
}
