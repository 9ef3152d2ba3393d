//! Traces: the context that goes along with a call (W3C Trace Context), and the spans of those that are recorded.

use std::{
    borrow::Cow,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Instant, SystemTime},
};

use http::{HeaderMap, HeaderValue};
use starling_http::names::{TRACEPARENT, TRACESTATE};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// The flags of level 2 that are known: sampled, and that the trace's id is random.
const SAMPLED: u8 = 1;
const RANDOM: u8 = 2;
/// Spans that may wait to be exported; beyond it they are dropped and counted.
const MAX_WAITING: usize = 4096;
/// Longest notes of others that a span keeps: what W3C Trace Context §3.3.1.5 asks to be passed on at least.
const MAX_STATE_BYTES: usize = 512;
/// How many of them may be of one other node's calls, on all workers, those included that have not ended: whoever has everything
/// recorded must not leave the others without.
pub(crate) const MAX_OF_ONE: usize = MAX_WAITING / 8;

/// Which trace a call belongs to, and which span the next one is a child of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    trace: [u8; 16],
    span: [u8; 8],
    flags: u8,
}

impl TraceContext {
    /// A new trace. Whether it is sampled is for its id to say, so that everybody who looks at it decides the same.
    fn new(threshold: u64) -> Self {
        let (trace, span) = (rand::random::<u128>().max(1), rand::random::<u64>().max(1));
        let sampled = if (trace as u64) < threshold { SAMPLED } else { 0 };
        Self { trace: trace.to_be_bytes(), span: span.to_be_bytes(), flags: RANDOM | sampled }
    }

    /// The context that fields carry; `None` where there is none, or none that is valid (W3C Trace Context §3.2).
    fn of(fields: &HeaderMap) -> Option<Self> {
        let mut all = fields.get_all(&TRACEPARENT).iter();
        let (Some(field), None) = (all.next(), all.next()) else { return None };
        let field = field.as_bytes();
        let version: [u8; 1] = hex(field.get(..2)?)?;
        // A later version may have more behind a dash; what version 0 has stays where it is.
        let fits = match version {
            [0] => field.len() == 55,
            [0xff] => false,
            _ => field.len() == 55 || field.get(55) == Some(&b'-'),
        };
        if !fits || [2, 35, 52].iter().any(|dash| field[*dash] != b'-') {
            return None;
        }
        let (trace, span, [flags]) = (hex(&field[3..35])?, hex(&field[36..52])?, hex(&field[53..55])?);
        (trace != [0; 16] && span != [0; 8]).then_some(Self { trace, span, flags: flags & (SAMPLED | RANDOM) })
    }

    /// Whether its spans are recorded.
    pub fn is_sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }

    /// The trace's id, as 32 hexadecimal digits.
    pub fn trace_id(&self) -> String {
        format!("{:032x}", u128::from_be_bytes(self.trace))
    }

    pub(crate) fn ids(&self) -> ([u8; 16], [u8; 8]) {
        (self.trace, self.span)
    }

    pub(crate) fn flags(&self) -> u8 {
        self.flags
    }

    /// The same trace, for children of a new span.
    fn child(&self) -> Self {
        Self { span: rand::random::<u64>().max(1).to_be_bytes(), ..*self }
    }

    fn write_to(&self, fields: &mut HeaderMap) {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        let mut put = |from: usize, bytes: &[u8]| {
            for (at, byte) in (from..).step_by(2).zip(bytes) {
                text[at] = DIGITS[usize::from(byte >> 4)];
                text[at + 1] = DIGITS[usize::from(byte & 15)];
            }
        };
        put(3, &self.trace);
        put(36, &self.span);
        put(53, &[self.flags]);
        fields.insert(TRACEPARENT.clone(), HeaderValue::from_bytes(&text).expect("digits and dashes"));
    }
}

/// What others have noted of the trace: several fields are one (W3C Trace Context §3.3). A span keeps no long notes, because
/// spans wait by the thousand; the fields go on as they are.
fn state_of(fields: &HeaderMap) -> Option<String> {
    let notes: Vec<_> = fields.get_all(&TRACESTATE).iter().filter_map(|value| value.to_str().ok()).collect();
    Some(notes.join(",")).filter(|notes| !notes.is_empty() && notes.len() <= MAX_STATE_BYTES)
}

