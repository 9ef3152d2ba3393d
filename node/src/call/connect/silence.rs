//! A peer that answers no more.

use std::{
    sync::{Arc, Weak, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use super::{Connection, State};
use crate::call::choose::Reach;

/// How often a connection with calls in flight is looked at.
const WATCH_PERIOD: Duration = Duration::from_millis(50);
/// Silence that is taken for death: QUIC acknowledges within 25 ms (RFC 9000 §13.2.1), so nothing for this long, and for
/// three round trips, while probes go out, means that nobody is there.
const SILENCE: Duration = Duration::from_millis(300);
/// Packets that must have gone unanswered, so that one loss is not a silence.
const UNANSWERED: u64 = 3;

/// Notices within a few hundred milliseconds that a peer has died or hangs, long before gossip can say so: calls that may
/// be repeated then go elsewhere.
pub(super) async fn watch_for_silence(of: Weak<State>, peer: Arc<Reach>) {
    let Some((connection, busy)) = of.upgrade().map(|state| (state.client.connection().clone(), state.busy.clone()))
    else {
        return;
    };
    loop {
        tokio::select! {
            () = busy.notified() => {}
            _ = connection.closed() => return,
        }
        let mut heard = connection.stats().udp_rx.datagrams;
        let mut sent_then = connection.stats().udp_tx.datagrams;
        let mut since: Option<Instant> = None;
        let has_calls = || of.upgrade().is_some_and(|state| state.calls.load(Relaxed) > 0);
        while has_calls() && connection.close_reason().is_none() {
            let slept = Instant::now();
            tokio::time::sleep(WATCH_PERIOD).await;
            let stats = connection.stats();
            let sent = stats.udp_tx.datagrams;
            if stats.udp_rx.datagrams != heard || slept.elapsed() > WATCH_PERIOD * 3 {
                // Heard something; or this thread itself was stalled, and says nothing about the peer.
                (heard, sent_then, since) = (stats.udp_rx.datagrams, sent, None);
            } else if sent > sent_then {
                let quiet = since.get_or_insert(slept).elapsed();
                if quiet > SILENCE.max(connection.rtt() * 3) && sent >= sent_then + UNANSWERED {
                    tracing::debug!(peer = %connection.remote_address(), ?quiet, "peer is silent");
                    peer.unreachable();
                    if let Some(state) = of.upgrade() {
                        let connection = Connection(state);
                        connection.retire();
                        connection.0.silent.cancel();
                    }
                    return;
                }
            }
        }
    }
}
