//! What the RFC forbids: each has its error, and costs no more than it must.

use std::{sync::Arc, time::Duration};

use starling_tests::{
    raw_h3::{DATA, HEADERS, Outcome, RawClient, SETTINGS, code, frame, head, section, varint},
    relay::shuffling_relay,
};

use crate::scene::*;

#[tokio::test]
async fn malformed_requests_cost_their_stream_and_nothing_else() {
    let scene = Scene::new().await;
    for side in SIDES {
        let client = scene.dial(side).await;
        assert_eq!(client.request(&side.get()).await.unwrap(), HELLO);
        let reached = scene.ledger.count();
        let get = side.fields("GET", "/");
        let with = |name: &'static str, value: &'static str| {
            get.iter().map(|f| if f.0 == name { (f.0, value) } else { *f }).collect::<Vec<_>>()
        };
        let without = |name: &str| get.iter().filter(|f| f.0 != name).copied().collect::<Vec<_>>();
        let and = |more: &[(&'static str, &'static str)]| [&get[..], more].concat();
        let post = |more: &[(&'static str, &'static str)]| [&side.fields("POST", "/")[..], more].concat();
        let length = |value: &'static str| head(&post(&[("content-length", value)]));
        let mut rows: Vec<Vec<u8>> = [
            without(":method"),
            without(":scheme"),
            without(":path"),
            without(":authority"),
            and(&[(":path", "/")]),
            and(&[(":authority", "x")]),
            and(&[(":status", "200")]),
            and(&[(":unknown", "1")]),
            and(&[("x", "1"), (":method", "GET")]),
            [&[("x", "1")][..], &get].concat(),
            with(":path", ""),
            with(":path", "no-slash"),
            with(":path", "/a#b"),
            with(":path", "/a b"),
            with(":method", "G T"),
            with(":method", ""),
            with(":authority", ""),
            with(":authority", "user@x"),
            with(":scheme", ""),
            and(&[("host", "other.example.com")]),
            and(&[("host", "")]),
            and(&[("X-Upper", "1")]),
            and(&[("", "1")]),
            and(&[("x y", "1")]),
            and(&[("x", "a\r\nx-injected: 1")]),
            and(&[("x", "a\0b")]),
            and(&[("x", "a\nb")]),
            and(&[("connection", "close")]),
            and(&[("keep-alive", "timeout=5")]),
            and(&[("proxy-connection", "keep-alive")]),
            and(&[("transfer-encoding", "chunked")]),
            and(&[("upgrade", "websocket")]),
            and(&[("te", "gzip")]),
            and(&[("content-length", "1"), ("content-length", "2")]),
            and(&[("content-length", "+1")]),
            and(&[("content-length", "1x")]),
            and(&[("content-length", "7")]),
            vec![(":method", "CONNECT"), (":scheme", "https"), (":authority", "up:80"), (":path", "/")],
            // Of a tunnel with a protocol there is all of it, and of anything else no protocol.
            vec![(":method", "CONNECT"), (":protocol", "websocket"), (":authority", HOST)],
            vec![
                (":method", "CONNECT"),
                (":protocol", "web socket"),
                (":scheme", "https"),
                (":authority", HOST),
                (":path", "/"),
            ],
            and(&[(":protocol", "websocket")]),
        ]
        .iter()
        .map(|fields| head(fields))
        .collect();
        // Bodies that are not as long as they say, and trailers that are none.
        rows.push([length("5"), frame(DATA, "hell")].concat());
        rows.push([length("5"), frame(DATA, "hello!")].concat());
        rows.push([length("0"), frame(DATA, "x")].concat());
        for trailer in [(":path", "/"), ("X-Upper", "1"), ("transfer-encoding", "chunked"), ("x", "a\nb")] {
            rows.push([head(&post(&[])), frame(DATA, "x"), head(&[trailer])].concat());
        }
        for row in &rows {
            let outcome = client.request(row).await.unwrap();
            assert_eq!(outcome, Outcome::Reset(MESSAGE_ERROR), "{side:?}: {}", String::from_utf8_lossy(row));
        }
        assert_eq!(client.request(&side.get()).await.unwrap(), HELLO, "the connection goes on");
        // Only what was well-formed until its body began may have reached the service, and none of it whole.
        let heads = scene.ledger.heads.lock().unwrap()[reached..].to_vec();
        assert!(heads.iter().all(|head| !head.starts_with("get") || head.starts_with("get / ")), "{heads:?}");
        assert!(heads.iter().all(|head| !head.contains("injected") && !head.contains("x-upper")), "{heads:?}");
    }
    scene.assert_served().await;
    scene.assert_calm();
}

