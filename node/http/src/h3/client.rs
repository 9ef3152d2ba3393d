//! Sends requests over an established QUIC connection.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use http::{Method, response};
use tokio_util::task::AbortOnDropHandle;

use super::{
    Broken, Code, Fault,
    codec::{
        control::Role,
        head::{self, Checked},
        message::Event,
    },
    connection::{Connection, MAX_SECTION_BYTES},
    datagrams::Flow,
    order::Order,
    pump::{Cut, pump},
    stream::{Receiver, Sender},
};
use crate::{
    Body, Head, Shelf,
    interim::MAX_TAKEN,
    normal::Origin,
    shelf::Wanted,
    tunnel::{self, FlowSlot, Protocol},
};

/// A request waits so long for others to end, if the server takes no more at a time: it is not a queue.
const OPENS_WITHIN: Duration = Duration::from_millis(100);
/// The same on a connection that is new for so long: a node gives a peer its places when it knows who that is, which is round trips
/// after the peer may send its first requests.
const NEW: Duration = Duration::from_secs(1);

/// How long a request waits for the server's settings that depends on them.
const SETTINGS_WITHIN: Duration = Duration::from_secs(3);

/// One connection to a server, for requests. Cheap to clone; the connection closes with the last clone.
#[derive(Clone)]
pub struct Client(Arc<Closing>);

struct Closing {
    connection: Arc<Connection>,
    shelf: Shelf,
    since: Instant,
}

impl Drop for Closing {
    fn drop(&mut self) {
        self.connection.quinn().close(Code::H3_NO_ERROR.var_int(), b"");
    }
}

/// The answer, as far as it has come.
#[derive(Debug)]
pub struct Answer {
    /// Its head.
    pub head: response::Parts,
    /// Its body; dropping it before the end tells the server so.
    pub body: Body,
    /// The rest of the upload, if the answer came before its end. Dropping it resets the upload.
    pub upload: Option<AbortOnDropHandle<()>>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The server has as many requests of this connection as it takes at a time. Nothing was sent.
    #[error("the server takes no more requests at a time")]
    Full,
    /// The connection was gone before the request could be sent.
    #[error("{0}")]
    NotSent(String),
    /// The server does not take so large a head. Nothing was sent.
    #[error("the header fields are larger than the server takes")]
    TooLarge,
    /// The server does not take the request's body.
    #[error("the server does not take the request's body")]
    Stalled,
    /// The request's own body broke off.
    #[error("the request's body broke off")]
    Body,
    /// The server opens no tunnels of that kind. Nothing was sent.
    #[error("the server does not take tunnels with a protocol")]
    Unsupported,
    /// No answer came.
    #[error(transparent)]
    Broken(#[from] Broken),
}

impl Client {
    /// Begins to speak HTTP/3 over a connection. Answers that nobody reads stand on the shelf.
    pub fn start(connection: quinn::Connection, shelf: Shelf, order: Order) -> Self {
        let since = Instant::now();
        Self(Arc::new(Closing { connection: Connection::start(connection, Role::Client, order), shelf, since }))
    }

    /// The connection.
    pub fn connection(&self) -> &quinn::Connection {
        self.0.connection.quinn()
    }

    /// Whether new requests should go over this connection: the server neither goes away nor is gone, and the connection
    /// does not carry so much of the past that another one is better.
    pub fn takes_requests(&self) -> bool {
        self.0.connection.takes_requests() && !self.0.connection.is_worn_out()
    }

