//! Connections that have changed to another protocol.

use super::*;

const SWITCHED: &str = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";

/// An app that changes the protocol at the first request of each connection, and then says again what it hears.
async fn echo() -> Arc<Backend> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bind");
    let port = listener.local_addr().expect("address").port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut read = [0; 4096];
                let _request = stream.read(&mut read).await.expect("a request");
                stream.write_all(SWITCHED.as_bytes()).await.expect("write");
                let (mut hears, mut says) = stream.split();
                let _ended = tokio::io::copy(&mut hears, &mut says).await;
            });
        }
    });
    Arc::new(Backend { port, sha: String::from("aaaa"), meter: Meter::new() })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tunnel_keeps_the_place_of_its_connection_until_it_ends() {
    let stand = stand(PATIENCE);
    let backend = echo().await;
    stand.plane.set_target(Target::App { backend, closing: false });
    let open = || stand.plane.shared.counters.connections.get();
    let mut stream = TcpStream::connect(stand.address).await.expect("connect");
    let request = "GET /talk HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    stream.write_all(request.as_bytes()).await.expect("write");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.expect("the head of the answer"));
    }
    assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
    // One task does all that is known of the connection before the second word is passed on.
    for word in [b"one", b"two"] {
        stream.write_all(word).await.expect("write");
        let mut heard = [0; 3];
        stream.read_exact(&mut heard).await.expect("the echo");
        assert_eq!(&heard, word);
    }
    assert_eq!(open(), 1, "the tunnel is a connection");
    drop(stream);
    let ended = async {
        while open() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, ended).await.expect("it gives its place back");
}