#[tokio::test]
async fn frames_out_of_place_close_the_connection_and_no_other() {
    let scene = Scene::new().await;
    for side in SIDES {
        let bystander = scene.dial(side).await;
        let get = side.get();
        let post = side.post("/");
        let rows: Vec<(Vec<u8>, u64)> = vec![
            (frame(DATA, "x"), FRAME_UNEXPECTED),
            ([&frame(DATA, "")[..], &get].concat(), FRAME_UNEXPECTED),
            ([&post[..], &head(&[("a", "b")]), &frame(DATA, "x")].concat(), FRAME_UNEXPECTED),
            ([&post[..], &head(&[("a", "b")]), &head(&[("a", "b")])].concat(), FRAME_UNEXPECTED),
            (frame(SETTINGS, ""), FRAME_UNEXPECTED),
            ([&post[..], &frame(SETTINGS, "")].concat(), FRAME_UNEXPECTED),
            ([&post[..], &frame(0x07, [0])].concat(), FRAME_UNEXPECTED),
            ([&post[..], &frame(0x03, [0])].concat(), FRAME_UNEXPECTED),
            ([&post[..], &frame(0x0d, [0])].concat(), FRAME_UNEXPECTED),
            ([&post[..], &frame(0x05, [0, 0, 0])].concat(), FRAME_UNEXPECTED),
            ([&post[..], &frame(0x02, "")].concat(), FRAME_UNEXPECTED),
            ([&post[..], &frame(0x06, [0; 8])].concat(), FRAME_UNEXPECTED),
            ([&post[..], &frame(0x08, "")].concat(), FRAME_UNEXPECTED),
            ([&post[..], &frame(0x09, "")].concat(), FRAME_UNEXPECTED),
            (frame(HEADERS, [1, 0, 0x80]), DECOMPRESSION_FAILED),
            (frame(HEADERS, [0, 0, 0x80]), DECOMPRESSION_FAILED),
            (frame(HEADERS, [0, 0, 0x10]), DECOMPRESSION_FAILED),
            (frame(HEADERS, [0, 0, 0xff, 0x24]), DECOMPRESSION_FAILED),
            (frame(HEADERS, [0, 0, 0x51, 0x81, 0]), DECOMPRESSION_FAILED),
            (frame(HEADERS, [0, 0, 0x51, 0x7f]), DECOMPRESSION_FAILED),
            (frame(HEADERS, ""), DECOMPRESSION_FAILED),
        ];
        for (row, code) in &rows {
            let client = scene.dial(side).await;
            assert_eq!(client.request(row).await.unwrap(), Outcome::Closed(*code), "{side:?}: {row:x?}");
        }
        assert_eq!(bystander.request(&get).await.unwrap(), HELLO, "others do not notice");
    }
    scene.assert_calm();
}

#[tokio::test]
async fn cut_messages_are_never_whole() {
    let scene = Scene::new().await;
    for side in SIDES {
        let get = side.get();
        let reached = scene.ledger.count();
        for (row, code) in [
            (&get[..1], FRAME_ERROR),
            (&get[..2], FRAME_ERROR),
            (&get[..get.len() - 1], FRAME_ERROR),
            (&[0x40][..], FRAME_ERROR),
            (&[&get[..], &[0x21, 5, 1]].concat()[..], FRAME_ERROR),
        ] {
            let client = scene.dial(side).await;
            assert_eq!(client.request(row).await.unwrap(), Outcome::Closed(code), "{side:?}: {row:x?}");
        }
        let client = scene.dial(side).await;
        assert_eq!(client.request(&[]).await.unwrap(), Outcome::Reset(REQUEST_INCOMPLETE), "{side:?}");
        assert_eq!(client.request(&frame(0x21, "x")).await.unwrap(), Outcome::Reset(REQUEST_INCOMPLETE), "{side:?}");
        assert_eq!(scene.ledger.count(), reached, "{side:?}: none of it reached the service");
        let cut = [side.post("/"), varint(DATA), varint(10), b"hello".to_vec()].concat();
        assert_eq!(client.request(&cut).await.unwrap(), Outcome::Closed(FRAME_ERROR), "{side:?}");
    }
    scene.assert_served().await;
    scene.assert_calm();
}

