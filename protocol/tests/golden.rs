//! The bytes of every released version of the wire, which no later one may read otherwise.
//!
//! Each file under `golden/` is one message of one version in hexadecimal, and stays as it is for as long as nodes of that
//! version may be in a mesh. A message that is written anew must come out the same; a change of the form is a new file of a new
//! version, beside the old one. `STARLING_WRITE_GOLDEN=1` writes the files that are missing.

use std::{fs, path::PathBuf, sync::Arc};

use starling_protocol::{
    Answer, Application, AskCounts, Capabilities, ChallengeShown, Delta, DialBack, DialledBack, DocumentEdition,
    DocumentHash, DocumentSight, DocumentState, FindCertificate, Floor, FoundCertificate, Grant, Grants, Inspect,
    IssuerProof, Items, Join, JoinToken, KnownCount, Ledger, Life, MemberHealth, MemberState, MeshDocument, News,
    NodeId, NodeKind, NodeRecord, Packet, Phase, Ping, Pong, Protocol, Purpose, Refusal, Relayed, Renew, Reservation,
    ServiceRecord, ServiceState, ShowChallenge, Sight, SignedAnswer, SignedDocument, SignedRecord, SignedReservation,
    SignedStrike, Strike, Summary, TakeCount, TakenCount, TellCounts, TokenClaims, Unsupported, View, Word,
    admin::MemberStatus, encode, frame,
};

/// The released versions, the present one last.
const VERSIONS: [&str; 1] = ["1"];

fn id(n: u8) -> NodeId {
    NodeId([n; 16])
}

fn name(text: &str) -> starling_protocol::Name {
    text.parse().unwrap()
}

fn record() -> NodeRecord {
    let service = |name_: &str, protocol, state| ServiceRecord {
        version: "v2".into(),
        state,
        ..ServiceRecord::new(name(name_), protocol)
    };
    NodeRecord {
        id: id(1),
        generation: 1_800_000_000,
        seq: 7,
        name: name("orders-1"),
        addr: "10.0.0.5:7400".parse().unwrap(),
        kind: NodeKind::Edge,
        zone: "eu-1a".into(),
        services: vec![
            service("orders", Protocol::Http1, ServiceState::Up),
            service("users", Protocol::H2c, ServiceState::Unhealthy),
        ],
        phase: Phase::Draining,
        cert_expires: 1_800_086_400,
        issuer: Some(IssuerProof { certificate: vec![0xc0; 4].into(), signature: vec![0x51; 4].into() }),
        speaks: Capabilities { oldest: 1, newest: 2, features: 0b101, software: "0.1.0".into() },
    }
}

/// A node whose service says how long it will be there.
fn record_of_versions() -> NodeRecord {
    let mut record = record();
    record.services.truncate(1);
    let service = &mut record.services[0];
    (service.deprecated, service.sunset) = (1_767_225_600, 1_798_761_600);
    service.link = "https://example.com/news".into();
    record
}

fn show_challenge() -> ShowChallenge {
    let text = |text: &str| text.to_owned();
    ShowChallenge {
        host: text("api.example.com"),
        token: text("evaGxfADs6pSRb2LAv9IZ"),
        authorization: text("evaGxfADs6pSRb2LAv9IZ.nP1qzpXGymHBrUEepNY9HCsQk7K8KhOypzEt62jcerQ"),
        over_tls: true,
    }
}

fn found_certificate() -> FoundCertificate {
    FoundCertificate { wanted: true, ordering: true, failures: 2, pem: vec![0x2d; 4].into() }
}

/// What is known of a counter: a part of time, who counts, taken and returned.
fn counts() -> bytes::Bytes {
    [1_800_000_000u64, 7, 40, 2].into_iter().flat_map(u64::to_be_bytes).collect::<Vec<_>>().into()
}

fn ask_counts() -> AskCounts {
    let (key, part) = ("free day consumer acme".to_owned(), 1_800_000_000);
    AskCounts {
        takes: vec![TakeCount { key: key.clone(), part, since: part, limit: 1000, least: 1, most: 3 }],
        knows: vec![KnownCount { key: key.clone(), counts: counts() }],
        finds: vec![key],
    }
}

fn tell_counts() -> TellCounts {
    TellCounts {
        taken: vec![TakenCount { taken: 3, counts: counts() }],
        found: vec![KnownCount { key: "free day consumer acme".into(), counts: counts() }],
        cut: true,
    }
}

