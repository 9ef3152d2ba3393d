//! The link model: what becomes of a message, per direction.

use std::{collections::BTreeMap, time::Duration};

use rand::{RngExt, rngs::StdRng};

/// A thing that is wrong with the network or with nodes. Each must have an effect, or the run has shown nothing.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Fault {
    /// Every link loses that share of its packets.
    Loss(f64),
    /// Every packet may arrive twice, with that chance.
    Duplication(f64),
    /// All links of that node lose that share of their packets.
    Lossy(usize, f64),
    /// Nobody hears that node.
    Mute(usize),
    /// That node hears nobody.
    Deaf(usize),
    /// Nodes below the number and the others do not reach each other.
    Split(usize),
    /// Two nodes do not reach each other; all others reach both.
    Cut(usize, usize),
    /// These and all others do not reach each other.
    Apart(Vec<usize>),
    /// Packets from and to that node take so much longer, and up to so much more.
    Slow(usize, Duration, Duration),
}

#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) latency: Duration,
    pub(crate) jitter: Duration,
    faults: Vec<Fault>,
    /// Messages that each fault has touched, by its description.
    pub(crate) fired: BTreeMap<String, u64>,
}

impl Network {
    pub(crate) fn new() -> Self {
        let (faults, fired) = Default::default();
        Self { latency: Duration::from_millis(1), jitter: Duration::from_millis(1), faults, fired }
    }

    pub(crate) fn begin(&mut self, fault: Fault) {
        self.fired.entry(format!("{fault:?}")).or_default();
        self.faults.push(fault);
    }

    pub(crate) fn end(&mut self, fault: &Fault) {
        self.faults.retain(|f| f != fault);
    }

    /// Whether the fault makes a packet of that way get lost, or arrive twice.
    fn touches(fault: &Fault, from: usize, to: usize, rng: &mut StdRng) -> (bool, bool) {
        let chance = |p: f64, rng: &mut StdRng| p > 0.0 && rng.random_bool(p);
        match fault {
            &Fault::Loss(p) => (chance(p, rng), false),
            &Fault::Duplication(p) => (false, chance(p, rng)),
            &Fault::Lossy(node, p) => ((from == node || to == node) && chance(p, rng), false),
            &Fault::Mute(node) => (from == node, false),
            &Fault::Deaf(node) => (to == node, false),
            &Fault::Split(first) => ((from < first) != (to < first), false),
            &Fault::Cut(a, b) => ((from, to) == (a, b) || (from, to) == (b, a), false),
            Fault::Apart(side) => (side.contains(&from) != side.contains(&to), false),
            Fault::Slow(..) => (false, false),
        }
    }

    /// Whether an acknowledgement arrives. It is no message that a fault could count.
    pub(crate) fn acknowledges(&self, from: usize, to: usize, rng: &mut StdRng) -> bool {
        self.faults.iter().all(|fault| !Self::touches(fault, from, to, rng).0)
    }

    /// Delays after which a packet arrives: none if it is lost, several if it is duplicated.
    pub(crate) fn datagram(&mut self, from: usize, to: usize, rng: &mut StdRng) -> Vec<Duration> {
        let later = self.later(from, to, rng);
        let mut arrivals = vec![self.delay(rng) + later];
        for at in 0..self.faults.len() {
            let (lost, twice) = Self::touches(&self.faults[at], from, to, rng);
            if lost || twice {
                *self.fired.entry(format!("{:?}", self.faults[at])).or_default() += 1;
            }
            if lost {
                return Vec::new();
            }
            if twice {
                arrivals.push(self.delay(rng) + later);
            }
        }
        arrivals
    }

    /// Delay of a message on a stream, which is sent again until it arrives, as QUIC does (RFC 9002 §6.2); `None` if even
    /// the last attempt is lost. It arrives without an acknowledgement, too: it fits into the first window.
    pub(crate) fn stream(&mut self, from: usize, to: usize, rng: &mut StdRng) -> Option<Duration> {
        let mut waited = Duration::ZERO;
        for attempt in 0..6u32 {
            if let Some(there) = self.datagram(from, to, rng).first() {
                return Some(waited + *there);
            }
            waited += Duration::from_millis(50) * 2u32.pow(attempt);
        }
        None
    }

    /// How much longer a packet of that way takes.
    fn later(&mut self, from: usize, to: usize, rng: &mut StdRng) -> Duration {
        let mut later = Duration::ZERO;
        for fault in &self.faults {
            if let Fault::Slow(node, by, jitter) = fault
                && (*node == from || *node == to)
            {
                later += *by + jitter.mul_f64(rng.random_range(0.0..1.0));
                *self.fired.entry(format!("{fault:?}")).or_default() += 1;
            }
        }
        later
    }

    fn delay(&self, rng: &mut StdRng) -> Duration {
        self.latency + self.jitter.mul_f64(rng.random_range(0.0..1.0))
    }
}
