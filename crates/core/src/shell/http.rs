//! A small HTTP client: one connection a request, plain text, every size and time limited. For what bots ask each other.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::{HeaderMap, Method, Request, Uri, header};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::{config::Secret, status::Identity};

/// The largest answer that [`get`] takes in. A status is a few kilobytes.
pub const BODY_BYTES_MAX: usize = 4 * 1024 * 1024;

/// How long a bot that seems to hold our name has to say who it is.
pub const PROBE_DEADLINE: Duration = Duration::from_secs(1);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The address cannot be used.
    #[error("`{0}` is not an http:// URL with a host")]
    Url(String),
    /// Nobody listens, or the way is blocked.
    #[error("connect to {authority}")]
    Connect {
        /// Host and port.
        authority: String,
        /// What failed.
        #[source]
        source: std::io::Error,
    },
    /// The conversation broke.
    #[error("speak HTTP with {authority}")]
    Protocol {
        /// Host and port.
        authority: String,
        /// What failed.
        #[source]
        source: hyper::Error,
    },
    /// The body was cut short.
    #[error("read the answer of {authority}")]
    Body {
        /// Host and port.
        authority: String,
        /// What failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The answer is larger than we take in.
    #[error("the answer of {authority} is larger than {limit} bytes")]
    TooLarge {
        /// Host and port.
        authority: String,
        /// The limit.
        limit: usize,
    },
    /// No answer in time.
    #[error("no answer within {0:?}")]
    Deadline(Duration),
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The whole body.
    pub body: Bytes,
}

/// GETs `url` within `deadline`: status and body, whatever the status is.
///
/// # Errors
/// If there is no complete answer in time.
pub async fn get(url: &str, deadline: Duration) -> Result<(u16, Bytes), HttpError> {
    let answer = request(Method::GET, url, HeaderMap::new(), Bytes::new(), deadline, BODY_BYTES_MAX).await?;
    Ok((answer.status, answer.body))
}

/// POSTs JSON to `url` within `deadline`: status and body, whatever the status is.
///
/// # Errors
/// If there is no complete answer in time.
pub async fn post(
    url: &str,
    authorization: Option<&str>,
    json: String,
    deadline: Duration,
) -> Result<(u16, Bytes), HttpError> {
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    if let Some(value) = authorization.and_then(|text| header::HeaderValue::from_str(text).ok()) {
        headers.insert(header::AUTHORIZATION, value);
    }
    let answer = request(Method::POST, url, headers, Bytes::from(json), deadline, BODY_BYTES_MAX).await?;
    Ok((answer.status, answer.body))
}

/// The `Authorization` header of somebody with a password.
#[must_use]
pub fn basic_authorization(username: &str, password: &Secret) -> String {
    let pair = format!("{username}:{}", password.expose());
    format!("Basic {}", base64(pair.as_bytes()))
}

/// Sends a request and takes in the whole answer, within `deadline` and up to `body_limit` bytes.
///
/// # Errors
/// If there is no complete answer in time and size.
pub async fn request(
    method: Method,
    url: &str,
    headers: HeaderMap,
    body: Bytes,
    deadline: Duration,
    body_limit: usize,
) -> Result<Response, HttpError> {
    let exchange = Box::pin(exchange(method, url, headers, body, body_limit));
    tokio::time::timeout(deadline, exchange).await.map_err(|_elapsed| HttpError::Deadline(deadline))?
}

/// The `instance` of the bot of our own scope and name that answers at this `api_url`, or nothing if none does in time: an address
/// may have been given to another bot since.
pub async fn probe_instance(api_url: &str, ours: &Identity) -> Option<String> {
    let uri: Uri = api_url.parse().ok()?;
    // A bot that shares its API with others has a path of its own there.
    let path = Some(uri.path()).filter(|path| path.ends_with("/status")).unwrap_or("/status");
    let status_url = format!("http://{}{path}", uri.authority()?);
    let (status, body) = get(&status_url, PROBE_DEADLINE).await.ok()?;
    let said: Identity = serde_json::from_slice(&body).ok().filter(|_| status == 200)?;
    let of = |who: &Identity| (who.namespace.clone(), who.scope.clone(), who.name.clone());
    (of(&said) == of(ours)).then_some(said.instance)
}

async fn exchange(
    method: Method,
    url: &str,
    headers: HeaderMap,
    body: Bytes,
    body_limit: usize,
) -> Result<Response, HttpError> {
    let bad_url = || HttpError::Url(url.to_owned());
    let uri: Uri = url.parse().map_err(|_invalid| bad_url())?;
    let host = uri.host().filter(|_| uri.scheme_str() == Some("http")).ok_or_else(bad_url)?;
    let authority = uri.authority().ok_or_else(bad_url)?.to_string();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let connected = TcpStream::connect((host, uri.port_u16().unwrap_or(80))).await;
    let stream = connected.map_err(|source| HttpError::Connect { authority: authority.clone(), source })?;
    let protocol = |source| HttpError::Protocol { authority: authority.clone(), source };
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(protocol)?;
    let path = uri.path_and_query().map_or("/", |p| p.as_str());
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = method;
    *request.uri_mut() = path.parse().map_err(|_invalid| bad_url())?;
    *request.headers_mut() = headers;
    // Whoever is asked may be meant under another name: a cache holds pages by the name that visitors use.
    if !request.headers().contains_key(header::HOST) {
        let host_header = header::HeaderValue::from_str(&authority).map_err(|_invalid| bad_url())?;
        request.headers_mut().insert(header::HOST, host_header);
    }
    let answered = async {
        let (head, body) = sender.send_request(request).await.map_err(protocol)?.into_parts();
        let body = Limited::new(body, body_limit).collect().await.map_err(|source| {
            let authority = authority.clone();
            if source.is::<LengthLimitError>() {
                HttpError::TooLarge { authority, limit: body_limit }
            } else {
                HttpError::Body { authority, source }
            }
        })?;
        Ok(Response { status: head.status.as_u16(), headers: head.headers, body: body.to_bytes() })
    };
    tokio::pin!(answered);
    tokio::select! {
        biased;
        answer = &mut answered => answer,
        // The connection may end first, with the answer already read.
        _ended = connection => answered.await,
    }
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().fold(0_usize, |n, b| n << 8 | usize::from(*b)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let digit = char::from(DIGITS[group >> (18 - 6 * place) & 63]);
            out.push(if place <= chunk.len() { digit } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::base64;

    #[test]
    fn base64_is_rfc_4648s() {
        for (plain, coded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }
}
