//! The routes of a content bot: pushes in, packs out.

use std::{
    path::Path as FilePath,
    sync::{Arc, Mutex, PoisonError},
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bots_core::{
    machine::Span,
    shell::{Clock, Events, StatusHub},
};
use bytes::Bytes;
use serde_json::json;
use tokio_util::io::ReaderStream;

use super::{bucket::Bucket, metrics::ContentMetrics, mirror::Mirror, signature::is_signed};
use crate::machine::{Event, Role};

/// Announcements that may come at once: a monorepo's hooks fire in bursts.
const PUSH_BURST: u64 = 20;

/// Announcements after that: two a second. A look that was asked for is not lost, only the asking is refused.
const PUSH_EVERY: Span = Span::from_millis(500);

/// How much of a pack is read at once.
const CHUNK_LEN: usize = 64 * 1024;

/// Who may announce a push.
pub enum PushDoor {
    /// Whoever knows the secret, read afresh for every announcement.
    Signed(Box<dyn Fn() -> Result<bots_core::shell::Secret, String> + Send + Sync>),
    /// Whoever reaches us: only this machine can.
    Loopback,
    /// Nobody.
    Closed,
}

/// What the handlers share.
pub struct Doors {
    /// Who may announce a push.
    pub door: PushDoor,
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
    bucket: Mutex<Bucket>,
}

impl Doors {
    /// Doors with a full bucket.
    #[must_use]
    pub const fn new(
        door: PushDoor,
        events: Events<Event>,
        mirror: Arc<Mirror>,
        metrics: ContentMetrics,
        status: StatusHub,
        role: Arc<Mutex<Role>>,
    ) -> Self {
        Self { door, events, mirror, metrics, status, role, bucket: Mutex::new(Bucket::new(PUSH_BURST, PUSH_EVERY)) }
    }
}

/// `POST /push`, which looks after its own authentication.
pub fn push_routes(doors: Arc<Doors>) -> Router {
    Router::new().route("/push", post(push)).with_state(doors)
}

/// `GET /pack/<sha>` and `GET /leader`.
pub fn routes(doors: Arc<Doors>) -> Router {
    Router::new().route("/pack/{sha}", get(pack)).route("/leader", get(leader)).with_state(doors)
}

async fn push(State(doors): State<Arc<Doors>>, headers: HeaderMap, body: Bytes) -> Response {
    match &doors.door {
        PushDoor::Loopback => {}
        PushDoor::Closed => {
            let why = "push.secret is not set and the API can be reached from other machines: set it on this bot";
            return refusal(StatusCode::FORBIDDEN, why);
        }
        PushDoor::Signed(secret) => {
            let secret = match secret() {
                Ok(secret) => secret,
                Err(error) => {
                    tracing::error!(error, "an announcement cannot be checked");
                    return refusal(StatusCode::INTERNAL_SERVER_ERROR, "the secret cannot be read: see the log");
                }
            };
            let given = headers.get("x-hub-signature-256").and_then(|v| v.to_str().ok()).unwrap_or_default();
            if !is_signed(secret.expose().as_bytes(), &body, given) {
                doors.metrics.pushes_refused.inc();
                let why = "X-Hub-Signature-256 must be sha256=<HMAC-SHA256 of the body with push.secret>";
                return refusal(StatusCode::UNAUTHORIZED, why);
            }
        }
    }
    // Counted after the signature: a stranger must not use up what others may send.
    if !doors.bucket.lock().unwrap_or_else(PoisonError::into_inner).take(Clock::now()) {
        let after = [(header::RETRY_AFTER, "1")];
        return (after, refusal(StatusCode::TOO_MANY_REQUESTS, "too many announcements: one is enough"))
            .into_response();
    }
    doors.metrics.pushes.inc();
    doors.events.send(Event::PushReceived).await;
    (StatusCode::ACCEPTED, Json(json!({ "accepted": true }))).into_response()
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
                tracing::warn!(%error, sha, "a pack cannot be read");
                refusal(StatusCode::SERVICE_UNAVAILABLE, "the pack cannot be read: try again")
            }
        },
        Ok(Ok(None)) => refusal(StatusCode::NOT_FOUND, "this bot does not hold the commit"),
        Ok(Err(fault)) => {
            tracing::warn!(%fault, sha, "a commit of the mirror cannot be packed");
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
