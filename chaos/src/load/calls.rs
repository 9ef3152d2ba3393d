//! Open-loop load: a call starts when it is due, its time counts from then, and one that never ends has failed at its deadline.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, Method, Request, header};
use http_body_util::BodyExt;
use hyper::body::Frame;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{mpsc, watch},
    task::JoinSet,
};

use super::{door::Door, raw};
use crate::{
    history::{Call, CallKind, Event, Recorder},
    plan::{DoorKind, LoadPlan, Mix},
    run::COUNTED,
    service,
};

/// Calls under way at most. Those beyond are noted as failed: a client, too, has an end.
const MOST_IN_FLIGHT: u64 = 20_000;

/// Messages of a gRPC call, each way.
pub(super) const TURNS: u8 = 4;

/// A load that runs until it is stopped.
pub(crate) struct Calls {
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
    times: Arc<AtomicU32>,
}

/// What all calls of a load share.
struct Shared {
    plan: LoadPlan,
    recorder: Arc<Recorder>,
    in_flight: AtomicU64,
    /// Seconds by which each call's clock is wrong: sabotage.
    skew: f64,
}

impl Calls {
    /// Starts it: to all services in turn, through all doors in turn.
    pub(crate) fn start(
        plan: &LoadPlan,
        doors: Vec<Door>,
        services: Vec<String>,
        seed: u64,
        recorder: Arc<Recorder>,
        skew: f64,
    ) -> Self {
        let (stop, stopped) = watch::channel(false);
        let times = Arc::new(AtomicU32::new(1));
        let shared = Arc::new(Shared { plan: plan.clone(), recorder, in_flight: AtomicU64::new(0), skew });
        let schedule = schedule(shared, doors, services, seed, stopped, times.clone());
        Self { stop, task: tokio::spawn(schedule), times }
    }

    /// So many times the plan's rate from now on.
    pub(crate) fn times(&self, times: u32) {
        self.times.store(times.max(1), Relaxed);
    }

    /// No calls from now on, without a word: sabotage.
    pub(crate) fn pause(&self) {
        self.stop.send_replace(true);
    }

    /// No more calls; those under way come to their end.
    pub(crate) async fn stop(self) {
        self.stop.send_replace(true);
        let _ = self.task.await;
    }
}

async fn schedule(
    shared: Arc<Shared>,
    doors: Vec<Door>,
    services: Vec<String>,
    seed: u64,
    mut stopped: watch::Receiver<bool>,
    times: Arc<AtomicU32>,
) {
    let mut rng = StdRng::seed_from_u64(seed ^ 0x10ad);
    let mut calls = JoinSet::new();
    let mut due = Instant::now();
    let (mut second, mut behind) = (due, Duration::ZERO);
    for nonce in 1.. {
        due += Duration::from_secs_f64(1.0 / f64::from(shared.plan.rate * times.load(Relaxed)));
        tokio::select! {
            () = tokio::time::sleep_until(due.into()) => {}
            _ = stopped.changed() => break,
        }
        behind = behind.max(due.elapsed());
        if second.elapsed() > Duration::from_secs(1) {
            shared.recorder.note(Event::Behind { ms: behind.as_secs_f64() * 1e3 });
            (second, behind) = (Instant::now(), Duration::ZERO);
        }
        // Not in step with each other, or a kind of call would know only one door.
        let door = doors[rng.random_range(0..doors.len())].clone();
        let service = match &door.only {
            Some(only) => only.clone(),
            None => services[rng.random_range(0..services.len())].clone(),
        };
        let kind = pick(shared.plan.mix, door.kind, &mut rng);
        let shared = shared.clone();
        calls.spawn(async move { shared.call(nonce, kind, door, service, due).await });
        while calls.try_join_next().is_some() {}
    }
    while calls.join_next().await.is_some() {}
}