/// Lower-case hexadecimal digits; capital ones are not valid here.
fn hex<const N: usize>(digits: &[u8]) -> Option<[u8; N]> {
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
        *byte = value(pair[0])? << 4 | value(*pair.get(1)?)?;
    }
    (digits.len() == 2 * N).then_some(bytes)
}

/// Whose word it is what trace a call belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The application's beside us, or a member's: its trace goes on.
    Ours,
    /// Anybody's: a trace of our own begins, with a link to the one outside.
    Public,
}

/// What a span tells about: which end of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SpanKind {
    /// A request that came.
    Server,
    /// A request that was sent.
    Client,
}

/// What happened at one hop, and for how long.
#[derive(Debug)]
pub(crate) struct Span {
    pub(crate) context: TraceContext,
    pub(crate) parent: Option<[u8; 8]>,
    /// A trace that this one comes from, but is no part of.
    pub(crate) link: Option<TraceContext>,
    pub(crate) state: Option<String>,
    pub(crate) kind: SpanKind,
    pub(crate) name: String,
    pub(crate) begun: SystemTime,
    pub(crate) ended: SystemTime,
    pub(crate) attributes: Vec<(&'static str, Value)>,
    /// Why it did not go well: a word out of few, and what else there is to say.
    pub(crate) error: Option<(Cow<'static, str>, String)>,
    /// Kept until it is exported, or dropped.
    place: Option<OwnedSemaphorePermit>,
}

/// What a span says of something.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Text(Cow<'static, str>),
    Number(i64),
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text.into())
    }
}

impl From<&'static str> for Value {
    fn from(text: &'static str) -> Self {
        Self::Text(text.into())
    }
}

/// A span that has not ended. It ends when it is dropped.
#[derive(Debug)]
pub(crate) struct OpenSpan {
    span: Option<Span>,
    begun: Instant,
    spans: Spans,
}

impl OpenSpan {
    pub(crate) fn tell(&mut self, what: &'static str, value: impl Into<Value>) {
        if let Some(span) = &mut self.span {
            span.attributes.push((what, value.into()));
        }
    }

    /// Tells how long something took, in microseconds.
    pub(crate) fn tell_time(&mut self, what: &'static str, since: Instant) {
        self.tell(what, Value::Number(since.elapsed().as_micros() as i64));
    }

    pub(crate) fn name(&mut self, name: String) {
        if let Some(span) = &mut self.span {
            span.name = name;
        }
    }

    /// Says why it did not go well, with a word out of few; what is said first counts.
    pub(crate) fn fail(&mut self, why: impl Into<Cow<'static, str>>) {
        self.fail_because(why, String::new());
    }

    /// The same, with what else there is to say.
    pub(crate) fn fail_because(&mut self, why: impl Into<Cow<'static, str>>, message: String) {
        if let Some(span) = &mut self.span {
            span.error.get_or_insert((why.into(), message));
        }
    }

    /// Takes one of the places of its caller, or is dropped if there is none.
    pub(crate) fn take_place(mut self: Box<Self>, places: &Arc<Semaphore>) -> Option<Box<Self>> {
        match places.clone().try_acquire_owned() {
            Ok(place) => {
                self.span.as_mut()?.place = Some(place);
                Some(self)
            }
            Err(_) => {
                self.span = None;
                self.spans.dropped.fetch_add(1, Relaxed);
                None
            }
        }
    }

    pub(crate) fn begun(&self) -> Instant {
        self.begun
    }

    /// A span for a request that is sent in the course of this one. Whoever gets it is told.
    pub(crate) fn departure(&self, fields: &mut HeaderMap) -> Option<Box<OpenSpan>> {
        let context = self.span.as_ref()?.context;
        let child = context.child();
        child.write_to(fields);
        let span = Span::new(child, Some(context.span), SpanKind::Client);
        Some(Box::new(self.spans.open(span)))
    }
}

impl Drop for OpenSpan {
    fn drop(&mut self) {
        if let Some(mut span) = self.span.take() {
            span.ended = span.begun + self.begun.elapsed();
            self.spans.put(span);
        }
    }
}

/// Where spans wait to be exported.
#[derive(Debug, Clone)]
struct Spans {
    queue: mpsc::Sender<Span>,
    dropped: Arc<AtomicU64>,
}

impl Spans {
    fn open(&self, span: Span) -> OpenSpan {
        OpenSpan { span: Some(span), begun: Instant::now(), spans: self.clone() }
    }

    fn put(&self, span: Span) {
        if self.queue.try_send(span).is_err() {
            self.dropped.fetch_add(1, Relaxed);
        }
    }
}

