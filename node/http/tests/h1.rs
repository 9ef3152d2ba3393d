//! The client of HTTP/1.1 against a server that says and does what each row wants, over real sockets.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Method, Response};
use http_body_util::BodyExt;
use starling_http::{
    Body, BodyError, Head,
    h1::{Connection, ExchangeError, Outgoing, ServerStream},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

const LIMIT: Duration = Duration::from_secs(60);

/// A connection, both ends of it.
async fn connected() -> (Connection, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (server, _) = listener.accept().await.unwrap();
    (Connection::new(ServerStream::new(stream), Arc::new(())), server)
}

fn request(method: &Method, body: Body) -> Outgoing {
    let fields = HeaderMap::new();
    Outgoing::new(&Head { method, authority: "web", path: "/", fields: &fields, protocol: None, interim: None }, body)
}

/// Reads until that is there.
async fn read_until(server: &mut TcpStream, end: &[u8]) -> Vec<u8> {
    let mut read = Vec::new();
    while !read.ends_with(end) {
        let mut byte = [0];
        server.read_exact(&mut byte).await.unwrap();
        read.push(byte[0]);
    }
    read
}

/// What comes of a GET that the server answers with these pieces, each in a write of its own, and closes behind them if told so.
async fn get(pieces: &[&str], closes: bool) -> (Result<Result<Bytes, BodyError>, ExchangeError>, Connection) {
    let (connection, mut server) = connected().await;
    let pieces: Vec<String> = pieces.iter().map(ToString::to_string).collect();
    let served = tokio::spawn(async move {
        read_until(&mut server, b"\r\n\r\n").await;
        for piece in pieces {
            server.write_all(piece.as_bytes()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // Kept open by whoever awaits the task.
        (!closes).then_some(server)
    });
    let outcome = match connection.exchange(request(&Method::GET, Body::empty()), None).await {
        Ok(response) => Ok(whole(response).await),
        Err(error) => Err(error),
    };
    let _ = served.await;
    (outcome, connection)
}

async fn whole(response: Response<Body>) -> Result<Bytes, BodyError> {
    response.into_body().collect().await.map(|body| body.to_bytes())
}

#[tokio::test]
async fn answers_come_whole_however_they_are_cut_and_say_whether_the_connection_is_kept() {
    let long = format!("HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n{}", "x".repeat(100_000));
    for (pieces, closes, body, again) in [
        (vec!["HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"], false, "hello", true),
        (vec!["HTTP/1.1 200", " OK\r\ncontent-length: 5\r\n\r", "\nhel", "lo"], false, "hello", true),
        (vec!["HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 20", "0 OK\r\ncontent-length: 2\r\n\r\nhi"], false, "hi", true),
        (vec!["HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n", "0\r\n\r\n"], false, "hi", true),
        (vec!["HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi"], false, "hi", false),
        (vec!["HTTP/1.1 200 OK\r\n\r\n", "until the end"], true, "until the end", false),
        (vec!["HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhiHTTP/1.1 200 OK"], false, "hi", false),
        (vec![long.as_str()], false, &"x".repeat(100_000), true),
    ] {
        let (outcome, connection) = tokio::time::timeout(LIMIT, get(&pieces, closes)).await.unwrap();
        assert_eq!(outcome.unwrap().unwrap(), body, "{:.60}", pieces[0]);
        assert_eq!(connection.again().is_some(), again, "{:.60}", pieces[0]);
    }
}

#[tokio::test]
async fn what_breaks_off_is_never_whole() {
    for pieces in [
        vec!["HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nhello"],
        vec!["HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"],
    ] {
        let (outcome, connection) = tokio::time::timeout(LIMIT, get(&pieces, true)).await.unwrap();
        assert!(outcome.unwrap().is_err(), "{pieces:?}");
        assert!(connection.again().is_none(), "{pieces:?}");
    }
    for (pieces, is_offence) in [
        (vec![], false),
        (vec!["HTTP/1.1 200 OK\r\n"], false),
        (vec!["HTTP/1.1 101 Switching\r\n\r\n"], true),
        (vec!["HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n"], true),
    ] {
        let (outcome, _) = tokio::time::timeout(LIMIT, get(&pieces, true)).await.unwrap();
        let error = outcome.expect_err("there is no answer");
        assert_eq!(matches!(error, ExchangeError::Offence(_)), is_offence, "{pieces:?}: {error:?}");
    }
}

#[tokio::test]
async fn an_upload_arrives_in_chunks() {
    let (connection, mut server) = connected().await;
    let served = tokio::spawn(async move {
        let seen = read_until(&mut server, b"0\r\n\r\n").await;
        server.write_all(b"HTTP/1.1 204 Done\r\n\r\n").await.unwrap();
        (seen, server)
    });
    let response = connection.exchange(request(&Method::POST, Body::full("hello")), None).await.unwrap();
    assert_eq!(response.status(), 204);
    let (seen, _server) = served.await.unwrap();
    assert_eq!(
        String::from_utf8(seen).unwrap(),
        "POST / HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    );
    assert!(connection.again().is_some());
}

/// Nobody waits for the answer any more: the server learns it at once.
#[tokio::test]
async fn a_connection_that_is_dropped_closes() {
    for within_the_body in [false, true] {
        let (connection, mut server) = connected().await;
        let mut exchange = Box::pin(connection.exchange(request(&Method::GET, Body::empty()), None));
        let asked = async {
            read_until(&mut server, b"\r\n\r\n").await;
            if within_the_body {
                server.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhe").await.unwrap();
            }
        };
        let response = tokio::select! {
            response = &mut exchange => Some(response.unwrap()),
            () = asked => None,
        };
        let response = match response {
            None if within_the_body => Some(exchange.as_mut().await.unwrap()),
            response => response,
        };
        drop(exchange);
        drop(connection);
        // The body alone does not keep it.
        let read = tokio::time::timeout(LIMIT, server.read(&mut [0; 16])).await.unwrap();
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
        drop(response);
    }
}

#[tokio::test]
async fn a_request_that_nobody_took_comes_back_as_it_was() {
    let (connection, server) = connected().await;
    drop(server);
    tokio::time::timeout(LIMIT, async {
        while connection.is_quiet() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    // The first write after a FIN still succeeds and brings the reset; the next one fails.
    let first = connection.exchange(request(&Method::GET, Body::empty()), None).await;
    assert!(matches!(first, Err(ExchangeError::Closed(_))), "{first:?}");
    let mut outgoing = None;
    for _ in 0..100 {
        match connection.exchange(request(&Method::POST, Body::full("hello")), None).await {
            Err(ExchangeError::Unsent(unsent)) => {
                outgoing = Some(*unsent);
                break;
            }
            other => assert!(matches!(other, Err(ExchangeError::Closed(_))), "{other:?}"),
        }
    }
    let outgoing = outgoing.expect("a reset is noticed");
    let (fresh, mut server) = connected().await;
    let served = tokio::spawn(async move {
        let seen = read_until(&mut server, b"0\r\n\r\n").await;
        server.write_all(b"HTTP/1.1 204 Done\r\n\r\n").await.unwrap();
        seen
    });
    fresh.exchange(outgoing, None).await.unwrap();
    assert!(served.await.unwrap().starts_with(b"POST / HTTP/1.1\r\n"));
}
