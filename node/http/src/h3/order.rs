//! In which order the streams of a connection are sent.
//!
//! QUIC sends a packet of each stream in turn. Whoever receives then has a little of everything: a wake-up and a write for
//! each packet of each answer. Where a line is fast, it is better to send more of one stream at a time, as long as nobody
//! waits long for it. quinn sends the streams of the highest priority, so a place in a line makes a priority.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// How much a stream says in one turn, in bytes: all that may be on its way, between nodes of one site.
const TURN_BYTES: usize = 64 << 10;
/// A stream that has not said more than so much goes before others.
const LITTLE_BYTES: usize = 16 << 10;
/// Before so many turns of others, and not of all: a flood of small messages must not hold up a large one for ever.
const LEAD: i32 = 1024;

/// In which order streams are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// A packet of each in turn, which is right on a slow line.
    Mixed,
    /// One after the other, as each comes to its turn; those that say little first.
    InLine,
}

/// The line of a connection.
#[derive(Debug, Default)]
pub(crate) struct Line(AtomicU32);

/// A stream's turn.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    said: usize,
    left: usize,
}

impl Turn {
    /// The stream is about to say so much more: its new priority, if its turn is over.
    pub(crate) fn say(&mut self, bytes: usize, line: &Line) -> Option<i32> {
        let is_over = self.left == 0;
        let says_little = self.said < LITTLE_BYTES;
        self.said = self.said.saturating_add(bytes);
        if is_over {
            self.left = if says_little { LITTLE_BYTES } else { TURN_BYTES };
        }
        self.left = self.left.saturating_sub(bytes);
        is_over.then(|| line.place() + if says_little { LEAD } else { 0 })
    }
}

impl Line {
    /// The next place: lower than those before it, but for a new beginning after some 64 TiB.
    fn place(&self) -> i32 {
        -((self.0.fetch_add(1, Relaxed) & 0x3fff_ffff) as i32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_says_much_lines_up_again_and_who_says_little_goes_first() {
        let (line, mut large, mut other) = (Line::default(), Turn::default(), Turn::default());
        let first = large.say(16 << 10, &line).unwrap();
        let second = large.say(32 << 10, &line).unwrap();
        assert_eq!(large.say(32 << 10, &line), None, "its turn is not over");
        let third = large.say(1, &line).unwrap();
        assert!(first > second && second > third);
        assert!(other.say(100, &line).unwrap() > second, "it goes before what came earlier");
        assert_eq!(other.say(100, &line), None);
    }

    #[test]
    fn a_flood_of_little_does_not_hold_up_the_large() {
        let (line, mut large) = (Line::default(), Turn::default());
        large.say(LITTLE_BYTES, &line);
        let waits = large.say(TURN_BYTES, &line).unwrap();
        let before = (0..10 * LEAD).filter(|_| Turn::default().say(100, &line).unwrap() > waits).count();
        assert!(before <= LEAD as usize, "{before} went first");
    }
}
