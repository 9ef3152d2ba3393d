//! What this node has lived through with peers and with the instances behind them.
//!
//! A peer is reached or not, whatever it serves; everything else (latency, failures) is an instance's own, so that one service
//! never pays for its neighbour. Whatever is held against anybody fades with time alone: a penalty that only traffic could
//! lift, and that keeps traffic away, would never end.

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// How fast experience fades: after this long, a third of it is left, and after seven times as long a second looks like a
/// millisecond.
const FADES: Duration = Duration::from_secs(1);
/// Experience of which less is left is of the past.
const KNOWN: f64 = 0.3;
/// What an instance is taken for of which nothing is known.
const UNKNOWN_LATENCY: Duration = Duration::from_millis(1);
/// The least that an answer counts as: below, chance decides, and shares go by the square.
const BEST_LATENCY: Duration = Duration::from_micros(100);
/// What a failing answer counts as, so that an instance that fails fast does not look fast; also the most that a slow answer
/// counts as, so that it is forgotten as fast.
const WORST_LATENCY: Duration = Duration::from_secs(1);
/// How long a peer's word about its own load is believed.
const TOLD_FOR: Duration = Duration::from_secs(1);
/// Failures in a row that take an instance out.
const MAX_CONSECUTIVE_FAILURES: u32 = 5;
/// Or so many of a hundred, of those of so long, if there were enough to tell.
const MAX_FAILURE_RATE: f64 = 0.2;
const RATE_WINDOW: Duration = Duration::from_secs(10);
const RATE_ANSWERS: u32 = 20;
const EJECT_MIN: Duration = Duration::from_secs(1);
const EJECT_MAX: Duration = Duration::from_secs(60);
/// How long a trial may take before there may be another one.
const TRIAL: Duration = Duration::from_secs(5);
/// Experience that is so old says nothing any more.
const FORGOTTEN: Duration = Duration::from_secs(60);

/// Out for a while, longer each time; back by one real call that succeeds.
#[derive(Debug, Default)]
struct Ejection {
    times: u32,
    until: Option<Instant>,
    /// When the call began that decides.
    trial: Option<Instant>,
}

impl Ejection {
    fn is_out(&self, now: Instant) -> bool {
        let on_trial = || self.trial.is_some_and(|since| now.saturating_duration_since(since) < TRIAL);
        self.until.is_some_and(|until| now < until || on_trial())
    }

    /// A call begins; whether it is the trial.
    fn begin(&mut self, now: Instant) -> bool {
        let is_trial = self.until.is_some() && !self.is_out(now);
        if is_trial {
            self.trial = Some(now);
        }
        is_trial
    }

    /// The trial ended without saying anything about the other end.
    fn undecided(&mut self) {
        self.trial = None;
    }

    fn out(&mut self, now: Instant) {
        if self.until.is_some_and(|until| now < until) {
            return;
        }
        let pause = (EJECT_MIN * 2u32.pow(self.times.min(6))).min(EJECT_MAX);
        *self = Self { times: self.times + 1, until: Some(now + pause), trial: None };
    }

    fn back(&mut self) {
        *self = Self::default();
    }

    /// Whether there is nothing to be kept.
    fn is_over(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| now > until + FORGOTTEN)
    }
}

/// Whether a peer is reached, and how many calls are under way to it.
#[derive(Debug, Default)]
pub(crate) struct Reach {
    in_flight: AtomicU32,
    ejection: Mutex<Ejection>,
}

impl Reach {
    /// Calls in flight to the peer, to all of its services.
    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// The connection failed or went silent. Out at once; gossip confirms later.
    pub(crate) fn unreachable(&self) {
        lock(&self.ejection).out(Instant::now());
    }

    /// Whether it is out of reach at `now`, and whether it is time to dial it again: whoever is told so has to. Out it is until
    /// a connection comes about, or so long that it says nothing any more.
    pub(crate) fn look(&self, now: Instant) -> (bool, bool) {
        let mut ejection = lock(&self.ejection);
        let is_out = ejection.until.is_some_and(|until| now < until + FORGOTTEN);
        (is_out, ejection.begin(now))
    }

    /// A connection came about.
    pub(crate) fn reached(&self) {
        lock(&self.ejection).back();
    }

