//! Answers that are against the protocol: each is an error at the caller, with the code of the RFC, and costs no more than it
//! must.

use http_body_util::BodyExt;
use starling_http::h3::{
    Broken, Code, Fault,
    client::{Client, RequestError},
};

use crate::wire::{LIMIT, connections, frame, get, head};

/// A server's settings on its control stream.
const SETTINGS: &[u8] = &[0, 4, 0];

/// What our client makes of an answer: its status and body, or the code of the error; and with which code the server's end
/// of the stream was stopped, and the connection closed, if they were.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    outcome: Result<(u16, Vec<u8>), Code>,
    closed: Option<u64>,
}

async fn answered(control: &[u8], answer: &[u8]) -> Seen {
    let (dialled, accepted, _endpoints) = connections().await;
    let client = Client::start(dialled, crate::shelf(), starling_http::h3::Order::InLine);
    let mut settings = accepted.open_uni().await.unwrap();
    settings.write_all(control).await.unwrap();
    let answering = async {
        let (mut send, mut receive) = accepted.accept_bi().await.unwrap();
        let _ = receive.read_to_end(10_000).await;
        let _ = send.write_all(answer).await;
        let _ = send.finish();
        // The stream stays until the client is done.
        tokio::time::timeout(LIMIT, send.stopped()).await.expect("the client reads or refuses")
    };
    let asking = async {
        let answer = get(&client, "/").await.map_err(code)?;
        let status = answer.head.status.as_u16();
        match answer.body.collect().await {
            Ok(body) => Ok((status, body.to_bytes().to_vec())),
            // The code is in the words: a body has no other place for it.
            Err(error) => {
                let text = error.to_string();
                let codes = [Code::H3_MESSAGE_ERROR, Code::H3_FRAME_ERROR, Code::H3_FRAME_UNEXPECTED];
                Err(*codes.iter().find(|code| text.contains(&code.to_string())).unwrap_or_else(|| panic!("{text}")))
            }
        }
    };
    let (outcome, _) = tokio::join!(asking, answering);
    // A connection error closes at once; whatever is merely a stream's leaves the connection for the next request.
    let closed = match tokio::time::timeout(std::time::Duration::from_millis(200), accepted.closed()).await {
        Ok(quinn::ConnectionError::ApplicationClosed(close)) => Some(close.error_code.into_inner()),
        Ok(other) => panic!("{other}"),
        Err(_) => None,
    };
    Seen { outcome, closed }
}

