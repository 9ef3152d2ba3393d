//! What this edge has to say to another one about counts, gathered into few questions.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use starling_protocol::{AskCounts, KnownCount, TakeCount};
use tokio::{sync::oneshot, time::Instant};

/// Questions a second in the long run, and at once: edges take some fifty streams a second of each other, with all else.
const PER_SECOND: f64 = 30.0;
const AT_ONCE: f64 = 60.0;
/// The same in bytes; half of what a link takes.
const BYTES_PER_SECOND: f64 = (1 << 20) as f64;
const BYTES_AT_ONCE: f64 = (4 << 20) as f64;
/// What one question holds: things, and bytes of them.
const MAX_ITEMS: usize = 256;
const MAX_BYTES: usize = 256 << 10;
/// Callers for whom somebody waits: half a second of questions. Beyond that, a flood of new callers, each edge counts those by itself.
const MAX_WAITING: usize = 4000;
/// Callers of whom something is to be told, while nobody waits for it.
pub(super) const MAX_TOLD: usize = 2000;

/// Tells whoever waits that it was said and heard; gone without, that it was not.
type Said = oneshot::Sender<()>;
/// The other end of it.
pub(super) type Heard = oneshot::Receiver<()>;

/// What waits to be said to one edge.
#[derive(Debug)]
pub(super) struct Line {
    /// Callers for whom somebody waits, in turn.
    turns: VecDeque<String>,
    wanted: HashMap<String, Wanted>,
    told: VecDeque<(KnownCount, Option<Said>)>,
    /// How many times as much as to an edge may be said there.
    pace: f64,
    /// Whether somebody talks.
    pub(super) talking: bool,
    /// How many questions may be asked, and how many bytes, as of when.
    free: (f64, f64, Instant),
}

/// What is wanted of one counter, by however many calls.
#[derive(Debug, Default)]
struct Wanted {
    /// What the owner is to know first.
    know: Option<KnownCount>,
    take: Option<TakeCount>,
    find: bool,
    waiting: Vec<Said>,
}

/// One question, and who waits for the answer.
#[derive(Debug, Default)]
pub(super) struct Question {
    pub(super) ask: AskCounts,
    pub(super) waiting: Vec<Said>,
}

impl Line {
    pub(super) fn new(now: Instant, pace: f64) -> Self {
        Self {
            pace,
            turns: VecDeque::new(),
            wanted: HashMap::new(),
            told: VecDeque::new(),
            talking: false,
            free: (AT_ONCE, BYTES_AT_ONCE, now),
        }
    }

    /// Asks for a lease, with what the owner is to know first. The calls of one caller ask together.
    pub(super) fn take(&mut self, take: TakeCount, know: Option<KnownCount>) -> Heard {
        let Some((wanted, heard)) = self.want(&take.key) else { return unheard() };
        wanted.know = know.or(wanted.know.take());
        wanted.take = Some(match wanted.take.take() {
            Some(others) => TakeCount {
                least: others.least.min(take.least),
                most: others.most.saturating_add(take.least),
                ..others
            },
            None => take,
        });
        heard
    }

    /// Asks what the other edge knows of a counter.
    pub(super) fn find(&mut self, key: &str) -> Heard {
        let Some((wanted, heard)) = self.want(key) else { return unheard() };
        wanted.find = true;
        heard
    }

    fn want(&mut self, key: &str) -> Option<(&mut Wanted, Heard)> {
        if !self.wanted.contains_key(key) {
            if self.turns.len() >= MAX_WAITING {
                return None;
            }
            self.turns.push_back(key.to_owned());
        }
        let wanted = self.wanted.entry(key.to_owned()).or_default();
        let (said, heard) = oneshot::channel();
        wanted.waiting.push(said);
        Some((wanted, heard))
    }

    /// Tells what is known of a counter, when there is time. `false` if there is too much to be told.
    pub(super) fn tell(&mut self, known: KnownCount) -> bool {
        let has_room = self.told.len() < MAX_TOLD;
        if has_room {
            self.told.push_back((known, None));
        }
        has_room
    }

    /// The same, for somebody who waits for it.
    pub(super) fn tell_at_once(&mut self, known: KnownCount) -> Heard {
        let (said, heard) = oneshot::channel();
        self.told.push_front((known, Some(said)));
        heard
    }

    /// How long to wait until the next question; `None` if there is nothing to be said, so that nobody talks any more.
    pub(super) fn pause(&mut self, now: Instant) -> Option<Duration> {
        self.talking = !self.turns.is_empty() || !self.told.is_empty();
        self.talking.then(|| self.next_at(now))
    }

    fn next_at(&mut self, now: Instant) -> Duration {
        let (questions, bytes, at) = self.free;
        let passed = (now - at).as_secs_f64();
        let questions = (questions + passed * PER_SECOND * self.pace).min(AT_ONCE * self.pace) - 1.0;
        let bytes = (bytes + passed * BYTES_PER_SECOND * self.pace).min(BYTES_AT_ONCE);
        self.free = (questions, bytes, now);
        let seconds = (-questions / PER_SECOND).max(-bytes / BYTES_PER_SECOND).max(0.0);
        Duration::from_secs_f64(seconds / self.pace)
    }

