//! Clients of other programs, and of none.

use std::path::Path;

use bytes::BytesMut;
use http::{HeaderMap, HeaderValue};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use starling_http::h3::codec::head::{decode_trailers, encode_trailers};
use starling_tests::{
    client_script, program, python,
    raw_h3::{GET, head},
    run,
};

use crate::scene::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_clients_understand_us_and_we_them() {
    let scene = Scene::new().await;
    let url = format!("https://{HOST}:{}/", scene.public.port());
    // ngtcp2 with nghttp3.
    if let Some(gtlsclient) = program("gtlsclient") {
        let port = scene.public.port().to_string();
        let local_url = format!("https://{LOCAL}:{port}/");
        let dir = scene.cluster.dir().join("downloads");
        std::fs::create_dir_all(&dir).unwrap();
        let args =
            ["-q", "--exit-on-all-streams-close", "--download", &dir.to_string_lossy(), LOCAL, &port, &local_url];
        let (ok, out, err) = run(&gtlsclient, &args);
        assert!(ok, "{out}{err}");
        let files: Vec<_> =
            std::fs::read_dir(&dir).unwrap().map(|file| std::fs::read(file.unwrap().path()).unwrap()).collect();
        assert_eq!(files, [b"hello"], "{out}{err}");
    }
    // aioquic, and its pylsqpack, which reads and writes what our codec wrote and reads.
    let Some(python) = python() else { return };
    let script = client_script("h3.py");
    let connect = scene.public.to_string();
    let args = [&script, &url, "--connect", &connect, "--ca", &scene.cert, "--parallel", "20", "--data", "x"];
    let (ok, out, err) = run(&python, &args);
    assert!(ok && out.matches("\"status\": 200").count() == 20, "{out}{err}");
    qpack_agrees(&python);
}

/// ls-qpack reads what our codec writes, and our codec what ls-qpack writes, Huffman codes and all.
fn qpack_agrees(python: &Path) {
    let mut rng = StdRng::seed_from_u64(9);
    let mut names =
        vec!["accept", "cookie", "content-type", "x-frame-options", "vary", "authorization", "x-mine", "via"];
    let long = "x-".repeat(100);
    names.push(&long);
    let sections: Vec<HeaderMap> = (0..300)
        .map(|_| {
            let mut fields = HeaderMap::new();
            for _ in 0..rng.random_range(1..12) {
                let name = names[rng.random_range(0..names.len())];
                let most = if rng.random() { 20 } else { 400 };
                let length = rng.random_range(0..most);
                let value: Vec<u8> =
                    (0..length).map(|_| rng.random_range(0x21..=0xff)).filter(|b| *b != 0x7f).collect();
                let mut value = HeaderValue::from_bytes(&value).unwrap();
                value.set_sensitive(rng.random());
                fields.append(http::HeaderName::from_bytes(name.as_bytes()).unwrap(), value);
            }
            fields
        })
        .collect();
    let written: Vec<String> = sections
        .iter()
        .map(|fields| {
            let mut frame = BytesMut::new();
            encode_trailers(fields, 1 << 20, &mut frame).unwrap();
            frame[3..].iter().map(|byte| format!("{byte:02x}")).collect()
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.json"), dir.path().join("out.json"));
    std::fs::write(&input, serde_json::to_string(&written).unwrap()).unwrap();
    let status = std::process::Command::new(python)
        .arg(client_script("qpack.py"))
        .stdin(std::fs::File::open(&input).unwrap())
        .stdout(std::fs::File::create(&output).unwrap())
        .status()
        .unwrap();
    assert!(status.success(), "ls-qpack reads all that we write");
    let read: Vec<serde_json::Value> = serde_json::from_slice(&std::fs::read(&output).unwrap()).unwrap();
    assert_eq!(read.len(), sections.len());
    for (fields, read) in sections.iter().zip(&read) {
        let latin1 = |bytes: &[u8]| bytes.iter().map(|byte| char::from(*byte)).collect::<String>();
        let sent: Vec<[String; 2]> =
            fields.iter().map(|(name, value)| [name.to_string(), latin1(value.as_bytes())]).collect();
        assert_eq!(serde_json::from_value::<Vec<[String; 2]>>(read["fields"].clone()).unwrap(), sent);
        let hex = read["section"].as_str().unwrap();
        let again: Vec<u8> =
            (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect();
        assert_eq!(&decode_trailers(&again, 1 << 20).unwrap(), fields);
    }
}

#[tokio::test]
async fn the_head_of_a_get_is_understood() {
    // The raw client's own words, once: a test of the tests.
    let scene = Scene::new().await;
    let client = scene.dial(Side::Public).await;
    let mut fields = GET.to_vec();
    fields[2].1 = HOST;
    assert_eq!(client.request(&head(&fields)).await.unwrap(), HELLO);
    assert!(scene.ledger.last().starts_with("get / http/1.1\r\n"), "{}", scene.ledger.last());
    assert_eq!(client.request(&head(&Side::Public.fields("GET", "/nothing/here"))).await.unwrap(), HELLO);
}
