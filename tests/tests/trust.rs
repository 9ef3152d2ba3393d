//! What is not verified is not believed: seeds, issuers, members and relays that lie, against the real binary.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose, SigningKey as _};
use starling_chaos::{Client, Cluster, NodeSpec, Process, free_port, wait_for};
use starling_protocol::{
    Answer, Application, Framed, Grant, Join, JoinToken, Ledger, Life, MemberHealth, MemberState, News, NodeId, Packet,
    Purpose, Refusal, RefusalCode, Relayed, Renew, SignedAnswer, Summary, Word,
    admin::{Member, MemberStatus, OwnedName},
    alpn, decode, encode, frame,
};
use starling_tests::{
    applicant::{Applicant, ask, exchange, prove, seed, verdict},
    binary, memory_kib,
    rogue::{Rogue, claim, packet},
};

const LIMIT: Duration = Duration::from_secs(60);

async fn mesh(names: &[&str]) -> Cluster {
    let mut cluster = Cluster::start(binary()).await.unwrap();
    for name in names {
        cluster.add(&NodeSpec::named(name)).await.unwrap();
    }
    cluster.converge().await.unwrap();
    cluster
}

async fn token(cluster: &Cluster, flags: &[&str]) -> JoinToken {
    cluster.token(flags).await.unwrap().parse().unwrap()
}

/// Waits until a process has written such a line so often.
async fn says(process: &Process, line: &str, times: usize) {
    wait_for(&format!("{times} times {line:?} in the log"), LIMIT, || async {
        let log = process.log();
        if log.matches(line).count() >= times { Ok(()) } else { Err(log) }
    })
    .await
    .unwrap();
}

