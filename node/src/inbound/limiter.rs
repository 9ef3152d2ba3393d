//! How many calls a service gets at a time: as many as it can answer without making all of them wait.
//!
//! That calls stand in line there shows in how long the *quickest* answers take, as in CoDel (RFC 8289 §3): slow ones may be so by
//! nature, but where even the quickest are late, all are. Then fewer calls are let in, and the others are refused at once, who
//! can go elsewhere; a caller with more than its share first.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use starling_protocol::NodeId;

/// How long answers are gathered that are judged together, and how many there must be.
const WINDOW: Duration = Duration::from_millis(500);
const ENOUGH: usize = 20;
/// How many are kept of a window: the first ones.
const KEPT: usize = 512;
/// Which of a window's answers are the quickest: one of so many.
const QUICKEST: usize = 10;
/// Answers are late that take so many times as long as usual.
const LATE: f64 = 2.0;
/// What is usual follows what is seen: down at once, up so much a window.
const DRIFT: f64 = 1.02;
/// By how much the limit goes down a window, at most.
const STEEPEST: f64 = 0.5;
/// Where so few of the calls are left, or as few as may be, it is to be seen whether answers stand in a line.
const FEW: f64 = 0.35;
/// Answers that were in time while so many calls, and a few more, were under way, are no sign of a line when they are not; that is
/// forgotten by half in so long.
const FEW_MORE: f64 = 1.25;
const REMEMBERED: Duration = Duration::from_secs(300);
/// A line that is so much shorter than it was in the same window is let be.
const SHRINKS: f64 = 0.9;
/// The limit never goes below.
const LEAST: f64 = 8.0;
/// A limit that nothing spoke for during so long is lifted.
const LIFTED: Duration = Duration::from_secs(30);

/// Lets calls in to one service. Shared by all workers.
#[derive(Debug)]
pub(crate) struct Limiter {
    settings: Settings,
    state: Mutex<State>,
}

/// What an operator may set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Settings {
    /// Calls at a time, whatever happens.
    pub(crate) most: usize,
    /// The same of one caller.
    pub(crate) of_one: usize,
    /// Answers that come so soon are never late. `None`: the limit does not adapt.
    pub(crate) late: Option<Duration>,
}

#[derive(Debug)]
struct State {
    /// As long as answers are in time there is only the hard one.
    limit: Option<f64>,
    /// Calls that wait for an answer, by caller.
    waiting: HashMap<NodeId, usize>,
    in_flight: usize,
    /// How long the quickest answers take as a rule, in seconds.
    usual: Option<f64>,
    /// Beside how many others calls began at most that were answered in time, and when that was seen. Who is quick because he was
    /// first in a line began beside few.
    held: (f64, Instant),
    window: Window,
    /// When answers were last late.
    late: Instant,
    /// How it was when they began to be.
    began: Option<Began>,
    shed: u64,
}

/// How it was when answers began to be late.
#[derive(Debug, Clone, Copy)]
struct Began {
    in_flight: f64,
    quickest: f64,
    /// Since when there are so few calls that answers should be in time again.
    few_since: Option<Instant>,
}

#[derive(Debug)]
struct Window {
    since: Instant,
    /// How long each answer took, in seconds, and beside how many others its call began.
    answers: Vec<(f32, u32)>,
    /// The last of them, and the longest.
    last: Instant,
    longest: Duration,
    most_in_flight: usize,
}

impl Window {
    fn new(now: Instant, in_flight: usize) -> Self {
        Self { since: now, answers: Vec::new(), last: now, longest: Duration::ZERO, most_in_flight: in_flight }
    }

    /// How long the quickest answers took, and beside how many other calls all of those began.
    fn quickest(&mut self) -> (f64, f64) {
        let at = self.answers.len() / QUICKEST;
        let (quicker, (time, beside), _) = self.answers.select_nth_unstable_by(at, |(a, _), (b, _)| a.total_cmp(b));
        let beside = quicker.iter().map(|(_, beside)| *beside).fold(*beside, u32::min);
        (f64::from(*time), f64::from(beside))
    }
}

/// A call that waits for its answer.
#[derive(Debug)]
pub(crate) struct Admitted {
    limiter: Arc<Limiter>,
    caller: NodeId,
    since: Instant,
    /// Calls that were under way when it began.
    beside: u32,
    /// How long it waits says something of the service.
    is_telling: bool,
}

/// What there is to be told of a limiter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Figures {
    /// Calls at a time, as it stands.
    pub(crate) limit: usize,
    /// Calls that were refused.
    pub(crate) shed: u64,
}

