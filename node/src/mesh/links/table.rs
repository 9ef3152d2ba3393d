//! The links by peer: which are up, being dialled, or resting after a dial that failed. Pure bookkeeping.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use rand::seq::IteratorRandom;
use starling_gossip::Reach;
use starling_protocol::NodeId;

/// A packet older than this when the handshake is done is stale: a probe's round trip.
const STALE: Duration = Duration::from_millis(150);
/// Packets held for a handshake.
const MAX_HELD: usize = 8;
/// Most links. Above, those that were used for probes alone go first, the longest unused before others.
const MAX_LINKS: usize = 1024;
/// Most dials at a time: in a mesh that falls apart, the rest waits.
const MAX_DIALS: usize = 64;
/// Pause between two rumours over one connection that were meant for somebody else.
const STRAY_PERIOD: Duration = Duration::from_millis(200);
/// Pauses after dials that failed.
const REST_MIN: Duration = Duration::from_millis(250);
const REST_MAX: Duration = Duration::from_secs(5);
/// Two connections that are set up within this time were dialled by both sides at once.
const AT_ONCE: Duration = Duration::from_secs(2);

/// The way to a peer.
#[derive(Clone)]
pub(super) enum Link {
    /// On its way; packets wait for it.
    Dialling { held: Vec<(Instant, Bytes)>, pause: Duration },
    /// There.
    Up {
        connection: quinn::Connection,
        dialled_by: NodeId,
        since: Instant,
        used: Instant,
        /// Whether changes are pushed over it, and not only probes sent.
        eager: bool,
        /// When a rumour last went over it that was meant for somebody else.
        strayed: Option<Instant>,
    },
    /// Not to be dialled for a while: dead peers must not cost the living anything.
    Resting { until: Instant, pause: Duration },
}

/// A link as operators see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LinkView {
    pub(crate) state: &'static str,
    pub(crate) rtt: Option<Duration>,
}

/// What to do with a packet.
pub(super) enum Step {
    Over(quinn::Connection),
    Dial,
    Nothing,
}

/// What follows from a new connection.
#[derive(Default)]
pub(super) struct Adopted {
    /// Packets that waited, and are not stale yet.
    pub(super) held: Vec<Bytes>,
    /// Connections that are to be closed.
    pub(super) losers: Vec<quinn::Connection>,
}

#[derive(Default)]
pub(super) struct Table {
    links: HashMap<NodeId, Link>,
    /// Connections to members that were given up, which are still heard.
    given_up: HashMap<NodeId, quinn::Connection>,
}

impl Table {
    pub(super) fn get(&self, peer: &NodeId) -> Option<Link> {
        self.links.get(peer).cloned()
    }

    /// A connection that is up.
    pub(super) fn up(&mut self, peer: &NodeId, now: Instant) -> Option<quinn::Connection> {
        match self.links.get_mut(peer) {
            Some(Link::Up { connection, used, .. }) if connection.close_reason().is_none() => {
                *used = now;
                Some(connection.clone())
            }
            _ => None,
        }
    }

    /// The same, or one over which a member that was given up is still heard.
    pub(super) fn heard_over(&mut self, peer: &NodeId, now: Instant) -> Option<quinn::Connection> {
        self.up(peer, now).or_else(|| self.given_up.get(peer).filter(|c| c.close_reason().is_none()).cloned())
    }

