//! A member gone bad: what it sends is refused and counted, and harms nobody.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use starling_chaos::{Client, Cluster, NodeSpec, Process, wait_for};
use starling_protocol::{
    DocumentHash, Framed, IssuerProof, Items, Life, MAX_DOCUMENT_BYTES, MAX_GOSSIP_FRAME_BYTES, MAX_PUSH_BYTES,
    MAX_RECORD_BYTES, MAX_SERVICES, MeshDocument, NodeKind, NodeRecord, Protocol, Purpose, ServiceRecord,
    SignedDocument, SignedRecord, admin::MemberStatus, frame, frame_of, put_varint,
};
use starling_tests::{
    binary, call, memory_kib,
    rogue::{Line, Rogue, packet},
    sample,
};

/// How long anything may take on a slow machine.
const LIMIT: Duration = Duration::from_secs(60);
/// Nodes that behave.
const HEALTHY: [&str; 3] = ["seed", "a", "b"];
/// Zone that forged records tell; must be shown nowhere.
const FORGED: &str = "forged";
/// How much a flood may add to a node's largest resident size, in KiB.
const MAX_GROWTH_KB: u64 = 64 << 10;
const TEN_DAYS_S: u64 = 10 * 86400;

/// A healthy mesh, with `store` on `a`, and the identity of `mallory`, who may serve `spare` and is dead.
struct Scene {
    cluster: Cluster,
    rogue: Rogue,
    /// True records by node name, as the seed had them in the beginning.
    records: BTreeMap<String, NodeRecord>,
    _store: Process,
}

impl Scene {
    async fn new() -> Self {
        let mut cluster = Cluster::start(binary()).await.unwrap();
        let (store, addr) = sample(cluster.dir(), "store").await;
        for spec in [
            NodeSpec::named("a").serving(format!("store={addr}")),
            NodeSpec::named("b"),
            NodeSpec::named("mallory").serving("spare=127.0.0.1:9"),
        ] {
            cluster.add(&spec).await.unwrap();
        }
        cluster.converge().await.unwrap();
        cluster.kill("mallory").await.unwrap();
        for observer in HEALTHY {
            // A member that is given up is hung up on: better now than in the middle of a test.
            cluster.wait_status(observer, "mallory", MemberStatus::Down).await.unwrap();
        }
        let rogue = Rogue::of(&cluster.node("mallory").state).unwrap();
        let line = rogue.dial(cluster.seed()).await.unwrap();
        let delta = line.exchange(&frame(&Items::default())).await.unwrap();
        let records: BTreeMap<_, _> =
            delta.items.records.iter().map(|signed| signed.peek().unwrap()).map(|r| (r.name.to_string(), r)).collect();
        assert_eq!(records.len(), 4, "the exchange by hand works: {records:?}");
        Self { cluster, rogue, records, _store: store }
    }

    /// Mallory's next life, by its own word.
    fn mallory(&self) -> NodeRecord {
        let last = self.records["mallory"].clone();
        NodeRecord { generation: last.generation + 1, seq: 100, zone: FORGED.into(), ..last }
    }

    fn life(&self, name: &str) -> Life {
        let NodeRecord { id, generation, .. } = self.records[name];
        Life { id, generation }
    }

    async fn dial(&self, target: &str) -> Line {
        self.rogue.dial(self.cluster.node(target).mesh).await.unwrap()
    }

    async fn refused(&self, target: &str, what: &str, reason: &str) -> u64 {
        let admin = self.cluster.node(target).admin;
        let text = Client::plain().get(admin, &admin.to_string(), "/metrics").await.unwrap().text().to_string();
        let label = format!("starling_gossip_refused_total{{what=\"{what}\",reason=\"{reason}\"}} ");
        let line = text.lines().find_map(|line| line.strip_prefix(&label));
        line.unwrap_or_else(|| panic!("no {label} in {text}")).parse().unwrap()
    }

    /// Waits until the counter is more than `before`.
    async fn counted(&self, target: &str, (what, reason): (&str, &str), before: u64, row: &str) -> anyhow::Result<()> {
        wait_for(&format!("{target} counts a refused {what} ({reason}): {row}"), Duration::from_secs(15), || async {
            let now = self.refused(target, what, reason).await;
            if now > before { Ok(()) } else { Err(format!("{now}")) }
        })
        .await
    }

