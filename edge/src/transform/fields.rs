//! Header fields that a route sets, adds and removes.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body::{Frame, SizeHint};
use serde::{Deserialize, Deserializer, de};
use starling_http::{Body, BodyError, Recoded, normal};

/// Changes of the fields of a message. Removed first, then set, then added.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Edits {
    /// In place of what is there.
    #[serde(default, deserialize_with = "fields")]
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Beside what is there.
    #[serde(default, deserialize_with = "fields")]
    pub add: Vec<(HeaderName, HeaderValue)>,
    /// Gone.
    #[serde(default, deserialize_with = "names")]
    pub remove: Vec<HeaderName>,
}

impl Edits {
    /// Whether it changes nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.set.is_empty() && self.add.is_empty() && self.remove.is_empty()
    }

    /// Whether it says anything about a field.
    pub(crate) fn has(&self, name: &HeaderName) -> bool {
        let named = self.set.iter().chain(&self.add).map(|(name, _)| name).chain(&self.remove);
        named.into_iter().any(|other| other == name)
    }

    /// Changes the fields of a message.
    pub(crate) fn apply(&self, fields: &mut HeaderMap) {
        for name in &self.remove {
            fields.remove(name);
        }
        for (name, value) in &self.set {
            fields.insert(name, value.clone());
        }
        for (name, value) in &self.add {
            fields.append(name, value.clone());
        }
    }
}

/// A body without these fields in its trailers: some servers read those like fields of the head.
pub(crate) fn without_trailers<'a>(body: Body, names: impl Iterator<Item = &'a HeaderName>) -> Body {
    let mut names = names.peekable();
    match names.peek().is_none() || http_body::Body::is_end_stream(&body) {
        true => body,
        false => Body::recoded(WithoutTrailers { body, names: names.cloned().collect() }),
    }
}

struct WithoutTrailers {
    body: Body,
    names: Vec<HeaderName>,
}

impl http_body::Body for WithoutTrailers {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &mut frame
            && let Some(trailers) = frame.trailers_mut()
        {
            self.names.iter().for_each(|name| drop(trailers.remove(name)));
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

impl Recoded for WithoutTrailers {
    fn source(&self) -> &Body {
        &self.body
    }
}

fn name(text: &str) -> Result<HeaderName, String> {
    let name: HeaderName = text.parse().map_err(|_| format!("{text:?} is not the name of a field"))?;
    match normal::is_of_hops(&name) {
        true => Err(format!("{name} belongs to the connections on the way, or to Starling; leave it alone")),
        false => Ok(name),
    }
}

fn fields<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<(HeaderName, HeaderValue)>, D::Error> {
    let fields = std::collections::BTreeMap::<String, String>::deserialize(d)?;
    let field = |(text, value): (String, String)| {
        let value =
            HeaderValue::from_str(&value).map_err(|_| format!("{text}: {value:?} is not what a field can carry"))?;
        Ok((name(&text)?, value))
    };
    fields.into_iter().map(field).collect::<Result<_, String>>().map_err(de::Error::custom)
}

fn names<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<HeaderName>, D::Error> {
    let names = Vec::<String>::deserialize(d)?;
    names.iter().map(|text| name(text)).collect::<Result<_, String>>().map_err(de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removed_then_set_then_added() {
        let edits = "set = { x-env = \"prod\" }\nadd = { link = \"<b>\" }\nremove = [\"Cookie\", \"x-env\"]";
        let edits: Edits = toml::from_str(edits).unwrap();
        let mut fields = HeaderMap::new();
        for (name, value) in [("cookie", "a"), ("x-env", "1"), ("x-env", "2"), ("link", "<a>"), ("accept", "*/*")] {
            fields.append(name, HeaderValue::from_static(value));
        }
        edits.apply(&mut fields);
        let of = |name: &str| fields.get_all(name).iter().map(|v| v.to_str().unwrap()).collect::<Vec<_>>();
        assert_eq!(
            (of("cookie"), of("x-env"), of("link"), of("accept")),
            (vec![], vec!["prod"], vec!["<a>", "<b>"], vec!["*/*"])
        );
    }

    /// A body of nothing but trailers.
    struct Trailers(Option<HeaderMap>, Body);

    impl http_body::Body for Trailers {
        type Data = Bytes;
        type Error = BodyError;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
            Poll::Ready(self.0.take().map(|trailers| Ok(Frame::trailers(trailers))))
        }
    }

    impl Recoded for Trailers {
        fn source(&self) -> &Body {
            &self.1
        }
    }

    #[tokio::test]
    async fn trailers_say_nothing_in_place_of_the_head() {
        use http_body_util::BodyExt as _;
        let mut trailers = HeaderMap::new();
        for (name, value) in [("x-tenant", "evil"), ("x-checksum", "1")] {
            trailers.append(name, HeaderValue::from_static(value));
        }
        let body = Body::recoded(Trailers(Some(trailers), Body::empty()));
        let left = without_trailers(body, [HeaderName::from_static("x-tenant")].iter()).collect().await.unwrap();
        let left = left.trailers().unwrap();
        assert_eq!((left.get("x-tenant"), left.len()), (None, 1));
    }

    #[test]
    fn what_is_not_a_routes_to_change() {
        for name in [
            "host",
            "Content-Length",
            "transfer-encoding",
            "connection",
            "starling-consumer",
            "starling_caller",
            "te",
            "via",
            "expect",
        ] {
            let error = toml::from_str::<Edits>(&format!("remove = [{name:?}]")).unwrap_err().to_string();
            assert!(error.contains("leave it alone"), "{name}: {error}");
        }
        assert!(toml::from_str::<Edits>("set = { a = \"b\\r\\nc\" }").unwrap_err().to_string().contains("can carry"));
        assert!(
            toml::from_str::<Edits>("set = { \"a b\" = \"c\" }")
                .unwrap_err()
                .to_string()
                .contains("the name of a field")
        );
    }
}
