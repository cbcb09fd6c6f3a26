//! A TCP proxy that delays, swallows or cuts: the network's faults, on loopback.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

/// A proxy in front of one server.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    faults: Arc<Faults>,
    cut: watch::Sender<u64>,
}

#[derive(Default)]
struct Faults {
    reply_delay_ms: AtomicU64,
    swallow_requests: AtomicBool,
    swallow_replies: AtomicBool,
}

impl Proxy {
    pub(crate) async fn start(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let (faults, cut) = (Arc::new(Faults::default()), watch::Sender::new(0));
        let (target, shared, cuts) = (target.to_owned(), Arc::clone(&faults), cut.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(&target).await else { continue };
                let (from_client, to_client) = client.into_split();
                let (from_server, to_server) = server.into_split();
                tokio::spawn(pump(from_client, to_server, Arc::clone(&shared), true, cuts.subscribe()));
                tokio::spawn(pump(from_server, to_client, Arc::clone(&shared), false, cuts.subscribe()));
            }
        });
        Self { address, faults, cut }
    }

    pub(crate) fn hosts(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn delay_replies(&self, by: Duration) {
        self.faults.reply_delay_ms.store(by.as_millis().try_into().expect("short"), Ordering::Relaxed);
    }

    /// From now on the server hears everything and the client nothing.
    pub(crate) fn swallow_replies(&self, on: bool) {
        self.faults.swallow_replies.store(on, Ordering::Relaxed);
    }

    /// From now on neither side hears anything, and no connection ends.
    pub(crate) fn partition(&self, on: bool) {
        self.faults.swallow_requests.store(on, Ordering::Relaxed);
        self.swallow_replies(on);
    }

    /// Ends every open connection.
    pub(crate) fn cut(&self) {
        self.cut.send_modify(|n| *n += 1);
    }
}

async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    faults: Arc<Faults>,
    request: bool,
    mut cut: watch::Receiver<u64>,
) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let read = tokio::select! {
            read = from.read(&mut buffer) => read.unwrap_or(0),
            _ = cut.changed() => 0,
        };
        if read == 0 {
            return;
        }
        let swallowed = if request { &faults.swallow_requests } else { &faults.swallow_replies };
        if swallowed.load(Ordering::Relaxed) {
            continue;
        }
        if !request {
            tokio::time::sleep(Duration::from_millis(faults.reply_delay_ms.load(Ordering::Relaxed))).await;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
