//! A node that the mesh has declared dead, and when it may come back.
//!
//! It could come back at once, and a node with a bad link would go up and down for as long as the link is bad. So it first
//! shows itself that it can be heard: it pings members and counts what comes back.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use starling_protocol::NodeId;

use crate::Ident;

/// Pause between two pings.
const PING_PERIOD: Duration = Duration::from_millis(150);
/// Pings that are judged together.
const WINDOW: usize = 8;
/// Answers among them that make a good link, and that are too few for one.
const GOOD: usize = 5;
const BAD: usize = 2;
/// How long the link of a node that was caught flapping must have been good; doubles each time.
const HOLD: Duration = Duration::from_secs(30);
const MAX_HOLD: Duration = Duration::from_secs(300);
/// A node that is lost again within this time after it came back is flapping.
const RELAPSE: Duration = Duration::from_secs(30);
/// A node that stayed this long is forgiven.
const FORGIVEN: Duration = Duration::from_secs(600);
/// Being heard for this long without hearing is a link that works one way.
const DEAF: Duration = Duration::from_secs(3);
/// Members that must say so.
const DEAF_WITNESSES: usize = 2;

/// Hearing nobody for this long may be why a node was given up, if it learns of that within that time afterwards.
const SILENCE: Duration = Duration::from_secs(3);
const LEARNS_WITHIN: Duration = Duration::from_secs(10);
/// Probes in a row that nobody answers, directly or through others, that make this node's own link a bad one.
const UNANSWERED: u32 = 5;
/// Pings that are this late mean that the process did not run.
const STOPPED: Duration = Duration::from_secs(1);

/// What a node remembers of being given up.
#[derive(Debug, Default)]
pub(crate) struct Recovery {
    lost: Option<Lost>,
    /// When anybody who is not thought dead last sent a packet.
    heard_at: Option<Instant>,
    /// The last time in which nobody did.
    silence: Option<Silence>,
    /// Probes in a row that brought no answer, and when there last were many.
    unanswered: u32,
    unheard_at: Option<Instant>,
    back_since: Option<Instant>,
    flaps: u32,
}

#[derive(Debug)]
struct Silence {
    /// `None` if nobody had ever been heard.
    start: Option<Instant>,
    end: Instant,
}

#[derive(Debug)]
struct Lost {
    next_ping: Instant,
    waiting: VecDeque<(Instant, Ident)>,
    /// Who was asked, and whether they answered.
    answers: VecDeque<(NodeId, bool)>,
    good_since: Option<Instant>,
    asked_why: Vec<NodeId>,
    /// Who says that it heard this node all the time.
    deaf_by: Vec<NodeId>,
    flapping: bool,
}

