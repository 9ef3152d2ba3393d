//! Clients that open a call at a door and never move on.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use anyhow::{Context, Result};
use http::{Request, header};
use http_body_util::{BodyExt, Empty};
use hyper::body::Frame;
use tokio::{io::AsyncWriteExt, sync::mpsc, task::JoinSet};

use super::NONCES;
use crate::{
    load::Door,
    plan::DoorKind,
    run::mesh::{Mesh, Node},
    service::Frames,
};

/// What they want to read, in bytes: more than anybody keeps for them.
const DOWNLOAD_BYTES: usize = 32 << 20;

/// All of them; they go when it is dropped.
pub(crate) struct Crowd {
    wanted: usize,
    standing: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

/// How one of them does not move.
#[derive(Clone, Copy)]
enum Manner {
    /// Its head has no end; where heads are frames, its body has none.
    HalfAHead,
    HalfABody,
    ReadsNothing,
    /// Once, and then no more.
    ReadsALittle,
}

const MANNERS: [Manner; 4] = [Manner::HalfAHead, Manner::HalfABody, Manner::ReadsNothing, Manner::ReadsALittle];

impl Crowd {
    /// Sends them to the victims' doors, by every protocol that those speak and in every manner.
    pub(super) fn gather(mesh: &Mesh, victims: &[usize], clients: usize) -> Result<Self> {
        let mut tasks = JoinSet::new();
        let standing = Arc::new(AtomicUsize::new(0));
        let service = mesh.nodes.iter().flat_map(|node| &node.services).next().context("no service")?.service.clone();
        for client in 0..clients {
            let node = &mesh.nodes[victims[client % victims.len()]];
            let round = client / victims.len();
            let door = door(mesh, node, round / MANNERS.len())?;
            let manner = MANNERS[round % MANNERS.len()];
            let (service, standing) = (service.clone(), standing.clone());
            tasks.spawn(async move {
                standing.fetch_add(1, Relaxed);
                // It ends only when it is sent away.
                let _ = stand(&door, &service, client, manner).await;
                standing.fetch_sub(1, Relaxed);
            });
        }
        Ok(Self { wanted: clients, standing, _tasks: tasks })
    }

    /// How many stand there now.
    pub(super) fn stands(&self) -> Result<String, String> {
        match self.standing.load(Relaxed) {
            0 => Err(format!("none of {} clients got in", self.wanted)),
            standing => Ok(format!("{standing} of {} clients stand there", self.wanted)),
        }
    }
}

/// One of a node's doors, with connections of its own.
fn door(mesh: &Mesh, node: &Node, number: usize) -> Result<Door> {
    match &node.public {
        Some((addr, key)) => {
            let kinds = [DoorKind::EdgeHttp1, DoorKind::EdgeHttp2, DoorKind::EdgeHttp3];
            let clients = mesh.stage.place(mesh.nodes.len());
            mesh.public_door(kinds[number % kinds.len()], &node.name, *addr, key, &clients)
        }
        None => {
            let kinds = [DoorKind::OutboundHttp1, DoorKind::OutboundHttp2];
            Ok(Door::new(kinds[number % kinds.len()], &node.name, node.outbound, node.place.clone()))
        }
    }
}

async fn stand(door: &Door, service: &str, client: usize, manner: Manner) -> Result<()> {
    let number = NONCES + client as u64;
    let is_http1 = matches!(door.kind, DoorKind::OutboundHttp1 | DoorKind::EdgeHttp1);
    match manner {
        Manner::HalfAHead if is_http1 => {
            let host = door.host.clone().unwrap_or(format!("{service}.mesh.internal"));
            let mut stream = door.connect(&host, b"http/1.1").await?;
            stream.write_all(format!("GET /call/{number} HTTP/1.1\r\nhost: {host}\r\nx-never").as_bytes()).await?;
            std::future::pending().await
        }
        Manner::HalfAHead | Manner::HalfABody => {
            let (send, body) = mpsc::channel(1);
            send.send(Frame::data("only so".into())).await?;
            let mut body = Some(Frames(body).boxed_unsync());
            let head = Request::post(format!("/bytes/{number}")).header(header::CONTENT_LENGTH, 1000);
            let (head, ()) = head.body(())?.into_parts();
            door.open(service, head, &mut || body.take().unwrap_or_else(|| Empty::new().boxed_unsync())).await?;
            Ok(())
        }
        Manner::ReadsNothing | Manner::ReadsALittle => {
            let (head, ()) = Request::get(format!("/bytes/{number}/{DOWNLOAD_BYTES}")).body(())?.into_parts();
            let (_, mut coming) = door.open(service, head, &mut || Empty::new().boxed_unsync()).await?.into_parts();
            if matches!(manner, Manner::ReadsALittle) {
                let _ = coming.next().await;
            }
            std::future::pending().await
        }
    }
}