    /// Decides about a packet, and holds it if its link is being dialled and it is for this peer alone.
    pub(super) fn send(&mut self, to: NodeId, bytes: &Bytes, reach: Reach, now: Instant) -> Step {
        if let Some(connection) = self.up(&to, now) {
            return Step::Over(connection);
        }
        if reach == Reach::Anybody {
            return self.stray(now).map_or(Step::Nothing, Step::Over);
        }
        let pause = match self.links.get_mut(&to) {
            Some(Link::Dialling { held, .. }) => {
                if held.len() < MAX_HELD {
                    held.push((now, bytes.clone()));
                }
                return Step::Nothing;
            }
            Some(Link::Resting { until, .. }) if now < *until => return Step::Nothing,
            _ if reach != Reach::Dial => return Step::Nothing,
            Some(Link::Resting { pause, .. }) => *pause,
            _ => REST_MIN,
        };
        let dialling = |link: &&Link| matches!(link, Link::Dialling { .. });
        if self.links.values().filter(dialling).count() >= MAX_DIALS {
            return Step::Nothing;
        }
        self.links.insert(to, Link::Dialling { held: vec![(now, bytes.clone())], pause });
        if self.links.len() > MAX_LINKS {
            self.forget_resting(&to);
        }
        Step::Dial
    }

    /// A connection for a rumour whose receiver has none. Each gets few of them: in a mesh that has just started, all that
    /// most nodes have is one to a seed.
    fn stray(&mut self, now: Instant) -> Option<quinn::Connection> {
        let rested = self.links.values_mut().filter_map(|link| match link {
            Link::Up { connection, strayed, .. } => {
                let rested = strayed.is_none_or(|at| now.saturating_duration_since(at) >= STRAY_PERIOD);
                (rested && connection.close_reason().is_none()).then_some((connection, strayed))
            }
            _ => None,
        });
        let (connection, strayed) = rested.choose(&mut rand::rng())?;
        *strayed = Some(now);
        Some(connection.clone())
    }

    /// A dial has ended; returns the packets that waited for it. After a failure the peer rests.
    pub(super) fn dialled(&mut self, peer: NodeId, worked: bool, now: Instant) -> Vec<Bytes> {
        let Some(Link::Dialling { held, pause }) = self.links.get(&peer) else { return Vec::new() };
        let (held, pause) = (fresh(held.clone(), now), *pause);
        if worked {
            self.links.remove(&peer);
        } else {
            self.links.insert(peer, Link::Resting { until: now + pause, pause: (pause * 2).min(REST_MAX) });
        }
        held
    }

    /// Makes the connection the one to send over. The newer one is better: the peer may have restarted, and the old one be
    /// dead. Only of two that were dialled by both sides at once, both sides keep the one dialled by the smaller id, or
    /// they would go on replacing each other's.
    pub(super) fn adopt(
        &mut self,
        connection: &quinn::Connection,
        peer: NodeId,
        dialled_by: NodeId,
        now: Instant,
    ) -> Adopted {
        let keep_old = matches!(self.links.get(&peer), Some(Link::Up { connection: old, dialled_by: by, since, .. })
            if old.close_reason().is_none() && *by < dialled_by && now.saturating_duration_since(*since) < AT_ONCE);
        if keep_old {
            return Adopted { losers: vec![connection.clone()], ..Adopted::default() };
        }
        let (connection, strayed) = (connection.clone(), None);
        let new = Link::Up { connection, dialled_by, since: now, used: now, eager: false, strayed };
        let mut adopted = Adopted::default();
        // A new one works both ways: what was left to hear over the other is heard over this one.
        adopted.losers.extend(self.given_up.remove(&peer));
        match self.links.insert(peer, new) {
            Some(Link::Up { connection, .. }) => adopted.losers.push(connection),
            Some(Link::Dialling { held, .. }) => adopted.held = fresh(held, now),
            _ => {}
        }
        adopted.losers.extend(self.make_room(&peer));
        adopted
    }

    /// Forgets the peer that has rested longest.
    fn forget_resting(&mut self, except: &NodeId) {
        let resting = self.links.iter().filter_map(|(id, link)| match link {
            Link::Resting { until, .. } if id != except => Some((*until, *id)),
            _ => None,
        });
        if let Some((_, id)) = resting.min() {
            self.links.remove(&id);
        }
    }