    pub(crate) fn is_out(&self) -> bool {
        let now = Instant::now();
        lock(&self.ejection).until.is_some_and(|until| now < until + FORGOTTEN)
    }
}

/// This node's own experience with one instance: one service of one peer.
#[derive(Debug)]
pub(crate) struct Experience(Mutex<State>);

#[derive(Debug)]
struct State {
    in_flight: u32,
    /// Tunnels that are open.
    tunnels: u32,
    /// Calls in flight at the instance, from all its callers, as it last told, and when.
    told: Option<(u32, Instant)>,
    latency: f64,
    updated: Instant,
    /// It has answered, or was waited for in vain.
    asked: bool,
    failures: u32,
    rate: FailureRate,
    ejection: Ejection,
}

/// Answers and failures of late: of this half of the window, and of the one before.
#[derive(Debug, Default)]
struct FailureRate {
    halves: [(u32, u32); 2],
    since: Option<Instant>,
}

impl FailureRate {
    /// Counts an answer; whether too many of late have failed.
    fn add(&mut self, failed: bool, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        let passed = now.saturating_duration_since(since);
        if passed >= RATE_WINDOW {
            self.halves = Default::default();
        } else if passed >= RATE_WINDOW / 2 {
            self.halves = [(0, 0), self.halves[0]];
        }
        if passed >= RATE_WINDOW / 2 {
            self.since = Some(now);
        }
        let [(answers, failures), (earlier_answers, earlier_failures)] = &mut self.halves;
        *answers += 1;
        *failures += u32::from(failed);
        let (answers, failures) = (*answers + *earlier_answers, *failures + *earlier_failures);
        answers >= RATE_ANSWERS && f64::from(failures) > MAX_FAILURE_RATE * f64::from(answers)
    }
}

impl State {
    /// The latency to be expected, in seconds: what was seen, faded into what is taken of the unknown.
    fn latency(&self, now: Instant) -> f64 {
        let unknown = UNKNOWN_LATENCY.as_secs_f64();
        unknown + (self.latency - unknown) * self.kept(now)
    }

    /// Calls that are in line there, as far as is known here.
    fn in_line(&self, is_tunnel: bool, now: Instant) -> u32 {
        let told = self.told.filter(|(_, at)| now.saturating_duration_since(*at) < TOLD_FOR);
        let own = self.in_flight + if is_tunnel { self.tunnels } else { 0 };
        own.max(told.map_or(0, |(load, _)| load))
    }

    /// The share of experience that is left.
    fn kept(&self, now: Instant) -> f64 {
        (-now.saturating_duration_since(self.updated).as_secs_f64() / FADES.as_secs_f64()).exp()
    }

    fn sample(&mut self, latency: Duration, now: Instant) {
        let sample = latency.clamp(BEST_LATENCY, WORST_LATENCY).as_secs_f64();
        let (old, kept) = (self.latency(now), self.kept(now));
        // Peaks count at once, recovery takes its time.
        self.latency = if sample > old { sample } else { old * kept + sample * (1.0 - kept) };
        self.updated = now;
        self.asked = true;
    }
}

