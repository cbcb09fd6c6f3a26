//! What is asked of one bot through its API: restart its Postgres server, make its data anew, read its configuration again.

use std::time::Duration;

use bots_core::{
    machine::{Span, Time},
    shell::{Clock, Secret, http},
    wire::{Kind, Member, PostgresFacts},
};
use serde_json::{Value, json};

use crate::{
    act::{REDRAW_INTERVAL, confirm, print},
    args::Args,
    failure::{Failure, one_line},
    fleet::{Fleet, ScopeView},
    store::Store,
    text, why,
};

/// A bot answers a restart when the server is up again; it limits every request to a minute.
const ANSWER_DEADLINE: Duration = Duration::from_secs(65);

/// What a bot answers then. It goes on with what it was asked for.
const TOO_LONG: (u16, &str) = (503, "the request took too long");

/// How long a member may be missing, or be as if it had not been asked. A bot that is started anew is back by then, and a new copy
/// begins as soon as the server is stopped.
const PATIENCE: Span = Span::from_secs(120);

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
    let asked = find(store, bot, &[Kind::Postgres]).await?;
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
    match post(login, &asked, "restart", &wish).await? {
        Answer::Said(said) => print(&format!("{scope}/{name}: {said}\n")),
        Answer::TooLong => {
            print(&format!("{scope}/{name}: it takes longer than a minute, and goes on\n"))?;
            follow(store, &asked, Goal::Up).await
        }
    }
}

/// `botctl reload`.
pub(crate) async fn reload(store: &Store, login: &Login, bot: &str) -> Result<(), Failure> {
    let asked = find(store, bot, &[Kind::Postgres, Kind::Web]).await?;
    let Asked { scope, name, .. } = &asked;
    match post(login, &asked, "reload", &json!({})).await? {
        Answer::Said(said) => print(&format!("{scope}/{name}: {said}\n")),
        Answer::TooLong => {
            Err(Failure::failed(format!("{scope}/{name} has not read its configuration within a minute")))
        }
    }
}

/// `botctl reinit`.
pub(crate) async fn reinit(
    store: &Store,
    login: &Login,
    bot: &str,
    from_leader: bool,
    force: bool,
) -> Result<(), Failure> {
    let asked = find(store, bot, &[Kind::Postgres]).await?;
    let Asked { scope, name, .. } = &asked;
    if !force {
        confirm(&format!("Delete the data of {scope}/{name} and copy it anew?"))?;
    }
    match post(login, &asked, "reinitialize", &json!({"force": force, "from_leader": from_leader})).await? {
        Answer::Said(said) => print(&format!("{scope}/{name}: {said}\n"))?,
        Answer::TooLong => print(&format!("{scope}/{name}: it does not say whether it begins\n"))?,
    }
    follow(store, &asked, Goal::Copied).await
}

/// What an operator waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Goal {
    /// The server runs.
    Up,
    /// It runs on a copy that was made meanwhile.
    Copied,
}

