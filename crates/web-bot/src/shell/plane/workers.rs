//! Threads and connections: one runtime a thread, so that a connection never changes cores; accept within limits; be
//! patient with slow clients, but not for ever.

use std::{
    convert::Infallible,
    io,
    net::{SocketAddr, TcpListener as StdListener},
    pin::{Pin, pin},
    sync::{
        Arc, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use hyper::{Request, body::Incoming, header, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustix::net::sockopt;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::Sleep,
};

use tokio_rustls::TlsAcceptor;

use super::{
    Shared,
    activity::{Activity, Quiet},
    lane::Left,
    proxy::Proxy,
    tls::is_http2,
};

/// Connections at once. Each costs a few kilobytes; more clients than this belong behind a proxy.
const CONNECTIONS_MAX: usize = 8_192;

/// Connections that a worker has not looked at yet.
const QUEUE_MAX: usize = 1_024;

/// How long the two ends may take to agree on how to encrypt.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(15);

/// The largest head of a request, all its lines together. Cookies and tokens of real clients fit twice. hyper looks at it
/// between two reads, of which the last may bring as much again: what slips through is refused before it is answered.
pub(super) const HEAD_BYTES_MAX: usize = 64 * 1024;

/// Requests at once on one connection (HTTP/2); browsers ask for about a hundred.
const STREAMS_MAX: u32 = 128;

/// How often a silent HTTP/2 connection is asked whether it lives, and how long the answer may take. One that lives and asks for
/// nothing is closed all the same, as over HTTP/1.
const PING_INTERVAL: Duration = Duration::from_secs(20);

/// A peer that is silent is asked by the kernel whether it is there, and a connection to one that does not say so is given up:
/// two minutes after it has vanished without a word. Nobody else notices it of a WebSocket, on which silence is no fault. Middle
/// boxes that forget silent connections do so after five minutes and more.
const ALIVE_AFTER: Duration = Duration::from_secs(60);
const ALIVE_INTERVAL: Duration = Duration::from_secs(15);
const ALIVE_QUESTIONS: u32 = 4;

/// What is read before it is known what a connection speaks.
const FIRST_BYTES_MAX: usize = 1_024;

/// How a connection that speaks HTTP/2 without asking begins.
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0";

/// One thread's part of the work.
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) proxy: Proxy,
    tls: Option<TlsAcceptor>,
    open: AtomicUsize,
}

/// All threads, as the one that accepts sees them.
pub(super) struct Workers {
    places: Arc<Semaphore>,
    workers: Vec<(Arc<Worker>, mpsc::Sender<Accepted>)>,
}

/// Who asks, and how.
#[derive(Debug, Clone, Copy)]
pub(super) struct Client {
    pub(super) address: SocketAddr,
    /// Under TLS.
    pub(super) secure: bool,
}

/// A connection's place among [`CONNECTIONS_MAX`] and in the figures, until this is dropped. A connection that changes to another
/// protocol takes it along.
pub(super) struct Place {
    worker: Arc<Worker>,
    _permit: OwnedSemaphorePermit,
}