    /// Drops the least useful link if there are too many.
    fn make_room(&mut self, except: &NodeId) -> Option<quinn::Connection> {
        if self.links.len() <= MAX_LINKS {
            return None;
        }
        let rank = |link: &Link| match link {
            Link::Resting { until, .. } => (0, Some(*until)),
            Link::Up { eager: false, used, .. } => (1, Some(*used)),
            Link::Up { used, .. } => (2, Some(*used)),
            Link::Dialling { .. } => (3, None),
        };
        let least = self.links.iter().filter(|(id, _)| *id != except).min_by_key(|(_, link)| rank(link));
        let least = least.map(|(id, _)| *id)?;
        self.remove(&least)
    }

    /// A connection has ended.
    pub(super) fn ended(&mut self, peer: &NodeId, connection: &quinn::Connection) {
        let same = |c: &quinn::Connection| c.stable_id() == connection.stable_id();
        if matches!(self.links.get(peer), Some(Link::Up { connection, .. }) if same(connection)) {
            self.links.remove(peer);
        }
        if self.given_up.get(peer).is_some_and(same) {
            self.given_up.remove(peer);
        }
    }

    /// Sends nothing more over the peer's connection; returns it, to be closed later, if there was one.
    pub(super) fn give_up(&mut self, peer: &NodeId) -> Option<quinn::Connection> {
        let connection = self.remove(peer)?;
        self.given_up.insert(*peer, connection.clone());
        Some(connection)
    }

    /// Forgets the peer; returns its connection if there was one.
    fn remove(&mut self, peer: &NodeId) -> Option<quinn::Connection> {
        match self.links.remove(peer) {
            Some(Link::Up { connection, .. }) => Some(connection),
            _ => None,
        }
    }

    pub(super) fn live(&self) -> Vec<(NodeId, quinn::Connection)> {
        self.connections().map(|(id, connection)| (*id, connection.clone())).collect()
    }

    fn connections(&self) -> impl Iterator<Item = (&NodeId, &quinn::Connection)> {
        self.links.iter().filter_map(|(id, link)| match link {
            Link::Up { connection, .. } if connection.close_reason().is_none() => Some((id, connection)),
            _ => None,
        })
    }

    /// Changes are pushed over that link.
    pub(super) fn used_for_push(&mut self, peer: &NodeId) {
        if let Some(Link::Up { eager, .. }) = self.links.get_mut(peer) {
            *eager = true;
        }
    }

    pub(super) fn views(&self) -> HashMap<NodeId, LinkView> {
        let view = |link: &Link| match link {
            Link::Dialling { .. } => LinkView { state: "dialling", rtt: None },
            Link::Resting { .. } => LinkView { state: "unreachable", rtt: None },
            Link::Up { connection, .. } if connection.close_reason().is_some() => {
                LinkView { state: "closed", rtt: None }
            }
            Link::Up { connection, .. } => LinkView { state: "connected", rtt: Some(connection.rtt()) },
        };
        self.links.iter().map(|(id, link)| (*id, view(link))).collect()
    }
}