/// How far it is.
#[derive(Debug, PartialEq, Eq)]
enum Course {
    /// On its way, or not begun.
    Under,
    Reached,
    /// In vain; in words that follow the member's name.
    Given(&'static str),
}

/// What was seen of a member since it was asked.
#[derive(Debug)]
struct Watched {
    goal: Goal,
    /// It was made anew.
    copying: bool,
    /// When it last did what it was asked for.
    busy: Time,
}

impl Watched {
    fn see(&mut self, now: Time, member: Option<&Member>) -> Course {
        let state = member.map(|member| member.head.state.as_str());
        self.copying |= state == Some(CREATING);
        let begun = self.goal == Goal::Up || self.copying;
        match state {
            Some(RUNNING) if begun => return Course::Reached,
            Some(RUNNING) | None => {}
            Some(_) => self.busy = now,
        }
        match state {
            _any if now.since(self.busy) < PATIENCE => Course::Under,
            None => Course::Given("is not there any more: its bot has ended, or cannot reach etcd"),
            Some(_) => Course::Given("runs, and was not copied anew"),
        }
    }
}

/// The states that matter here, as Postgres bots write them.
const CREATING: &str = "creating replica";
const RUNNING: &str = "running";

/// Shows how a member gets on until it is where it shall be.
async fn follow(store: &Store, asked: &Asked, goal: Goal) -> Result<(), Failure> {
    let Asked { scope, name, .. } = asked;
    let watched_scope = store.scope(scope)?;
    let mut followed = store.follow_scope(&watched_scope);
    let mut watched = Watched { goal, copying: false, busy: Clock::now() };
    let (mut shown, mut fresh_at) = (String::new(), Clock::now());
    loop {
        followed.changed(REDRAW_INTERVAL).await;
        let fleet = followed.fleet(store);
        let member = fleet.scopes.get(scope).and_then(|view: &ScopeView| view.members.get(name));
        if let Some(now) = member.map(progress).filter(|now| *now != shown) {
            print(&format!("{scope}/{name}: {now}\n"))?;
            shown = now;
        }
        if !followed.is_fresh() {
            // What etcd last said is nothing to go by.
            if Clock::now().since(fresh_at) >= PATIENCE {
                return Err(store.silent(PATIENCE));
            }
            watched.busy = Clock::now();
            continue;
        }
        fresh_at = Clock::now();
        match watched.see(Clock::now(), member) {
            Course::Under => {}
            Course::Reached => return Ok(()),
            Course::Given(why) => {
                return Err(Failure::failed(format!("{scope}/{name} {why}: `botctl why {scope}/{name}` may say more")));
            }
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

async fn find(store: &Store, bot: &str, kinds: &[Kind]) -> Result<Asked, Failure> {
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
    if !kinds.contains(&member.head.kind) {
        let asked_of = kinds.iter().map(Kind::to_string).collect::<Vec<_>>().join(" and ");
        let kind = member.head.kind;
        return Err(Failure::failed(format!("{scope}/{name} is a {kind} bot: that is asked of {asked_of} bots only")));
    }
    let status = why::status_url(&member.head.api_url)
        .ok_or_else(|| Failure::failed(format!("its api_url `{}` is no address", member.head.api_url)))?;
    let origin = status.trim_end_matches("/status").to_owned();
    Ok(Asked { scope: scope.to_owned(), name: name.to_owned(), origin })
}

/// What a bot says to a request.
enum Answer {
    Said(String),
    /// It has not come to its end within the time that a request has.
    TooLong,
}

async fn post(login: &Login, asked: &Asked, path: &str, wish: &Value) -> Result<Answer, Failure> {
    let url = format!("{}/{path}", asked.origin);
    let Asked { scope, name, .. } = asked;
    let answer = http::post(&url, login.authorization.as_deref(), wish.to_string(), ANSWER_DEADLINE).await;
    let (status, body) =
        answer.map_err(|e| Failure::failed(format!("{scope}/{name} does not answer at {url}: {e}")))?;
    let said = one_line(&String::from_utf8_lossy(&body));
    match status {
        200 | 202 => Ok(Answer::Said(said)),
        status if (status, said.as_str()) == TOO_LONG => Ok(Answer::TooLong),
        401 => Err(Failure::failed(format!(
            "{scope}/{name} wants a password: give --api-username and --api-password-file"
        ))),
        _refused => Err(Failure::failed(format!("{scope}/{name} refused: {said}"))),
    }
}

#[cfg(test)]
mod tests {
    use bots_core::{machine::Time, wire::Member};

    use super::{CREATING, Course, Goal, PATIENCE, RUNNING, Span, Watched};

    fn check(goal: Goal, seen: &[(u64, Option<&str>, Course)]) {
        let mut watched = Watched { goal, copying: false, busy: Time::from_millis(0) };
        for (at_s, state, expected) in seen {
            let member = state.map(|state| {
                Member::from_json(&format!(r#"{{"kind":"postgres","state":"{state}","role":"replica"}}"#)).unwrap()
            });
            let now = Time::from_millis(at_s * 1_000);
            assert_eq!(watched.see(now, member.as_ref()), *expected, "{state:?} at {at_s} s");
        }
    }

    #[test]
    fn a_copy_is_done_only_if_it_was_seen() {
        let patience = PATIENCE.as_millis() / 1_000;
        let still = Course::Given("runs, and was not copied anew");
        check(Goal::Copied, &[(1, Some(RUNNING), Course::Under), (patience, Some(RUNNING), still)]);
        let done = [
            (1, Some(RUNNING), Course::Under),
            (2, Some("stopping"), Course::Under),
            (3, Some(CREATING), Course::Under),
            (3 * patience, Some(CREATING), Course::Under),
            (3 * patience + 1, Some("starting"), Course::Under),
            (3 * patience + 2, Some(RUNNING), Course::Reached),
        ];
        check(Goal::Copied, &done);
    }

    #[test]
    fn a_member_that_is_gone_is_not_waited_for_for_ever() {
        let patience = PATIENCE.as_millis() / 1_000;
        let gone = Course::Given("is not there any more: its bot has ended, or cannot reach etcd");
        let course = [
            (100, Some(CREATING), Course::Under),
            (101, None, Course::Under),
            (99 + patience, None, Course::Under),
            (100 + patience, None, gone),
        ];
        check(Goal::Copied, &course);
        check(Goal::Up, &[(1, Some("starting"), Course::Under), (2, Some(RUNNING), Course::Reached)]);
        assert!(PATIENCE > Span::from_secs(15), "a member that rests is listed for so long after its death");
    }
}
