//! What is asked of one Postgres bot through its API: restart its server, make its data anew.

use std::time::Duration;

use bots_core::{
    shell::{Secret, http},
    wire::{Kind, Member, PostgresFacts},
};
use serde_json::{Value, json};

use crate::{
    act::{confirm, print},
    args::Args,
    failure::{Failure, one_line},
    fleet::Fleet,
    store::Store,
    text, why,
};

/// A bot answers a restart when the server is up again; it limits every request to a minute.
const ANSWER_DEADLINE: Duration = Duration::from_secs(65);

/// How often a copy is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Who asks.
pub(crate) struct Login {
    authorization: Option<String>,
}

impl Login {
    /// As the command line says.
    pub(crate) fn new(args: &Args) -> Result<Self, Failure> {
        let authorization = match (&args.api_username, &args.api_password_file) {
            (Some(username), Some(path)) => {
                let password = Secret::from_file(path);
                let password = password.map_err(|e| Failure::usage(format!("--api-password-file: {e}")))?;
                Some(http::basic_authorization(username, &password))
            }
            (None, None) => None,
            (Some(_), None) | (None, Some(_)) => {
                return Err(Failure::usage("--api-username and --api-password-file belong together"));
            }
        };
        Ok(Self { authorization })
    }
}

/// A bot that is asked something.
struct Asked {
    scope: String,
    name: String,
    /// Where its API is.
    origin: String,
}

/// `botctl restart`.
pub(crate) async fn restart(
    store: &Store,
    login: &Login,
    bot: &str,
    pending: bool,
    timeout: Option<u64>,
    force: bool,
) -> Result<(), Failure> {
    let asked = find(store, bot).await?;
    let Asked { scope, name, .. } = &asked;
    if !force {
        confirm(&format!("Restart the Postgres server of {scope}/{name}?"))?;
    }
    let mut wish = json!({});
    if pending {
        wish["restart_pending"] = json!(true);
    }
    if let Some(secs) = timeout {
        wish["timeout"] = json!(secs);
    }
    let said = post(login, &asked, "restart", &wish).await?;
    print(&format!("{scope}/{name}: {said}\n"))
}

/// `botctl reinit`.
pub(crate) async fn reinit(
    store: &Store,
    login: &Login,
    bot: &str,
    from_leader: bool,
    force: bool,
) -> Result<(), Failure> {
    let asked = find(store, bot).await?;
    let Asked { scope, name, .. } = &asked;
    if !force {
        confirm(&format!("Delete the data of {scope}/{name} and copy it anew?"))?;
    }
    let said = post(login, &asked, "reinitialize", &json!({"force": force, "from_leader": from_leader})).await?;
    print(&format!("{scope}/{name}: {said}\n"))?;
    let mut shown = String::new();
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let view = store.scope_view(&store.scope(scope)?).await?;
        let Some(member) = view.members.get(name) else { continue };
        let now = progress(member);
        if now != shown {
            print(&format!("{scope}/{name}: {now}\n"))?;
            shown = now;
        }
        if member.head.state == "running" {
            return Ok(());
        }
    }
}

/// A member's state, with how far its copy is.
pub(crate) fn progress(member: &Member) -> String {
    let copying = member.facts::<PostgresFacts>().and_then(|facts| facts.copying);
    match copying {
        Some(copy) => {
            let (done, total) = (text::bytes(copy.bytes_done), text::bytes(copy.bytes_total));
            format!("{}, {} % ({done} of {total})", member.head.state, copy.percent)
        }
        None => member.head.state.clone(),
    }
}

async fn find(store: &Store, bot: &str) -> Result<Asked, Failure> {
    let fleet: Fleet = store.fleet().await?;
    let found = fleet.find(bot);
    let (scope, name, member) = match found[..] {
        [one] => one,
        [] => return Err(Failure::not_found(format!("no bot {bot} is alive: `botctl list` shows who is"))),
        ref several => {
            let names = several.iter().map(|(s, n, _)| format!("{s}/{n}")).collect::<Vec<_>>().join(" or ");
            return Err(Failure::usage(format!("{bot} is the name of several bots: say {names}")));
        }
    };
    if member.head.kind != Kind::Postgres {
        return Err(Failure::failed(format!(
            "{scope}/{name} is a {} bot: it has no Postgres server",
            member.head.kind
        )));
    }
    let status = why::status_url(&member.head.api_url)
        .ok_or_else(|| Failure::failed(format!("its api_url `{}` is no address", member.head.api_url)))?;
    let origin = status.trim_end_matches("/status").to_owned();
    Ok(Asked { scope: scope.to_owned(), name: name.to_owned(), origin })
}

async fn post(login: &Login, asked: &Asked, path: &str, wish: &Value) -> Result<String, Failure> {
    let url = format!("{}/{path}", asked.origin);
    let Asked { scope, name, .. } = asked;
    let answer = http::post(&url, login.authorization.as_deref(), wish.to_string(), ANSWER_DEADLINE).await;
    let (status, body) =
        answer.map_err(|e| Failure::failed(format!("{scope}/{name} does not answer at {url}: {e}")))?;
    let said = one_line(&String::from_utf8_lossy(&body));
    match status {
        200 | 202 => Ok(said),
        401 => Err(Failure::failed(format!(
            "{scope}/{name} wants a password: give --api-username and --api-password-file"
        ))),
        _refused => Err(Failure::failed(format!("{scope}/{name} refused: {said}"))),
    }
}