impl Experience {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(State {
            in_flight: 0,
            tunnels: 0,
            told: None,
            latency: UNKNOWN_LATENCY.as_secs_f64(),
            updated: Instant::now(),
            asked: false,
            failures: 0,
            rate: FailureRate::default(),
            ejection: Ejection::default(),
        }))
    }

    /// Counts a call until the guard is dropped.
    pub(crate) fn begin(self: &Arc<Self>, peer: &Arc<Reach>) -> PendingCall {
        self.begin_at(peer, Instant::now())
    }

    pub(super) fn begin_at(self: &Arc<Self>, peer: &Arc<Reach>, now: Instant) -> PendingCall {
        peer.in_flight.fetch_add(1, Relaxed);
        let mut state = self.lock();
        state.in_flight += 1;
        let is_trial = state.ejection.begin(now);
        PendingCall { instance: self.clone(), peer: peer.clone(), is_trial, is_tunnel: false, waits: Some(now) }
    }

    /// An answer came after `latency`; `failed` if it was an error of the service or a refusal to work.
    pub(super) fn answered_at(&self, latency: Duration, failed: bool, now: Instant) {
        let mut state = self.lock();
        state.sample(if failed { WORST_LATENCY } else { latency }, now);
        let has_failed_often = state.rate.add(failed, now);
        if !failed {
            state.failures = 0;
            // What was under way when it was put out decides nothing; what came later does.
            if state.ejection.until.is_none_or(|until| now >= until) {
                state.ejection.back();
            }
            return;
        }
        state.failures += 1;
        // One that is on trial has no more credit.
        if state.failures >= MAX_CONSECUTIVE_FAILURES || has_failed_often || state.ejection.until.is_some() {
            (state.failures, state.rate) = Default::default();
            state.ejection.out(now);
        }
    }

    /// Whoever asked has waited so long, and waits no more: it would have taken longer still.
    pub(super) fn waited_at(&self, time: Duration, now: Instant) {
        let mut state = self.lock();
        if time.as_secs_f64() > state.latency(now) {
            state.sample(time, now);
        }
    }

    pub(crate) fn is_ejected(&self) -> bool {
        self.is_ejected_at(Instant::now())
    }

    pub(super) fn is_ejected_at(&self, now: Instant) -> bool {
        self.lock().ejection.is_out(now)
    }

    /// What a call is expected to cost, and how many are in line, if that is known of late.
    pub(super) fn known_cost_at(&self, is_tunnel: bool, now: Instant) -> Option<(f64, u32)> {
        let state = self.lock();
        let is_known = state.asked && state.kept(now) > KNOWN;
        is_known
            .then(|| (state.latency(now) * f64::from(state.in_line(is_tunnel, now) + 1), state.in_line(is_tunnel, now)))
    }

    /// As it is to be shown.
    pub(crate) fn seen(&self) -> Seen {
        let (state, now) = (self.lock(), Instant::now());
        // Faded, it says nothing of the instance any more.
        let latency = (state.kept(now) > 0.01).then(|| Duration::from_secs_f64(state.latency(now)));
        Seen { in_flight: state.in_flight + state.tunnels, latency: latency.filter(|_| state.asked) }
    }

    /// Whether forgetting it would lose nothing.
    pub(crate) fn is_forgotten(&self) -> bool {
        let (state, now) = (self.lock(), Instant::now());
        state.in_flight + state.tunnels == 0
            && state.ejection.is_over(now)
            && now.duration_since(state.updated) > FORGOTTEN
    }

    /// What a call is expected to cost: the time that it takes, for as many as are in line.
    /// Where it is about tunnels, those that are open count, too; beside calls they are idle, mostly.
    pub(super) fn cost_at(&self, is_tunnel: bool, now: Instant) -> f64 {
        let state = self.lock();
        state.latency(now) * f64::from(state.in_line(is_tunnel, now) + 1)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }
}

/// What an instance looks like from this node.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen {
    /// Calls from here that are under way, open tunnels among them.
    pub(crate) in_flight: u32,
    /// How soon an answer is expected, if one came of late.
    pub(crate) latency: Option<Duration>,
}

/// One call in flight.
pub(crate) struct PendingCall {
    instance: Arc<Experience>,
    peer: Arc<Reach>,
    is_trial: bool,
    /// It is a tunnel, and open.
    is_tunnel: bool,
    /// Since when an answer is waited for; `None` if there is no more to be learnt from how long it takes.
    waits: Option<Instant>,
}

impl PendingCall {
    /// An answer came after `latency`; `failed` if it was an error of the service or a refusal to work.
    pub(crate) fn answered(&mut self, latency: Duration, failed: bool) {
        self.answered_at(latency, failed, Instant::now());
    }

    pub(super) fn answered_at(&mut self, latency: Duration, failed: bool, now: Instant) {
        self.waits = None;
        self.instance.answered_at(latency, failed, now);
    }

    /// It was not let in: for a while others are better asked, and nothing is wrong with the instance.
    pub(crate) fn refused(&mut self) {
        self.waits = None;
        self.instance.lock().sample(WORST_LATENCY, Instant::now());
    }

    /// It was answered, and goes on as a tunnel.
    pub(crate) fn opened(&mut self) {
        let mut state = self.instance.lock();
        (state.in_flight, state.tunnels) = (state.in_flight - 1, state.tunnels + 1);
        drop(state);
        self.is_tunnel = true;
    }

    /// However long it takes, that is not the instance's fault.
    pub(crate) fn excuse(&mut self) {
        self.waits = None;
    }

