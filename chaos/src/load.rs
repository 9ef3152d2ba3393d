//! Load, open loop: calls are due at a steady rate, whatever becomes of them.

mod calls;
mod door;
mod raw;

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::Request;
use tokio::{sync::watch, task::JoinSet};

pub(crate) use self::{calls::Calls, door::Door};
use crate::{plan::DoorKind, stage::Place};

/// A call that has no answer by then has failed.
const DEADLINE: Duration = Duration::from_secs(60);

/// What a load came to.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// Calls answered with a status below 500.
    pub good: usize,
    /// Everything else, with why.
    pub failed: Vec<String>,
    /// The slowest good call, from when it was due.
    pub slowest: Duration,
}

/// `GET /` to a service through an outbound listener, HTTP/1.1, at a steady rate, until it is stopped.
#[derive(Debug)]
pub struct Load {
    stop: watch::Sender<bool>,
    schedule: tokio::task::JoinHandle<()>,
    tally: Arc<Mutex<Tally>>,
}

impl Load {
    /// Starts so many calls a second to `service` through `outbound`.
    pub fn start(outbound: SocketAddr, service: &str, rate: u32) -> Self {
        let (stop, mut stopped) = watch::channel(false);
        let tally = Arc::<Mutex<Tally>>::default();
        let door = Door::new(DoorKind::OutboundHttp1, "", outbound, Place::Host);
        let (service, tallied) = (service.to_string(), tally.clone());
        let schedule = tokio::spawn(async move {
            let mut calls = JoinSet::new();
            let mut due = Instant::now();
            loop {
                due += Duration::from_secs(1) / rate;
                tokio::select! {
                    () = tokio::time::sleep_until(due.into()) => {}
                    _ = stopped.changed() => break,
                }
                calls.spawn(call(door.clone(), service.clone(), due, tallied.clone()));
                while calls.try_join_next().is_some() {}
            }
            while calls.join_next().await.is_some() {}
        });
        Self { stop, schedule, tally }
    }

    /// Calls answered so far.
    pub fn good(&self) -> usize {
        self.tally.lock().unwrap_or_else(|e| e.into_inner()).good
    }

    /// Lets calls under way finish and counts up.
    pub async fn stop(self) -> Tally {
        self.stop.send_replace(true);
        let _ = self.schedule.await;
        self.tally.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

async fn call(door: Door, service: String, due: Instant, tally: Arc<Mutex<Tally>>) {
    let made = async {
        let answer = door.call(&service, Request::builder().uri("/").body(Bytes::new())?, &mut |_| {}).await?;
        if answer.status >= 500 {
            anyhow::bail!("{}: {}", answer.status, answer.text);
        }
        anyhow::Ok(())
    };
    let outcome = tokio::time::timeout_at((due + DEADLINE).into(), made).await;
    let mut tally = tally.lock().unwrap_or_else(|e| e.into_inner());
    match outcome {
        Ok(Ok(())) => {
            tally.good += 1;
            tally.slowest = tally.slowest.max(due.elapsed());
        }
        Ok(Err(error)) => tally.failed.push(format!("{error:#}")),
        Err(_) => tally.failed.push(format!("no whole answer within {DEADLINE:?}")),
    }
}
