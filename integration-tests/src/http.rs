//! HTTP from outside: a client that keeps its connections, and a bounded load that counts what went wrong.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{HeaderMap, Method, Request, header};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::task::JoinSet;

/// No page here takes longer unless something is wrong.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// No page here is larger.
const BODY_BYTES_MAX: usize = 4 * 1024 * 1024;

/// The header by which a web bot says which commit an answer is from.
pub const REVISION_HEADER: &str = "x-bots-revision";

/// A client that keeps connections open between requests. Clones share them.
#[derive(Debug, Clone)]
pub struct Http {
    client: Client<HttpConnector, Full<Bytes>>,
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The body, as text.
    pub text: String,
}

impl Answer {
    /// A header's value, empty if it is absent.
    #[must_use]
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default()
    }

    /// The commit that the answer is from, empty if it does not say.
    #[must_use]
    pub fn revision(&self) -> &str {
        self.header(REVISION_HEADER)
    }
}

impl Default for Http {
    fn default() -> Self {
        Self::new()
    }
}

impl Http {
    /// A client.
    #[must_use]
    pub fn new() -> Self {
        Self { client: Client::builder(TokioExecutor::new()).build_http() }
    }

    /// GETs a page.
    ///
    /// # Errors
    /// If there is no complete answer in time. An error status is an answer.
    pub async fn get(&self, url: &str) -> Result<Answer> {
        self.send(Method::GET, url, None, Bytes::new()).await
    }

    /// GETs a page that must be there.
    ///
    /// # Errors
    /// If the answer is not 200.
    pub async fn page(&self, url: &str) -> Result<Answer> {
        let answer = self.get(url).await?;
        ensure!(answer.status == 200, "{url} answers {}: {}", answer.status, answer.text.trim());
        Ok(answer)
    }

    /// POSTs a form.
    ///
    /// # Errors
    /// If there is no complete answer in time.
    pub async fn post_form(&self, url: &str, fields: &[(&str, &str)]) -> Result<Answer> {
        let encode = |(name, value): &(&str, &str)| format!("{}={}", form_encoded(name), form_encoded(value));
        let body = fields.iter().map(encode).collect::<Vec<_>>().join("&");
        self.send(Method::POST, url, Some("application/x-www-form-urlencoded"), body.into()).await
    }

    /// Sends a request.
    ///
    /// # Errors
    /// If there is no complete answer in time.
    pub async fn send(&self, method: Method, url: &str, content_type: Option<&str>, body: Bytes) -> Result<Answer> {
        let content_type = content_type.map(|value| (header::CONTENT_TYPE.as_str(), value));
        self.send_with(method, url, content_type, body).await
    }

    /// Sends a request with headers.
    ///
    /// # Errors
    /// If there is no complete answer in time.
    pub async fn send_with<'h>(
        &self,
        method: Method,
        url: &str,
        headers: impl IntoIterator<Item = (&'h str, &'h str)>,
        body: Bytes,
    ) -> Result<Answer> {
        let mut request = Request::builder().method(method).uri(url);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let request = request.body(Full::new(body)).with_context(|| format!("use the address {url}"))?;
        let exchange = async {
            let answer = self.client.request(request).await.with_context(|| format!("ask {url}"))?;
            let (head, body) = answer.into_parts();
            let body = Limited::new(body, BODY_BYTES_MAX).collect().await;
            let body = body.map_err(anyhow::Error::from_boxed).with_context(|| format!("read the answer of {url}"))?;
            let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
            Ok(Answer { status: head.status.as_u16(), headers: head.headers, text })
        };
        tokio::time::timeout(ANSWER_DEADLINE, exchange).await.with_context(|| format!("an answer of {url} in time"))?
    }
}

fn form_encoded(text: &str) -> String {
    let encode = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    text.bytes().map(encode).collect()
}

/// A closed loop of `clients` that ask one page after the other, in turn from each address.
#[derive(Debug)]
pub struct Load {
    shared: Arc<LoadShared>,
    clients: JoinSet<()>,
}

#[derive(Debug, Default)]
struct LoadShared {
    stop: AtomicBool,
    addresses: Mutex<Vec<String>>,
    answered: AtomicU64,
    failed: AtomicU64,
    first_failure: Mutex<Option<String>>,
    by_revision: Mutex<BTreeMap<String, u64>>,
}

/// What a load has seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadTally {
    /// Answers with 200.
    pub answered: u64,
    /// Everything else.
    pub failed: u64,
    /// The first of the failures.
    pub first_failure: Option<String>,
    /// Answers by commit.
    pub by_revision: BTreeMap<String, u64>,
}

impl Load {
    /// Starts `clients` that pause for `pause` between requests.
    #[must_use]
    pub fn start(clients: usize, pause: Duration, addresses: Vec<String>) -> Self {
        let shared = Arc::new(LoadShared { addresses: Mutex::new(addresses), ..LoadShared::default() });
        let mut tasks = JoinSet::new();
        for index in 0..clients {
            tasks.spawn(ask(Arc::clone(&shared), index, pause));
        }
        Self { shared, clients: tasks }
    }

    /// Asks at these addresses from now on.
    pub fn aim(&self, addresses: Vec<String>) {
        *self.shared.addresses.lock().unwrap_or_else(PoisonError::into_inner) = addresses;
    }

    /// What was seen so far.
    #[must_use]
    pub fn tally(&self) -> LoadTally {
        LoadTally {
            answered: self.shared.answered.load(Ordering::Relaxed),
            failed: self.shared.failed.load(Ordering::Relaxed),
            first_failure: self.shared.first_failure.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            by_revision: self.shared.by_revision.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// Lets every client end its last request, and says what was seen.
    pub async fn finish(mut self) -> LoadTally {
        self.shared.stop.store(true, Ordering::Relaxed);
        while self.clients.join_next().await.is_some() {}
        self.tally()
    }
}

async fn ask(shared: Arc<LoadShared>, index: usize, pause: Duration) {
    let http = Http::new();
    let mut turn = index;
    while !shared.stop.load(Ordering::Relaxed) {
        let address = {
            let addresses = shared.addresses.lock().unwrap_or_else(PoisonError::into_inner);
            if addresses.is_empty() { None } else { addresses.get(turn % addresses.len()).cloned() }
        };
        turn += 1;
        if let Some(address) = address {
            match http.page(&address).await {
                Ok(answer) => {
                    shared.answered.fetch_add(1, Ordering::Relaxed);
                    let mut by_revision = shared.by_revision.lock().unwrap_or_else(PoisonError::into_inner);
                    *by_revision.entry(answer.revision().to_owned()).or_default() += 1;
                }
                Err(error) => {
                    shared.failed.fetch_add(1, Ordering::Relaxed);
                    let mut first = shared.first_failure.lock().unwrap_or_else(PoisonError::into_inner);
                    first.get_or_insert_with(|| format!("{error:#}"));
                }
            }
        }
        tokio::time::sleep(pause).await;
    }
}
