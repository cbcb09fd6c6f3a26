//! The demo's app: a guestbook. Its page comes from a git revision (`CONTENT_DIR`), its entries from Postgres
//! (`DATABASE_URL`). It knows nothing of bots: it reads its environment, serves HTTP on `PORT` and ends on SIGTERM.

mod entries;
mod files;
mod page;

use std::{net::Ipv4Addr, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use axum::{
    Form, Json, Router,
    extract::{DefaultBodyLimit, Path, State},
    http::StatusCode,
    response::{Html, IntoResponse, Redirect, Response},
    routing::{get, post},
};
use serde::Deserialize;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::{
    entries::{Entries, Trouble},
    page::Page,
};

/// The longest name, in characters.
const NAME_LEN_MAX: usize = 80;

/// The longest message, in characters.
const MESSAGE_LEN_MAX: usize = 1_000;

/// The largest form: both fields at four bytes a character, percent-encoded.
const FORM_BYTES_MAX: usize = 16 * 1024;

/// How long requests in flight may take once we are asked to stop.
const DRAIN_DEADLINE: Duration = Duration::from_secs(2);

/// What handlers share.
struct App {
    entries: Entries,
    page: Page,
    content_dir: PathBuf,
}

/// The form below the entries.
#[derive(Debug, Deserialize)]
struct NewEntry {
    name: String,
    #[serde(alias = "text")]
    message: String,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guestbook: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<()> {
    let content_dir = PathBuf::from(variable("CONTENT_DIR")?);
    let port: u16 = variable("PORT")?.parse().context("PORT is not a port")?;
    let page = Page::load(&content_dir, variable("REVISION")?, variable("CDN_URL").unwrap_or_default())?;
    let entries = Entries::new(&variable("DATABASE_URL")?)?;
    let app = Arc::new(App { entries, page, content_dir });
    let router = Router::new()
        .route("/", get(show))
        .route("/entries", post(write))
        .route("/api/entries", get(list))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/{*path}", get(file))
        .layer(DefaultBodyLimit::max(FORM_BYTES_MAX))
        .with_state(app);
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.context("listen on PORT")?;
    let (stop, mut stopped) = watch::channel(false);
    tokio::spawn(async move {
        terminate.recv().await;
        stop.send_replace(true);
    });
    let mut also_stopped = stopped.clone();
    let asked = async move { drop(stopped.wait_for(|stop| *stop).await) };
    let late = async move {
        drop(also_stopped.wait_for(|stop| *stop).await);
        tokio::time::sleep(DRAIN_DEADLINE).await;
    };
    tokio::select! {
        served = axum::serve(listener, router).with_graceful_shutdown(asked) => served.context("serve"),
        // A client that has begun a request and says no more must not keep us.
        () = late => Ok(()),
    }
}

fn variable(name: &str) -> Result<String> {
    std::env::var(name).with_context(|| format!("the environment has no usable {name}"))
}

async fn show(State(app): State<Arc<App>>) -> Response {
    match app.entries.latest().await {
        Ok(entries) => Html(app.page.render(&entries)).into_response(),
        Err(trouble) => unavailable(&trouble),
    }
}

async fn list(State(app): State<Arc<App>>) -> Response {
    match app.entries.latest().await {
        Ok(entries) => Json(entries).into_response(),
        Err(trouble) => unavailable(&trouble),
    }
}

async fn write(State(app): State<Arc<App>>, Form(new): Form<NewEntry>) -> Response {
    let (name, message) = (new.name.trim(), new.message.trim());
    let bad = |text: String| (StatusCode::BAD_REQUEST, text).into_response();
    for (field, text, max) in [("name", name, NAME_LEN_MAX), ("message", message, MESSAGE_LEN_MAX)] {
        if text.is_empty() || text.contains('\0') {
            return bad(format!("the {field} is empty: write something\n"));
        }
        if text.chars().count() > max {
            return bad(format!("the {field} is longer than {max} characters: shorten it\n"));
        }
    }
    match app.entries.write(name, message).await {
        Ok(()) => Redirect::to("/").into_response(),
        Err(trouble) => unavailable(&trouble),
    }
}

async fn file(State(app): State<Arc<App>>, Path(path): Path<String>) -> Response {
    match files::read(&app.content_dir, &path).await {
        Some((content_type, bytes)) => ([("content-type", content_type)], bytes).into_response(),
        None => (StatusCode::NOT_FOUND, "no such page\n").into_response(),
    }
}

fn unavailable(trouble: &Trouble) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, [("retry-after", "1")], format!("{trouble}\n")).into_response()
}