#[tokio::test]
async fn critical_streams_keep_their_rules() {
    let scene = Scene::new().await;
    for side in SIDES {
        // What is written on the control stream behind its type.
        for (bytes, code) in [
            (frame(0x07, [0]), MISSING_SETTINGS),
            (frame(0x21, [0]), MISSING_SETTINGS),
            ([frame(SETTINGS, ""), frame(SETTINGS, "")].concat(), FRAME_UNEXPECTED),
            ([frame(SETTINGS, ""), frame(DATA, "x")].concat(), FRAME_UNEXPECTED),
            ([frame(SETTINGS, ""), frame(HEADERS, [0, 0])].concat(), FRAME_UNEXPECTED),
            ([frame(SETTINGS, ""), frame(0x05, [0, 0])].concat(), FRAME_UNEXPECTED),
            ([frame(SETTINGS, ""), frame(0x06, [0; 8])].concat(), FRAME_UNEXPECTED),
            (frame(SETTINGS, [0x02, 0x01]), SETTINGS_ERROR),
            (frame(SETTINGS, [0x08, 0x02]), SETTINGS_ERROR),
            (frame(SETTINGS, [0x06, 0x01, 0x06, 0x01]), SETTINGS_ERROR),
            (frame(SETTINGS, [0x06]), FRAME_ERROR),
            ([varint(SETTINGS), varint(1 << 20)].concat(), EXCESSIVE_LOAD),
            ([frame(SETTINGS, ""), frame(0x07, [1]), frame(0x07, [2])].concat(), ID_ERROR),
            ([frame(SETTINGS, ""), frame(0x0d, [4]), frame(0x0d, [3])].concat(), ID_ERROR),
            ([frame(SETTINGS, ""), frame(0x03, [0])].concat(), ID_ERROR),
            ([frame(SETTINGS, ""), frame(0x07, [0, 0])].concat(), FRAME_ERROR),
            ([frame(SETTINGS, ""), frame(0x07, "")].concat(), FRAME_ERROR),
        ] {
            let client = scene.silent(side).await;
            let _control = client.one_way(&[varint(0), bytes.clone()].concat()).await.unwrap();
            assert_eq!(client.closed().await.unwrap(), Outcome::Closed(code), "{side:?}: {bytes:x?}");
        }
        for (stream, code) in [
            (&[0x00, 0x04, 0x00][..], STREAM_CREATION_ERROR),
            (&[0x01, 0x00], STREAM_CREATION_ERROR),
            (&[0x02, 0x3f, 0xbd, 0x01], ENCODER_STREAM_ERROR),
            (&[0x02, 0xc0, 0x00], ENCODER_STREAM_ERROR),
            (&[0x02, 0x41, 0x61, 0x00], ENCODER_STREAM_ERROR),
            (&[0x02, 0x00], ENCODER_STREAM_ERROR),
            (&[0x03, 0x80], DECODER_STREAM_ERROR),
            (&[0x03, 0x01], DECODER_STREAM_ERROR),
            (&[0x03, 0x00], DECODER_STREAM_ERROR),
        ] {
            let client = scene.dial(side).await;
            let _stream = client.one_way(stream).await.unwrap();
            assert_eq!(client.closed().await.unwrap(), Outcome::Closed(code), "{side:?}: {stream:x?}");
        }
        for kind in [2u64, 3] {
            let client = scene.dial(side).await;
            let _first = client.one_way(&varint(kind)).await.unwrap();
            let _second = client.one_way(&varint(kind)).await.unwrap();
            assert_eq!(client.closed().await.unwrap(), Outcome::Closed(STREAM_CREATION_ERROR), "{side:?} {kind}");
        }
        for reset in [true, false] {
            let mut client = scene.dial(side).await;
            assert_eq!(client.request(&side.get()).await.unwrap(), HELLO);
            let control = client.control();
            if reset {
                control.reset(code(0)).unwrap();
            } else {
                control.finish().unwrap();
            }
            assert_eq!(client.closed().await.unwrap(), Outcome::Closed(CLOSED_CRITICAL_STREAM), "{side:?}");
        }
        // The server's own control stream must not be stopped.
        let client = scene.dial(side).await;
        let mut theirs = client.connection().accept_uni().await.unwrap();
        let mut kind = [9];
        theirs.read_exact(&mut kind).await.unwrap();
        assert_eq!(kind, [0]);
        theirs.stop(code(0)).unwrap();
        assert_eq!(client.closed().await.unwrap(), Outcome::Closed(CLOSED_CRITICAL_STREAM), "{side:?}");
    }
    scene.assert_served().await;
    scene.assert_calm();
}

