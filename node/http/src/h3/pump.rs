//! The one copier of bodies onto a stream: requests on their way in, responses on their way back.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    task::Poll,
};

use bytes::Bytes;
use http_body::Body;

use super::{Code, stream::Sender};
use crate::BodyError;

/// Why a message was not sent whole.
#[derive(Debug)]
pub(crate) enum Cut {
    /// Its body broke off.
    Body(BodyError),
    /// Trailers that the receiver does not take.
    TrailersTooLarge,
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
        // `None` when nothing more comes at once: then what is queued goes first.
        let next = poll_fn(|cx| match Pin::new(&mut *body).poll_frame(cx) {
            Poll::Ready(frame) => Poll::Ready(Some(frame)),
            Poll::Pending if has_queued => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        });
        match pin!(next).await {
            None => flush(sender).await?,
            Some(None) => break,
            Some(Some(Err(error))) => return Err(Cut::Body(error)),
            Some(Some(Ok(frame))) => match frame.into_data() {
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

async fn flush(sender: &mut Sender) -> Result<(), Cut> {
    sender.flush().await.map_err(|error| match error {
        quinn::WriteError::Stopped(code) => Cut::Unwanted(Some(code.into())),
        _ => Cut::Unwanted(None),
    })
}