fn fresh(held: Vec<(Instant, Bytes)>, now: Instant) -> Vec<Bytes> {
    held.into_iter().filter(|(at, _)| now.saturating_duration_since(*at) < STALE).map(|(_, bytes)| bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: NodeId = NodeId([1; 16]);

    fn dials(table: &mut Table, now: Instant) -> bool {
        matches!(table.send(PEER, &Bytes::from_static(b"ping"), Reach::Dial, now), Step::Dial)
    }

    fn id(n: usize) -> NodeId {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&n.to_be_bytes());
        NodeId(id)
    }

    /// A connection, and what keeps it up: its other end, and the endpoint of both.
    async fn connection() -> (quinn::Connection, impl Sized) {
        let key = rcgen::generate_simple_self_signed(["here".to_owned()]).unwrap();
        let certificate = key.cert.der().clone();
        let private = rustls::pki_types::PrivateKeyDer::try_from(key.signing_key.serialize_der()).unwrap();
        let server = quinn::ServerConfig::with_single_cert(vec![certificate.clone()], private).unwrap();
        let endpoint = quinn::Endpoint::server(server, ([127, 0, 0, 1], 0).into()).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(certificate).unwrap();
        let client = quinn::ClientConfig::with_root_certificates(roots.into()).unwrap();
        let dialling = endpoint.connect_with(client, endpoint.local_addr().unwrap(), "here").unwrap();
        let accepting = async { endpoint.accept().await.unwrap().await.unwrap() };
        let (dialled, accepted) = tokio::join!(dialling, accepting);
        (dialled.unwrap(), (accepted, endpoint))
    }

    #[tokio::test]
    async fn above_the_cap_the_longest_unused_goes_and_links_of_pushes_stay() {
        let (connection, _there) = connection().await;
        let (mut table, start) = (Table::default(), Instant::now());
        let at = |n: usize| start + Duration::from_secs(n as u64);
        for n in 0..MAX_LINKS {
            assert!(table.adopt(&connection, id(n), id(n), at(n)).losers.is_empty());
        }
        table.used_for_push(&id(0));
        assert!(table.up(&id(1), at(MAX_LINKS)).is_some());
        // The oldest carries pushes, the next was used just now: the one after it goes.
        assert_eq!(table.adopt(&connection, id(MAX_LINKS), PEER, at(MAX_LINKS)).losers.len(), 1);
        let there = |table: &Table, n| table.links.contains_key(&id(n));
        assert_eq!([0, 1, 2, 3].map(|n| there(&table, n)), [true, true, false, true]);
    }

    #[tokio::test]
    async fn a_rumour_goes_to_whoever_is_there_and_nothing_else_does() {
        let (connection, _there) = connection().await;
        let (mut table, now) = (Table::default(), Instant::now());
        let step = |table: &mut Table, reach| table.send(PEER, &Bytes::from_static(b"packet"), reach, now);
        assert!(matches!(step(&mut table, Reach::Anybody), Step::Nothing), "there is nobody");
        table.adopt(&connection, id(7), id(7), now);
        assert!(matches!(step(&mut table, Reach::Anybody), Step::Over(_)));
        assert!(matches!(step(&mut table, Reach::Anybody), Step::Nothing), "one at a time");
        assert!(matches!(step(&mut table, Reach::Linked), Step::Nothing));
        assert!(matches!(step(&mut table, Reach::Dial), Step::Dial));
        table.adopt(&connection, id(8), id(8), now);
        assert!(matches!(step(&mut table, Reach::Anybody), Step::Over(_)), "it does not wait for the dial");
    }

    #[tokio::test]
    async fn of_a_peer_that_is_given_up_again_and_again_one_connection_is_heard() {
        let (connection, _there) = connection().await;
        let (mut table, now) = (Table::default(), Instant::now());
        for life in 0..5 {
            assert_eq!(table.adopt(&connection, PEER, PEER, now).losers.len(), usize::from(life > 0));
            assert!(table.give_up(&PEER).is_some());
            assert!(table.up(&PEER, now).is_none() && table.give_up(&PEER).is_none());
        }
        table.ended(&PEER, &connection);
        assert!(table.given_up.is_empty());
    }

    #[test]
    fn a_dead_peer_is_dialled_less_and_less_but_for_ever() {
        let (mut table, start) = (Table::default(), Instant::now());
        let mut dialled = 0;
        for tenth in 0..600 {
            let now = start + Duration::from_millis(100 * tenth);
            if dials(&mut table, now) {
                dialled += 1;
                assert!(!dials(&mut table, now), "one dial at a time");
                table.dialled(PEER, false, now);
            }
        }
        assert!((14..20).contains(&dialled), "{dialled} dials in a minute");
    }

    #[test]
    fn no_probe_waits_for_a_handshake_longer_than_it_is_worth() {
        let (mut table, start) = (Table::default(), Instant::now());
        assert!(dials(&mut table, start));
        (0..20).for_each(|_| assert!(!dials(&mut table, start + STALE)));
        assert_eq!(table.dialled(PEER, true, start + STALE * 3 / 2).len(), MAX_HELD - 1);
    }
}