    /// The next question: what somebody waits for, and then what is to be told.
    pub(super) fn question(&mut self) -> Question {
        let mut question = Question::default();
        let (mut items, mut bytes) = (0, 0);
        while items < MAX_ITEMS
            && bytes < MAX_BYTES
            && let Some(key) = self.turns.pop_front()
        {
            let Some(Wanted { know, take, find, waiting }) = self.wanted.remove(&key) else { continue };
            let ask = &mut question.ask;
            items += 1;
            bytes += 2 * key.len() + know.as_ref().map_or(0, |known| known.counts.len());
            ask.knows.extend(know);
            ask.takes.extend(take);
            ask.finds.extend(find.then_some(key));
            question.waiting.extend(waiting);
        }
        while items < MAX_ITEMS
            && bytes < MAX_BYTES
            && let Some((known, said)) = self.told.pop_front()
        {
            items += 1;
            bytes += known.key.len() + known.counts.len();
            question.ask.knows.push(known);
            question.waiting.extend(said);
        }
        self.free.1 -= bytes as f64;
        question
    }

    /// Nobody listens: what was to be said, whoever waited is told so by that.
    pub(super) fn clear(&mut self) -> AskCounts {
        let mut all = AskCounts::default();
        self.turns.clear();
        for Wanted { know, take, .. } in std::mem::take(&mut self.wanted).into_values() {
            all.knows.extend(know);
            all.takes.extend(take);
        }
        all.knows.extend(self.told.drain(..).map(|(known, _)| known));
        all
    }
}

/// What is not said.
fn unheard() -> Heard {
    oneshot::channel().1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(key: &str, least: u64, most: u64) -> TakeCount {
        TakeCount { key: key.into(), part: 1, since: 1, limit: 100, least, most }
    }

    fn known(key: &str) -> KnownCount {
        KnownCount { key: key.into(), counts: vec![0; 32].into() }
    }

    #[test]
    fn much_is_said_in_few_questions_and_what_is_waited_for_first() {
        let now = Instant::now();
        let mut line = Line::new(now, 1.0);
        for n in 0..600 {
            assert!(line.tell(known(&format!("told {n}"))));
        }
        let heard: Vec<Heard> = (0..1000).map(|n| line.find(&format!("k{}", n % 300))).collect();
        let mut questions = Vec::new();
        while line.pause(now).is_some() {
            questions.push(line.question());
        }
        assert!(!line.talking);
        let counts: Vec<_> = questions.iter().map(|q| (q.ask.finds.len(), q.ask.knows.len())).collect();
        assert_eq!(counts, [(256, 0), (44, 212), (0, 256), (0, 132)]);
        assert_eq!(questions[0].waiting.len(), 256 * 3 + 100);
        drop((questions, heard));
        let (mut line, mut said, mut now) = (Line::new(now, 1.0), 0, now);
        let begun = now;
        while now - begun < Duration::from_secs(10) {
            now += line.next_at(now);
            said += 1;
        }
        assert!((300..=370).contains(&said), "{said}");
    }

    #[test]
    fn the_calls_of_one_caller_ask_together() {
        let mut line = Line::new(Instant::now(), 1.0);
        let _heard = [line.take(take("a", 2, 10), Some(known("a"))), line.take(take("a", 1, 10), None), line.find("a")];
        let question = line.question();
        assert_eq!(question.ask.takes, [take("a", 1, 11)]);
        assert_eq!((question.ask.knows.len(), question.ask.finds.len(), question.waiting.len()), (1, 1, 3));
    }

    #[test]
    fn what_is_too_much_is_not_said() {
        let mut line = Line::new(Instant::now(), 1.0);
        let heard: Vec<Heard> = (0..MAX_WAITING).map(|n| line.find(&format!("k{n}"))).collect();
        assert!(line.find("one more").try_recv().is_err_and(|e| e == oneshot::error::TryRecvError::Closed));
        assert!((0..MAX_TOLD).all(|n| line.tell(known(&format!("k{n}")))) && !line.tell(known("one more")));
        assert_eq!(line.clear().knows.len(), MAX_TOLD);
        assert!(line.pause(Instant::now()).is_none());
        drop(heard);
    }

    #[test]
    fn no_more_bytes_than_a_link_takes() {
        let (mut line, mut now) = (Line::new(Instant::now(), 1.0), Instant::now());
        let (begun, mut bytes) = (now, 0);
        while now - begun < Duration::from_secs(20) {
            let large = KnownCount { key: "k".into(), counts: vec![0; 2000].into() };
            while line.tell(large.clone()) {}
            now += line.pause(now).unwrap();
            bytes += line.question().ask.knows.iter().map(|known| known.counts.len()).sum::<usize>();
        }
        assert!((15 << 20..=26 << 20).contains(&bytes), "{bytes}");
    }
}