/// An issuer of nobody's, and an answer that it signs: its own certificate for the same key and names.
fn forge(answer: &SignedAnswer) -> SignedAnswer {
    let issuer_key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.distinguished_name.push(DnType::CommonName, "demo issuer");
    let issuer: Bytes = params.self_signed(&issuer_key).unwrap().der().to_vec().into();
    let signature = issuer_key.sign(&SignedAnswer::signed_bytes(&answer.body)).unwrap().into();
    SignedAnswer { signature, issuer, ..answer.clone() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seed_that_lies_gets_nothing_believed_and_the_joiner_joins_all_the_same() {
    let mut cluster = mesh(&["mallory"]).await;
    cluster.kill("mallory").await.unwrap();
    let rogue = Rogue::of(&cluster.node("mallory").state).unwrap();
    let issuer = cluster.seed();
    // What another node was granted, and an answer to another request.
    let other = cluster.token(&[]).await.unwrap().parse().unwrap();
    let strange = ask(issuer, Join::KIND, &encode(&Applicant::default().join(&other, "strange"))).await.unwrap().1;
    let turn = Arc::new(AtomicUsize::new(0));
    let certificate = rogue.certificate();
    let lies = {
        let (turn, rogue) = (turn.clone(), Arc::new(rogue));
        move |kind: u64, body: Bytes| {
            let (turn, rogue, strange, certificate) =
                (turn.clone(), rogue.clone(), strange.clone(), certificate.clone());
            async move {
                let turn = turn.fetch_add(1, SeqCst);
                let (answered, honest) = ask(issuer, kind, &body).await.unwrap();
                let signed: SignedAnswer = decode(&honest).unwrap();
                let answer: Answer = decode(&signed.body).unwrap();
                let grant = answer.granted.clone().expect("the issuer grants it");
                let altered = |grant: Grant| {
                    let body = encode(&Answer { granted: Some(grant), ..answer.clone() });
                    SignedAnswer { body: body.into(), ..signed.clone() }
                };
                let mut root = CertificateParams::default();
                root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
                let root: Bytes = root.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec().into();
                let by_member = |signed: &SignedAnswer| SignedAnswer {
                    signature: rogue.sign_bytes(&SignedAnswer::signed_bytes(&signed.body)).into(),
                    issuer: certificate.clone(),
                    ..signed.clone()
                };
                let reply = match turn {
                    0 => altered(Grant { root: root.clone(), ..grant.clone() }),
                    1 => altered(Grant { peers: vec![([127, 0, 0, 1], 1).into()], ..grant.clone() }),
                    2 => forge(&altered(Grant { root, ..grant })),
                    3 => by_member(&signed),
                    4 => decode(&strange).unwrap(),
                    5 => SignedAnswer { signature: Bytes::new(), ..signed },
                    6 => return (SignedAnswer::KIND, Bytes::from_static(b"\xff\xff\xff")),
                    7 => return (99, Bytes::new()),
                    8 => return (Refusal::KIND, encode(&Refusal::used()).into()),
                    _ => return (answered, honest),
                };
                (SignedAnswer::KIND, encode(&reply).into())
            }
        }
    };
    let (at, _endpoint) = seed(&cluster.node("mallory").state, lies).unwrap();
    let state = cluster.dir().join("joiner");
    let (mesh, admin) = (free_port(), free_port());
    let (state_dir, at, listen) = (state.to_string_lossy(), at.to_string(), mesh.to_string());
    let (admin, outbound, token) = (admin.to_string(), free_port().to_string(), token_without_seeds(&cluster).await);
    let mut args = vec!["node", "--name", "joiner", "--state", &state_dir, "--listen", &listen, "--admin", &admin];
    args.extend(["--outbound", &outbound, "--token", &token]);
    // All its seeds are the liar, so that it does not pause between the lies.
    args.extend(["--seed", &at].repeat(10));
    let joiner = Process::start(binary(), args, &cluster.dir().join("joiner.log")).unwrap();
    says(&joiner, "nothing of it is used", 8).await;
    says(&joiner, "which is not its to say", 1).await;
    cluster.wait_status("seed", "joiner", MemberStatus::Alive).await.unwrap();
    let roots = std::fs::read_to_string(state.join("identity/roots.pem")).unwrap();
    let root = std::fs::read_to_string(cluster.node("seed").state.join("root/cert.pem")).unwrap();
    assert_eq!(roots.matches("BEGIN CERTIFICATE").count(), 1, "one root, and no other");
    assert_eq!(roots.split_whitespace().collect::<String>(), root.split_whitespace().collect::<String>());
    assert!(turn.load(SeqCst) >= 9);
}

/// A token that names no seed.
async fn token_without_seeds(cluster: &Cluster) -> String {
    let state = cluster.node("seed").state.to_string_lossy().into_owned();
    cluster.run(&["token", "create", "--state", &state]).await.unwrap().trim().to_string()
}

#[tokio::test]
async fn an_issuers_refusal_ends_a_join_with_the_next_step() {
    let mut cluster = mesh(&["a"]).await;
    let through = cluster.node("a").mesh.to_string();
    let token = cluster.token(&["--seed", &through]).await.unwrap();
    cluster.add_with_token(&NodeSpec::named("b"), &token).await.unwrap();
    let state = cluster.dir().join("c");
    let state = state.to_string_lossy();
    let args = ["node", "--name", "c", "--state", &state, "--seed", &through, "--token", &token];
    let args =
        [&args[..], &["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--outbound", "127.0.0.1:0"]].concat();
    let refused = cluster.run(&args).await.unwrap_err().to_string();
    assert!(refused.contains("has been used already") && refused.contains("starling token create"), "{refused}");
}

#[tokio::test]
async fn a_name_belongs_to_one_key_and_a_use_to_one_request() {
    let mut cluster = mesh(&["a"]).await;
    let at = cluster.node("a").mesh;
    let first = Applicant::default();
    let one_use = token(&cluster, &[]).await;
    let code =
        |outcome: anyhow::Result<Result<Grant, Refusal>>| outcome.unwrap().map_err(|refusal| refusal.code).map(|_| ());
    let granted = first.ask(at, &one_use, "first").await.unwrap().unwrap();
    assert_eq!(code(first.ask(at, &one_use, "first").await), Ok(()), "the same request may be repeated");
    for name in ["second", "third", "fourth"] {
        assert_eq!(code(first.ask(at, &one_use, name).await), Err(RefusalCode::Used), "{name}");
    }
    // The name is taken though nobody of it runs, whoever holds a token; also at another issuer, and after a restart.
    let other = Applicant::default();
    let fresh = token(&cluster, &[]).await;
    assert_eq!(code(other.ask(at, &fresh, "first").await), Err(RefusalCode::NameTaken));
    let second = cluster.token(&["--issuer"]).await.unwrap();
    cluster.add_with_token(&NodeSpec::named("issuer-2"), &second).await.unwrap();
    cluster.converge().await.unwrap();
    let state = cluster.node("issuer-2").state.to_string_lossy().into_owned();
    let of_second: JoinToken = cluster.run(&["token", "create", "--state", &state]).await.unwrap().parse().unwrap();
    let verdict_of_second = code(other.ask(at, &of_second, "first").await);
    assert_eq!(verdict_of_second, Err(RefusalCode::NameTaken), "{}", cluster.node("issuer-2").process.log());
    cluster.kill("seed").await.unwrap();
    cluster.restart("seed").await.unwrap();
    cluster.converge().await.unwrap();
    assert_eq!(code(other.ask(at, &fresh, "first").await), Err(RefusalCode::NameTaken));
    // A person frees it, at any issuer.
    let admin = format!("http://{}", cluster.node("issuer-2").admin);
    wait_for("the second issuer knows all names", LIMIT, || async {
        let listed = cluster.run(&["names", "--admin", &admin, "-o", "json"]).await.map_err(|e| e.to_string())?;
        let listed: Vec<OwnedName> = serde_json::from_str(&listed).map_err(|e| e.to_string())?;
        let all = ["first", "a", "seed", "issuer-2"].iter().all(|n| listed.iter().any(|o| o.name.as_str() == *n));
        all.then_some(()).ok_or_else(|| format!("{listed:?}"))
    })
    .await
    .unwrap();
    cluster.run(&["names", "free", "first", "--admin", &admin]).await.unwrap();
    assert_eq!(code(other.ask(at, &of_second, "first").await), Ok(()));
    wait_for("the first issuer knows whose it is now", LIMIT, || async {
        match code(Applicant::default().ask(at, &fresh, "first").await) {
            Err(RefusalCode::NameTaken) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
    .unwrap();
    // Whoever had it is out: its certificate ends, and is not renewed.
    let renew = encode(&Renew { csr: first.csr(), chain: granted.chain });
    for issuer in ["seed", "issuer-2"] {
        let (kind, body) = ask(cluster.node(issuer).mesh, Renew::KIND, &renew).await.unwrap();
        assert_eq!(verdict(kind, &body).unwrap().unwrap_err().code, RefusalCode::NameTaken, "{issuer}");
    }
}

#[tokio::test]
async fn a_token_binds_names_and_zone_and_a_newer_one_is_refused() {
    let cluster = mesh(&["a"]).await;
    let at = cluster.node("a").mesh;
    let bound = token(&cluster, &["--name", "web-*", "--zone", "eu-1", "--uses", "9"]).await;
    let refused = Applicant::default().ask(at, &bound, "db-1").await.unwrap().unwrap_err();
    assert_eq!(refused.code, RefusalCode::NotGranted, "{refused}");
    Applicant::default().ask(at, &bound, "web-1").await.unwrap().unwrap();
    // Claims that the issuer did not make; a proof of another application; no proof.
    let join = Applicant::default().join(&bound, "web-2");
    let mut claims = bound.claims_bytes.to_vec();
    claims.extend([40 << 1, 1, 7]);
    let application: Application = decode(&join.application).unwrap();
    let altered = prove(&bound, encode(&Application { claims: claims.into(), ..application.clone() }));
    let unproven = Join { proof: [0; 32], ..join.clone() };
    let later = prove(&bound, encode(&Application { version: 99, ..application }));
    let (kind, body) = ask(at, Join::KIND, &encode(&later)).await.unwrap();
    verdict(kind, &body).unwrap().expect("a later version of joining is one that this one understands");
    for (row, join, code) in
        [("altered claims", altered, RefusalCode::Forged), ("no proof", unproven, RefusalCode::Forged)]
    {
        let (kind, body) = ask(at, Join::KIND, &encode(&join)).await.unwrap();
        assert_eq!(verdict(kind, &body).unwrap().unwrap_err().code, code, "{row}");
    }
    // What is not known is no offence.
    let (kind, _) = ask(at, 4711, b"later").await.unwrap();
    assert_eq!(kind, 0, "unsupported");
}

#[tokio::test]
async fn what_was_carried_is_not_carried_again_and_nothing_is_carried_unseen() {
    let mut cluster = mesh(&["a", "mallory"]).await;
    cluster.kill("mallory").await.unwrap();
    let rogue = Rogue::of(&cluster.node("mallory").state).unwrap();
    let at = cluster.node("a").mesh;
    let token = token(&cluster, &[]).await;
    let join = encode(&Applicant::default().join(&token, "b"));
    let relayed = encode(&Relayed { kind: Join::KIND, request: join.clone().into() });
    let code = |answer: anyhow::Result<(u64, Bytes)>| {
        let (kind, body) = answer.unwrap();
        verdict(kind, &body).unwrap().map(|_| ()).map_err(|refusal| refusal.code)
    };
    // A stranger says that it carries; a member says so to one that is no issuer.
    assert_eq!(code(ask(at, Relayed::KIND, &relayed).await), Err(RefusalCode::Malformed));
    let endpoint = quinn::Endpoint::client(([127, 0, 0, 1], 0).into()).unwrap();
    let member = || async {
        let connecting = endpoint.connect_with(rogue.client_config(alpn::JOIN), at, "mesh.internal").unwrap();
        connecting.await.unwrap()
    };
    assert_eq!(code(exchange(&member().await, Relayed::KIND, &relayed).await), Err(RefusalCode::IssuerUnreachable));
    // Renewals of what is no certificate of this mesh go nowhere.
    let renew = encode(&Renew { csr: Applicant::default().csr(), chain: vec![Bytes::from_static(b"none"); 2] });
    assert_eq!(code(ask(at, Renew::KIND, &renew).await), Err(RefusalCode::NotRenewable));
    // Names are for issuers to compare.
    let ledger = encode(&Ledger::default());
    assert!(exchange(&member().await, Ledger::KIND, &ledger).await.is_err());
    assert!(ask(cluster.seed(), Ledger::KIND, &ledger).await.is_err());
    assert_eq!(code(ask(at, Join::KIND, &join).await), Ok(()), "what is right goes through");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_lies_takes_nobody_down_and_is_named() {
    const HEALTHY: [&str; 3] = ["seed", "a", "b"];
    let mut cluster = mesh(&["a", "b", "mallory"]).await;
    let members = cluster.members("seed").await.unwrap();
    let life = |name: &str| {
        let member = members.iter().find(|m| m.name == name).unwrap();
        Life { id: member.id.parse().unwrap(), generation: member.generation }
    };
    let before = |members: &[Member]| {
        members.iter().filter(|m| HEALTHY.contains(&m.name.as_str())).map(|m| m.generation).collect::<Vec<_>>()
    };
    let generations = before(&members);
    // The real one goes on: it is a member, and its other self speaks beside it.
    let rogue = Rogue::of(&cluster.node("mallory").state).unwrap();
    let (me, victim) = (life("mallory"), life("b"));
    let mut phantoms = 0u64;
    let started = std::time::Instant::now();
    while started.elapsed() < Duration::from_secs(12) {
        for target in ["seed", "a", "b"] {
            let to = life(target);
            let Ok(line) = rogue.dial(cluster.node(target).mesh).await else { continue };
            let down = News { life: victim, incarnation: 0, health: MemberHealth::Down };
            let own = News { life: to, incarnation: 0, health: MemberHealth::Down };
            let far = News { life: to, incarnation: u16::MAX, health: MemberHealth::Suspect };
            let mut packets = vec![
                packet(me, to, Purpose::Gossip, &[down, own]),
                packet(me, to, Purpose::Dead, &[]),
                packet(me, to, Purpose::Ping, &[far]),
                Packet {
                    words: vec![
                        rogue.word(Word::ACCUSES, me.id, victim, 0),
                        rogue.word(Word::ACCUSES, life("a").id, victim, 0),
                        rogue.word(Word::LIVES, victim.id, victim, 9),
                    ],
                    ..packet(me, to, Purpose::Gossip, &[])
                },
            ];
            for _ in 0..20 {
                let phantom = |n: u64| {
                    let mut id = [0xee; 16];
                    id[..8].copy_from_slice(&n.to_be_bytes());
                    News { life: Life { id: NodeId(id), ..victim }, incarnation: 0, health: MemberHealth::Alive }
                };
                let news: Vec<News> = (phantoms..phantoms + 40).map(phantom).collect();
                phantoms += 40;
                let purpose = Purpose::PingRequest(news[0].life);
                packets.push(packet(me, to, purpose, &news));
            }
            for packet in packets {
                let _ = line.datagram(packet.encode()).await;
            }
            let _ = line.ping_suspecting(Some(u16::MAX)).await;
            let all: Vec<MemberState> = HEALTHY.iter().map(|name| claim(life(name), 0, MemberHealth::Down)).collect();
            let own = claim(me, 0, MemberHealth::Alive);
            let members = [&all[..], &[own]].concat();
            let summary = Summary { members, standing: u32::MAX, appeals: true, ..Summary::default() };
            let _ = line.exchange_with(summary, &frame(&starling_protocol::Items::default())).await;
        }
        for observer in HEALTHY {
            for member in cluster.members(observer).await.unwrap() {
                let healthy = HEALTHY.contains(&member.name.as_str());
                assert!(!healthy || member.status != MemberStatus::Down, "{observer} sees {member:?}");
                assert!(cluster.names().any(|name| name == member.name), "{observer} shows a phantom: {member:?}");
            }
        }
    }
    assert!(phantoms > 10_000, "{phantoms}");
    for observer in HEALTHY {
        assert_eq!(before(&cluster.members(observer).await.unwrap()), generations, "nobody had to begin anew");
        let memory = memory_kib(&cluster.node(observer).process, "VmHWM:");
        assert!(memory < 96 << 10, "{observer} took {memory} KiB");
        let detailed: Vec<Member> = cluster.admin(observer, "/v1/members?detail=true").await.unwrap();
        let refused = |name: &str| {
            let of = detailed.iter().find(|m| m.name == name).unwrap();
            of.detail.as_ref().map_or(0, |d| d.refused.total())
        };
        assert!(refused("mallory") > 100, "{observer}: {}", refused("mallory"));
        assert!(HEALTHY.iter().filter(|name| **name != observer).all(|name| refused(name) < 10), "{detailed:?}");
        let admin = cluster.node(observer).admin;
        let metrics = Client::plain().get(admin, &admin.to_string(), "/metrics").await.unwrap().text().to_string();
        let line = "starling_gossip_refused_of_member_total{member=\"mallory\",what=\"stranger\"}";
        assert!(metrics.contains(line), "{metrics}");
        let wide = cluster.run(&["members", "-o", "wide", "--admin", &format!("http://{admin}")]).await.unwrap();
        assert!(wide.contains("REFUSED"), "{wide}");
    }
    // Among all that, a real death is noticed.
    cluster.kill("b").await.unwrap();
    for observer in ["seed", "a"] {
        cluster.wait_status(observer, "b", MemberStatus::Down).await.unwrap();
    }
}