/// A node in front of services that are no HTTP.
fn record_of_carriers() -> NodeRecord {
    let service = |text, protocol| ServiceRecord::new(name(text), protocol);
    NodeRecord { services: vec![service("db", Protocol::Tcp), service("dns", Protocol::Udp)], ..record() }
}

fn signed_record() -> SignedRecord {
    let chain = vec![vec![0xc1; 4].into(), vec![0xc2; 4].into()];
    SignedRecord { body: SignedRecord::encode_body(&record()), signature: vec![0x51; 8].into(), chain }
}

fn signed_document() -> SignedDocument {
    let document = MeshDocument {
        kind: name("policy"),
        version: 3,
        previous: DocumentHash([9; 32]),
        not_before: 1_800_000_000,
        expires: Some(1_900_000_000),
        deleted: false,
        content: b"mode = \"open\"".as_slice().into(),
        understood: true,
    };
    let (signature, certificate) = (vec![0x51; 8].into(), vec![0xca; 4].into());
    SignedDocument { body: SignedDocument::encode_body(&document), signature, certificate }
}

fn signed_strike() -> SignedStrike {
    let strike = Strike { id: id(4), generation: 1_700_000_000, prune: true };
    let (signature, certificate) = (vec![0x51; 8].into(), vec![0xca; 4].into());
    SignedStrike { body: SignedStrike::encode_body(&strike), signature, certificate }
}

fn word() -> Word {
    let (kind, generation, signature) = (Word::ACCUSES, 1_800_000_000, vec![0x51; 8]);
    Word { kind, subject: id(2), generation, incarnation: 300, by: id(1), raised: true, signature }
}

fn items() -> Items {
    Items {
        records: vec![Arc::new(signed_record())],
        documents: vec![Arc::new(signed_document())],
        strikes: vec![Arc::new(signed_strike())],
        words: vec![word()],
    }
}

fn members() -> Vec<MemberState> {
    let member = |n: u8, health, down_s| MemberState {
        id: id(n),
        generation: 1_800_000_000,
        seq: n.into(),
        incarnation: 2,
        health,
        down_s,
    };
    vec![member(1, MemberHealth::Alive, 0), member(2, MemberHealth::Suspect, 0), member(3, MemberHealth::Down, 90)]
}

fn claims() -> TokenClaims {
    TokenClaims {
        issuer: id(6),
        id: [7; 16],
        expires: 1_800_003_600,
        mesh: "prod.example".parse().unwrap(),
        root: [8; 32],
        uses: 2,
        grants: Grants {
            services: vec![name("orders")],
            edge: true,
            issuer: true,
            names: vec!["orders-*".parse().unwrap()],
            zone: "eu-1a".into(),
        },
        seeds: vec!["10.0.0.1:7400".into()],
    }
}

