//! The routes of a content bot: pushes in, packs out.

use std::{
    path::Path as FilePath,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bots_core::shell::{Clock, Events, StatusHub};
use http_body_util::BodyExt;
use serde_json::json;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_util::io::ReaderStream;

use super::{
    metrics::ContentMetrics,
    mirror::Mirror,
    turnstile::{Entry, Turnstile},
    webhook::{Sender, Verdict, judge, trust},
};
use crate::machine::{Event, Reference, Role};

/// The largest announcement. A push of two thousand commits has a payload of about a mebibyte.
const PUSH_BYTES_MAX: usize = 3 * 1024 * 1024;

/// An announcement up to this length is read whoever sends it: as many as there may be connections at an address take 16 MiB.
const SMALL_BYTES_MAX: usize = 64 * 1024;

/// So many longer ones are read at once, whatever their sites: 48 MiB at most, before it is known who sends them.
static LARGE: Semaphore = Semaphore::const_new(16);

/// How long one of them waits for its turn. Forges give up after ten seconds.
const TURN_DEADLINE: Duration = Duration::from_secs(2);

/// How long the body of an announcement may take. Forges give up after ten seconds.
const BODY_DEADLINE: Duration = Duration::from_secs(5);

/// The secrets that are in force, read afresh.
pub type Secrets = Box<dyn Fn() -> Result<Vec<bots_core::shell::Secret>, String> + Send + Sync>;

/// How much of a pack is read at once.
const CHUNK_LEN: usize = 64 * 1024;

/// Who may announce a push.
pub enum PushDoor {
    /// Whoever knows one of the secrets.
    Signed(Secrets),
    /// Whoever reaches us: only this machine can.
    Loopback,
    /// Nobody.
    Closed,
}

/// What pushes are announced of, and by whom.
pub struct Front {
    /// The scope whose content this is.
    pub site: String,
    /// Whether the API is this site's alone, so that an announcement need not name it.
    pub is_alone: bool,
    /// What is published.
    pub reference: Reference,
    /// Who may announce a push.
    pub door: PushDoor,
}

/// What the handlers share.
pub struct Doors {
    /// What pushes are announced of, and by whom.
    pub front: Front,
    /// The way into the machine.
    pub events: Events<Event>,
    /// Where packs come from.
    pub mirror: Arc<Mirror>,
    /// What is counted.
    pub metrics: ContentMetrics,
    /// What the bot is.
    pub status: StatusHub,
    /// The role after the last step.
    pub role: Arc<Mutex<Role>>,
    turnstile: Mutex<Turnstile>,
}

impl Doors {
    /// Doors that nobody has come to.
    #[must_use]
    pub const fn new(
        front: Front,
        events: Events<Event>,
        mirror: Arc<Mirror>,
        metrics: ContentMetrics,
        status: StatusHub,
        role: Arc<Mutex<Role>>,
    ) -> Self {
        Self { front, events, mirror, metrics, status, role, turnstile: Mutex::new(Turnstile::new()) }
    }
}

/// `POST /push/<site>`, with or without the sender's name behind it, and `POST /push` where there is one site; it looks after
/// its own authentication.
pub fn push_routes(doors: Arc<Doors>) -> Router {
    let site = if doors.front.is_alone { "{site}" } else { &doors.front.site };
    let (to_site, by_sender) = (format!("/push/{site}"), format!("/push/{site}/{{sender}}"));
    let routes = if doors.front.is_alone {
        Router::new()
            .route("/push", post(push))
            .route(&to_site, post(push_to_site))
            .route(&by_sender, post(push_by_sender))
    } else {
        Router::new().route(&to_site, post(push)).route(&by_sender, post(push_here_by_sender))
    };
    routes.with_state(doors)
}

/// `GET /pack/<sha>` and `GET /leader`.
pub fn routes(doors: Arc<Doors>) -> Router {
    Router::new().route("/pack/{sha}", get(pack)).route("/leader", get(leader)).with_state(doors)
}

async fn push(State(doors): State<Arc<Doors>>, request: Request) -> Response {
    announce(&doors, None, request).await
}

async fn push_to_site(State(doors): State<Arc<Doors>>, Path(site): Path<String>, request: Request) -> Response {
    if site == doors.front.site { announce(&doors, None, request).await } else { not_here(&doors) }
}

async fn push_by_sender(
    State(doors): State<Arc<Doors>>,
    Path((site, sender)): Path<(String, String)>,
    request: Request,
) -> Response {
    if site == doors.front.site {
        push_here_by_sender(State(doors), Path(sender), request).await
    } else {
        not_here(&doors)
    }
}

async fn push_here_by_sender(
    State(doors): State<Arc<Doors>>,
    Path(sender): Path<String>,
    request: Request,
) -> Response {
    match Sender::named(&sender) {
        Some(only) => announce(&doors, Some(only), request).await,
        None => refusal(StatusCode::NOT_FOUND, "senders are github, gitlab, gitea, forgejo, bitbucket and standard"),
    }
}

fn not_here(doors: &Doors) -> Response {
    refusal(
        StatusCode::NOT_FOUND,
        &format!("pushes to {} are announced here: POST /push/{}", doors.front.site, doors.front.site),
    )
}

/// Takes an announcement in: it is judged at once, and worked on when the sender has its answer.
async fn announce(doors: &Doors, only: Option<Sender>, request: Request) -> Response {
    let secrets = match &doors.front.door {
        PushDoor::Closed => {
            let why = "push.secret is not set and the API can be reached from other machines: set it on this bot";
            return refusal(StatusCode::FORBIDDEN, why);
        }
        PushDoor::Loopback => None,
        PushDoor::Signed(secrets) => Some(secrets),
    };
    let (head, body) = request.into_parts();
    let (body, _place) = match tokio::time::timeout(BODY_DEADLINE, take_in(body)).await {
        Ok(Ok(taken)) => taken,
        Ok(Err(refused)) => return *refused,
        Err(_elapsed) => return refusal(StatusCode::REQUEST_TIMEOUT, "the body took longer than 5 s"),
    };
    let verdict = match secrets {
        None => trust(&head.headers, &body, &doors.front.reference),
        Some(secrets) => match secrets() {
            Ok(secrets) => {
                judge(&head.headers, &body, &secrets, only, &doors.front.reference, Clock::unix_ms() / 1_000)
            }
            Err(error) => {
                tracing::error!(site = doors.front.site, error, "an announcement cannot be checked");
                return refusal(StatusCode::INTERNAL_SERVER_ERROR, "the secret cannot be read: see the log");
            }
        },
    };
    let announcement = match verdict {
        Verdict::Push(announcement) => announcement,
        Verdict::Ping => return (StatusCode::OK, Json(json!({ "pong": doors.front.site }))).into_response(),
        Verdict::Other(why) => {
            doors.metrics.pushes_ignored.inc();
            return (StatusCode::ACCEPTED, Json(json!({ "accepted": false, "why": why }))).into_response();
        }
        Verdict::Refused(why) => {
            doors.metrics.pushes_refused.inc();
            return refusal(StatusCode::UNAUTHORIZED, why);
        }
    };
    // Counted after the signature: a stranger must not use up what others may send.
    let delivery = announcement.delivery.as_deref();
    let entry = doors.turnstile.lock().unwrap_or_else(PoisonError::into_inner).enter(Clock::now(), delivery);
    match entry {
        Entry::Free => {}
        Entry::Known => return (StatusCode::ACCEPTED, Json(json!({ "accepted": true }))).into_response(),
        Entry::Full => {
            let after = [(header::RETRY_AFTER, "1")];
            return (after, refusal(StatusCode::TOO_MANY_REQUESTS, "too many announcements: one is enough"))
                .into_response();
        }
    }
    doors.metrics.pushes.inc();
    doors.events.send(Event::PushReceived(announcement)).await;
    (StatusCode::ACCEPTED, Json(json!({ "accepted": true }))).into_response()
}

/// Reads an announcement. A long one keeps its place among those for as long as it is held.
async fn take_in(mut body: Body) -> Result<(Vec<u8>, Option<SemaphorePermit<'static>>), Box<Response>> {
    let (mut bytes, mut place) = (Vec::new(), None);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Box::new(refusal(StatusCode::BAD_REQUEST, &format!("the body: {error}"))))?;
        let Ok(frame) = frame.into_data() else { continue };
        if bytes.len() + frame.len() > PUSH_BYTES_MAX {
            let why = "the body is larger than 3 MiB: announce fewer commits at once";
            return Err(Box::new(refusal(StatusCode::PAYLOAD_TOO_LARGE, why)));
        }
        if bytes.len() + frame.len() > SMALL_BYTES_MAX && place.is_none() {
            place = tokio::time::timeout(TURN_DEADLINE, LARGE.acquire()).await.ok().and_then(Result::ok);
            if place.is_none() {
                let after = [(header::RETRY_AFTER, "5")];
                let why = "too many announcements of more than 64 KiB at once";
                return Err(Box::new((after, refusal(StatusCode::SERVICE_UNAVAILABLE, why)).into_response()));
            }
        }
        bytes.extend_from_slice(&frame);
    }
    Ok((bytes, place))
}

