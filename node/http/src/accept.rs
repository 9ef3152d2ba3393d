//! Accepting connections: one loop for TCP, one for QUIC, with room for so many and no more.

use std::{
    collections::HashMap,
    future::{Future, poll_fn},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use tokio::{net::TcpListener, sync::Semaphore};

use crate::{Drain, tcp::Socket};

/// How long a handshake may take, of TLS or QUIC.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after a failed accept: out of descriptors, most likely, and some have to come back first.
const PAUSE: Duration = Duration::from_millis(100);
/// How often it is told that connections are not taken.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// How many connections a TCP listener takes.
#[derive(Debug, Clone, Copy)]
pub struct TcpRoom {
    /// At most; more wait in the backlog.
    pub connections: usize,
    /// Of one address at most; more are closed.
    pub of_one: usize,
}

impl TcpRoom {
    /// Its places, to be shared by all who accept at one address.
    pub fn places(self) -> TcpPlaces {
        let most = self.connections.min(descriptors() / DESCRIPTORS_OF_ONE);
        let (free, sources) = (Arc::new(Semaphore::new(most)), Sources::default());
        TcpPlaces { free, sources, of_one: self.of_one, carriers: Arc::new(|_| false) }
    }
}

/// Places for the connections to one address. Cheap to clone; every clone gives the same.
#[derive(Clone)]
pub struct TcpPlaces {
    free: Arc<Semaphore>,
    sources: Sources,
    of_one: usize,
    carriers: Arc<dyn Fn(IpAddr) -> bool + Send + Sync>,
}

impl TcpPlaces {
    /// Does not count connections by these addresses, which carry those of others: whoever serves them asks
    /// [`TcpPlaces::of_one`] for a place as soon as it is told whose they are.
    #[must_use]
    pub fn carried_by(self, carriers: impl Fn(IpAddr) -> bool + Send + Sync + 'static) -> Self {
        Self { carriers: Arc::new(carriers), ..self }
    }

    /// A place for one more connection of an address, if it has not as many as it may.
    pub fn of_one(&self, from: IpAddr) -> Option<Place> {
        self.sources.enter(from, self.of_one)
    }
}

/// Of a process's file descriptors, each listener's connections take one in so many at most: each leads to another one, and
/// some are needed to dial peers, and to be asked what is the matter.
const DESCRIPTORS_OF_ONE: usize = 3;

fn descriptors() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    limit.and_then(|limit| limit.try_into().ok()).unwrap_or(usize::MAX)
}

/// Accepts connections until the drain, as many as there is room for. Each is served by a task that the drain waits for.
/// Addresses are told with it.
pub async fn tcp<S, F>(listener: TcpListener, places: TcpPlaces, drain: Drain, serve: S)
where
    S: Fn(Socket, SocketAddr) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let (mut failed, mut full) = (Seldom::default(), Seldom::default());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = drain.draining() => return,
        };
        // Behind it: an acceptor to whom nobody comes must not hold a place that another one needs.
        let place = tokio::select! {
            place = places.free.clone().acquire_owned() => place,
            () = drain.closing() => return,
        };
        match accepted {
            Ok((stream, from)) => {
                // Whoever has as many as he may have is not let in, rather than all others.
                let is_carrier = (places.carriers)(from.ip());
                let one_of = if is_carrier { None } else { places.of_one(from.ip()) };
                if one_of.is_none() && !is_carrier {
                    if full.may_speak() {
                        tracing::warn!(from = %source_of(from.ip()), most = places.of_one, "an address has as many connections as it may");
                    }
                    continue;
                }
                let served = serve(Socket::new(stream), from);
                drain.spawn(async move {
                    served.await;
                    drop((place, one_of));
                });
            }
            Err(error) => {
                if failed.may_speak() {
                    tracing::warn!(%error, "cannot accept connections; trying again");
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// What is to be said once in a while, however often it happens.
#[derive(Debug, Default)]
pub struct Seldom(Option<Instant>);

impl Seldom {
    /// Whether it may be said now: then it is not said again for a minute.
    pub fn may_speak(&mut self) -> bool {
        let may = self.0.is_none_or(|at| at.elapsed() > SAY_EVERY);
        if may {
            self.0 = Some(Instant::now());
        }
        may
    }
}

/// How many connections a QUIC endpoint takes.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// At most; more are refused.
    pub connections: usize,
    /// Above so many, a peer must prove its address first (RFC 9000 §8.1.2).
    pub unproven: usize,
    /// The same, of handshakes under way.
    pub unproven_handshakes: usize,
    /// Handshakes under way of one address; more are refused.
    pub handshakes_of_one: usize,
    /// Connections of one address; more are closed.
    pub of_one: usize,
}

impl Room {
    /// The share of one of so many endpoints on a port. Clients choose whose it is, so that each is held to its own.
    #[must_use]
    pub fn shared_by(self, endpoints: usize) -> Self {
        let share = |all: usize| all.div_ceil(endpoints.max(1));
        Self {
            connections: share(self.connections),
            unproven: share(self.unproven),
            unproven_handshakes: share(self.unproven_handshakes),
            handshakes_of_one: share(self.handshakes_of_one),
            of_one: share(self.of_one),
        }
    }

    /// Lets a connection attempt in, or refuses it, or asks it to prove its address; `None` if it is dealt with.
    fn admit(
        self,
        endpoint: &quinn::Endpoint,
        incoming: quinn::Incoming,
        handshakes: &Sources,
        lets_in: impl Fn(IpAddr, bool) -> bool,
    ) -> Option<(quinn::Incoming, Place)> {
        let open = endpoint.open_connections();
        let from = incoming.remote_address().ip();
        let is_proven = incoming.remote_address_validated() || !incoming.may_retry();
        let place = handshakes.enter(from, self.handshakes_of_one).filter(|_| open < self.connections);
        let is_let_in = place.is_some() && lets_in(from, is_proven);
        let Some(place) = place.filter(|_| is_let_in || !is_proven) else {
            incoming.refuse();
            return None;
        };
        let must_prove = !is_let_in || open >= self.unproven || handshakes.total() > self.unproven_handshakes;
        if must_prove && !is_proven {
            // It may have been answered already; then it is gone, as it would be.
            let _ = incoming.retry();
            return None;
        }
        Some((incoming, place))
    }
}

/// Counts what is there by where it comes from. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Sources(Arc<Mutex<HashMap<IpAddr, usize>>>);

impl Sources {
    /// A place for one more from that address, or, in IPv6, from its /64, if there are fewer than so many.
    pub fn enter(&self, from: IpAddr, most: usize) -> Option<Place> {
        let source = source_of(from);
        let mut counts = self.lock();
        let count = counts.entry(source).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Place { sources: self.clone(), source })
    }

    /// All that are there.
    pub fn total(&self) -> usize {
        self.lock().values().sum()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        lock(&self.0)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// A place; given back when dropped.
#[derive(Debug)]
pub struct Place {
    sources: Sources,
    source: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.sources.lock();
        if let Some(count) = counts.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.source);
            }
        }
    }
}