    /// Everybody sees the healthy ones alive in their old lives, shows nothing that was forged, and calls work.
    async fn unharmed(&self, row: &str) {
        for observer in HEALTHY {
            wait_for(&format!("{observer} sees the healthy alive after {row}"), LIMIT, || self.calm(observer, row))
                .await
                .unwrap();
            assert_eq!(call(self.cluster.node(observer).outbound, "store", "/").await.status, 200, "{row}");
        }
    }

    /// An error if a healthy node is not seen alive, which may be a passing suspicion; panics if the view is false.
    async fn calm(&self, observer: &str, row: &str) -> Result<(), String> {
        let members = self.cluster.members(observer).await.map_err(|e| e.to_string())?;
        for name in HEALTHY {
            let truth = &self.records[name];
            let seen: Vec<_> = members.iter().filter(|m| m.id == truth.id.to_string()).collect();
            let [seen] = seen[..] else { panic!("{row}: {observer} sees {name} as {seen:?}") };
            let services: Vec<_> = seen.services.iter().map(|s| &s.name).collect();
            assert_eq!(
                (seen.name.as_str(), seen.generation, seen.addr, seen.zone.as_str(), services),
                (name, truth.generation, truth.addr, "", truth.services.iter().map(|s| &s.name).collect()),
                "{row}: {observer} has a false view"
            );
            assert!(!matches!(seen.status, MemberStatus::Down | MemberStatus::Left), "{row}: {observer}: {seen:?}");
            if seen.status != MemberStatus::Alive {
                return Err(format!("{name} is {:?}", seen.status));
            }
        }
        assert!(members.iter().all(|m| m.zone != FORGED), "{row}: {observer} shows a forged record: {members:?}");
        let horizon = self.records["mallory"].generation + 86400;
        assert!(members.iter().all(|m| m.generation < horizon), "{row}: {observer} lives in the future: {members:?}");
        let documents: Vec<serde_json::Value> =
            self.cluster.admin(observer, "/v1/documents").await.map_err(|e| e.to_string())?;
        assert!(documents.is_empty(), "{row}: {observer} has a forged document: {documents:?}");
        Ok(())
    }

    /// Pushes the items to two nodes, and checks that each refuses and counts, and that nobody is harmed.
    async fn check(&self, row: &str, counter: (&str, &str), items: &Items) {
        for target in ["seed", "a"] {
            let before = self.refused(target, counter.0, counter.1).await;
            let line = self.dial(target).await;
            line.push(items.clone()).await.unwrap();
            self.counted(target, counter, before, row).await.unwrap();
        }
        self.unharmed(row).await;
    }
}

/// The same with one bit of its signature changed.
fn flip(mut signed: SignedRecord) -> SignedRecord {
    let mut signature = signed.signature.to_vec();
    *signature.last_mut().unwrap() ^= 1;
    signed.signature = signature.into();
    signed
}

fn record(signed: SignedRecord) -> Items {
    Items { records: vec![Arc::new(signed)], ..Items::default() }
}

fn service(name: &str) -> ServiceRecord {
    ServiceRecord::new(name.parse().unwrap(), Protocol::Http1)
}