/// Every message that travels or is stored, by the name of its file.
fn messages() -> Vec<(&'static str, Vec<u8>)> {
    let edition = DocumentEdition { kind: name("policy"), version: 3, hash: DocumentHash([9; 32]) };
    let summary = Summary {
        members: members(),
        documents: vec![edition.clone()],
        strikes: vec![Strike { id: id(4), generation: 5, prune: true }.edition()],
        standing: 77,
        appeals: true,
    };
    let delta = Delta {
        members: members(),
        items: items(),
        wanted_records: vec![id(5)],
        wanted_documents: vec![name("policy")],
        wanted_strikes: vec![id(4)],
        wanted_words: vec![id(2)],
        deaf_ms: 1500,
        standing: 78,
    };
    let view = View {
        members: vec![Sight { id: id(2), generation: 1_800_000_000, status: MemberStatus::Left }],
        documents: vec![DocumentSight { edition, state: DocumentState::Quarantined }],
    };
    let application = Application {
        version: Application::VERSION,
        claims: claims().encode(),
        name: name("orders-1"),
        services: vec![name("orders")],
        csr: vec![0xc5; 4].into(),
        issuer_csr: Some(vec![0xc6; 4].into()),
    };
    let join = Join { application: encode(&application).into(), proof: [0x77; 32] };
    let grant = Grant {
        chain: vec![vec![0xc1; 4].into(), vec![0xc2; 4].into()],
        root: vec![0xc0; 4].into(),
        issuer_cert: Some(vec![0xc3; 4].into()),
        peers: vec!["[2001:db8::1]:7400".parse().unwrap()],
        floors: vec![Floor { kind: name("policy"), version: 3 }],
    };
    let answer = |answer: Answer| SignedAnswer {
        body: encode(&answer).into(),
        signature: vec![0x51; 8].into(),
        issuer: vec![0xc2; 4].into(),
    };
    let granted = answer(Answer { request: [5; 32], granted: Some(grant), refused: None });
    let refused = answer(Answer { request: [5; 32], granted: None, refused: Some(Refusal::used()) });
    let reservation =
        Reservation { name: name("orders-1"), key: id(1), since: 1_700_000_000, until: 1_800_000_000, freed: 7 };
    let reservation = SignedReservation {
        body: encode(&reservation).into(),
        signature: vec![0x51; 8].into(),
        issuer: vec![0xc2; 4].into(),
    };
    let life = |n| Life { id: id(n), generation: 1_800_000_000 };
    let packet = |purpose| Packet {
        root: 0x0102_0304_0506_0708,
        source: life(1),
        incarnation: 300,
        receiver: life(2),
        purpose,
        probe: 9,
        news: vec![News { life: life(3), incarnation: 1, health: MemberHealth::Down }],
        words: vec![word()],
    };
    vec![
        ("items", frame(&items())),
        ("summary", frame(&summary)),
        ("delta", frame(&delta)),
        ("ping", frame(&Ping { suspected: Some(3) })),
        ("pong", frame(&Pong { generation: 1_800_000_000, incarnation: 4 })),
        ("inspect", frame(&Inspect {})),
        ("view", frame(&view)),
        ("dial-back", frame(&DialBack {})),
        ("dialled-back", frame(&DialledBack { why: Some("no answer in time".into()) })),
        ("unsupported", frame(&Unsupported { kind: 300 })),
        ("show-challenge", frame(&show_challenge())),
        ("challenge-shown", frame(&ChallengeShown {})),
        ("find-certificate", frame(&FindCertificate { id: "a1b2".into(), newer_than: 1_800_000_000 })),
        ("found-certificate", frame(&found_certificate())),
        ("ask-counts", frame(&ask_counts())),
        ("tell-counts", frame(&tell_counts())),
        ("join", frame(&join)),
        ("renew", frame(&Renew { csr: vec![0xc5; 4].into(), chain: vec![vec![0xc1; 4].into()] })),
        ("relayed", frame(&Relayed { kind: 16, request: vec![1, 2, 3].into() })),
        ("granted", frame(&granted)),
        ("refused", frame(&refused)),
        ("refusal", frame(&Refusal::issuer_unreachable())),
        (
            "ledger",
            frame(&Ledger { entries: vec![reservation], whole: true, digest: Some([3; 32]), about: vec![name("b")] }),
        ),
        ("packet-ping", packet(Purpose::Ping).encode()),
        ("packet-ping-request", packet(Purpose::PingRequest(life(4))).encode()),
        ("packet-dead", packet(Purpose::Dead).encode()),
        ("record-of-carriers", SignedRecord::encode_body(&record_of_carriers()).to_vec()),
        ("record-of-versions", SignedRecord::encode_body(&record_of_versions()).to_vec()),
        ("token", JoinToken::new(claims(), [0x5e; 32]).to_string().into_bytes()),
    ]
}

fn file(version: &str, message: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{version}/{message}.hex"))
}

fn hex(bytes: &[u8]) -> String {
    let lines: Vec<String> =
        bytes.chunks(32).map(|line| line.iter().map(|byte| format!("{byte:02x}")).collect()).collect();
    lines.join("\n") + "\n"
}

#[test]
fn what_is_written_is_what_was_released() {
    let version = VERSIONS[VERSIONS.len() - 1];
    for (message, bytes) in messages() {
        let path = file(version, message);
        if !path.exists() && std::env::var_os("STARLING_WRITE_GOLDEN").is_some() {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, hex(&bytes)).unwrap();
        }
        let golden = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(hex(&bytes), golden, "{message} is not written as version {version} has it");
    }
}