impl Place {
    fn take(worker: Arc<Worker>, permit: OwnedSemaphorePermit) -> Self {
        worker.shared.counters.connections.inc();
        Self { worker, _permit: permit }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.worker.shared.counters.connections.dec();
        self.worker.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection on its way to a worker.
struct Accepted {
    stream: std::net::TcpStream,
    client: Client,
    /// Its place among [`CONNECTIONS_MAX`].
    place: OwnedSemaphorePermit,
}

impl Workers {
    /// Starts `threads` threads; they end when this is dropped.
    pub(super) fn start(
        threads: usize,
        shared: &Arc<Shared>,
        app_answer_timeout: Duration,
        tls: Option<&TlsAcceptor>,
    ) -> io::Result<Self> {
        let mut workers = Vec::new();
        for number in 0..threads.max(1) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let (sender, mut queue) = mpsc::channel::<Accepted>(QUEUE_MAX);
            let proxy = Proxy::new(app_answer_timeout, shared.patience);
            let (shared, tls, open) = (Arc::clone(shared), tls.cloned(), AtomicUsize::new(0));
            let worker = Arc::new(Worker { shared, proxy, tls, open });
            let mine = Arc::clone(&worker);
            std::thread::Builder::new().name(format!("web-{number}")).spawn(move || {
                runtime.block_on(async move {
                    while let Some(accepted) = queue.recv().await {
                        tokio::spawn(Arc::clone(&mine).take(accepted));
                    }
                });
                // Tasks that read from disk may still wait there.
                runtime.shutdown_background();
            })?;
            workers.push((worker, sender));
        }
        Ok(Self { places: Arc::new(Semaphore::new(CONNECTIONS_MAX)), workers })
    }

    /// Takes connections until the runtime ends.
    pub(super) async fn accept(self: Arc<Self>, listener: TcpListener, secure: bool) {
        let places = Arc::clone(&self.places);
        loop {
            let place = Arc::clone(&places).acquire_owned().await.expect("the semaphore is never closed");
            let taken = match listener.accept().await {
                Ok((stream, address)) => {
                    stream.into_std().map(|stream| Accepted { stream, client: Client { address, secure }, place })
                }
                Err(error) => Err(error),
            };
            match taken {
                Ok(accepted) => self.hand_over(accepted).await,
                Err(error) => {
                    tracing::warn!(%error, "a connection cannot be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// To the worker that has the fewest.
    async fn hand_over(&self, accepted: Accepted) {
        let fewest = self.workers.iter().min_by_key(|(worker, _)| worker.open.load(Ordering::Relaxed));
        if let Some((worker, queue)) = fewest {
            worker.open.fetch_add(1, Ordering::Relaxed);
            // A worker that is gone is one of a data plane that is being dropped.
            let _gone = queue.send(accepted).await;
        }
    }
}

/// Has the kernel ask silent peers whether they are there: a connection is like the listener that it comes from. Connections to the
/// app need none of that: it is on this machine, and the kernel knows when it has ended.
pub(super) fn ask_silent_peers(listener: &StdListener) -> io::Result<()> {
    sockopt::set_socket_keepalive(listener, true)?;
    sockopt::set_tcp_keepidle(listener, ALIVE_AFTER)?;
    sockopt::set_tcp_keepintvl(listener, ALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(listener, ALIVE_QUESTIONS)?;
    Ok(())
}

impl Worker {
    async fn take(self: Arc<Self>, accepted: Accepted) {
        let Accepted { stream, client, place } = accepted;
        let place = Arc::new(Place::take(Arc::clone(&self), place));
        if let Ok(stream) = TcpStream::from_std(stream) {
            self.connection(stream, client, &place).await;
        }
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, client: Client, place: &Arc<Place>) {
        let _best_effort = stream.set_nodelay(true);
        if let Some(acceptor) = self.tls.clone().filter(|_| client.secure) {
            let handshake = acceptor.accept(Patient::new(stream, self.shared.patience));
            let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE_DEADLINE, handshake).await else { return };
            let closing = self.closing();
            match is_http2(stream.get_ref().1.alpn_protocol()) {
                true => self.http2(stream, client, closing).await,
                false => self.http1(stream, client, place, closing).await,
            }
            return;
        }
        let (mut stream, mut closing) = (stream, self.closing());
        // A line in the access log is written on the long way.
        let rest = match self.shared.log {
            None => match self.short_way(&mut stream, &mut closing).await {
                Left::Ended => return,
                Left::Rest(rest) => rest,
            },
            Some(_) => match first_bytes(&mut stream, self.shared.patience, &mut closing).await {
                Some(first) => first,
                None => return,
            },
        };
        // Who speaks HTTP/2 without asking says so in its first packet.
        let speaks_http2 = rest.starts_with(HTTP2_PREFACE);
        let stream = Begun { rest, stream: Patient::new(stream, self.shared.patience) };
        match speaks_http2 {
            true => self.http2(stream, client, closing).await,
            false => self.http1(stream, client, place, closing).await,
        }
    }

    async fn http1(
        self: Arc<Self>,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        client: Client,
        place: &Arc<Place>,
        mut closing: watch::Receiver<()>,
    ) {
        let (worker, place) = (Arc::clone(&self), Arc::clone(place));
        let service = service_fn(move |mut request: Request<Incoming>| {
            let worker = Arc::clone(&worker);
            // For hyper the connection ends where a tunnel begins.
            if request.headers().contains_key(header::UPGRADE) {
                request.extensions_mut().insert(Arc::clone(&place));
            }
            async move { Ok::<_, Infallible>(worker.answer(request, client).await) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.shared.patience)
            .max_buf_size(HEAD_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let mut connection = pin!(connection);
        tokio::select! {
            // A client that breaks off is its own business.
            _ended = connection.as_mut() => return,
            _asked = closing.changed() => connection.as_mut().graceful_shutdown(),
        }
        let _ended = connection.await;
    }

    async fn http2(
        self: Arc<Self>,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        client: Client,
        mut closing: watch::Receiver<()>,
    ) {
        let (worker, activity) = (Arc::clone(&self), Activity::new());
        let requests = activity.clone();
        let service = service_fn(move |request| {
            let (worker, busy) = (Arc::clone(&worker), requests.begin());
            async move {
                let answer = worker.answer(request, client).await;
                Ok::<_, Infallible>(answer.map(|body| busy.until_end_of(body)))
            }
        });
        let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .max_concurrent_streams(STREAMS_MAX)
            .max_header_list_size(u32::try_from(HEAD_BYTES_MAX).unwrap_or(u32::MAX))
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_INTERVAL)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = pin!(connection);
        tokio::select! {
            // A client that breaks off is its own business.
            _ended = connection.as_mut() => return,
            _asked = closing.changed() => connection.as_mut().graceful_shutdown(),
            quiet = activity.quiet_for(self.shared.patience) => match quiet {
                Quiet::Idle => connection.as_mut().graceful_shutdown(),
                // Who takes no answer takes no farewell.
                Quiet::Stalled => return,
            },
        }
        let left_alone = async {
            // What was idle for long has just been told to end.
            tokio::time::sleep(self.shared.patience).await;
            activity.quiet_for(self.shared.patience).await
        };
        tokio::select! {
            _ended = connection => {}
            // One that takes leave of nobody is left.
            _quiet = left_alone => {}
        }
    }

    /// Tells when open connections are to be closed, each after the answer that is under way.
    fn closing(&self) -> watch::Receiver<()> {
        self.shared.connections.lock().unwrap_or_else(PoisonError::into_inner).subscribe()
    }
}

/// What comes first, if it comes in time, and before the connection is to be closed.
async fn first_bytes(stream: &mut TcpStream, patience: Duration, closing: &mut watch::Receiver<()>) -> Option<Bytes> {
    let mut first = BytesMut::with_capacity(FIRST_BYTES_MAX);
    let came = tokio::select! {
        biased;
        came = tokio::time::timeout(patience, stream.read_buf(&mut first)) => came,
        _asked = closing.changed() => return None,
    };
    matches!(came, Ok(Ok(1..))).then(|| first.freeze())
}

/// A connection of which some bytes were read already.
struct Begun<T> {
    rest: Bytes,
    stream: T,
}

impl<T: AsyncRead + Unpin> AsyncRead for Begun<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.rest.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let length = self.rest.len().min(buf.remaining());
        buf.put_slice(&self.rest.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Begun<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A connection that is given up when its other end reads nothing for too long.
struct Patient<T> {
    stream: T,
    patience: Duration,
    /// Runs while what is to be written cannot be.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<T> Patient<T> {
    const fn new(stream: T, patience: Duration) -> Self {
        Self { stream, patience, stalled: None }
    }

    fn wait(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            if self.stalled.is_some() {
                self.stalled = None;
            }
            return written;
        }
        let patience = self.patience;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::from(io::ErrorKind::TimedOut)))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Patient<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Patient<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.wait(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.wait(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use rustix::net::sockopt;

    use super::{ALIVE_AFTER, ALIVE_INTERVAL, ALIVE_QUESTIONS, ask_silent_peers};

    #[test]
    fn an_accepted_connection_is_asked_whether_it_lives() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
        ask_silent_peers(&listener).expect("set");
        let _client = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
        let (accepted, _) = listener.accept().expect("accept");
        assert!(sockopt::socket_keepalive(&accepted).expect("read"));
        assert_eq!(sockopt::tcp_keepidle(&accepted).expect("read"), ALIVE_AFTER);
        assert_eq!(sockopt::tcp_keepintvl(&accepted).expect("read"), ALIVE_INTERVAL);
        assert_eq!(sockopt::tcp_keepcnt(&accepted).expect("read"), ALIVE_QUESTIONS);
    }
}