impl Limiter {
    pub(crate) fn new(settings: Settings) -> Self {
        let now = Instant::now();
        let (limit, waiting, in_flight, usual, window, shed) = (None, HashMap::new(), 0, None, Window::new(now, 0), 0);
        let (late, began) = (now, None);
        Self {
            settings,
            state: Mutex::new(State { limit, waiting, in_flight, usual, held: (0.0, now), window, late, began, shed }),
        }
    }

    /// Lets a call in, or not.
    pub(crate) fn admit(self: &Arc<Self>, caller: NodeId, now: Instant) -> Option<Admitted> {
        let mut state = self.lock();
        let may = state.has_room(caller, self.settings, now);
        if !may {
            state.shed += 1;
            return None;
        }
        let beside = state.in_flight as u32;
        *state.waiting.entry(caller).or_default() += 1;
        state.in_flight += 1;
        state.window.most_in_flight = state.window.most_in_flight.max(state.in_flight);
        drop(state);
        Some(Admitted { limiter: self.clone(), caller, since: now, beside, is_telling: true })
    }

    /// As it stands.
    pub(crate) fn figures(&self) -> Figures {
        let state = self.lock();
        let limit = state.limit.filter(|_| !state.is_lifted(Instant::now()));
        let limit = limit.map_or(self.settings.most, |limit| (limit as usize).min(self.settings.most));
        Figures { limit, shed: state.shed }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl State {
    /// Whether there is room for one more. Beyond the limit there still is for a caller that has less than its share of it, which
    /// all of them together have not more than: those who have more are not let in until they have not.
    fn has_room(&mut self, caller: NodeId, Settings { most, of_one, .. }: Settings, now: Instant) -> bool {
        let own = self.waiting.get(&caller).copied().unwrap_or_default();
        if self.in_flight >= most || own >= of_one {
            return false;
        }
        if self.is_lifted(now) {
            (self.limit, self.began) = (None, None);
        }
        let Some(limit) = self.limit else { return true };
        if (self.in_flight as f64) < limit {
            return true;
        }
        let callers = self.waiting.len() + usize::from(own == 0);
        let share = (limit / callers as f64).max(1.0);
        (own as f64) < share.floor()
    }

    /// Whether nothing has spoken for the limit for long.
    fn is_lifted(&self, now: Instant) -> bool {
        self.limit.is_some() && now.saturating_duration_since(self.late) > LIFTED
    }

    /// How many calls at a time were answered in time, as far as that is remembered.
    fn held_at(&self, now: Instant) -> f64 {
        let (held, at) = self.held;
        held * 0.5f64.powf(now.saturating_duration_since(at).as_secs_f64() / REMEMBERED.as_secs_f64())
    }

    /// An answer came after so long.
    fn answered(&mut self, time: Duration, beside: u32, late: Duration, now: Instant) {
        if now.saturating_duration_since(self.window.last) > 2 * WINDOW.max(self.window.longest) {
            // What came before such a pause has nothing to do with it.
            self.window = Window::new(now, self.in_flight);
        }
        (self.window.last, self.window.longest) = (now, self.window.longest.max(time));
        if self.window.answers.len() < KEPT {
            self.window.answers.push((time.as_secs_f32(), beside));
        }
        let is_over = now.saturating_duration_since(self.window.since) >= WINDOW && self.window.answers.len() >= ENOUGH;
        if is_over {
            let (quickest, beside) = self.window.quickest();
            let most_in_flight = self.window.most_in_flight as f64;
            let is_shrinking = (self.in_flight as f64) < most_in_flight * SHRINKS;
            self.window = Window::new(now, self.in_flight);
            self.judge((quickest, beside), most_in_flight, is_shrinking, late.as_secs_f64(), now);
        }
    }

    fn judge(
        &mut self,
        (quickest, beside): (f64, f64),
        most_in_flight: f64,
        is_shrinking: bool,
        late: f64,
        now: Instant,
    ) {
        let usual = *self.usual.get_or_insert(quickest);
        let in_time = late.max(usual * LATE);
        if quickest > in_time {
            if self.limit.is_none() && most_in_flight <= self.held_at(now) * FEW_MORE {
                // Some calls take so long by themselves, and there were few others this time. Where there is a limit, it is what keeps
                // the calls so few.
                return;
            }
            if self.is_no_queue(quickest, most_in_flight, now) {
                // It is another kind of calls that takes so long by itself.
                (self.usual, self.limit, self.began) = (Some(quickest), None, None);
                return;
            }
            self.late = now;
            if is_shrinking {
                // A burst, which comes to its end by itself.
                return;
            }
            // What is usual is not learnt now.
            let down = (in_time / quickest).max(STEEPEST);
            let from = self.limit.unwrap_or(f64::MAX).min(most_in_flight);
            self.limit = Some((from * down).max(LEAST));
            return;
        }
        self.began = None;
        self.held = (self.held_at(now).max(beside), now);
        self.usual = Some(quickest.min(usual * DRIFT));
        if let Some(limit) = &mut self.limit
            && most_in_flight > *limit * 0.8
        {
            // It is made use of, and answers are in time: a little more may go, too.
            *limit += limit.sqrt().max(2.0);
        }
    }
}

impl State {
    /// Whether answers are as late as they were although only a part of the calls is left, and was for as long as they take: then
    /// they do not stand in line for each other. In a line they would take as much less as there are less.
    fn is_no_queue(&mut self, quickest: f64, most_in_flight: f64, now: Instant) -> bool {
        let began = self.began.get_or_insert(Began { in_flight: most_in_flight, quickest, few_since: None });
        began.in_flight = began.in_flight.max(most_in_flight);
        let left = most_in_flight / began.in_flight.max(1.0);
        if left > FEW && self.limit.is_none_or(|limit| limit > LEAST) {
            began.few_since = None;
            return false;
        }
        let since = *began.few_since.get_or_insert(now);
        let settled = WINDOW + Duration::from_secs_f64((2.0 * quickest).min(3600.0));
        now.saturating_duration_since(since) > settled && quickest > began.quickest * f64::midpoint(1.0, left)
    }
}

impl Admitted {
    /// How long it waits is its caller's doing.
    pub(crate) fn excuse(&mut self) {
        self.is_telling = false;
    }

    /// Its answer has come, or did not come in time, which is an answer, too. It took from when all of the request was there, if
    /// that was later.
    pub(crate) fn answered(mut self, asked: Option<Instant>, now: Instant) {
        self.is_telling = false;
        if let Some(late) = self.limiter.settings.late {
            let time = now.saturating_duration_since(asked.map_or(self.since, |asked| asked.max(self.since)));
            self.limiter.lock().answered(time, self.beside, late, now);
        }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut state = self.limiter.lock();
        if let Some(late) = self.limiter.settings.late.filter(|_| self.is_telling) {
            // Given up: it would have taken longer still. Where all are, that is all that is to be seen of an overload.
            let now = Instant::now();
            let waited = now.saturating_duration_since(self.since);
            if waited > late {
                state.answered(waited, self.beside, late, now);
            }
        }
        state.in_flight -= 1;
        if let Some(waiting) = state.waiting.get_mut(&self.caller) {
            *waiting -= 1;
            if *waiting == 0 {
                state.waiting.remove(&self.caller);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    const LATE_MS: Duration = Duration::from_millis(100);

    fn settings() -> Settings {
        Settings { most: 5000, of_one: 5000, late: Some(LATE_MS) }
    }

    fn id(n: u8) -> NodeId {
        NodeId([n; 16])
    }

    /// A service that answers one call after the other, each in `work`, and its callers, each with as many calls under way as it
    /// has `hands`. Who is refused tries again a moment later.
    struct Line {
        limiter: Arc<Limiter>,
        now: Instant,
        work: Duration,
        queue: VecDeque<Admitted>,
        busy_until: Instant,
    }

    struct Caller {
        id: NodeId,
        hands: usize,
        waiting: usize,
        answered: usize,
        refused: usize,
        longest: Duration,
    }

    impl Line {
        fn new(work: Duration) -> Self {
            let now = Instant::now();
            let limiter = Arc::new(Limiter::new(settings()));
            Self { limiter, now, work, queue: VecDeque::new(), busy_until: now }
        }

        fn run(&mut self, callers: &mut [Caller], time: Duration) {
            const STEP: Duration = Duration::from_millis(1);
            let end = self.now + time;
            while self.now < end {
                for caller in callers.iter_mut() {
                    while caller.waiting < caller.hands {
                        match self.limiter.admit(caller.id, self.now) {
                            Some(admitted) => {
                                caller.waiting += 1;
                                self.queue.push_back(admitted);
                            }
                            None => {
                                caller.refused += 1;
                                break;
                            }
                        }
                    }
                }
                while let Some(next) = self.queue.front() {
                    let done = self.busy_until.max(next.since) + self.work;
                    if done > self.now + STEP {
                        break;
                    }
                    self.busy_until = done;
                    let Some(next) = self.queue.pop_front() else { break };
                    let caller = callers.iter_mut().find(|caller| caller.id == next.caller).unwrap();
                    caller.waiting -= 1;
                    caller.answered += 1;
                    caller.longest = caller.longest.max(done.saturating_duration_since(next.since));
                    next.answered(None, done);
                }
                self.now += STEP;
            }
        }
    }

    fn caller(n: u8, hands: usize) -> Caller {
        Caller { id: id(n), hands, waiting: 0, answered: 0, refused: 0, longest: Duration::ZERO }
    }

    #[test]
    fn who_is_answered_in_time_knows_no_limit() {
        let mut line = Line::new(Duration::from_micros(500));
        let mut callers = [caller(1, 100)];
        line.run(&mut callers, Duration::from_secs(20));
        assert_eq!((callers[0].refused, line.limiter.figures().limit), (0, 5000));
    }

    /// A thousand at a time for a service that does a hundred a second would all wait for ten seconds.
    #[test]
    fn what_is_too_much_is_refused_and_the_rest_is_answered_soon() {
        let mut line = Line::new(Duration::from_millis(10));
        let mut callers = [caller(1, 1)];
        line.run(&mut callers, Duration::from_secs(5));
        let mut callers = [caller(1, 1000)];
        line.run(&mut callers, Duration::from_secs(30));
        callers[0].longest = Duration::ZERO;
        callers[0].answered = 0;
        line.run(&mut callers, Duration::from_secs(10));
        assert!(callers[0].answered >= 990, "the service is kept busy: {}", callers[0].answered);
        assert!(callers[0].longest < LATE_MS * 6, "{:?}", callers[0].longest);
        assert!(callers[0].refused > 0);
    }

    /// As long as it is too much, the limit stays, also where it is a large one: nobody is let in by the thousand now and then.
    #[test]
    fn what_is_too_much_for_long_is_refused_for_as_long() {
        let mut line = Line::new(Duration::from_millis(1));
        // It was busy before, and not too much so.
        let mut before = [caller(1, 90)];
        line.run(&mut before, Duration::from_secs(20));
        before[0].hands = 0;
        line.run(&mut before, Duration::from_secs(1));
        let mut callers = [caller(1, 2000)];
        line.run(&mut callers, Duration::from_secs(30));
        (callers[0].longest, callers[0].answered) = (Duration::ZERO, 0);
        line.run(&mut callers, Duration::from_secs(150));
        assert!(callers[0].longest < LATE_MS * 6, "{:?}", callers[0].longest);
        assert!(callers[0].answered >= 148_000, "{}", callers[0].answered);
    }

    #[test]
    fn one_that_takes_all_leaves_the_others_their_share() {
        let mut line = Line::new(Duration::from_millis(10));
        let mut callers = [caller(1, 2), caller(2, 1000), caller(3, 2)];
        line.run(&mut callers, Duration::from_secs(30));
        for caller in &mut callers {
            (caller.answered, caller.refused) = (0, 0);
        }
        line.run(&mut callers, Duration::from_secs(10));
        assert_eq!((callers[0].refused, callers[2].refused), (0, 0), "less than their share, they are never refused");
        assert!(callers[0].answered > 30, "{}", callers[0].answered);
    }

    #[test]
    fn the_limit_goes_with_its_reason() {
        let mut line = Line::new(Duration::from_millis(10));
        let mut callers = [caller(1, 1000)];
        line.run(&mut callers, Duration::from_secs(20));
        assert!(line.limiter.figures().limit < 500);
        // Without traffic, too.
        line.queue.clear();
        line.now += LIFTED * 2;
        assert!(line.limiter.admit(id(2), line.now).is_some());
        assert_eq!(line.limiter.figures().limit, 5000);
    }

    /// Long polls beside quick calls are no sign of a queue, whatever their number.
    #[test]
    fn slow_calls_among_quick_ones_are_no_overload() {
        let limiter = Arc::new(Limiter::new(settings()));
        let mut now = Instant::now();
        for round in 0..10_000u32 {
            now += Duration::from_millis(5);
            let time = if round % 4 == 0 { Duration::from_millis(2) } else { Duration::from_secs(30) };
            let mut admitted = limiter.admit(id(1), now).unwrap();
            admitted.since = now - time;
            admitted.answered(None, now);
        }
        assert_eq!(limiter.figures(), Figures { limit: 5000, shed: 0 });
    }

    #[test]
    fn the_hard_limits_hold_for_everybody() {
        let limiter = Arc::new(Limiter::new(Settings { most: 3, of_one: 2, late: None }));
        let now = Instant::now();
        let _kept = (limiter.admit(id(1), now).unwrap(), limiter.admit(id(1), now).unwrap());
        assert!(limiter.admit(id(1), now).is_none());
        let _other = limiter.admit(id(2), now).unwrap();
        assert!(limiter.admit(id(3), now).is_none());
        assert_eq!(limiter.figures(), Figures { limit: 3, shed: 2 });
    }

    /// A burst is answered late, all of it; it says nothing of the next one.
    #[test]
    fn a_burst_does_not_shut_the_door() {
        let mut line = Line::new(Duration::from_millis(10));
        let mut callers = [caller(1, 1)];
        line.run(&mut callers, Duration::from_secs(5));
        for _ in 0..5 {
            let mut burst = [caller(2, 100)];
            line.run(&mut burst, Duration::from_millis(2));
            burst[0].hands = 0;
            line.run(&mut burst, Duration::from_secs(8));
            assert_eq!((burst[0].answered, burst[0].refused), (100, 0));
        }
    }

    /// The same where they are so rare that most of what is judged together has none of them, and a few have many.
    #[test]
    fn a_few_quick_calls_among_slow_ones_are_no_overload() {
        let limiter = Arc::new(Limiter::new(settings()));
        let mut now = Instant::now();
        let mut waiting: VecDeque<Admitted> = VecDeque::new();
        let (mut asked, mut refused) = (0u32, 0u32);
        for step in 0..120_000u32 {
            now += Duration::from_millis(5);
            while waiting.front().is_some_and(|poll| now - poll.since >= Duration::from_secs(10)) {
                waiting.pop_front().unwrap().answered(None, now);
            }
            if waiting.len() < 500 && step % 4 == 0 {
                asked += 1;
                match limiter.admit(id(1), now) {
                    Some(poll) => waiting.push_back(poll),
                    None => refused += 1,
                }
            }
            // Now and then a handful of quick ones.
            if step % 2000 < 10 {
                let mut admitted = limiter.admit(id(2), now).unwrap();
                admitted.since = now - Duration::from_millis(2);
                admitted.answered(None, now);
            }
        }
        assert!(refused < asked / 20, "{refused} of {asked}");
        assert_eq!(limiter.figures().limit, 5000);
    }

    /// Where no more than a few are under way, they cannot be made a fraction of what they were.
    #[test]
    fn few_slow_calls_are_let_in_again() {
        for (callers, hands) in [(1u8, 9usize), (1, 20), (40, 2)] {
            let limiter = Arc::new(Limiter::new(settings()));
            let mut now = Instant::now();
            for _ in 0..500 {
                now += Duration::from_millis(5);
                let mut admitted = limiter.admit(id(1), now).unwrap();
                admitted.since = now - Duration::from_millis(2);
                admitted.answered(None, now);
            }
            let mut under_way: VecDeque<Admitted> = VecDeque::new();
            let mut refused_at_last = 0;
            for step in 0..60_000u32 {
                now += Duration::from_millis(2);
                while under_way.front().is_some_and(|call| now - call.since >= Duration::from_millis(700)) {
                    under_way.pop_front().unwrap().answered(None, now);
                }
                for n in 1..=callers {
                    if under_way.iter().filter(|call| call.caller == id(n)).count() < hands {
                        match limiter.admit(id(n), now) {
                            Some(call) => under_way.push_back(call),
                            None => refused_at_last += u32::from(step > 50_000),
                        }
                    }
                }
            }
            assert_eq!(refused_at_last, 0, "{callers} callers with {hands}: limit {}", limiter.figures().limit);
        }
    }

    /// By day quick calls, by night nothing but long polls: they are no overload, however long they take.
    #[test]
    fn another_kind_of_calls_is_let_in_again() {
        let limiter = Arc::new(Limiter::new(settings()));
        let mut now = Instant::now();
        for _ in 0..1000 {
            now += Duration::from_millis(5);
            let mut admitted = limiter.admit(id(1), now).unwrap();
            admitted.since = now - Duration::from_millis(2);
            admitted.answered(None, now);
        }
        // A hundred pollers, each again and again for two seconds; who is refused comes back later.
        let mut polls: VecDeque<Admitted> = VecDeque::new();
        let mut refused_at_last = 0;
        for step in 0..60_000u32 {
            now += Duration::from_millis(5);
            while polls.front().is_some_and(|poll| now - poll.since >= Duration::from_secs(2)) {
                polls.pop_front().unwrap().answered(None, now);
            }
            if step % 4 == 0 && polls.len() < 100 {
                match limiter.admit(id(1), now) {
                    Some(poll) => polls.push_back(poll),
                    None => refused_at_last += u32::from(step > 50_000),
                }
            }
        }
        assert_eq!(refused_at_last, 0, "limit {}", limiter.figures().limit);
    }
}
