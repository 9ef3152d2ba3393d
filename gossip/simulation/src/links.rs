//! Who has a connection to whom, as the links of a node keep them. Each side has its own end: it can have given it up, or its
//! process be dead, while the other still sends.
//!
//! The constants here and in `world` are those of `node`'s links, which this crate cannot name.
//!
//! Not modelled: the idle timeout, the cap on links, how often a peer that cannot be reached is dialled beyond one try every
//! few seconds, and that after an outage QUIC sends again only at its next probe timeout.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use rand::{Rng, seq::IteratorRandom};

/// Pause between two rumours over one connection that were meant for somebody else.
const STRAY_PERIOD: Duration = Duration::from_millis(200);
/// Bytes that QUIC sends without hearing that they arrive: its initial window (RFC 9002 §7.2).
const WINDOW: usize = 12_000;
/// How long a dial that nobody answers takes, and the rest after it.
const DIAL_FAILS: Duration = Duration::from_millis(5250);

/// One side's end of a connection.
#[derive(Debug)]
struct End {
    /// Of the connection; the other end has the same.
    number: u64,
    dialled_here: bool,
    /// Nothing is sent over it any more.
    given_up: bool,
    /// The process that had dialled it is dead, so that nobody says that it is of no use.
    orphan: bool,
    strayed: Option<Duration>,
    /// Bytes sent since the other side was last heard.
    unheard: usize,
}

/// What becomes of something that is sent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// It goes over the connection.
    Open,
    /// There is none.
    None,
    /// Nobody is at the other end; its process, if there is one, says so.
    Dead,
    /// Nobody is, and nobody says so.
    Orphan,
}

/// The ends of all nodes, by node and peer.
#[derive(Debug)]
pub(crate) struct Links {
    of: Vec<BTreeMap<usize, End>>,
    opened: u64,
    /// Until when peers are not dialled again for a packet, by node and peer.
    resting: HashMap<(usize, usize), Duration>,
}

impl Links {
    pub(crate) fn new(nodes: usize) -> Self {
        let of = (0..nodes).map(|_| BTreeMap::new()).collect();
        Self { of, opened: 0, resting: HashMap::new() }
    }

    /// Peers that the node sends to.
    pub(crate) fn of(&self, node: usize) -> impl Iterator<Item = usize> {
        self.of[node].iter().filter(|(_, end)| !end.given_up).map(|(peer, _)| *peer)
    }

    pub(crate) fn has(&self, node: usize, peer: usize) -> bool {
        self.of[node].get(&peer).is_some_and(|end| !end.given_up)
    }

    pub(crate) fn way(&self, node: usize, peer: usize) -> Way {
        let Some(end) = self.of[node].get(&peer).filter(|end| !end.given_up) else { return Way::None };
        match self.of[peer].get(&node).is_some_and(|other| other.number == end.number) {
            true => Way::Open,
            false if end.orphan => Way::Orphan,
            false => Way::Dead,
        }
    }

    /// Whether that much more may be sent; `acknowledged` is whether the other side is heard.
    pub(crate) fn may_send(&mut self, node: usize, peer: usize, bytes: usize, acknowledged: bool) -> bool {
        let Some(end) = self.of[node].get_mut(&peer) else { return false };
        end.unheard = if acknowledged { 0 } else { end.unheard + bytes };
        end.unheard <= WINDOW
    }

    /// A peer for a rumour that was meant for somebody to whom there is no connection.
    pub(crate) fn stray(&mut self, node: usize, now: Duration, rng: &mut impl Rng) -> Option<usize> {
        let rested = |end: &End| !end.given_up && end.strayed.is_none_or(|at| now - at >= STRAY_PERIOD);
        let (peer, end) = self.of[node].iter_mut().filter(|(_, end)| rested(end)).choose(rng)?;
        end.strayed = Some(now);
        Some(*peer)
    }

    /// Whether a packet may be the cause of a dial.
    pub(crate) fn may_dial(&self, node: usize, peer: usize, now: Duration) -> bool {
        self.resting.get(&(node, peer)).is_none_or(|until| now >= *until)
    }

    pub(crate) fn dial_failed(&mut self, node: usize, peer: usize, now: Duration) {
        self.resting.insert((node, peer), now + DIAL_FAILS);
    }

    /// A new connection takes the place of whatever either had.
    pub(crate) fn open(&mut self, node: usize, peer: usize) {
        self.opened += 1;
        let end = |dialled_here| End {
            number: self.opened,
            dialled_here,
            given_up: false,
            orphan: false,
            strayed: None,
            unheard: 0,
        };
        let (dialled, accepted) = (end(true), end(false));
        self.of[node].insert(peer, dialled);
        self.of[peer].insert(node, accepted);
        self.resting.remove(&(node, peer));
        self.resting.remove(&(peer, node));
    }

    /// The node sends no more over its end, and gets the number of it to [close](Links::close) it later.
    pub(crate) fn give_up(&mut self, node: usize, peer: usize) -> Option<u64> {
        let end = self.of[node].get_mut(&peer).filter(|end| !end.given_up)?;
        end.given_up = true;
        Some(end.number)
    }

    /// The number of the node's end if nobody will ever say that it is of no use.
    pub(crate) fn orphan(&self, node: usize, peer: usize) -> Option<u64> {
        self.of[node].get(&peer).filter(|end| end.orphan).map(|end| end.number)
    }

    /// The node's end is gone, if it is still that one.
    pub(crate) fn close(&mut self, node: usize, peer: usize, number: u64) {
        if self.of[node].get(&peer).is_some_and(|end| end.number == number) {
            self.of[node].remove(&peer);
        }
    }

    /// The node was told that nobody is at the other end.
    pub(crate) fn is_reset(&mut self, node: usize, peer: usize) {
        self.of[node].remove(&peer);
    }

    /// The node's process is dead. Whoever has its port next resets what was dialled to it, and knows nothing of what it
    /// had dialled itself.
    pub(crate) fn die(&mut self, node: usize) {
        for (peer, end) in std::mem::take(&mut self.of[node]) {
            if let Some(other) = self.of[peer].get_mut(&node).filter(|other| other.number == end.number) {
                other.orphan = end.dialled_here;
            }
        }
    }
}
