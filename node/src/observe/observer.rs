//! What a door notes of a call: from its arrival to the end of its answer.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use http::{HeaderMap, Method, Response, StatusCode};
use starling_http::{Body, Guard, Guarded};

use super::{
    ledger::{Account, Ledger, Page, method_label, open},
    trace::{OpenSpan, Origin, TraceContext, Tracer},
};

/// What stands for the service of a request that is for none.
const UNKNOWN: &str = "_UNKNOWN";

/// Notes the calls of one worker. Cheap to clone; each clone notes into the same.
#[derive(Clone)]
pub struct Observer {
    pub(super) sent: Arc<Page>,
    pub(super) served: Arc<Ledger>,
    pub(super) tracer: Tracer,
}

impl Observer {
    /// Begins to note a request that goes into the mesh from here. Its fields then say which trace it belongs to.
    pub fn outgoing(&self, method: &Method, fields: &mut HeaderMap, origin: Origin) -> Observed {
        self.begin(self.sent.clone(), method, fields, origin)
    }

    /// Where the calls of another node are counted, by the name under which it calls. To be held as long as it may call.
    pub(crate) fn of_caller(&self, caller: &str) -> Arc<Page> {
        self.served.page(caller)
    }

    /// Begins to note a call of another node.
    pub(crate) fn incoming(&self, caller: &Arc<Page>, method: &Method, fields: &mut HeaderMap) -> Observed {
        let mut observed = self.begin(caller.clone(), method, fields, Origin::Ours);
        observed.span = observed.span.take().and_then(|span| span.take_place(&caller.places));
        observed
    }

    fn begin(&self, page: Arc<Page>, method: &Method, fields: &mut HeaderMap, origin: Origin) -> Observed {
        let (context, span) = self.tracer.arrival(fields, origin);
        Observed {
            begun: span.as_ref().map_or_else(Instant::now, |span| span.begun()),
            method: method_label(method),
            page,
            account: None,
            head: None,
            attempts: 0,
            uploaded: None,
            downloaded: 0,
            whole: false,
            context,
            span,
        }
    }
}

/// One call, as a door sees it. What it has noted is counted when it is dropped, with the body of the answer.
pub struct Observed {
    begun: Instant,
    method: &'static str,
    page: Arc<Page>,
    account: Option<Arc<Mutex<Account>>>,
    head: Option<StatusCode>,
    attempts: u32,
    uploaded: Option<Arc<AtomicU64>>,
    downloaded: u64,
    whole: bool,
    context: TraceContext,
    span: Option<Box<OpenSpan>>,
}

impl Observed {
    /// When the call arrived.
    pub fn begun(&self) -> Instant {
        self.begun
    }

    /// Which trace the call belongs to.
    pub fn context(&self) -> TraceContext {
        self.context
    }

    /// A span for an attempt at the call, if it is recorded: its fields then lead there.
    pub(crate) fn departure(&self, fields: &mut HeaderMap) -> Option<Box<OpenSpan>> {
        self.span.as_ref()?.departure(fields)
    }

    /// Counts an attempt at the call.
    pub(crate) fn attempted(&mut self) {
        self.attempts += 1;
    }

    /// Says for which service the call is, once that is known: its name, not what a stranger calls it. What is said first counts.
    pub fn is_for(&mut self, service: &str) {
        if self.account.is_some() {
            return;
        }
        self.account = Some(self.page.account(service));
        let method = self.method;
        self.tell("server.address", || service.to_string());
        if let Some(span) = &mut self.span {
            span.name(format!("{method} {service}"));
        }
    }

    /// Tells something in the call's span, if it has one.
    pub fn tell(&mut self, what: &'static str, value: impl FnOnce() -> String) {
        if let Some(span) = &mut self.span {
            span.tell(what, value());
        }
    }

    /// Counts the bytes of a request's body.
    pub fn counting(&mut self, body: Body) -> Body {
        if http_body::Body::is_end_stream(&body) {
            return body;
        }
        body.counted(self.uploaded.insert(Arc::default()).clone())
    }

    /// Notes the head of the answer, and gives its body this to keep, and whatever it has kept so far.
    pub fn answered<G: Guard>(mut self, response: Response<Guarded<G>>) -> Response<Guarded<Answered<G>>> {
        let status = response.status();
        self.head = Some(status);
        let account = self.account.get_or_insert_with(|| self.page.account(UNKNOWN));
        open(account).answered(self.method, status, self.begun.elapsed());
        if let Some(span) = &mut self.span {
            span.tell("http.request.method", self.method);
            span.tell("http.response.status_code", super::trace::Value::Number(status.as_u16().into()));
            span.tell_time("starling.head_us", self.begun);
            if status.is_server_error() {
                span.fail(status.as_str().to_string());
            }
        }
        // Nothing of the body of an answer to HEAD is to come.
        self.whole = self.method == "HEAD" || http_body::Body::is_end_stream(response.body());
        response.map(|body| body.map_guard(|kept| Answered { observed: self, kept }))
    }
}

impl Guard for Observed {
    fn passed(&mut self, bytes: usize) {
        self.downloaded += bytes as u64;
    }

    fn ended(&mut self) {
        self.whole = true;
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        if let Some(account) = &self.account {
            let mut account = open(account);
            if self.head.is_some() {
                account.whole.add(self.begun.elapsed());
                account.cut += u64::from(!self.whole);
            } else {
                account.abandoned += 1;
            }
            account.attempts += u64::from(self.attempts);
            account.request_bytes += self.uploaded.as_ref().map_or(0, |bytes| bytes.load(Relaxed));
            account.response_bytes += self.downloaded;
        }
        if let Some(span) = &mut self.span {
            match self.head {
                None => span.fail("abandoned"),
                Some(_) if !self.whole => span.fail("cut"),
                Some(_) => {}
            }
        }
    }
}

/// What the body of an answer keeps: the note of its call, and what it has kept before.
pub struct Answered<G> {
    observed: Observed,
    kept: Option<G>,
}

impl<G: Guard> Guard for Answered<G> {
    fn passed(&mut self, bytes: usize) {
        self.observed.passed(bytes);
        self.kept.passed(bytes);
    }

    fn ended(&mut self) {
        self.observed.ended();
        self.kept.ended();
    }
}
