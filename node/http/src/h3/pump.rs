//! The one copier of bodies onto a stream: requests on their way in, responses on their way back.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    task::Poll,
};

use bytes::Bytes;
use http_body::{Body, Frame};

use super::{
    Code,
    stream::{Sender, Unsent},
};
use crate::BodyError;

/// Why a message was not sent whole.
#[derive(Debug)]
pub(crate) enum Cut {
    /// Its body broke off.
    Body(BodyError),
    /// Trailers that the receiver does not take.
    TrailersTooLarge,
    /// The receiver takes nothing.
    Stalled,
    /// The receiver wants no more of it, with the code that it gave, if it gave one; or the connection is gone.
    Unwanted(Option<Code>),
}

/// Sends what is queued, then the body and its trailers, if there is one, and ends the stream. What is there at once leaves in one write. Ends
/// early when `unwanted` resolves; the sender is to be reset then, as after any error.
pub(crate) async fn pump<B>(
    sender: &mut Sender,
    body: Option<B>,
    unwanted: impl Future<Output = Option<Code>>,
) -> Result<(), Cut>
where
    B: Body<Data = Bytes, Error = BodyError> + Unpin,
{
    tokio::select! {
        biased;
        sent = copy(sender, body) => sent,
        code = unwanted => Err(Cut::Unwanted(code)),
    }
}

async fn copy<B>(sender: &mut Sender, mut body: Option<B>) -> Result<(), Cut>
where
    B: Body<Data = Bytes, Error = BodyError> + Unpin,
{
    while let Some(body) = body.as_mut().filter(|body| !body.is_end_stream()) {
        let has_queued = sender.has_queued();
        let next = poll_fn(|cx| match Pin::new(&mut *body).poll_frame(cx) {
            Poll::Ready(frame) => Poll::Ready(Some(frame)),
            Poll::Pending if has_queued => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        });
        let frame = match pin!(next).await {
            Some(frame) => frame,
            // Nothing more comes at once: what is queued goes first.
            None => match flush_beside(sender, body).await? {
                Some(frame) => frame,
                None => continue,
            },
        };
        match frame {
            None => break,
            Some(Err(error)) => return Err(Cut::Body(error)),
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => sender.data(data),
                Err(frame) => {
                    // An empty section is allowed, but some decoders stumble over it.
                    if let Ok(trailers) = frame.into_trailers()
                        && !trailers.is_empty()
                    {
                        sender.trailers(&trailers).map_err(|_| Cut::TrailersTooLarge)?;
                    }
                    break;
                }
            },
        }
        if sender.is_full() {
            flush(sender).await?;
        }
    }
    flush(sender).await?;
    sender.finish();
    Ok(())
}

/// Flushes, and goes on reading meanwhile: the body's sender may give up while the receiver takes nothing, and whoever waits for
/// data is the first to see that. Reads one frame at most.
async fn flush_beside<B>(
    sender: &mut Sender,
    body: &mut B,
) -> Result<Option<Option<Result<Frame<Bytes>, BodyError>>>, Cut>
where
    B: Body<Data = Bytes, Error = BodyError> + Unpin,
{
    let mut flushing = pin!(flush(sender));
    let read = poll_fn(|cx| {
        if let Poll::Ready(flushed) = flushing.as_mut().poll(cx) {
            return Poll::Ready(flushed.map(|()| None));
        }
        Pin::new(&mut *body).poll_frame(cx).map(|frame| Ok(Some(frame)))
    })
    .await?;
    if let Some(Some(Err(error))) = read {
        return Err(Cut::Body(error));
    }
    if read.is_some() {
        flushing.await?;
    }
    Ok(read)
}

async fn flush(sender: &mut Sender) -> Result<(), Cut> {
    sender.flush().await.map_err(|error| match error {
        Unsent::Stalled => Cut::Stalled,
        Unsent::Failed(quinn::WriteError::Stopped(code)) => Cut::Unwanted(Some(code.into())),
        Unsent::Failed(_) => Cut::Unwanted(None),
    })
}
