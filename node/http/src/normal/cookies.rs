//! Cookies leave HTTP/2 and 3 in one piece.

use http::{HeaderMap, HeaderValue, header};

/// Joins the lines of `cookie` with `; `: browsers send them one by one over HTTP/2 and 3, and an HTTP/1.1 service would read
/// but one of them (RFC 9113 §8.2.3, RFC 9114 §4.2.1).
pub fn join_cookies(fields: &mut HeaderMap) {
    let mut lines = fields.get_all(header::COOKIE).iter();
    if lines.next().is_none() || lines.next().is_none() {
        return;
    }
    let all: Vec<&[u8]> = fields.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    // Values of fields stay one when they are joined.
    if let Ok(mut joined) = HeaderValue::from_bytes(&all.join(&b"; "[..])) {
        joined.set_sensitive(true);
        fields.insert(header::COOKIE, joined);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crumbs_become_one_line_in_their_order() {
        let mut fields = HeaderMap::new();
        for crumb in ["a=1", "b=2", "c=\u{e4}"] {
            fields.append(header::COOKIE, HeaderValue::from_str(crumb).unwrap());
            fields.append("x", HeaderValue::from_static("1"));
        }
        join_cookies(&mut fields);
        assert_eq!(fields.get_all(header::COOKIE).iter().collect::<Vec<_>>(), ["a=1; b=2; c=\u{e4}"]);
        assert_eq!(fields.get_all("x").iter().count(), 3);
    }
}
