//! Names, host names and join tokens: what parses prints, and parses again to the same.
#![no_main]

use std::{fmt, str::FromStr};

use libfuzzer_sys::fuzz_target;
use starling_protocol::{JoinToken, MeshName, Name, NamePattern, TokenClaims, service_of_host};

fn check<T: FromStr + fmt::Display + fmt::Debug + PartialEq>(text: &str) -> Option<T> {
    let value: T = text.parse().ok()?;
    assert_eq!(value.to_string().parse().ok().as_ref(), Some(&value));
    Some(value)
}

fuzz_target!(|bytes: &[u8]| {
    if let Ok(claims) = TokenClaims::decode(bytes) {
        let token = JoinToken::new(claims, [7; 32]);
        assert_eq!(token.to_string().parse().as_ref(), Ok(&token));
    }
    let Ok(text) = str::from_utf8(bytes) else { return };
    if let Some(name) = check::<Name>(text) {
        assert_eq!(name.as_str(), text);
        assert_eq!(service_of_host(&name.service_host()), Some(name.clone()));
        assert!(text.parse::<MeshName>().is_ok(), "a label is a mesh name");
    }
    check::<MeshName>(text);
    check::<JoinToken>(text);
    check::<NamePattern>(text);
    if let Some(service) = service_of_host(text) {
        assert_eq!(service_of_host(&text.to_ascii_uppercase()), Some(service.clone()));
        assert_eq!(service_of_host(&service.service_host()), Some(service));
    }
});
