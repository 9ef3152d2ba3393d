//! `match`: what a request must have, besides host and path, for a route to be its.

use std::collections::BTreeMap;

use http::{HeaderName, Method};
use serde::{Deserialize, Deserializer, de};
use starling_http::normal::is_of_hops;

use crate::route::Sought;

/// Most conditions of one kind.
const MAX_CONDITIONS: usize = 16;

/// `match`: what a request must have, besides host and path, for a route to be its. All of it; nothing if not told.
///
/// They choose among routes, and protect nothing: a request that does not have it takes another route, if there is one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Conditions {
    /// One of these methods; any if empty. GET stands for HEAD as well, and for WebSockets over HTTP/2 and 3.
    #[serde(deserialize_with = "methods")]
    pub methods: Vec<Method>,
    /// Fields with a value each; `*` is any.
    #[serde(deserialize_with = "fields")]
    pub headers: Vec<(HeaderName, String)>,
    /// Parameters of the query with a value each, which may be written with escapes; `*` is any.
    pub query: BTreeMap<String, String>,
}

impl Conditions {
    /// Whether a request has all of it. What it says twice, it has to say alike.
    pub(crate) fn hold(&self, sought: &Sought<'_>) -> bool {
        self.allow(sought.method) && self.hold_but_for_method(sought)
    }

    /// Whether a method is one of them.
    fn allow(&self, method: &Method) -> bool {
        let method = if *method == Method::HEAD { &Method::GET } else { method };
        self.methods.is_empty() || self.methods.contains(method)
    }

    pub(crate) fn hold_but_for_method(&self, sought: &Sought<'_>) -> bool {
        let has_field = |(name, value): &(HeaderName, String)| {
            let mut found = sought.headers.get_all(name).iter().peekable();
            found.peek().is_some() && found.all(|found| value == "*" || found.as_bytes() == value.as_bytes())
                || sought.announces(name)
        };
        let has_parameter = |(name, value): (&String, &String)| {
            let mut found = sought.query.parameters().iter().filter(|(found, _)| found == name).peekable();
            found.peek().is_some() && found.all(|(_, found)| value == "*" || found == value)
        };
        self.headers.iter().all(has_field) && self.query.iter().all(has_parameter)
    }

    /// How much it asks for: of two routes of one path, the one that asks for more is the more specific one.
    pub(crate) fn count(&self) -> usize {
        usize::from(!self.methods.is_empty()) + self.headers.len() + self.query.len()
    }

    /// Whether one request could have both as far as one can tell, with neither asking for more.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        let any_of_both = |a: &Self, b: &Self| a.methods.iter().any(|method| b.methods.contains(method));
        let one_method = self.methods.is_empty() || other.methods.is_empty() || any_of_both(self, other);
        self.count() == other.count() && one_method && {
            let others = |value: &str, other: &str| value != "*" && other != "*" && value != other;
            let field = |(name, value): &(HeaderName, String)| {
                other.headers.iter().any(|(known, is)| known == name && others(value, is))
            };
            let parameter =
                |(name, value): (&String, &String)| other.query.get(name).is_some_and(|is| others(value, is));
            !self.headers.iter().any(field) && !self.query.iter().any(parameter)
        }
    }

    /// In words; empty if there are none.
    pub(crate) fn words(&self) -> Vec<String> {
        let methods = self.methods.iter().map(Method::as_str).collect::<Vec<_>>().join(" or ");
        let methods = (!methods.is_empty()).then_some(methods);
        let headers = self.headers.iter().map(|(name, value)| format!("{name}: {value}"));
        let query = self.query.iter().map(|(name, value)| format!("?{name}={value}"));
        methods.into_iter().chain(headers).chain(query).collect()
    }
}

fn methods<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<Method>, D::Error> {
    let names = Vec::<String>::deserialize(d)?;
    let method = |name: &String| {
        let method = name.parse::<Method>().ok().filter(|_| name.bytes().all(|b| b.is_ascii_uppercase() || b == b'-'));
        match method {
            Some(Method::HEAD) => Err(de::Error::custom("GET stands for HEAD as well; leave it out")),
            Some(Method::CONNECT) | None => {
                Err(de::Error::custom(format!("{name:?} is not a method: use \"GET\", \"POST\" and the like")))
            }
            Some(method) => Ok(method),
        }
    };
    match names.len() {
        0 => Err(de::Error::custom("this list must not be empty; leave it out for all methods")),
        1..=MAX_CONDITIONS => names.iter().map(method).collect(),
        _ => Err(de::Error::custom(format!("{MAX_CONDITIONS} methods at most"))),
    }
}

