//! Restart, reinitialize, reload: the wish goes to the machine as a command, and its answer becomes the response.

use std::sync::atomic::Ordering;

use axum::{body::Bytes, extract::State as Extract, http::StatusCode, response::Response};
use bots_core::{
    shell::Clock,
    wire::{
        tags::{is_true, yes_or_no},
        unix_ms_from_rfc3339,
    },
};
use serde_json::{Map, Value};

use super::{Site, read, say};
use crate::machine::{Answer, Command, CommandId, Event, Refusal, Restart};

type Refused = Box<Response>;

/// `POST /restart`.
pub(super) async fn restart(Extract(site): Extract<Site>, body: Bytes) -> Response {
    let paused = site.state().dynamic().pause;
    match wish(&body, paused) {
        Ok(restart) => command(&site, Command::Restart(restart)).await,
        Err(refused) => *refused,
    }
}

/// `DELETE /restart`.
pub(super) async fn drop_restart(Extract(site): Extract<Site>) -> Response {
    command(&site, Command::DropRestart).await
}

/// `POST /reinitialize`.
pub(super) async fn reinitialize(Extract(site): Extract<Site>, body: Bytes) -> Response {
    let fields = match object(&body) {
        Ok(fields) => fields,
        Err(refused) => return *refused,
    };
    if let Some(unknown) =
        fields.keys().find(|field| !matches!(field.as_str(), "force" | "from_leader" | "from-leader"))
    {
        return say(StatusCode::BAD_REQUEST, format!("{unknown}: nobody knows this field: use force and from_leader"));
    }
    if let Some((field, value)) = fields.iter().find(|(_, value)| yes_or_no(value).is_none()) {
        return say(StatusCode::BAD_REQUEST, format!("{field} is {value}: use true or false"));
    }
    let is = |field: &str| fields.get(field).is_some_and(is_true);
    let from_leader = is("from_leader") || is("from-leader");
    command(&site, Command::Reinitialize { force: is("force"), from_leader }).await
}

/// `POST /reload`: the member's own configuration is read again.
pub(super) async fn reload(Extract(site): Extract<Site>) -> Response {
    match site.inner.reload.read().await {
        Ok(live) => match ask(&site, Command::Reload(live)).await {
            Some(_taken_in) => say(StatusCode::ACCEPTED, "reload scheduled"),
            None => say(StatusCode::SERVICE_UNAVAILABLE, "the bot ends"),
        },
        Err(why) => say(StatusCode::UNPROCESSABLE_ENTITY, format!("nothing was changed: {why}")),
    }
}

async fn command(site: &Site, command: Command) -> Response {
    match ask(site, command).await {
        Some(Answer::Done(text)) => say(StatusCode::OK, text),
        Some(Answer::Scheduled) => say(StatusCode::ACCEPTED, "Restart scheduled"),
        Some(Answer::Refused(refusal, why)) => say(code(refusal), why),
        None => say(StatusCode::SERVICE_UNAVAILABLE, "the bot ends"),
    }
}

