use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, sync::watch, task::JoinSet};

/// What a load came to.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// Calls answered with a status below 500.
    pub good: usize,
    /// Everything else, with why.
    pub failed: Vec<String>,
    /// The slowest good call.
    pub slowest: Duration,
}

/// GET after GET on kept connections to a plain door, until it is stopped.
#[derive(Debug)]
pub struct Load {
    stop: watch::Sender<bool>,
    workers: JoinSet<()>,
    tally: Arc<Mutex<Tally>>,
}

impl Load {
    /// Starts `connections` loops of calls to `http://host/` through `door`, with a short pause between calls.
    pub fn start(door: SocketAddr, host: &str, connections: usize) -> Self {
        let (stop, stopped) = watch::channel(false);
        let tally = Arc::<Mutex<Tally>>::default();
        let mut workers = JoinSet::new();
        for _ in 0..connections {
            let (host, stopped, tally) = (host.to_string(), stopped.clone(), tally.clone());
            workers.spawn(async move {
                while !*stopped.borrow() {
                    if let Err(why) = calls(door, &host, &stopped, &tally).await {
                        tally.lock().unwrap_or_else(|e| e.into_inner()).failed.push(why);
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                }
            });
        }
        Self { stop, workers, tally }
    }

    /// Calls answered so far.
    pub fn good(&self) -> usize {
        self.tally.lock().unwrap_or_else(|e| e.into_inner()).good
    }

    /// Lets calls under way finish and counts up.
    pub async fn stop(mut self) -> Tally {
        self.stop.send_replace(true);
        while self.workers.join_next().await.is_some() {}
        self.tally.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

async fn calls(
    door: SocketAddr,
    host: &str,
    stopped: &watch::Receiver<bool>,
    tally: &Mutex<Tally>,
) -> Result<(), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let stream = TcpStream::connect(door).await.map_err(|e| text(&e))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| text(&e))?;
    tokio::spawn(connection);
    while !*stopped.borrow() {
        let begun = Instant::now();
        let request = Request::builder().uri("/").header(header::HOST, host).body(Empty::<Bytes>::new());
        let response = sender.send_request(request.map_err(|e| text(&e))?).await.map_err(|e| text(&e))?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(|e| text(&e))?.to_bytes();
        if status.is_server_error() {
            return Err(format!("{status}: {}", String::from_utf8_lossy(&body)));
        }
        {
            let mut tally = tally.lock().unwrap_or_else(|e| e.into_inner());
            tally.good += 1;
            tally.slowest = tally.slowest.max(begun.elapsed());
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}
