//! Asks a Postgres server whether it answers: the first step of a conversation, without a login.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// A server in the same network answers within milliseconds; one that needs longer is one that requests wait for.
const DEADLINE: Duration = Duration::from_secs(1);

/// `SSLRequest`: length 8, code 80877103. Any server answers with one byte, whether it has TLS or not.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

/// Whether the server at `address` (`host:port`) answers in time.
pub(super) async fn answers(address: &str) -> bool {
    let asked = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(&SSL_REQUEST).await?;
        stream.read_u8().await
    };
    matches!(tokio::time::timeout(DEADLINE, asked).await, Ok(Ok(_byte)))
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::{SSL_REQUEST, answers};

    #[tokio::test]
    async fn a_server_that_says_a_byte_answers() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("accept");
            let mut asked = [0; SSL_REQUEST.len()];
            stream.read_exact(&mut asked).await.expect("the question");
            assert_eq!(asked, SSL_REQUEST);
            stream.write_all(b"N").await.expect("the answer");
        });
        assert!(answers(&address).await);
        server.await.expect("it was asked");
        assert!(!answers(&address).await, "nobody listens there any more");
    }

    #[tokio::test]
    async fn one_that_takes_connections_and_says_nothing_does_not() {
        // The kernel takes them for a program that hangs.
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        assert!(!answers(&listener.local_addr().expect("bound").to_string()).await);
    }
}
