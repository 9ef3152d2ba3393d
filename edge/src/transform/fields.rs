//! Header fields that a route sets, adds and removes.

use http::{HeaderMap, HeaderName, HeaderValue};
use serde::{Deserialize, Deserializer, de};
use starling_http::normal;

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

    #[test]
    fn what_is_not_a_routes_to_change() {
        for name in
            ["host", "Content-Length", "transfer-encoding", "connection", "starling-consumer", "starling_caller", "te"]
        {
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