/// Records that nobody may believe, and what is wrong with them.
fn forgeries(scene: &Scene) -> Vec<(&'static str, SignedRecord)> {
    let rogue = &scene.rogue;
    let mine = scene.mallory();
    let unsigned = SignedRecord { signature: Bytes::new(), ..rogue.sign(&mine) };
    let flipped = flip(rogue.sign(&mine));
    let mut altered = rogue.sign(&NodeRecord { zone: "honest".into(), ..mine.clone() });
    altered.body = SignedRecord::encode_body(&mine);
    let chainless = SignedRecord { chain: Vec::new(), ..rogue.sign(&mine) };
    let garbled = SignedRecord { body: vec![0xff; 300].into(), ..rogue.sign(&mine) };
    let victim = NodeRecord { zone: FORGED.into(), seq: 1000, ..scene.records["b"].clone() };
    let stolen_name = NodeRecord { name: victim.name.clone(), ..mine.clone() };
    let ungranted = NodeRecord { services: vec![service("store")], ..mine.clone() };
    let edge = NodeRecord { kind: NodeKind::Edge, ..mine.clone() };
    let future = NodeRecord { generation: mine.generation + TEN_DAYS_S, ..mine.clone() };
    let long_zone = NodeRecord { zone: "z".repeat(65), ..mine.clone() };
    let many = (0..=MAX_SERVICES).map(|n| service(&format!("s{n}"))).collect();
    let too_many = NodeRecord { services: many, ..mine.clone() };
    let twice = NodeRecord { services: vec![service("spare"); 2], ..mine.clone() };
    let escape = NodeRecord { zone: "\x1b[2J".into(), ..mine.clone() };
    let junk = Bytes::from_static(b"a third certificate");
    let long_chain = SignedRecord { chain: [&rogue.sign(&mine).chain[..], &[junk]].concat(), ..rogue.sign(&mine) };
    // Everybody has the issuer's certificate; its key, not.
    let proof = IssuerProof {
        certificate: rogue.issuer_certificate(),
        signature: rogue.sign_bytes(&IssuerProof::signed_bytes(mine.id)).into(),
    };
    let issuer = NodeRecord { issuer: Some(proof), ..mine.clone() };
    vec![
        ("another node's record", rogue.sign(&victim)),
        ("another node's name", rogue.sign(&stolen_name)),
        ("a service without a grant", rogue.sign(&ungranted)),
        ("an edge without a grant", rogue.sign(&edge)),
        ("no signature", unsigned),
        ("a flipped bit in the signature", flipped),
        ("another body under the signature", altered),
        ("no certificates", chainless),
        ("no record at all", garbled),
        ("a generation of the future", rogue.sign(&future)),
        ("too long a zone", rogue.sign(&long_zone)),
        ("too many services", rogue.sign(&too_many)),
        ("one service twice", rogue.sign(&twice)),
        ("a zone that fools terminals", rogue.sign(&escape)),
        ("more certificates than two", long_chain),
        ("an issuer without its key", rogue.sign(&issuer)),
    ]
}

#[tokio::test]
async fn forged_records_are_refused() {
    // Whoever has sent eight is not listened to for a minute.
    const PATIENCE: usize = 6;
    let mut done = 0;
    loop {
        let scene = Scene::new().await;
        let rows: Vec<_> = forgeries(&scene).into_iter().skip(done).take(PATIENCE).collect();
        if rows.is_empty() {
            return;
        }
        done += rows.len();
        for (row, signed) in rows {
            scene.check(row, ("record", "invalid"), &record(signed)).await;
        }
    }
}

#[tokio::test]
async fn records_that_unfold_too_far_are_not_even_read() {
    let scene = Scene::new().await;
    let mine = scene.mallory();
    let too_large = scene.rogue.sign(&NodeRecord { zone: "z".repeat(MAX_RECORD_BYTES), ..mine.clone() });
    let crumbs = SignedRecord { chain: vec![Bytes::from_static(b"c"); 1000], ..scene.rogue.sign(&mine) };
    for (row, signed) in [("too large a record", too_large), ("a thousand certificates", crumbs)] {
        scene.check(row, ("stream", "invalid"), &record(signed)).await;
    }
}

#[tokio::test]
async fn a_replayed_record_does_not_replace_a_newer_one() {
    let scene = Scene::new().await;
    let edition = |seq: u64, zone: &str| {
        let record = NodeRecord { seq, zone: zone.into(), ..scene.mallory() };
        self::record(scene.rogue.sign(&record))
    };
    // A right record is taken, and passed on: what the other tests send is refused for what is wrong with it alone.
    let line = scene.dial("seed").await;
    line.push(edition(5, "five")).await.unwrap();
    let shown = |observer: &'static str| {
        let scene = &scene;
        async move {
            let members = scene.cluster.members(observer).await.map_err(|e| e.to_string())?;
            let zone = members.into_iter().find(|m| m.name == "mallory").map(|m| m.zone);
            if zone.as_deref() == Some("five") { Ok(()) } else { Err(format!("{zone:?}")) }
        }
    };
    for observer in HEALTHY {
        wait_for(&format!("{observer} has the newer record"), LIMIT, || shown(observer)).await.unwrap();
    }
    scene.check("an old record", ("record", "stale"), &edition(4, FORGED)).await;
    for observer in HEALTHY {
        shown(observer).await.unwrap();
    }
}