fn pick(mix: Mix, door: DoorKind, rng: &mut StdRng) -> CallKind {
    match door {
        DoorKind::UpstreamTcp => return CallKind::Connection,
        DoorKind::UpstreamUdp => return CallKind::Packets,
        _ => {}
    }
    let weights = [
        (CallKind::Get, mix.get),
        (CallKind::Post, mix.post),
        (CallKind::Download, mix.download),
        (CallKind::Upload, mix.upload),
        (CallKind::Stream, mix.stream),
        (CallKind::Talk, if door.has_streams() { mix.talk } else { 0 }),
        (CallKind::Socket, if door.has_sockets() { mix.socket } else { 0 }),
        (CallKind::Counted, if door.is_public() { mix.counted } else { 0 }),
    ];
    let all: u32 = weights.iter().map(|(_, weight)| weight).sum();
    let mut at = rng.random_range(0..all.max(1));
    for (kind, weight) in weights {
        if at < weight {
            return kind;
        }
        at -= weight;
    }
    CallKind::Get
}

impl Shared {
    async fn call(&self, nonce: u64, kind: CallKind, door: Door, service: String, due: Instant) {
        let start = self.recorder.start();
        let mut call = Call {
            nonce,
            kind,
            door: door.kind,
            node: door.node.clone(),
            service,
            due: (due - start).as_secs_f64(),
            ms: 0.0,
            status: 0,
            by: String::new(),
            error: None,
            wrong: false,
        };
        if self.in_flight.fetch_add(1, Relaxed) < MOST_IN_FLIGHT {
            let until = due + self.plan.deadline;
            let made = self.make(&mut call, &door);
            match tokio::time::timeout_at(until.into(), made).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => call.error = Some(format!("{error:#}")),
                Err(_) => call.error = Some("no whole answer by the deadline".into()),
            }
        } else {
            call.error = Some("the client has no room for more".into());
        }
        self.in_flight.fetch_sub(1, Relaxed);
        call.ms = (due.elapsed().as_secs_f64() + self.skew) * 1e3;
        self.recorder.note(Event::Call(call));
    }

    async fn make(&self, call: &mut Call, door: &Door) -> anyhow::Result<()> {
        let (nonce, size) = (call.nonce, self.plan.bulk_bytes);
        let (method, path) = match call.kind {
            CallKind::Get | CallKind::Counted => (Method::GET, format!("/call/{nonce}")),
            CallKind::Post => (Method::POST, format!("/call/{nonce}")),
            CallKind::Download => (Method::GET, format!("/bytes/{nonce}/{size}")),
            CallKind::Stream => (Method::GET, format!("/drip/{nonce}/{size}")),
            CallKind::Upload => (Method::POST, format!("/bytes/{nonce}")),
            CallKind::Talk => return talk(call, door).await,
            CallKind::Socket => return socket(call, door).await,
            CallKind::Connection => return raw::connection(call, door).await,
            CallKind::Packets => return raw::packets(call, door).await,
        };
        let body = match call.kind {
            CallKind::Post => Bytes::from_static(b"once"),
            CallKind::Upload => {
                let mut body = BytesMut::with_capacity(size);
                service::chunks(nonce, size).for_each(|chunk| body.extend_from_slice(&chunk));
                body.freeze()
            }
            _ => Bytes::new(),
        };
        let mut request = Request::builder().method(method).uri(path);
        if call.kind == CallKind::Upload {
            request = request.header(header::CONTENT_LENGTH, size);
        }
        let digest = Mutex::new(Sha256::new());
        let is_bulk = matches!(call.kind, CallKind::Download | CallKind::Stream);
        let mut read = |chunk: &[u8]| {
            if is_bulk {
                digest.lock().unwrap_or_else(|e| e.into_inner()).update(chunk);
            }
        };
        let service = if call.kind == CallKind::Counted { COUNTED } else { &call.service };
        let answer = door.call(service, request.body(body)?, &mut read).await?;
        (call.status, call.by) = (answer.status, served_by(&answer.headers));
        if call.kind == CallKind::Counted && answer.status == 429 {
            return Ok(());
        }
        if answer.status != 200 {
            let start: String = answer.text.chars().take(200).collect();
            bail!("{}: {start}", answer.status);
        }
        let (got, expected) = match call.kind {
            CallKind::Get | CallKind::Post | CallKind::Counted => (answer.text, nonce.to_string()),
            CallKind::Upload => (answer.text, format!("{size} {}", service::digest(nonce, size))),
            _ => {
                let digest = digest.into_inner().unwrap_or_else(|e| e.into_inner());
                let digest = format!("{} {}", answer.bytes, service::hex(&digest.finalize()));
                (digest, format!("{size} {}", service::digest(nonce, size)))
            }
        };
        if got != expected {
            call.wrong = true;
            let start: String = got.chars().take(80).collect();
            bail!("wrong content: {start:?} instead of {expected:?}");
        }
        Ok(())
    }
}