#[tokio::test]
async fn what_is_unknown_is_ignored() {
    let scene = Scene::new().await;
    for side in SIDES {
        let mut client = scene.dial(side).await;
        let grease = |n: u64| 0x1f * n + 0x21;
        client.control().write_all(&[frame(grease(5), "abc"), frame(0xf0700, [0, 1])].concat()).await.unwrap();
        let mut streams = Vec::new();
        for kind in [grease(0), grease(70), 0x54] {
            streams.push(client.one_way(&[varint(kind), b"whatever".to_vec()].concat()).await.unwrap());
        }
        // Closed or reset before anybody knows what it is.
        client.one_way(&[0x40]).await.unwrap().finish().unwrap();
        client.one_way(&[0x40]).await.unwrap().reset(code(7)).unwrap();
        // QPACK's streams may be there, and say what needs no table.
        streams.push(client.one_way(&[0x02, 0x20, 0x20]).await.unwrap());
        streams.push(client.one_way(&[0x03, 0x44, 0x7f, 0x05]).await.unwrap());
        let long = frame(grease(1), vec![0; 200_000]);
        let around = [
            &frame(grease(0), "x")[..],
            &side.post("/"),
            &frame(grease(2), ""),
            &frame(DATA, ""),
            &frame(DATA, "ab"),
            &long,
            &frame(DATA, "c"),
            &head(&[("x-t", "1")]),
            &frame(grease(9), "z"),
        ]
        .concat();
        assert_eq!(client.request(&around).await.unwrap(), HELLO, "{side:?}");
        assert_eq!(client.request_in_drops(&side.get()).await.unwrap(), HELLO, "{side:?}: one byte a packet");
        let posted =
            [side.post("/"), frame(DATA, "ab"), frame(DATA, ""), frame(DATA, "c"), head(&[("x-t", "1")])].concat();
        assert_eq!(client.request_in_drops(&posted).await.unwrap(), HELLO, "{side:?}: one byte a packet");
        // Frames may say their type and length in more bytes than they need.
        let section = section(&side.fields("GET", "/"));
        let wide = [&[0x40, 0x01, 0xc0, 0, 0, 0, 0, 0][..], &(section.len() as u16).to_be_bytes(), &section].concat();
        assert_eq!(client.request(&wide).await.unwrap(), HELLO, "{side:?}");
        // Settings that nobody knows.
        let client = scene.silent(side).await;
        let settings =
            [varint(grease(3)), varint(1 << 40), varint(0x07), varint(100), varint(0x01), varint(4096)].concat();
        let _control = client.one_way(&[varint(0), frame(SETTINGS, settings)].concat()).await.unwrap();
        assert_eq!(client.request(&side.get()).await.unwrap(), HELLO, "{side:?}");
        // No settings at all, so far: they may be late.
        let client = scene.silent(side).await;
        assert_eq!(client.request(&side.get()).await.unwrap(), HELLO, "{side:?}");
        drop(streams);
    }
    scene.assert_calm();
}

#[tokio::test]
async fn packets_doubled_and_reordered_change_nothing() {
    let scene = Scene::new().await;
    for side in SIDES {
        let endpoint = if side == Side::Mesh { scene.rogue.calls() } else { &scene.stranger };
        let relay = shuffling_relay(scene.address(side)).await;
        let client = RawClient::dial(endpoint, relay, HOST).await.unwrap();
        for size in [0, 1, 1500, 300_000] {
            let reached = scene.ledger.count();
            let length = size.to_string();
            let fields = [&side.fields("POST", "/")[..], &[("content-length", length.as_str())]].concat();
            let bytes = [head(&fields), frame(DATA, vec![7; size])].concat();
            assert_eq!(client.request(&bytes).await.unwrap(), HELLO, "{side:?}: {size} bytes");
            assert_eq!(scene.ledger.count(), reached + 1, "{side:?}: no request is made twice");
        }
        assert_eq!(client.request_in_drops(&side.get()).await.unwrap(), HELLO, "{side:?}");
        let big = client.request(&head(&side.fields("GET", "/big"))).await.unwrap();
        assert_eq!(big, Outcome::Answer(200, BIG), "{side:?}");
    }
    scene.assert_calm();
}