    /// The instance's word about its own load.
    pub(crate) fn told(&self, load: u32) {
        self.told_at(load, Instant::now());
    }

    pub(super) fn told_at(&self, load: u32, now: Instant) {
        self.instance.lock().told = Some((load, now));
    }
}

/// A call that is given up says something, too: an instance that answers later than anybody waits must not look as good as one
/// that was never asked.
impl Drop for PendingCall {
    fn drop(&mut self) {
        self.peer.in_flight.fetch_sub(1, Relaxed);
        if let Some(since) = self.waits {
            let now = Instant::now();
            self.instance.waited_at(now.saturating_duration_since(since), now);
        }
        let mut state = self.instance.lock();
        let count = if self.is_tunnel { &mut state.tunnels } else { &mut state.in_flight };
        *count -= 1;
        if self.is_trial {
            state.ejection.undecided();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn one_bad_answer_is_forgotten_by_time_alone() {
        for (latency, failed) in [(MS, true), (Duration::from_secs(1), false), (Duration::from_secs(600), false)] {
            let (instance, now) = (Experience::new(), Instant::now());
            instance.answered_at(latency, failed, now);
            assert!(instance.cost_at(false, now) > 0.9, "at first it is kept away from");
            let later = instance.cost_at(false, now + 8 * FADES);
            assert!(later < 0.0015, "{later}: after eight seconds it is as good as an unknown one");
            assert!(!instance.is_ejected());
        }
    }

    #[test]
    fn what_a_peer_told_of_its_load_is_believed_for_a_moment() {
        let instance = Experience::new();
        instance.lock().told = Some((1000, Instant::now()));
        let now = Instant::now();
        assert!(instance.cost_at(false, now) > 0.9);
        assert!(instance.cost_at(false, now + TOLD_FOR) < 0.0011);
    }

    #[test]
    fn an_ejected_instance_comes_back_by_one_call() {
        let mut ejection = Ejection::default();
        let start = Instant::now();
        ejection.out(start);
        assert!(ejection.is_out(start) && !ejection.begin(start), "a call in need is no trial");
        let later = start + EJECT_MIN;
        assert!(!ejection.is_out(later) && ejection.begin(later));
        assert!(ejection.is_out(later) && !ejection.begin(later), "one at a time");
        assert!(!ejection.is_out(later + TRIAL), "a trial that says nothing holds nobody up");
        ejection.out(later);
        assert!(ejection.is_out(later + EJECT_MIN), "longer each time");
        ejection.back();
        assert!(!ejection.is_out(later));
    }

    #[test]
    fn a_peer_out_of_reach_is_tried_by_one_and_back_when_it_answers() {
        let (peer, now) = (Reach::default(), Instant::now());
        assert_eq!(peer.look(now), (false, false), "nothing is known against it");
        peer.unreachable();
        assert_eq!(peer.look(now), (true, false), "not at once");
        let later = Instant::now() + EJECT_MIN;
        assert_eq!(peer.look(later), (true, true));
        assert_eq!(peer.look(later), (true, false), "one at a time, and out until it answers");
        assert!(!peer.look(later + FORGOTTEN).0, "time alone lifts it, too");
        peer.reached();
        assert_eq!(peer.look(later), (false, false));
    }

    #[test]
    fn failures_in_a_row_eject_and_a_trial_has_no_credit() {
        let instance = Experience::new();
        let now = Instant::now();
        (1..MAX_CONSECUTIVE_FAILURES).for_each(|_| instance.answered_at(MS, true, now));
        assert!(!instance.lock().ejection.is_out(now));
        instance.answered_at(MS, true, now);
        assert!(instance.lock().ejection.is_out(now));
        let later = now + EJECT_MIN;
        assert!(!instance.lock().ejection.is_out(later));
        instance.answered_at(MS, true, later);
        assert!(instance.lock().ejection.is_out(later));
    }

    #[test]
    fn a_trial_that_was_given_up_decides_nothing() {
        let (instance, peer) = (Arc::new(Experience::new()), Arc::default());
        instance.lock().ejection = Ejection { times: 1, until: Some(Instant::now()), trial: None };
        let trial = instance.begin(&peer);
        assert!(instance.is_ejected());
        drop(trial);
        assert!(!instance.is_ejected());
    }
}