    /// Sends a request and waits for the head of the final answer. Dropping the future cancels
    /// the request at the server.
    pub async fn send(&self, head: Head<'_>, body: Option<Body>) -> Result<Answer, RequestError> {
        let connection = &self.0.connection;
        let opened = tokio::select! {
            biased;
            opened = connection.quinn().open_bi() => opened,
            () = self.full() => return Err(RequestError::Full),
        };
        let (send, receive) = opened.map_err(|error| RequestError::NotSent(error.to_string()))?;
        let mut sender = Sender::new(send, connection.clone(), Code::H3_REQUEST_CANCELLED);
        let mut receiver = Receiver::new(receive, connection.clone(), Code::H3_REQUEST_CANCELLED);
        match head.protocol {
            Some(_) if !self.takes_protocols().await => return Err(RequestError::Unsupported),
            _ => sender.have_patience(patience_with(&head)),
        }
        if !connection.takes_requests() {
            // It said so while we waited for our turn; the stream goes with a reset.
            return Err(RequestError::NotSent("the server goes away".into()));
        }
        let flow = head.protocol.filter(|protocol| protocol.0 == Protocol::UDP);
        let flow = flow.map(|_| FlowSlot::new(Flow::of(connection, sender.stream_id())));
        sender.request(&head).map_err(|_| RequestError::TooLarge)?;

        let Some(body) = body else {
            sender.flush().await.map_err(|error| RequestError::NotSent(error.to_string()))?;
            sender.finish();
            let patience = patience_with(&head);
            let head = receive_head(&mut receiver, head).await?;
            return Ok(Answer { head, body: self.body(receiver, patience), upload: None });
        };
        let mut upload = Box::pin(async move {
            let stopped = sender.stopped();
            let sent = pump(&mut sender, Some(body), stopped).await;
            if let Err(Cut::Unwanted(Some(code))) = &sent {
                // RFC 9000 §3.5: a stream that was stopped is reset with the code that it was stopped with.
                sender.reset(*code);
            }
            sent
        });
        let mut uploading = true;
        let mut answer_head = {
            let mut answered = std::pin::pin!(receive_head(&mut receiver, head));
            loop {
                tokio::select! {
                    biased;
                    head = &mut answered => break head?,
                    sent = &mut upload, if uploading => match sent {
                        Err(Cut::Body(_)) => return Err(RequestError::Body),
                        Err(Cut::Stalled) => return Err(RequestError::Stalled),
                        // What the server makes of it, its answer tells.
                        Ok(()) | Err(Cut::Unwanted(_) | Cut::TrailersTooLarge) => uploading = false,
                    },
                }
            }
        };
        if let Some(flow) = flow {
            answer_head.extensions.insert(flow);
        }
        let upload = uploading.then(|| AbortOnDropHandle::new(tokio::spawn(async move { drop(upload.await) })));
        Ok(Answer { head: answer_head, body: self.body(receiver, patience_with(&head)), upload })
    }
}

impl Client {
    /// Resolves when a request has waited long enough for others to end.
    async fn full(&self) {
        let patience = match self.0.since.elapsed() < NEW {
            true => NEW,
            false => OPENS_WITHIN.max(self.connection().rtt() * 3),
        };
        tokio::time::sleep(patience).await;
    }

    /// Whether the server takes extended CONNECT, which it must have said before (RFC 9220 §3); it says so with its first words.
    async fn takes_protocols(&self) -> bool {
        let told = tokio::time::timeout(SETTINGS_WITHIN, self.0.connection.peer()).await;
        told.is_ok_and(|settings| settings.extended_connect)
    }

    fn body(&self, receiver: Receiver, patience: Duration) -> Body {
        Body::from(receiver).shelved_for(&self.0.shelf, patience, Wanted::Now)
    }
}

/// How long what a request brings may be left lying.
fn patience_with(head: &Head<'_>) -> Duration {
    tunnel::patience_with(head.method, head.protocol)
}

async fn receive_head(receiver: &mut Receiver, request: Head<'_>) -> Result<response::Parts, Broken> {
    for _ in 0..=MAX_TAKEN {
        let Some(Event::Head(section)) = receiver.event().await? else {
            return Err(receiver.break_off(Fault::malformed("an answer without a head")));
        };
        let Checked { head, length } = match head::decode_response(&section, MAX_SECTION_BYTES) {
            Ok(checked) => checked,
            Err(fault) => return Err(receiver.break_off(fault)),
        };
        if head.status.is_informational() {
            receiver.expect_another_head();
            if let Some(interim) = request.interim {
                interim.pass_on(head.status, head.headers, Origin::Mesh);
            }
            continue;
        }
        // These have no content, whatever length they tell (RFC 9110 §6.4.1).
        let bodiless = *request.method == Method::HEAD || matches!(head.status.as_u16(), 204 | 304);
        receiver.promise(if bodiless { Some(0) } else { length });
        // Often the whole answer is there already.
        receiver.look_ahead().await?;
        return Ok(head);
    }
    Err(receiver.break_off(Fault::Stream(Code::H3_EXCESSIVE_LOAD, "too many interim answers")))
}