#[tokio::test]
async fn heads_have_a_limit_and_a_polite_answer() {
    let scene = Scene::new().await;
    for side in SIDES {
        let client = scene.dial(side).await;
        let reached = scene.ledger.count();
        let large = "a".repeat(70_000);
        let fields = [&side.fields("GET", "/")[..], &[("x", large.as_str())]].concat();
        let refused = |outcome: Outcome| matches!(outcome, Outcome::Answer(431, _));
        assert!(refused(client.request(&head(&fields)).await.unwrap()), "{side:?}: one large field");
        // By its header alone: nothing of it is waited for.
        let (_send, receive) = client.open(&[varint(HEADERS), varint(1 << 30)].concat()).await.unwrap();
        assert!(refused(client.outcome(receive).await.unwrap()), "{side:?}: a frame of a gigabyte");
        // 25,000 fields in as many bytes.
        let bomb = [&section(&side.fields("GET", "/"))[..], &[0xdd; 25_000]].concat();
        assert!(refused(client.request(&frame(HEADERS, bomb)).await.unwrap()), "{side:?}: many fields");
        let names: Vec<String> = (0..130).map(|i| format!("x-{i}")).collect();
        let many: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "1")).collect();
        let fields = [&side.fields("GET", "/")[..], &many].concat();
        assert!(refused(client.request(&head(&fields)).await.unwrap()), "{side:?}: 130 fields");
        let fields = [&side.fields("GET", "/")[..], &many[..97]].concat();
        assert_eq!(client.request(&head(&fields)).await.unwrap(), HELLO, "{side:?}: 97 fields, and what the edge adds");
        assert_eq!(scene.ledger.count(), reached + 1, "{side:?}");
        // Trailers, too; and frames that carry nothing.
        let trailers = [side.post("/"), frame(DATA, "x"), head(&[("x", &large)])].concat();
        assert_eq!(client.request(&trailers).await.unwrap(), Outcome::Reset(EXCESSIVE_LOAD), "{side:?}");
        let empty = [side.post("/"), frame(DATA, "").repeat(3000)].concat();
        assert_eq!(client.request(&empty).await.unwrap(), Outcome::Reset(EXCESSIVE_LOAD), "{side:?}");
        assert_eq!(client.request(&side.get()).await.unwrap(), HELLO, "{side:?}: the connection goes on");
    }
    scene.assert_calm();
}

#[tokio::test]
async fn rapid_resets_reach_the_service_by_tens_and_harm_nobody() {
    let scene = Scene::new().await;
    for side in SIDES {
        let client = scene.dial(side).await;
        let (reached, memory) = (scene.ledger.count(), scene.memory_kib());
        let never = head(&side.fields("GET", "/never"));
        let begun = std::time::Instant::now();
        for _ in 0..10_000 {
            let Ok((mut send, mut receive)) = client.open(&never).await else { break };
            let _ = send.reset(code(REQUEST_CANCELLED));
            let _ = receive.stop(code(REQUEST_CANCELLED));
        }
        scene.assert_served().await;
        let took = begun.elapsed();
        // Whatever was under way has arrived by then.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let reached = scene.ledger.count() - reached;
        let allowed = 100 + 20 * took.as_secs() as usize;
        assert!(reached <= allowed, "{side:?}: {reached} of 10,000 reached the service in {took:?}");
        let grown = scene.memory_kib().saturating_sub(memory);
        assert!(grown < 64 << 10, "{side:?}: memory grew by {grown} KiB");
    }
    scene.assert_calm();
}

#[tokio::test]
async fn credit_that_is_withheld_holds_one_call_and_little_memory() {
    let scene = Scene::new().await;
    for side in SIDES {
        let client = scene.dial(side).await;
        let memory = scene.memory_kib();
        // Heads that never end, and uploads that stand still.
        let mut held = Vec::new();
        for i in 0..60 {
            let bytes = if i % 2 == 0 {
                side.get()[..5].to_vec()
            } else {
                [side.post("/"), varint(DATA), varint(1 << 20)].concat()
            };
            held.push(client.open(&bytes).await.unwrap());
        }
        scene.assert_served().await;
        assert_eq!(client.request(&side.get()).await.unwrap(), HELLO, "{side:?}");
        // Large answers that nobody takes, beyond the first KiB of each.
        let endpoint = if side == Side::Mesh { scene.rogue.calls() } else { &scene.stranger };
        let mut config = scene.config(side);
        let mut transport = quinn::TransportConfig::default();
        transport.stream_receive_window(1024u32.into());
        config.transport_config(Arc::new(transport));
        let stuck = RawClient::dial_with(endpoint, config, scene.address(side), HOST).await.unwrap();
        for _ in 0..20 {
            held.push(stuck.open(&head(&side.fields("GET", "/big"))).await.unwrap());
        }
        assert_eq!(stuck.request(&side.get()).await.unwrap(), HELLO, "{side:?}: a neighbour on the same connection");
        scene.assert_served().await;
        let grown = scene.memory_kib().saturating_sub(memory);
        assert!(grown < 64 << 10, "{side:?}: memory grew by {grown} KiB");
    }
    scene.assert_calm();
}