async fn pack(State(doors): State<Arc<Doors>>, Path(sha): Path<String>) -> Response {
    let is_commit = sha.len() == 40 && sha.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if !is_commit {
        return refusal(StatusCode::BAD_REQUEST, "a commit is named by 40 digits of 0-9 and a-f");
    }
    let (mirror, asked) = (Arc::clone(&doors.mirror), sha.clone());
    let found = tokio::task::spawn_blocking(move || mirror.pack(&asked)).await;
    match found {
        Ok(Ok(Some(path))) => match stream(&path, &sha).await {
            Ok(response) => {
                doors.metrics.packs.inc();
                response
            }
            Err(error) => {
                tracing::warn!(site = doors.front.site, %error, sha, "a pack cannot be read");
                refusal(StatusCode::SERVICE_UNAVAILABLE, "the pack cannot be read: try again")
            }
        },
        Ok(Ok(None)) => refusal(StatusCode::NOT_FOUND, "this bot does not hold the commit"),
        Ok(Err(fault)) => {
            tracing::warn!(site = doors.front.site, %fault, sha, "a commit of the mirror cannot be packed");
            if !fault.is_damage() {
                return refusal(StatusCode::SERVICE_UNAVAILABLE, "the commit cannot be packed now: try again");
            }
            doors.events.send(Event::CommitDamaged { sha }).await;
            refusal(StatusCode::SERVICE_UNAVAILABLE, "the commit is damaged and will be fetched again")
        }
        Err(_panicked) => refusal(StatusCode::INTERNAL_SERVER_ERROR, "the pack could not be built"),
    }
}

async fn stream(path: &FilePath, sha: &str) -> std::io::Result<Response> {
    let file = tokio::fs::File::open(path).await?;
    let len = file.metadata().await?.len();
    let headers = [
        (header::CONTENT_TYPE, String::from("application/x-git-pack")),
        (header::CONTENT_LENGTH, len.to_string()),
        (header::ETAG, format!("\"{sha}\"")),
        (header::CACHE_CONTROL, String::from("public, max-age=31536000, immutable")),
    ];
    Ok((headers, Body::from_stream(ReaderStream::with_capacity(file, CHUNK_LEN))).into_response())
}

async fn leader(State(doors): State<Arc<Doors>>) -> Response {
    let leads = doors.role.lock().unwrap_or_else(PoisonError::into_inner).leads();
    bots_core::shell::api::answer(&doors.status, leads)
}

fn refusal(status: StatusCode, why: &str) -> Response {
    (status, Json(json!({ "error": why }))).into_response()
}