#[tokio::test]
async fn datagrams_that_are_no_packets_or_speak_for_others_are_refused() {
    let scene = Scene::new().await;
    let mut rng = StdRng::seed_from_u64(1);
    let mut random = |length: usize| {
        let mut bytes = vec![0; length];
        rng.fill(&mut bytes[..]);
        bytes
    };
    for target in ["seed", "a"] {
        let (me, victim, to) = (scene.life("mallory"), scene.life("b"), scene.life(target));
        let honest = packet(me, to, Purpose::Ping, &[]).encode();
        let mut miscounted = honest.clone();
        *miscounted.last_mut().unwrap() = 0x7f;
        // What begins like a later version is let pass.
        let noise =
            |length: usize, random: &mut dyn FnMut(usize) -> Vec<u8>| [&[0xee], &random(length - 1)[..]].concat();

        // The packets are made as nodes make them: to one that is right, something comes back.
        let line = scene.dial(target).await;
        let before = scene.refused(target, "packet", "invalid").await;
        line.datagram(honest.clone()).await.unwrap();
        tokio::time::timeout(LIMIT, line.heard()).await.expect("an answer comes").unwrap();
        assert_eq!(scene.refused(target, "packet", "invalid").await, before, "a right packet is no wrong one");

        for (row, bytes) in [
            ("noise", noise(100, &mut random)),
            ("nothing", Vec::new()),
            ("too short", noise(7, &mut random)),
            ("a root hash alone", noise(9, &mut random)),
            ("as long as can be", noise(1162, &mut random)),
            ("half a header", honest[..20].to_vec()),
            ("more news than there are", miscounted),
            ("a ping in another's name", packet(victim, to, Purpose::Ping, &[]).encode()),
            ("a verdict in another's name", packet(victim, to, Purpose::Dead, &[]).encode()),
            ("a ping in the target's own name", packet(to, to, Purpose::Ping, &[]).encode()),
            ("a ping for another", packet(me, victim, Purpose::Ping, &[]).encode()),
        ] {
            let before = scene.refused(target, "packet", "invalid").await;
            line.datagram(bytes).await.unwrap();
            scene.counted(target, ("packet", "invalid"), before, row).await.unwrap();
            scene.unharmed(row).await;
        }
    }
}

#[tokio::test]
async fn streams_that_are_no_frames_are_refused() {
    let scene = Scene::new().await;
    let mut noise = vec![0; 64];
    StdRng::seed_from_u64(2).fill(&mut noise[..]);
    let announced = |length: u64, body: &[u8]| {
        let mut bytes = vec![Items::KIND as u8];
        put_varint(length, &mut bytes);
        [&bytes[..], body].concat()
    };
    let whole = frame(&record(scene.rogue.sign(&scene.mallory())));
    let honest = scene.rogue.sign(&scene.mallory());
    let long_body = SignedRecord { body: vec![0; MAX_PUSH_BYTES].into(), ..honest };
    // Two bytes for each of a million records.
    let empty_records = [1 << 1, 0].repeat(MAX_PUSH_BYTES / 2);
    // Those that were not counted: each says something of its own.
    let mut missed = Vec::new();
    for (row, bytes) in [
        ("a header that never ends", [0xff; 64].to_vec()),
        ("noise in a frame", announced(64, &[&[0xee], &noise[1..]].concat())),
        ("a frame of 4 GiB", announced(u32::MAX.into(), b"x")),
        ("too long a push", frame(&record(long_body))),
        ("records that are none", frame_of(Items::KIND, &empty_records)),
        ("half a frame", whole[..whole.len() / 2].to_vec()),
        ("half a header", whole[..1].to_vec()),
    ] {
        let before = scene.refused("seed", "stream", "invalid").await;
        let line = scene.dial("seed").await;
        line.stream(&bytes).await.unwrap();
        missed.extend(scene.counted("seed", ("stream", "invalid"), before, row).await.err());
        let pong = tokio::time::timeout(LIMIT, line.ping()).await.expect("an answer comes").unwrap();
        assert_eq!(pong.generation, scene.records["seed"].generation, "other streams go on: {row}");
        scene.unharmed(row).await;
    }
    let row = "an exchange that ends in noise";
    let before = scene.refused("seed", "stream", "invalid").await;
    let line = scene.dial("seed").await;
    line.exchange(&announced(64, &noise)).await.unwrap();
    missed.extend(scene.counted("seed", ("stream", "invalid"), before, row).await.err());
    scene.unharmed(row).await;
    assert!(missed.is_empty(), "{missed:#?}");
}