impl Recovery {
    /// Whether this node is given up at present.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.is_some()
    }

    /// The mesh has given this node up.
    pub(crate) fn lose(&mut self, now: Instant) {
        if self.lost.is_some() {
            return;
        }
        let cut_off = self.cut_off_since(now);
        let gone = cut_off.unwrap_or(now);
        let stayed = self.back_since.map(|back| gone.saturating_duration_since(back));
        if stayed.is_some_and(|stayed| stayed > FORGIVEN) {
            self.flaps = 0;
        }
        self.lost = Some(Lost {
            next_ping: now,
            waiting: VecDeque::new(),
            answers: VecDeque::new(),
            good_since: None,
            asked_why: Vec::new(),
            deaf_by: Vec::new(),
            flapping: false,
        });
        // That others say so is no sign of a bad link; that nobody was heard, or heard this node, is one.
        if (cut_off.is_some() || self.is_unheard(now)) && stayed.is_some_and(|stayed| stayed < RELAPSE) {
            self.caught_flapping("it was lost soon after it had come back");
        }
    }

    /// Since when this node was cut off, if it was until of late. It may hear of it over a stream, before any packet comes.
    fn cut_off_since(&self, now: Instant) -> Option<Instant> {
        let since = |at| now.saturating_duration_since(at);
        let still = self.heard_at.filter(|at| since(*at) > SILENCE);
        let ended = self.silence.as_ref().filter(|silence| since(silence.end) < LEARNS_WITHIN);
        still.or(ended.and_then(|silence| silence.start))
    }

    /// Those are asked for how long they have heard this node.
    pub(crate) fn asks_why(&mut self, whom: Vec<NodeId>) {
        if let Some(lost) = &mut self.lost {
            lost.asked_why.extend(whom);
        }
    }

    /// A member says that it has heard this node for `deaf` while this node did not hear it. One alone may say what it likes.
    pub(crate) fn was_deaf(&mut self, by: NodeId, deaf: Duration) {
        let Some(lost) = self.lost.as_mut().filter(|_| deaf > DEAF) else { return };
        // Only those count that this node has picked itself.
        if let Some(at) = lost.asked_why.iter().position(|asked| *asked == by) {
            lost.asked_why.swap_remove(at);
            lost.deaf_by.push(by);
        }
        if lost.deaf_by.len() >= DEAF_WITNESSES {
            self.caught_flapping("others heard it all the time while it did not hear them");
        }
    }

    fn caught_flapping(&mut self, why: &str) {
        if let Some(lost) = self.lost.as_mut().filter(|lost| !lost.flapping) {
            lost.flapping = true;
            self.flaps += 1;
            tracing::warn!(why, hold = ?self.hold(), "this node's link is bad; it must be good for that long first");
        }
    }

    /// When [`Recovery::ping_is_due`] says yes next.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.lost.as_ref().map(|lost| lost.next_ping)
    }

    /// When anybody who is not thought dead last sent a packet.
    pub(crate) fn heard_at(&self) -> Option<Instant> {
        self.heard_at
    }

    /// A packet came from somebody who is not thought dead.
    pub(crate) fn heard(&mut self, now: Instant) {
        let before = self.heard_at.replace(now);
        if before.is_none_or(|at| now.saturating_duration_since(at) > SILENCE) {
            self.silence = Some(Silence { start: before, end: now });
        }
    }

    /// A probe of this node's own has ended.
    pub(crate) fn probed(&mut self, answered: bool, now: Instant) {
        self.unanswered = if answered { 0 } else { self.unanswered + 1 };
        if self.unanswered >= UNANSWERED {
            self.unheard_at = Some(now);
        }
    }

    /// Whether of late nobody answered this node.
    pub(crate) fn is_unheard(&self, now: Instant) -> bool {
        self.unheard_at.is_some_and(|at| now.saturating_duration_since(at) < LEARNS_WITHIN)
    }

    /// Whether there has been no silence for so long.
    pub(crate) fn in_touch_for(&self, time: Duration, now: Instant) -> bool {
        let since = |at| now.saturating_duration_since(at);
        let hears = self.heard_at.is_some_and(|at| since(at) <= SILENCE);
        hears && self.silence.as_ref().is_some_and(|silence| since(silence.end) > time)
    }

    /// A packet came from `from`: an answer if it was asked.
    pub(crate) fn answered(&mut self, from: &Ident) {
        if let Some(lost) = &mut self.lost
            && let Some(at) = lost.waiting.iter().position(|(_, asked)| asked.id == from.id)
        {
            lost.waiting.remove(at);
            lost.judge(from.id, true);
        }
    }

    /// Whether somebody is to be pinged now; then tell [`Recovery::asked`] whom. `patience` is how long an answer may take.
    pub(crate) fn ping_is_due(&mut self, now: Instant, patience: Duration) -> bool {
        let Some(lost) = self.lost.as_mut().filter(|lost| lost.next_ping <= now) else { return false };
        if now.saturating_duration_since(lost.next_ping) > STOPPED {
            // This process did not run: that is no time in which its link was good.
            lost.answers.clear();
            lost.good_since = None;
        }
        lost.next_ping = now + PING_PERIOD;
        while let Some((_, asked)) =
            lost.waiting.front().copied().filter(|(at, _)| now.saturating_duration_since(*at) > patience)
        {
            lost.waiting.pop_front();
            lost.judge(asked.id, false);
        }
        let good = lost.answers.iter().filter(|(_, good)| *good).count();
        if lost.answers.len() == WINDOW && good <= BAD {
            lost.good_since = None;
            // If it was but one who was asked, the bad link may as well be that one's.
            let first = lost.answers.front().map(|(asked, _)| *asked);
            if lost.answers.iter().any(|(asked, _)| Some(*asked) != first) {
                self.caught_flapping("few of its pings are answered");
            }
        } else if good >= GOOD {
            lost.good_since.get_or_insert(now);
        }
        true
    }

    /// Somebody was pinged.
    pub(crate) fn asked(&mut self, whom: Ident, now: Instant) {
        if let Some(lost) = &mut self.lost {
            lost.waiting.push_back((now, whom));
        }
    }

    /// Whether it is time to come back; then it is back.
    pub(crate) fn try_return(&mut self, now: Instant) -> bool {
        let Some(lost) = &self.lost else { return false };
        let Some(good_since) = lost.good_since else { return false };
        let hold = if lost.flapping { self.hold() } else { Duration::ZERO };
        if now.saturating_duration_since(good_since) < hold {
            return false;
        }
        self.came_back(now);
        true
    }

    /// A new life begins.
    pub(crate) fn came_back(&mut self, now: Instant) {
        self.lost = None;
        self.back_since = Some(now);
    }

    /// How long the link of a flapping node must stay good before it comes back.
    fn hold(&self) -> Duration {
        (HOLD * 2u32.pow(self.flaps.saturating_sub(1).min(8))).min(MAX_HOLD)
    }
}