#[test]
fn what_was_released_is_read() {
    for version in VERSIONS {
        for (message, _) in messages() {
            let golden = fs::read_to_string(file(version, message)).unwrap();
            let digits: Vec<u32> = golden.chars().filter_map(|c| c.to_digit(16)).collect();
            let bytes: Vec<u8> = digits.chunks(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect();
            read(message, &bytes).unwrap_or_else(|e| panic!("{message} of version {version}: {e}"));
        }
    }
}

/// Reads a message to its last signed part.
fn read(message: &str, bytes: &[u8]) -> Result<(), Box<dyn std::error::Error>> {
    use starling_protocol::{FrameHeader, Framed, decode, frame_header};
    fn body<T: Framed>(bytes: &[u8]) -> Result<T, Box<dyn std::error::Error>> {
        let FrameHeader { kind, length, rest: body } = frame_header(bytes, 1 << 20)?.ok_or("half a frame")?;
        assert_eq!((kind, length), (T::KIND, body.len()));
        Ok(decode(body)?)
    }
    let read_items = |items: &Items| -> Result<(), Box<dyn std::error::Error>> {
        assert_eq!(items.records[0].peek()?, record());
        assert!(items.documents[0].peek()?.understood && items.strikes[0].peek()?.prune);
        assert_eq!(items.words, [word()]);
        Ok(())
    };
    match message {
        "record-of-carriers" => {
            let signed = SignedRecord { body: bytes.to_vec().into(), ..signed_record() };
            assert_eq!(signed.peek()?, record_of_carriers());
        }
        "record-of-versions" => {
            let signed = SignedRecord { body: bytes.to_vec().into(), ..signed_record() };
            assert_eq!(signed.peek()?, record_of_versions());
        }
        "items" => read_items(&body(bytes)?)?,
        "summary" => assert_eq!(body::<Summary>(bytes)?.members, members()),
        "delta" => read_items(&body::<Delta>(bytes)?.items)?,
        "ping" => assert_eq!(body::<Ping>(bytes)?.suspected, Some(3)),
        "pong" => assert_eq!(body::<Pong>(bytes)?.incarnation, 4),
        "inspect" => assert_eq!(body::<Inspect>(bytes)?, Inspect::default()),
        "view" => assert_eq!(body::<View>(bytes)?.members[0].status, MemberStatus::Left),
        "dial-back" => assert_eq!(body::<DialBack>(bytes)?, DialBack::default()),
        "dialled-back" => assert_eq!(body::<DialledBack>(bytes)?.why.as_deref(), Some("no answer in time")),
        "unsupported" => assert_eq!(body::<Unsupported>(bytes)?.kind, 300),
        "show-challenge" => assert_eq!(body::<ShowChallenge>(bytes)?, show_challenge()),
        "challenge-shown" => assert_eq!(body::<ChallengeShown>(bytes)?, ChallengeShown {}),
        "find-certificate" => assert_eq!(body::<FindCertificate>(bytes)?.newer_than, 1_800_000_000),
        "found-certificate" => assert_eq!(body::<FoundCertificate>(bytes)?, found_certificate()),
        "ask-counts" => assert_eq!(body::<AskCounts>(bytes)?, ask_counts()),
        "tell-counts" => assert_eq!(body::<TellCounts>(bytes)?, tell_counts()),
        "join" => {
            let application: Application = decode(&body::<Join>(bytes)?.application)?;
            assert_eq!(TokenClaims::decode_in_full(&application.claims)?, claims());
        }
        "renew" => assert_eq!(body::<Renew>(bytes)?.chain.len(), 1),
        "relayed" => assert_eq!(body::<Relayed>(bytes)?.kind, 16),
        "granted" => {
            let answer: Answer = decode(&body::<SignedAnswer>(bytes)?.body)?;
            assert_eq!(answer.granted.ok_or("nothing granted")?.floors[0].version, 3);
        }
        "refused" => {
            let answer: Answer = decode(&body::<SignedAnswer>(bytes)?.body)?;
            assert_eq!(answer.refused.ok_or("not refused")?, Refusal::used());
        }
        "refusal" => assert!(body::<Refusal>(bytes)?.passes),
        "ledger" => {
            let reservation: Reservation = decode(&body::<Ledger>(bytes)?.entries[0].body)?;
            assert_eq!((reservation.key, reservation.freed), (id(1), 7));
        }
        "token" => assert_eq!(std::str::from_utf8(bytes)?.parse::<JoinToken>()?.claims, claims()),
        packet => {
            let read = Packet::decode(bytes)?;
            assert_eq!((read.words, read.news.len()), (vec![word()], 1), "{packet}");
        }
    }
    Ok(())
}
