//! Which web pages may call a route (the CORS protocol, Fetch §3.2).

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use serde::{Deserialize, Deserializer, de};

/// `cors = { origins = ["https://app.example.com"], … }` of a route.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cors {
    /// Origins of the pages, as browsers send them, or `*`.
    #[serde(deserialize_with = "origins")]
    pub origins: Vec<String>,
    /// Methods that pages may use; the usual ones if not told.
    #[serde(default = "usual_methods", deserialize_with = "methods")]
    pub methods: Vec<String>,
    /// Fields that pages may send; what they ask for if not told.
    pub headers: Option<Vec<String>>,
    /// Fields of the answer that pages may read.
    #[serde(default)]
    pub expose: Vec<String>,
    /// Whether pages may send cookies and the like.
    #[serde(default)]
    pub credentials: bool,
    /// How long browsers may remember; 10 min if not told.
    #[serde(default = "usual_max_age", deserialize_with = "starling_node::config::duration")]
    pub max_age: Duration,
}

fn usual_methods() -> Vec<String> {
    ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"].map(String::from).into()
}

fn usual_max_age() -> Duration {
    Duration::from_secs(600)
}

fn origins<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    let origins = Vec::<String>::deserialize(d)?;
    let is_origin = |text: &str| {
        text.split_once("://").is_some_and(|(scheme, host)| {
            !scheme.is_empty() && host.parse::<http::uri::Authority>().is_ok() && !host.contains('@')
        })
    };
    match origins.iter().find(|origin| *origin != "*" && !is_origin(origin)) {
        Some(wrong) => {
            Err(de::Error::custom(format!("{wrong:?} is not an origin: use \"https://HOST\" without a path")))
        }
        None if origins.is_empty() => Err(de::Error::custom("origins is empty: name one, or leave cors out")),
        None => Ok(origins),
    }
}

fn methods<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    let methods = Vec::<String>::deserialize(d)?;
    match methods.iter().find(|method| method.parse::<Method>().is_err()) {
        Some(wrong) => Err(de::Error::custom(format!("{wrong:?} is not a method"))),
        None => Ok(methods),
    }
}

/// Whether a browser asks if it may send a request.
pub(crate) fn is_preflight(method: &Method, fields: &HeaderMap) -> bool {
    *method == Method::OPTIONS
        && fields.contains_key(header::ORIGIN)
        && fields.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// Removes what a service says of who may call.
pub(crate) fn remove(answer: &mut HeaderMap) {
    for name in [
        header::ACCESS_CONTROL_ALLOW_ORIGIN,
        header::ACCESS_CONTROL_ALLOW_CREDENTIALS,
        header::ACCESS_CONTROL_ALLOW_METHODS,
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        header::ACCESS_CONTROL_EXPOSE_HEADERS,
        header::ACCESS_CONTROL_MAX_AGE,
    ] {
        answer.remove(name);
    }
}

impl Cors {
    /// What is wrong with it, and what to do.
    pub(crate) fn problem(&self) -> Option<&'static str> {
        let any = self.origins.iter().any(|origin| origin == "*");
        (any && self.credentials).then_some(
            "every page of the web could call in its reader's name: name the origins, or leave credentials out",
        )
    }

    /// Fields of every answer to a request with these fields: that of the service, and those of our own making.
    pub(crate) fn fields(&self, request: &HeaderMap) -> HeaderMap {
        let mut fields = HeaderMap::new();
        fields.insert(header::VARY, HeaderValue::from_static("origin"));
        let Some(origin) = request.get(header::ORIGIN).filter(|origin| self.allows(origin)) else { return fields };
        let any = self.origins.iter().any(|allowed| allowed == "*");
        let allowed = if any { HeaderValue::from_static("*") } else { origin.clone() };
        fields.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, allowed);
        if self.credentials {
            fields.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
        put(&mut fields, header::ACCESS_CONTROL_EXPOSE_HEADERS, &self.expose.join(", "));
        fields
    }

    /// What the answer to a preflight has besides.
    pub(crate) fn preflight(&self, request: &HeaderMap) -> HeaderMap {
        let mut fields = HeaderMap::new();
        put(&mut fields, header::ACCESS_CONTROL_ALLOW_METHODS, &self.methods.join(", "));
        match (&self.headers, request.get(header::ACCESS_CONTROL_REQUEST_HEADERS)) {
            (Some(allowed), _) => put(&mut fields, header::ACCESS_CONTROL_ALLOW_HEADERS, &allowed.join(", ")),
            (None, Some(asked)) => drop(fields.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, asked.clone())),
            (None, None) => {}
        }
        fields.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from(self.max_age.as_secs()));
        fields
    }

    fn allows(&self, origin: &HeaderValue) -> bool {
        self.origins.iter().any(|allowed| allowed == "*" || origin.as_bytes().eq_ignore_ascii_case(allowed.as_bytes()))
    }
}

fn put(fields: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value)
        && !value.is_empty()
    {
        fields.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(origin: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::ORIGIN, origin.parse().unwrap())])
    }

    #[test]
    fn pages_of_other_origins_get_nothing() {
        let cors: Cors = toml::from_str("origins = [\"https://app.example.com\"]\ncredentials = true").unwrap();
        let fields = cors.fields(&request("https://app.example.com"));
        assert_eq!(fields[header::ACCESS_CONTROL_ALLOW_ORIGIN], "https://app.example.com");
        assert_eq!(fields[header::ACCESS_CONTROL_ALLOW_CREDENTIALS], "true");
        let fields = cors.fields(&request("https://evil.example.com"));
        assert_eq!(fields.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["vary"]);
    }

    #[test]
    fn any_origin_is_a_star_and_has_no_credentials() {
        let any: Cors = toml::from_str("origins = [\"*\"]").unwrap();
        assert_eq!(any.fields(&request("https://a.b"))[header::ACCESS_CONTROL_ALLOW_ORIGIN], "*");
        let any: Cors = toml::from_str("origins = [\"*\"]\ncredentials = true").unwrap();
        assert!(any.problem().is_some());
    }

    #[test]
    fn what_is_no_origin_is_refused() {
        for wrong in ["[]", "[\"app.example.com\"]", "[\"https://a/b\"]"] {
            assert!(toml::from_str::<Cors>(&format!("origins = {wrong}")).is_err(), "{wrong}");
        }
    }
}