impl Lost {
    fn judge(&mut self, asked: NodeId, answered: bool) {
        if self.answers.len() == WINDOW {
            self.answers.pop_front();
        }
        self.answers.push_back((asked, answered));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_millis(300);

    fn peer(n: u8) -> Ident {
        Ident { id: NodeId([n; 16]), addr: ([127, 0, 0, 1], 7400).into(), generation: 1 }
    }

    /// Runs for `seconds` with two peers that answer as `answers` says; how long until the node came back.
    fn run(
        recovery: &mut Recovery,
        now: &mut Instant,
        seconds: u64,
        answers: impl FnMut(u64) -> bool,
    ) -> Option<Duration> {
        run_with(2, recovery, now, seconds, answers)
    }

    fn run_with(
        peers: u64,
        recovery: &mut Recovery,
        now: &mut Instant,
        seconds: u64,
        mut answers: impl FnMut(u64) -> bool,
    ) -> Option<Duration> {
        let start = *now;
        let mut asked = 0;
        for step in 0..seconds * 20 {
            *now = start + Duration::from_millis(50 * step);
            if recovery.ping_is_due(*now, PATIENCE) {
                asked += 1;
                let whom = peer((asked % peers) as u8);
                recovery.asked(whom, *now);
                if answers(step) {
                    recovery.answered(&whom);
                }
            }
            if recovery.try_return(*now) {
                return Some(*now - start);
            }
        }
        None
    }

    #[test]
    fn a_healed_link_brings_it_back_within_two_seconds() {
        let (mut recovery, mut now) = (Recovery::default(), Instant::now());
        recovery.lose(now);
        assert!(run(&mut recovery, &mut now, 10, |_| true).unwrap() < Duration::from_secs(2));
        assert!(!recovery.is_lost());
    }

    #[test]
    fn a_lossy_link_keeps_it_out_and_then_it_must_hold() {
        let (mut recovery, mut now) = (Recovery::default(), Instant::now());
        recovery.lose(now);
        assert_eq!(run(&mut recovery, &mut now, 60, |step| step % 21 == 0), None);
        let back = run(&mut recovery, &mut now, 60, |_| true).unwrap();
        assert!(back >= HOLD, "{back:?}");
    }

    #[test]
    fn one_peer_that_does_not_answer_says_nothing_of_the_own_link() {
        let (mut recovery, mut now) = (Recovery::default(), Instant::now());
        recovery.lose(now);
        assert_eq!(run_with(1, &mut recovery, &mut now, 20, |_| false), None);
        let back = run_with(1, &mut recovery, &mut now, 60, |_| true).unwrap();
        assert!(back < Duration::from_secs(3), "{back:?}");
    }

    #[test]
    fn who_relapses_or_was_deaf_must_hold() {
        for (deaf, heard_first) in [(false, false), (false, true), (true, false)] {
            let (mut recovery, mut now) = (Recovery::default(), Instant::now());
            recovery.lose(now);
            if deaf {
                recovery.asks_why(vec![NodeId([1; 16]), NodeId([2; 16])]);
                (1..=2).for_each(|by| recovery.was_deaf(NodeId([by; 16]), Duration::from_secs(17)));
            } else {
                run(&mut recovery, &mut now, 10, |_| true).unwrap();
                now += Duration::from_secs(5);
                recovery.heard(now);
                // It is cut off, and learns only long afterwards that this was noticed.
                now += 2 * RELAPSE;
                if heard_first {
                    recovery.heard(now);
                }
                recovery.lose(now);
            }
            assert!(run(&mut recovery, &mut now, 60, |_| true).unwrap() >= HOLD, "deaf: {deaf}");
        }
    }
}