fn code(error: RequestError) -> Code {
    match error {
        RequestError::Broken(Broken::Fault(fault)) => fault.code(),
        // The connection was closed by us while we waited.
        RequestError::Broken(Broken::Lost(_)) => Code::H3_NO_ERROR,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_good_answer_is_taken() {
    let interim = [head(&[(":status", "103"), ("link", "</a>")]), head(&[(":status", "100")])].concat();
    let trailers = head(&[("grpc-status", "0")]);
    let answer = [
        &frame(0x21, b"grease")[..],
        &interim,
        &head(&[(":status", "200"), ("content-length", "5")]),
        &frame(0, b""),
        &frame(0, b"hel"),
        &frame(0x2f, b""),
        &frame(0, b"lo"),
        &trailers,
    ]
    .concat();
    let seen = answered(SETTINGS, &answer).await;
    assert_eq!(seen, Seen { outcome: Ok((200, b"hello".to_vec())), closed: None });
}

#[tokio::test]
async fn malformed_answers_cost_their_stream_and_nothing_else() {
    let ok = head(&[(":status", "200"), ("content-length", "5")]);
    for answer in [
        head(&[("server", "x")]),
        head(&[(":status", "200"), (":status", "200")]),
        head(&[("server", "x"), (":status", "200")]),
        head(&[(":status", "200"), (":path", "/")]),
        head(&[(":status", "20x")]),
        head(&[(":status", "101")]),
        head(&[(":status", "200"), ("connection", "close")]),
        head(&[(":status", "200"), ("transfer-encoding", "chunked")]),
        head(&[(":status", "200"), ("Server", "x")]),
        head(&[(":status", "200"), ("x", "a\r\nb: c")]),
        head(&[(":status", "200"), ("content-length", "1"), ("content-length", "2")]),
        head(&[(":status", "100")]),
        Vec::new(),
        [&ok[..], &frame(0, b"hell")].concat(),
        [&ok[..], &frame(0, b"hello!")].concat(),
        [&ok[..], &frame(0, b"hello"), &head(&[(":status", "200")])].concat(),
        [&ok[..], &frame(0, b"hello"), &head(&[("Upper", "x")])].concat(),
        [&head(&[(":status", "204")])[..], &frame(0, b"x")].concat(),
    ] {
        let seen = answered(SETTINGS, &answer).await;
        assert_eq!(seen, Seen { outcome: Err(Code::H3_MESSAGE_ERROR), closed: None }, "{answer:x?}");
    }
}

#[tokio::test]
async fn frames_out_of_place_close_the_connection() {
    let ok = head(&[(":status", "200")]);
    for (answer, code) in [
        (frame(0, b"x"), Code::H3_FRAME_UNEXPECTED),
        ([&ok[..], &head(&[("a", "b")]), &frame(0, b"x")].concat(), Code::H3_FRAME_UNEXPECTED),
        (frame(4, b""), Code::H3_FRAME_UNEXPECTED),
        (frame(7, &[0]), Code::H3_FRAME_UNEXPECTED),
        (frame(2, b""), Code::H3_FRAME_UNEXPECTED),
        (frame(5, &[0, 0, 0]), Code::H3_ID_ERROR),
        ([&ok[..], &[0, 5, b'x']].concat(), Code::H3_FRAME_ERROR),
        (frame(1, &[1, 0, 0x80]), Code::QPACK_DECOMPRESSION_FAILED),
        (frame(1, &[0, 0, 0xff, 0x40]), Code::QPACK_DECOMPRESSION_FAILED),
    ] {
        let seen = answered(SETTINGS, &answer).await;
        assert!(seen.outcome.is_err(), "{answer:x?}");
        assert_eq!(seen.closed, Some(code.value()), "{code} for {answer:x?}");
    }
}

#[tokio::test]
async fn control_streams_keep_their_rules() {
    let ok = head(&[(":status", "200")]);
    for (control, code) in [
        (&[0, 7, 1, 0][..], Code::H3_MISSING_SETTINGS),
        (&[0, 4, 0, 4, 0], Code::H3_FRAME_UNEXPECTED),
        (&[0, 4, 2, 2, 0], Code::H3_SETTINGS_ERROR),
        (&[0, 4, 0, 0, 0], Code::H3_FRAME_UNEXPECTED),
        (&[0, 4, 0, 0x0d, 1, 0], Code::H3_FRAME_UNEXPECTED),
        (&[0, 4, 0, 7, 1, 1], Code::H3_ID_ERROR),
        (&[0, 4, 0, 7, 1, 0, 7, 1, 4], Code::H3_ID_ERROR),
        (&[0, 4, 0, 3, 1, 0], Code::H3_ID_ERROR),
        (&[1, 0], Code::H3_ID_ERROR),
        (&[2, 0x3f, 0xbd, 1], Code::QPACK_ENCODER_STREAM_ERROR),
        (&[3, 0x84], Code::QPACK_DECODER_STREAM_ERROR),
    ] {
        assert_eq!(answered(control, &ok).await.closed, Some(code.value()), "{code} for {control:x?}");
    }
    // Streams of unknown types, and frames of unknown types, are nobody's.
    for control in [&[0x21, 1, 2, 3][..], &[0, 4, 0, 0x21, 2, 1, 2, 0x40, 0xff, 0], &[2, 0x20], &[3, 0x44]] {
        assert_eq!(answered(control, &ok).await, Seen { outcome: Ok((200, Vec::new())), closed: None }, "{control:x?}");
    }
}

#[tokio::test]
async fn a_peer_that_goes_away_takes_no_more_requests() {
    let (dialled, accepted, _endpoints) = connections().await;
    let client = Client::start(dialled, crate::shelf(), starling_http::h3::Order::InLine);
    assert!(client.takes_requests());
    let mut control = accepted.open_uni().await.unwrap();
    control.write_all(&[0, 4, 0, 7, 1, 0]).await.unwrap();
    tokio::time::timeout(LIMIT, async {
        while client.takes_requests() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("GOAWAY is noticed");
}

#[tokio::test]
async fn a_critical_stream_that_is_closed_or_reset_closes_the_connection() {
    for kind in [0u8, 2, 3] {
        for reset in [true, false] {
            let (dialled, accepted, _endpoints) = connections().await;
            let _client = Client::start(dialled, crate::shelf(), starling_http::h3::Order::InLine);
            let mut stream = accepted.open_uni().await.unwrap();
            stream.write_all(if kind == 0 { SETTINGS } else { std::slice::from_ref(&kind) }).await.unwrap();
            // A reset overtakes what was not read yet: then the stream never had a type, which is no error.
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            if reset {
                stream.reset(0u32.into()).unwrap();
            } else {
                stream.finish().unwrap();
            }
            let closed = tokio::time::timeout(LIMIT, accepted.closed()).await.expect("the connection is closed");
            let quinn::ConnectionError::ApplicationClosed(close) = closed else { panic!("{closed}") };
            assert_eq!(close.error_code.into_inner(), Code::H3_CLOSED_CRITICAL_STREAM.value(), "{kind} {reset}");
        }
    }
}

#[tokio::test]
async fn an_answer_whose_head_is_too_large_is_an_error_of_its_stream() {
    // 70,000 bytes are announced; none of them has to come.
    let seen = answered(SETTINGS, &[1, 0x80, 1, 0x11, 0x70]).await;
    assert_eq!(seen, Seen { outcome: Err(Fault::TooLarge.code()), closed: None });
    let bomb = [&[1, 0x61, 0xaa, 0, 0][..], &[0xd9; 0x21a8]].concat();
    assert_eq!(answered(SETTINGS, &bomb).await.outcome.unwrap_err(), Code::H3_MESSAGE_ERROR, "a status twice");
}
