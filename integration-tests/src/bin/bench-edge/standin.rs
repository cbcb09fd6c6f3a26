//! A stand-in for a Postgres member: a server that says its name to whoever connects, and the health check of a bot's API.
//! A real server would take longer to promote than an edge takes to route; here the route alone is measured.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context, Result};
use bots_core::wire::{Kind, Member, MemberHead, PostgresFacts};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// A member that may lead.
pub(crate) struct StandIn {
    pub(crate) name: String,
    pub(crate) serve: SocketAddr,
    pub(crate) check: SocketAddr,
    leads: Arc<AtomicBool>,
}

impl StandIn {
    /// Starts its two servers; they end with the process.
    pub(crate) async fn start(name: &str) -> Result<Self> {
        let (serving, checked) = (listener().await?, listener().await?);
        let (serve, check) = (serving.local_addr()?, checked.local_addr()?);
        let leads = Arc::new(AtomicBool::new(false));
        let says = name.to_owned();
        tokio::spawn(async move {
            while let Ok((stream, _)) = serving.accept().await {
                tokio::spawn(greet(stream, says.clone()));
            }
        });
        let flag = Arc::clone(&leads);
        tokio::spawn(async move {
            while let Ok((stream, _)) = checked.accept().await {
                tokio::spawn(answer(stream, flag.load(Ordering::SeqCst)));
            }
        });
        Ok(Self { name: name.to_owned(), serve, check, leads })
    }

    /// From now on, its health check says that it leads, or not.
    pub(crate) fn lead(&self, leads: bool) {
        self.leads.store(leads, Ordering::SeqCst);
    }

    /// What stands in its member key.
    pub(crate) fn member(&self, leads: bool) -> String {
        let head = MemberHead {
            kind: Kind::Postgres,
            state: String::from("running"),
            role: String::from(if leads { "primary" } else { "replica" }),
            version: String::from("0"),
            api_url: format!("http://{}/patroni", self.check),
            instance: self.name.clone(),
            node: String::from(if leads { "primary" } else { "replica" }),
            since_unix_ms: 0,
        };
        let conn_url = format!("postgres://{}/postgres", self.serve);
        Member::new(head, &PostgresFacts { conn_url, ..PostgresFacts::default() }).to_json()
    }
}

async fn listener() -> Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("take a port")
}

/// Says the name, then keeps the session until the other side ends it.
async fn greet(mut stream: TcpStream, name: String) {
    let mut nothing = [0; 64];
    if stream.write_all(name.as_bytes()).await.is_ok() {
        while stream.read(&mut nothing).await.is_ok_and(|bytes| bytes > 0) {}
    }
}

async fn answer(mut stream: TcpStream, leads: bool) {
    let word = if leads { "200 OK" } else { "503 Service Unavailable" };
    let text = format!("HTTP/1.0 {word}\r\ncontent-length: 0\r\n\r\n");
    let mut request = [0; 1_024];
    if stream.read(&mut request).await.is_ok() {
        let _checker_gone = stream.write_all(text.as_bytes()).await;
    }
}
