//! A small cache in front of the site, for where no Varnish is installed: it keeps every page until it is told to forget, and takes
//! down who told it. What it keeps too long is what a content bot's purge is there for.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::Ipv4Addr,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, Result};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{Method, Request, Response, StatusCode, body::Incoming, header, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpListener, TcpStream},
    task::{JoinHandle, JoinSet},
};

use crate::http::{Answer, Http, REVISION_HEADER};

/// The header by which a purge says for which commit it is.
const PURGED_FOR_HEADER: &str = "x-purged-for";

/// The header by which the cache says whether an answer was there before it was asked for.
const CACHE_HEADER: &str = "x-cache";

/// A cache on loopback. Dropping it ends it.
#[derive(Debug)]
pub struct Cache {
    /// Where visitors and purgers reach it, without a path.
    pub url: String,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    http: Http,
    /// Who is asked for what is not kept, without a path: nobody yet, while it is empty.
    backend: Mutex<String>,
    pages: Mutex<HashMap<String, Answer>>,
    /// The commits that it was purged for, the oldest first.
    purged: Mutex<Vec<String>>,
}

impl Cache {
    /// Starts it, with nothing in it and nothing behind it.
    ///
    /// # Errors
    /// If there is no port for it.
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("take a port for the cache")?;
        let url = format!("http://{}", listener.local_addr().context("read the cache's port")?);
        let (http, backend) = (Http::new(), Mutex::default());
        let shared = Arc::new(Shared { http, backend, pages: Mutex::default(), purged: Mutex::default() });
        let server = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self { url, shared, server })
    }

    /// From now on `url`, which has no path, is asked for what is not kept.
    pub fn put_before(&self, url: &str) {
        url.clone_into(&mut self.shared.backend.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// What a content bot is to be told, so that it purges this cache: lines of its configuration.
    #[must_use]
    pub fn purge(&self) -> String {
        format!(
            "purge:\n  again_after_s: 1\n  requests:\n  - {{method: PURGE, url: '{}/', headers: {{{PURGED_FOR_HEADER}: '{{sha}}'}}}}\n",
            self.url
        )
    }

    /// The commits that it was purged for, the oldest first.
    #[must_use]
    pub fn purged(&self) -> Vec<String> {
        self.shared.purged.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// Whether an answer was in the cache before it was asked for.
#[must_use]
pub fn was_kept(answer: &Answer) -> bool {
    answer.header(CACHE_HEADER) == "hit"
}

/// Ends, with every connection, when it is aborted.
async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        connections.spawn(talk(stream, Arc::clone(&shared)));
        while connections.try_join_next().is_some() {}
    }
}

async fn talk(stream: TcpStream, shared: Arc<Shared>) {
    let service = service_fn(|request| {
        let shared = Arc::clone(&shared);
        async move { Ok::<_, Infallible>(shared.answer(&request).await) }
    });
    let _visitor_gone = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

impl Shared {
    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
        match request.method().as_str() {
            "PURGE" => {
                let sha = request.headers().get(PURGED_FOR_HEADER).and_then(|v| v.to_str().ok()).unwrap_or_default();
                self.purged.lock().unwrap_or_else(PoisonError::into_inner).push(sha.to_owned());
                self.pages.lock().unwrap_or_else(PoisonError::into_inner).clear();
                plain(StatusCode::OK, "purged\n")
            }
            "GET" => self.page(path).await,
            _ => plain(StatusCode::METHOD_NOT_ALLOWED, "this cache takes GET and PURGE\n"),
        }
    }

    async fn page(&self, path: &str) -> Response<Full<Bytes>> {
        let kept = self.pages.lock().unwrap_or_else(PoisonError::into_inner).get(path).cloned();
        if let Some(kept) = kept {
            return response(&kept, "hit");
        }
        let backend = self.backend.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if backend.is_empty() {
            return plain(StatusCode::BAD_GATEWAY, "there is nothing behind this cache yet\n");
        }
        // A purge that comes while the page is on its way would be lost on it.
        let purges = self.purges();
        match self.http.send(Method::GET, &format!("{backend}{path}"), None, Bytes::new()).await {
            Ok(answer) => {
                if answer.status == 200 && self.purges() == purges {
                    let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
                    pages.insert(path.to_owned(), answer.clone());
                }
                response(&answer, "miss")
            }
            Err(error) => plain(StatusCode::BAD_GATEWAY, &format!("{error:#}\n")),
        }
    }

    fn purges(&self) -> usize {
        self.purged.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

fn response(answer: &Answer, from: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(answer.text.clone()));
    *response.status_mut() = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::BAD_GATEWAY);
    for name in [header::CONTENT_TYPE.as_str(), REVISION_HEADER] {
        if let (Ok(name), Some(value)) = (header::HeaderName::try_from(name), answer.headers.get(name)) {
            response.headers_mut().insert(name, value.clone());
        }
    }
    response.headers_mut().insert(CACHE_HEADER, header::HeaderValue::from_static(from));
    response
}

fn plain(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text.to_owned()));
    *response.status_mut() = status;
    response
}