const fn code(refusal: Refusal) -> StatusCode {
    match refusal {
        Refusal::Unfit | Refusal::Failed => StatusCode::SERVICE_UNAVAILABLE,
        Refusal::AlreadyScheduled => StatusCode::CONFLICT,
        Refusal::NothingScheduled => StatusCode::NOT_FOUND,
        Refusal::Paused => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// Gives the machine a command and waits for its answer; nothing if the bot ends before. The time is limited as that of
/// every request is.
async fn ask(site: &Site, command: Command) -> Option<Answer> {
    let id = CommandId(site.inner.commands.fetch_add(1, Ordering::Relaxed) + 1);
    let mut changes = site.inner.state.clone();
    changes.mark_unchanged();
    site.inner.events.send(Event::Commanded { id, command }).await;
    loop {
        if let Some(answer) = changes.borrow_and_update().answer(id) {
            return Some(answer.clone());
        }
        changes.changed().await.ok()?;
    }
}

fn object(body: &[u8]) -> Result<Map<String, Value>, Refused> {
    if body.is_empty() {
        return Ok(Map::new());
    }
    match read(body)? {
        Value::Object(fields) => Ok(fields),
        _other => Err(Box::new(say(StatusCode::BAD_REQUEST, "the body must be a JSON object"))),
    }
}

fn wish(body: &[u8], paused: bool) -> Result<Restart, Refused> {
    let refuse = |code: StatusCode, why: String| Err(Box::new(say(code, why)));
    let fields = object(body)?;
    if paused && fields.contains_key("schedule") {
        return refuse(StatusCode::INTERNAL_SERVER_ERROR, String::from("Can't schedule restart in the paused state"));
    }
    let mut restart = Restart::default();
    for (field, value) in fields {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        match field.as_str() {
            "schedule" => match moment(&text, "restart", Clock::unix_ms()) {
                Ok(at) => (restart.at_unix_ms, restart.wish.schedule) = (Some(at), text),
                Err((code, why)) => return refuse(code, why),
            },
            "role" if matches!(text.as_str(), "primary" | "standby_leader" | "replica") => {
                restart.wish.role = Some(text);
            }
            "role" => {
                let why = "PostgreSQL role should be either primary, standby_leader, or replica";
                return refuse(StatusCode::BAD_REQUEST, String::from(why));
            }
            "postgres_version" => match version(&text) {
                Some(below) => {
                    (restart.below_version, restart.wish.postgres_version) = (Some(below), Some(text));
                }
                None => {
                    let why = format!("Invalid PostgreSQL version format: X.Y or X.Y.Z is accepted: {text}");
                    return refuse(StatusCode::BAD_REQUEST, why);
                }
            },
            "timeout" => match seconds(&text).filter(|secs| *secs > 0) {
                Some(secs) => restart.wish.timeout = Some(secs),
                None => {
                    let why = String::from("Timeout should be a positive number of seconds");
                    return refuse(StatusCode::BAD_REQUEST, why);
                }
            },
            // Patroni goes by its being there at all.
            "restart_pending" => restart.wish.restart_pending = true,
            unknown => {
                let why = format!("Unknown filter for the scheduled restart: {unknown}");
                return refuse(StatusCode::BAD_REQUEST, why);
            }
        }
    }
    Ok(restart)
}

/// A moment that is still to come, in milliseconds since 1970.
pub(super) fn moment(text: &str, action: &str, now_unix_ms: u64) -> Result<u64, (StatusCode, String)> {
    let Some(at) = unix_ms_from_rfc3339(text) else {
        if text.trim().parse::<jiff::civil::DateTime>().is_ok() {
            let why = format!("Timezone information is mandatory for the scheduled {action}");
            return Err((StatusCode::BAD_REQUEST, why));
        }
        let why = "Unable to parse scheduled timestamp. It should be in an unambiguous format, e.g. ISO 8601";
        return Err((StatusCode::UNPROCESSABLE_ENTITY, format!("{why}: 2026-07-24T12:00:00+00:00")));
    };
    if at < now_unix_ms {
        return Err((StatusCode::UNPROCESSABLE_ENTITY, format!("Cannot schedule {action} in the past")));
    }
    Ok(at)
}

/// `15.2` as 150002, `9.6.3` as 90603.
fn version(text: &str) -> Option<u32> {
    let parts: Vec<u32> = text.trim().split('.').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    match *parts.as_slice() {
        [major, minor] if major >= 10 => major.checked_mul(10_000)?.checked_add(minor),
        [major, minor] => Some(major * 10_000 + minor.checked_mul(100)?),
        [major, minor, patch] if major < 10 => Some(major * 10_000 + minor.checked_mul(100)?.checked_add(patch)?),
        _ => None,
    }
}

/// `90`, `90s`, `2min`, `1h`.
fn seconds(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    match unit.trim() {
        "" | "s" => Some(number),
        "ms" => Some(number / 1_000),
        "min" => number.checked_mul(60),
        "h" => number.checked_mul(3_600),
        "d" => number.checked_mul(86_400),
        _other => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{StatusCode, moment, seconds, version};

    #[test]
    fn versions_and_times_are_read() {
        assert_eq!(version("15.2"), Some(150_002));
        assert_eq!(version("9.6.3"), Some(90_603));
        for bad in ["15", "x.y", "15.2.1", "", "-1.0"] {
            assert_eq!(version(bad), None, "{bad}");
        }
        assert_eq!((seconds("90"), seconds("2min"), seconds("1 h")), (Some(90), Some(120), Some(3_600)));
        assert_eq!((seconds("soon"), seconds("-1")), (None, None));
    }

    #[test]
    fn a_moment_has_a_time_zone_and_lies_ahead() {
        let code = |text| moment(text, "restart", 1_784_894_400_000).map_err(|(code, _)| code);
        assert_eq!(code("2026-07-24T12:00:01+00:00"), Ok(1_784_894_401_000));
        assert_eq!(code("2026-07-24T12:00:01"), Err(StatusCode::BAD_REQUEST));
        assert_eq!(code("2026-07-24T11:00:00+00:00"), Err(StatusCode::UNPROCESSABLE_ENTITY));
        assert_eq!(code("tomorrow"), Err(StatusCode::UNPROCESSABLE_ENTITY));
    }
}