/// Whom an address stands for: who holds one address of a /64 holds them all.
pub fn source_of(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V4(v4) => v4.into(),
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
    }
}

/// Accepts connections until the endpoint closes or the future is dropped. Each is served by a task of its own, which
/// outlives that. The drain waits for handshakes; from its first step on, what `serve` gives has to see to that by itself.
///
/// `lets_in` is asked about each address before its handshake, and told whether it is proven; one that is not, and is not let in, is
/// asked to prove it. What anybody does in somebody's name should cost that one nothing.
pub async fn quic<L, S, F>(endpoint: quinn::Endpoint, room: Room, drain: Drain, lets_in: L, serve: S)
where
    L: Fn(IpAddr, bool) -> bool,
    S: Fn(quinn::Connection) -> F + Clone + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let (handshakes, connected) = (Sources::default(), Sources::default());
    let full = Arc::new(Mutex::new(Seldom::default()));
    while let Some(incoming) = endpoint.accept().await {
        let Some((incoming, place)) = room.admit(&endpoint, incoming, &handshakes, &lets_in) else { continue };
        let (serve, connected, full) = (serve.clone(), connected.clone(), full.clone());
        let mut busy = Some(drain.hold());
        tokio::spawn(async move {
            let shaken = tokio::time::timeout(HANDSHAKE_TIMEOUT, incoming).await;
            drop(place);
            match shaken {
                Ok(Ok(connection)) => match connected.enter(connection.remote_address().ip(), room.of_one) {
                    Some(_place) => {
                        let mut serving = pin!(serve(connection));
                        poll_fn(|cx| {
                            let served = serving.as_mut().poll(cx);
                            busy.take();
                            served
                        })
                        .await;
                    }
                    None => {
                        if lock(&full).may_speak() {
                            let from = source_of(connection.remote_address().ip());
                            tracing::warn!(%from, most = room.of_one, "an address has as many connections as it may");
                        }
                        connection.close(0u32.into(), b"too many connections");
                    }
                },
                Ok(Err(error)) => tracing::debug!(%error, "handshake"),
                Err(_) => tracing::debug!("handshake timed out"),
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_counted_by_address_and_given_back() {
        let sources = Sources::default();
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let one = sources.enter(ip("10.0.0.1"), 2).unwrap();
        let _mapped = sources.enter(ip("::ffff:10.0.0.1"), 2).unwrap();
        assert!(sources.enter(ip("10.0.0.1"), 2).is_none());
        let _other = sources.enter(ip("2001:db8::1"), 1).unwrap();
        assert!(sources.enter(ip("2001:db8::2"), 1).is_none(), "of the same /64");
        assert!(sources.enter(ip("2001:db8:0:1::2"), 1).is_some());
        assert_eq!(sources.total(), 3);
        drop(one);
        assert!(sources.enter(ip("10.0.0.1"), 2).is_some());
    }
}