fn served_by(headers: &HeaderMap) -> String {
    headers.get(service::SERVED_BY).and_then(|v| v.to_str().ok()).unwrap_or_default().into()
}

/// A gRPC call: each message is sent when the one before has come back, so that both directions must move; then the status.
async fn talk(call: &mut Call, door: &Door) -> anyhow::Result<()> {
    let head = Request::post(format!("/talk/{}", call.nonce)).header(header::CONTENT_TYPE, service::GRPC);
    let (head, ()) = head.header(header::TE, "trailers").body(())?.into_parts();
    let mut say = None;
    // Made again where a kept connection turns out to be closed.
    let mut body = || {
        let (first, said) = mpsc::channel(1);
        say = Some(first);
        service::Frames(said).boxed_unsync()
    };
    let (head, mut coming) = door.open(&call.service, head, &mut body).await?.into_parts();
    let say = say.context("nothing was said")?;
    (call.status, call.by) = (head.status.as_u16(), served_by(&head.headers));
    let mut status = grpc_status(&head.headers);
    let mut heard = BytesMut::new();
    for turn in 0..TURNS {
        if status.is_some() || call.status != 200 {
            break;
        }
        let message = message(call.nonce, turn);
        say.send(Frame::data(message.clone())).await.context("nobody listens any more")?;
        while heard.len() < message.len() {
            let frame = coming.next().await.context("the answer ends before the last message")??;
            heard.extend(frame.into_data().ok());
        }
        let echo = heard.split();
        if echo != message {
            call.wrong = true;
            bail!("wrong content: {echo:?} instead of {message:?}");
        }
    }
    drop(say);
    while let Some(frame) = coming.next().await {
        if let Ok(trailers) = frame?.into_trailers() {
            status = grpc_status(&trailers).or(status);
        }
    }
    match status {
        Some(status) if status == "0" && call.status == 200 => Ok(()),
        Some(status) => bail!("{}, grpc-status {status}", call.status),
        None => bail!("{}, no grpc-status", call.status),
    }
}

/// A WebSocket: each message is sent when the one before has come back; then both ends close it.
async fn socket(call: &mut Call, door: &Door) -> anyhow::Result<()> {
    let (head, stream) = door.switch(&call.service, &format!("/echo/{}", call.nonce)).await?;
    (call.status, call.by) = (head.status.as_u16(), served_by(&head.headers));
    let Some(mut stream) = stream else { bail!("{} instead of a WebSocket", call.status) };
    for turn in 0..TURNS {
        let message = websocket_frame(BINARY, &message(call.nonce, turn));
        stream.write_all(&message).await?;
        let mut echo = vec![0; message.len()];
        stream.read_exact(&mut echo).await.context("the last message does not come back")?;
        if echo != message {
            call.wrong = true;
            bail!("wrong content: {echo:?} instead of {message:?}");
        }
    }
    let close = websocket_frame(CLOSE, b"");
    stream.write_all(&close).await?;
    stream.shutdown().await?;
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await?;
    if rest != close {
        bail!("closed with {rest:?}");
    }
    Ok(())
}

const BINARY: u8 = 0x82;
const CLOSE: u8 = 0x88;

/// A frame of a WebSocket (RFC 6455 §5.2), which the service says again as it is.
fn websocket_frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![kind, 0x80 | payload.len() as u8, 0, 0, 0, 0];
    frame.extend_from_slice(payload);
    frame
}

/// How a gRPC call ended, and why.
fn grpc_status(headers: &HeaderMap) -> Option<String> {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let status = text(service::GRPC_STATUS)?;
    Some(text(service::GRPC_MESSAGE).map_or(status.into(), |message| format!("{status}: {message}")))
}

/// A gRPC message: not compressed, its length, and what tells it from others.
pub(super) fn message(nonce: u64, turn: u8) -> Bytes {
    let mut message = BytesMut::with_capacity(service::MESSAGE_BYTES);
    message.put_u8(0);
    message.put_u32(9);
    message.put_u64(nonce);
    message.put_u8(turn);
    message.freeze()
}