#[tokio::test]
async fn forged_documents_are_refused() {
    let scene = Scene::new().await;
    let kind = "policy".parse().unwrap();
    let document = |content: Vec<u8>, version: u64| {
        let previous = DocumentHash::default();
        SignedDocument::encode_body(&MeshDocument {
            kind: Clone::clone(&kind),
            version,
            previous,
            not_before: 0,
            expires: None,
            deleted: false,
            content: content.into(),
            understood: true,
        })
    };
    let by_mallory = |body: Bytes| {
        let signature = scene.rogue.sign_bytes(&SignedDocument::signed_bytes(&body)).into();
        SignedDocument { signature, body, certificate: scene.rogue.certificate() }
    };
    let unsigned = SignedDocument { body: document(vec![1], 1), signature: Bytes::new(), certificate: Bytes::new() };
    for (row, signed) in [
        ("no signature", unsigned),
        ("signed by a member", by_mallory(document(vec![1], 2))),
        ("too large", by_mallory(document(vec![1; MAX_DOCUMENT_BYTES + 1], 3))),
        ("no document at all", by_mallory(vec![0xff; 100].into())),
    ] {
        let items = Items { documents: vec![Arc::new(signed)], ..Items::default() };
        scene.check(row, ("document", "invalid"), &items).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_is_dropped_and_nobody_else_notices() {
    const DATAGRAMS: usize = 20_000;
    const STREAMS: usize = 500;
    let scene = Scene::new().await;
    let before = scene.refused("seed", "any", "flood").await;
    let memory = memory_kib(&scene.cluster.node("seed").process, "VmHWM:");
    let line = Arc::new(scene.dial("seed").await);
    let noise = vec![0xee; 1100];
    let sender = line.clone();
    let datagrams = tokio::spawn(async move {
        for _ in 0..DATAGRAMS {
            sender.datagram(noise.clone()).await.unwrap();
        }
    });
    let opener = line.clone();
    let streams = tokio::spawn(async move {
        for _ in 0..STREAMS {
            assert!(opener.pester().await, "the connection goes on");
        }
    });
    let mut looks = 0;
    while looks == 0 || !(datagrams.is_finished() && streams.is_finished()) {
        scene.unharmed("a flood going on").await;
        looks += 1;
    }
    datagrams.await.unwrap();
    streams.await.unwrap();
    scene.counted("seed", ("any", "flood"), before, "a flood").await.unwrap();
    scene.unharmed("a flood").await;
    let grown = memory_kib(&scene.cluster.node("seed").process, "VmHWM:") - memory;
    assert!(grown < MAX_GROWTH_KB, "the flood took {grown} KiB");
    let dropped = scene.refused("seed", "any", "flood").await - before;
    eprintln!("{looks} looks during the flood; {dropped} dropped; {grown} KiB more at most");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pushes_full_of_wrong_records_do_not_keep_a_node_from_its_probes() {
    const PUSHES: usize = 150;
    let scene = Scene::new().await;
    let wrong = Arc::new(flip(scene.rogue.sign(&scene.mallory())));
    let records = vec![wrong.clone(); MAX_PUSH_BYTES / (wrong.encoded_len() + 16)];
    let items = Items { records, ..Items::default() };
    let before = scene.refused("seed", "record", "invalid").await;
    let line = scene.dial("seed").await;
    let pushes = tokio::spawn(async move {
        for _ in 0..PUSHES {
            // A push that is refused as a whole is stopped in the middle.
            let _ = line.push(items.clone()).await;
        }
        line
    });
    while !pushes.is_finished() {
        scene.unharmed("wrong records by the thousand").await;
    }
    let _line = pushes.await.unwrap();
    scene.counted("seed", ("record", "invalid"), before, "wrong records").await.unwrap();
    scene.unharmed("wrong records by the thousand").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_as_large_as_allowed_do_not_take_the_memory() {
    /// Sixteen streams could bring 256 MiB; a few at a time are read.
    const MAX_GROWTH_KB: u64 = 128 << 10;
    let scene = Scene::new().await;
    let memory = memory_kib(&scene.cluster.node("seed").process, "VmHWM:");
    let line = Arc::new(scene.dial("seed").await);
    let length = MAX_GOSSIP_FRAME_BYTES;
    // The last byte stays away.
    let mut last = frame_of(Items::KIND, &vec![0; length]);
    last.pop();
    let last = Arc::new(last);
    let exchanges: Vec<_> = (0..16)
        .map(|_| {
            let (line, last) = (line.clone(), last.clone());
            tokio::spawn(async move { drop(line.exchange(&last).await) })
        })
        .collect();
    for exchange in exchanges {
        exchange.await.unwrap();
    }
    let grown = memory_kib(&scene.cluster.node("seed").process, "VmHWM:") - memory;
    assert!(grown < MAX_GROWTH_KB, "the frames took {grown} KiB");
    scene.unharmed("large frames").await;
}
