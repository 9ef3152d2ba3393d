//! How large requests may be.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use serde::Deserialize;
use starling_http::{Body, BodyError, Recoded};

/// A number of bytes, as `"10MiB"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Size(pub u64);

impl TryFrom<String> for Size {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let factor = match unit.trim_start() {
            "B" => Some(1),
            "KiB" => Some(1 << 10),
            "MiB" => Some(1 << 20),
            "GiB" => Some(1 << 30),
            "kB" => Some(1_000),
            "MB" => Some(1_000_000),
            "GB" => Some(1_000_000_000),
            _ => None,
        };
        let size = factor.and_then(|factor: u64| number.parse::<u64>().ok()?.checked_mul(factor));
        size.map(Self)
            .ok_or_else(|| format!("{text:?} is not a size: use a number and B, KiB, MiB or GiB, such as \"10MiB\""))
    }
}

/// Lets a body break off that has more than so many bytes. What is returned beside it says whether it had.
pub(crate) fn limited(body: Body, most: u64) -> (Body, Arc<AtomicBool>) {
    let over = Arc::new(AtomicBool::new(false));
    if http_body::Body::is_end_stream(&body) {
        return (body, over);
    }
    (Body::recoded(Limited { body, left: most, over: over.clone() }), over)
}

struct Limited {
    body: Body,
    left: u64,
    over: Arc<AtomicBool>,
}

impl http_body::Body for Limited {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        let length =
            frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()).map_or(0, |data| data.len() as u64);
        match self.left.checked_sub(length) {
            Some(left) => self.left = left,
            None => {
                self.over.store(true, Relaxed);
                return Poll::Ready(Some(Err(BodyError::Broken("it is larger than the route takes".into()))));
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Recoded for Limited {
    fn source(&self) -> &Body {
        &self.body
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[test]
    fn sizes_as_they_are_written() {
        let size = |text: &str| Size::try_from(text.to_owned()).map(|size| size.0);
        assert_eq!(size("0B"), Ok(0));
        assert_eq!(size("10MiB"), Ok(10 << 20));
        assert_eq!(size("1 GB"), Ok(1_000_000_000));
        for bad in ["", "10", "MiB", "-1B", "1.5MiB", "1TiBx", "99999999999GiB", "1MIB"] {
            assert!(size(bad).unwrap_err().contains("is not a size"), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_body_that_is_too_large_breaks_off() {
        let (body, over) = limited(Body::full("12345"), 5);
        assert_eq!(body.collect().await.unwrap().to_bytes(), "12345");
        assert!(!over.load(Relaxed));
        let (body, over) = limited(Body::full("123456"), 5);
        assert!(body.collect().await.is_err() && over.load(Relaxed));
    }
}