/// Makes traces and spans. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tracer(Option<Recording>);

#[derive(Debug, Clone)]
struct Recording {
    spans: Spans,
    /// Of the lower half of a trace's id: below it a new trace is sampled.
    threshold: u64,
}

impl Tracer {
    /// Records a share of the traces that begin here, 0 to 1, and all that began elsewhere and are to be recorded. What is to
    /// be exported comes from the receiver.
    pub(crate) fn recording(share: f64) -> (Self, mpsc::Receiver<Span>) {
        let (queue, waiting) = mpsc::channel(MAX_WAITING);
        // 2^64 is more than fits, so that a share of 1 means all but one of as many.
        let threshold = (share * 2f64.powi(64)) as u64;
        let spans = Spans { queue, dropped: Arc::default() };
        (Self(Some(Recording { spans, threshold })), waiting)
    }

    /// Spans that found no room to wait.
    pub(crate) fn dropped(&self) -> u64 {
        self.0.as_ref().map_or(0, |recording| recording.spans.dropped.load(Relaxed))
    }

    /// Takes the trace that a request belongs to, or begins one, and tells whoever is called next; the span is there if it is
    /// recorded.
    pub(crate) fn arrival(&self, fields: &mut HeaderMap, origin: Origin) -> (TraceContext, Option<Box<OpenSpan>>) {
        let told = TraceContext::of(fields);
        let (continued, link) = match origin {
            Origin::Ours => (told, None),
            Origin::Public => (None, told),
        };
        if continued.is_none() {
            // What others noted of a trace that is not this one.
            fields.remove(&TRACESTATE);
        }
        let threshold = self.0.as_ref().map_or(0, |recording| recording.threshold);
        let context = continued.unwrap_or_else(|| TraceContext::new(threshold));
        let Some(recording) = &self.0 else {
            // Who does not record does not decide for others: a service that is told nothing may begin a trace of its own.
            if continued.is_none() {
                fields.remove(&TRACEPARENT);
            }
            return (context, None);
        };
        if !context.is_sampled() {
            if continued.is_none() {
                context.write_to(fields);
            }
            return (context, None);
        }
        let parent = continued.map(|parent| parent.span);
        let context = context.child();
        context.write_to(fields);
        let span = Span { link, state: state_of(fields), ..Span::new(context, parent, SpanKind::Server) };
        (context, Some(Box::new(recording.spans.open(span))))
    }
}