fn fields<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<(HeaderName, String)>, D::Error> {
    let fields = BTreeMap::<String, String>::deserialize(d)?;
    if fields.len() > MAX_CONDITIONS {
        return Err(de::Error::custom(format!("{MAX_CONDITIONS} fields at most")));
    }
    let field = |(name, value): (String, String)| {
        let wrong = |what: &str| Err(de::Error::custom(format!("{name}: {what}")));
        let Ok(field) = name.parse::<HeaderName>() else { return wrong("this is not the name of a field") };
        // These are gone, or are written in other ways, by the time at which routes are looked for.
        let is_ours =
            field.as_str().starts_with("starling-") || ["host", "expect", "content-length"].contains(&field.as_str());
        if is_of_hops(&field) || is_ours {
            return wrong("this is between neighbours, or the edge's own, and chooses no route");
        }
        if field == http::header::COOKIE {
            return wrong("clients write cookies in several ways: use another field");
        }
        if field.as_str().contains('_') {
            return wrong("requests with _ in the name of a field are not taken");
        }
        if value.trim() != value || !value.bytes().all(|b| matches!(b, b' '..=b'~')) {
            return wrong("its value is visible ASCII, without blanks at the ends");
        }
        Ok((field, value))
    };
    fields.into_iter().map(field).collect()
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::*;
    use crate::route::Query;

    fn conditions(text: &str) -> Conditions {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn what_a_request_must_have() {
        let all = conditions(
            "methods = [\"GET\", \"POST\"]\nheaders = { x-tenant = \"acme\", x-beta = \"*\" }\nquery = { \"a b\" = \"1\", c = \"*\" }",
        );
        let fields = |pairs: &[(&'static str, &'static str)]| -> HeaderMap {
            let mut fields = HeaderMap::new();
            for (name, value) in pairs {
                fields.append(*name, value.parse().unwrap());
            }
            fields
        };
        let good = fields(&[("x-tenant", "acme"), ("x-beta", "")]);
        for (method, fields, query, holds) in [
            ("GET", &good, "a%20b=1&c", true),
            ("HEAD", &good, "c=&a+b=%31", true),
            ("POST", &good, "x&a+b=1&a+b=%31&c=7&c=8", true),
            // Whichever of two the service takes, it is not the one alone for which the route is.
            ("POST", &good, "x&a+b=2&a+b=1&c=7", false),
            ("GET", &fields(&[("x-tenant", "acme"), ("x-tenant", "other"), ("x-beta", "")]), "a+b=1&c", false),
            ("PUT", &good, "a+b=1&c", false),
            ("GET", &good, "a+b=1", false),
            ("GET", &good, "a+b=11&c", false),
            ("GET", &fields(&[("x-tenant", "Acme"), ("x-beta", "")]), "a+b=1&c", false),
            ("GET", &fields(&[("x-tenant", "acme")]), "a+b=1&c", false),
        ] {
            let method = method.parse().unwrap();
            let sought = Sought { host: "", method: &method, headers: fields, query: &Query::new(Some(query)) };
            assert_eq!(all.hold(&sought), holds, "{method} {fields:?} {query}");
        }
        let none = HeaderMap::new();
        assert!(conditions("").hold(&Sought {
            host: "",
            method: &Method::PUT,
            headers: &none,
            query: &Query::new(None)
        }));
        assert_eq!(all.words(), ["GET or POST", "x-beta: *", "x-tenant: acme", "?a b=1", "?c=*"]);
    }

    #[test]
    fn whether_one_request_could_take_two_routes() {
        for (one, other, is_like) in [
            ("", "", true),
            ("methods = [\"GET\"]", "methods = [\"POST\"]", false),
            ("methods = [\"GET\", \"PUT\"]", "methods = [\"PUT\"]", true),
            ("methods = [\"GET\"]", "", false),
            ("headers = { a = \"1\" }", "headers = { a = \"2\" }", false),
            ("headers = { a = \"1\" }", "headers = { b = \"2\" }", true),
            ("headers = { a = \"1\" }", "query = { a = \"2\" }", true),
            ("query = { a = \"1\" }", "query = { a = \"*\" }", true),
            ("query = { a = \"1\" }", "query = { a = \"2\" }", false),
        ] {
            let (one, other) = (conditions(one), conditions(other));
            assert_eq!((one.is_like(&other), other.is_like(&one)), (is_like, is_like), "{one:?} {other:?}");
        }
    }

    #[test]
    fn what_is_no_condition() {
        for bad in
            ["methods = []", "methods = [\"HEAD\"]", "methods = [\"get\"]", "headers = { \"a b\" = \"1\" }", "host = 1"]
        {
            assert!(toml::from_str::<Conditions>(bad).is_err(), "{bad}");
        }
    }
}