impl Span {
    fn new(context: TraceContext, parent: Option<[u8; 8]>, kind: SpanKind) -> Self {
        let now = SystemTime::now();
        Self {
            context,
            parent,
            link: None,
            state: None,
            kind,
            name: String::new(),
            begun: now,
            ended: now,
            attributes: Vec::new(),
            error: None,
            place: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALID: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn fields(traceparent: &[&str]) -> HeaderMap {
        let mut fields = HeaderMap::new();
        for value in traceparent {
            fields.append(&TRACEPARENT, HeaderValue::from_str(value).unwrap());
        }
        fields
    }

    #[test]
    fn what_is_valid_is_read_and_written_the_same() {
        let context = TraceContext::of(&fields(&[VALID])).unwrap();
        assert!(context.is_sampled());
        assert_eq!(context.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        let mut written = HeaderMap::new();
        context.write_to(&mut written);
        assert_eq!(written[&TRACEPARENT], VALID);
        for (later, sampled) in [
            ("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-and-more", true),
            ("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-ff", true),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-fe", false),
        ] {
            let context = TraceContext::of(&fields(&[later])).expect(later);
            assert_eq!(context.is_sampled(), sampled, "{later}");
        }
    }

    #[test]
    fn what_is_not_valid_is_none() {
        for bad in [
            "",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01more",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00_4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-600f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0g",
        ] {
            assert_eq!(TraceContext::of(&fields(&[bad])), None, "{bad}");
        }
        assert_eq!(TraceContext::of(&fields(&[VALID, VALID])), None, "nobody knows which of two");
    }

    #[test]
    fn a_share_of_new_traces_is_recorded() {
        let sampled = |share: f64| {
            let (tracer, _spans) = Tracer::recording(share);
            (0..2000).filter(|_| tracer.arrival(&mut HeaderMap::new(), Origin::Ours).0.is_sampled()).count()
        };
        assert_eq!((sampled(0.0), sampled(1.0)), (0, 2000));
        assert!((800..1200).contains(&sampled(0.5)));
    }

    #[test]
    fn a_trace_goes_on_from_span_to_span() {
        let (tracer, mut spans) = Tracer::recording(0.0);
        let mut fields = fields(&[VALID]);
        fields.insert(&TRACESTATE, HeaderValue::from_static("a=1"));
        let (_, arrival) = tracer.arrival(&mut fields, Origin::Ours);
        let arrival = arrival.unwrap();
        let departure = arrival.departure(&mut fields);
        let sent = TraceContext::of(&fields).unwrap();
        drop((departure, arrival));
        let (client, server) = (spans.try_recv().unwrap(), spans.try_recv().unwrap());
        assert_eq!(server.state.as_deref(), Some("a=1"));
        assert_eq!(server.parent, Some(0x00f0_67aa_0ba9_02b7u64.to_be_bytes()));
        assert_eq!(client.parent, Some(server.context.span));
        assert_eq!(sent.span, client.context.span);
        assert!(server.context.trace == sent.trace && client.context.trace == sent.trace);
        assert_eq!(fields[&TRACESTATE], "a=1");
    }

    #[test]
    fn a_span_keeps_short_notes_of_others_and_the_fields_go_on() {
        let of = |notes: &[String]| {
            let mut fields = HeaderMap::new();
            for note in notes {
                fields.append(&TRACESTATE, note.parse().unwrap());
            }
            state_of(&fields)
        };
        assert_eq!(of(&[]), None);
        assert_eq!(of(&["a=1".into(), "b=2".into()]).as_deref(), Some("a=1,b=2"));
        assert_eq!(of(&[format!("a={}", "x".repeat(MAX_STATE_BYTES))]), None);
    }

    #[test]
    fn the_word_of_strangers_is_linked_and_not_followed() {
        let (tracer, mut spans) = Tracer::recording(1.0);
        let mut fields = fields(&[VALID]);
        fields.insert(&TRACESTATE, HeaderValue::from_static("a=1"));
        let (context, span) = tracer.arrival(&mut fields, Origin::Public);
        assert_ne!(context.trace, TraceContext::of(&self::fields(&[VALID])).unwrap().trace);
        assert!(!fields.contains_key(&TRACESTATE));
        drop(span);
        let span = spans.try_recv().unwrap();
        assert_eq!(span.link, TraceContext::of(&self::fields(&[VALID])));
        assert_eq!(span.parent, None);
    }

    #[test]
    fn without_a_recorder_contexts_pass_as_they_are() {
        let tracer = Tracer::default();
        let mut fields = fields(&[VALID]);
        assert!(tracer.arrival(&mut fields, Origin::Ours).1.is_none());
        assert_eq!(fields[&TRACEPARENT], VALID);
        let mut none = HeaderMap::new();
        tracer.arrival(&mut none, Origin::Ours);
        assert!(none.is_empty(), "and where there is none, others may begin one");
        fields.insert(&TRACESTATE, HeaderValue::from_static("a=1"));
        tracer.arrival(&mut fields, Origin::Public);
        assert!(fields.is_empty(), "but none of a stranger");
    }

    #[test]
    fn one_caller_leaves_room_for_others() {
        let (tracer, mut spans) = Tracer::recording(1.0);
        let begin = |places| tracer.arrival(&mut HeaderMap::new(), Origin::Ours).1.unwrap().take_place(places);
        let (greedy, modest) = (Arc::new(Semaphore::new(MAX_OF_ONE)), Arc::new(Semaphore::new(MAX_OF_ONE)));
        let open: Vec<_> = (0..2 * MAX_WAITING).filter_map(|_| begin(&greedy)).collect();
        assert_eq!((open.len(), tracer.dropped()), (MAX_OF_ONE, (2 * MAX_WAITING - MAX_OF_ONE) as u64));
        drop(open);
        assert!(begin(&greedy).is_none() && begin(&modest).is_some(), "what has ended, waits");
        while spans.try_recv().is_ok() {}
        assert!(begin(&greedy).is_some(), "what is exported, does not");
    }

    #[test]
    fn what_cannot_wait_is_dropped_and_counted() {
        let (tracer, mut spans) = Tracer::recording(1.0);
        for _ in 0..MAX_WAITING + 7 {
            tracer.arrival(&mut HeaderMap::new(), Origin::Ours);
        }
        assert_eq!(tracer.dropped(), 7);
        assert!(spans.try_recv().is_ok());
    }
}
