//! A public certificate and its key, as files hold them: what makes them unusable, and what clients will not like.

use std::path::Path;

use rustls::{crypto::CryptoProvider, sign::CertifiedKey};
use rustls_pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{self, PemObject},
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::{certificates::matches, config::Files};

/// Which of the two files a problem is about: its key in the configuration.
pub(crate) type Part = &'static str;
const CERT: Part = "cert";
const KEY: Part = "key";

/// What some editors put before a text.
const BOM: &[u8] = b"\xef\xbb\xbf";

/// Reads both files, or says of each what is wrong with it and what to do.
pub(crate) fn read(files: &Files, provider: &CryptoProvider) -> Result<CertifiedKey, Vec<(Part, String)>> {
    let chain = read_chain(&files.cert).map_err(|why| (CERT, format!("{}: {why}", files.cert.display())));
    let key = read_key(&files.key).map_err(|why| (KEY, format!("{}: {why}", files.key.display())));
    match (chain, key) {
        (Ok(chain), Ok(key)) => CertifiedKey::from_der(chain, key, provider).map_err(|e| {
            const NEXT: &str = "give the key that the certificate was issued for";
            vec![(KEY, format!("{}: it does not go with cert ({e}); {NEXT}", files.key.display()))]
        }),
        (chain, key) => Err([chain.err(), key.err()].into_iter().flatten().collect()),
    }
}

/// A chain and its key, from one text.
pub(crate) fn of_pem(pem: &[u8], provider: &CryptoProvider) -> Result<CertifiedKey, String> {
    let key = PrivateKeyDer::from_pem_slice(pem).map_err(|e| format!("its key: {e}"))?;
    let chain =
        CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>().map_err(|e| format!("its chain: {e}"))?;
    if chain.is_empty() {
        return Err("it has no certificate".into());
    }
    CertifiedKey::from_der(chain, key, provider).map_err(|e| format!("its key does not go with it: {e}"))
}

/// Why a chain is of no use at all for `hosts`, at `unix` seconds.
pub(crate) fn refusal(chain: &[CertificateDer<'_>], hosts: &[String], unix: u64) -> Option<String> {
    let Some((_, until)) = chain.first().and_then(validity) else { return Some("it is no X.509".into()) };
    if until <= unix {
        return Some("it has ended".into());
    }
    (covered(chain, hosts, unix) < hosts.len()).then(|| format!("it is not for {}", hosts.join(", ")))
}

/// For how many of `hosts` a chain is good; for none, if it has ended.
pub(crate) fn covered(chain: &[CertificateDer<'_>], hosts: &[String], unix: u64) -> usize {
    let Some(leaf) = chain.first().filter(|leaf| validity(leaf).is_some_and(|(_, until)| until > unix)) else {
        return 0;
    };
    let Ok((_, leaf)) = X509Certificate::from_der(leaf) else { return 0 };
    let names = names(&leaf);
    hosts.iter().filter(|host| names.iter().any(|name| covers(name, host))).count()
}

/// From when until when a certificate is valid, in seconds since 1970; `None` if it is no X.509.
pub(crate) fn validity(certificate: &CertificateDer<'_>) -> Option<(u64, u64)> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let validity = certificate.validity();
    Some((u64::try_from(validity.not_before.timestamp()).ok()?, u64::try_from(validity.not_after.timestamp()).ok()?))
}

fn read_chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    const NEXT: &str = "give a PEM file of the chain, the host's own certificate first";
    let text = read_text(path)?;
    let chain = CertificateDer::pem_slice_iter(without_bom(&text)).collect::<Result<Vec<_>, _>>();
    match chain.map_err(|e| format!("it cannot be read ({e}); {NEXT}"))? {
        chain if !chain.is_empty() => Ok(chain),
        _ if text.first() == Some(&0x30) => Err("it is DER, not PEM; try openssl x509 -inform der -in FILE".into()),
        _ => Err(format!("it has no certificate; {NEXT}")),
    }
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    const NEXT: &str = "give a PEM file of the private key";
    let text = read_text(path)?;
    let has = |words: &[u8]| text.windows(words.len()).any(|part| part == words);
    match PrivateKeyDer::from_pem_slice(without_bom(&text)) {
        _ if has(b"BEGIN ENCRYPTED PRIVATE KEY") || has(b"Proc-Type: 4,ENCRYPTED") => {
            Err("it is encrypted with a passphrase, which nobody could type at a restart; try openssl pkey -in FILE"
                .into())
        }
        Ok(key) => Ok(key),
        Err(pem::Error::NoItemsFound) if text.first() == Some(&0x30) => {
            Err("it is DER, not PEM; try openssl pkey -inform der -in FILE".into())
        }
        Err(pem::Error::NoItemsFound) => Err(format!("it has no private key; {NEXT}")),
        Err(e) => Err(format!("it cannot be read ({e}); {NEXT}")),
    }
}

fn read_text(path: &Path) -> Result<Vec<u8>, String> {
    let text = std::fs::read(path).map_err(|e| format!("it cannot be read ({e})"))?;
    if text.starts_with(b"\xff\xfe") || text.starts_with(b"\xfe\xff") {
        return Err("it is UTF-16; save it as UTF-8 or ASCII".into());
    }
    Ok(text)
}

fn without_bom(text: &[u8]) -> &[u8] {
    text.strip_prefix(BOM).unwrap_or(text)
}

/// What clients will not like about a chain that is shown for `hosts`, at `unix` seconds. An edge runs with it all the same: a
/// certificate that has ended is better than none.
pub(crate) fn doubts(chain: &[CertificateDer<'_>], hosts: &[String], unix: u64) -> Vec<String> {
    let parsed: Vec<_> = chain.iter().filter_map(|der| Some(X509Certificate::from_der(der).ok()?.1)).collect();
    let Some(leaf) = parsed.first().filter(|_| parsed.len() == chain.len()) else {
        return vec!["a certificate of the chain is no X.509; clients may refuse it".into()];
    };
    let mut doubts = Vec::new();
    for (at, certificate) in parsed.iter().enumerate() {
        let which = if at == 0 { "the certificate".to_owned() } else { format!("certificate {} of the chain", at + 1) };
        let [from, until] = [certificate.validity().not_before, certificate.validity().not_after];
        if until.timestamp() <= unix as i64 {
            doubts.push(format!("{which} ended at {until}; renew it"));
        } else if from.timestamp() > unix as i64 {
            doubts.push(format!("{which} does not begin before {from}; see whether the clock is right"));
        }
    }
    if let Some(at) = parsed.windows(2).position(|pair| pair[0].issuer() != pair[1].subject()) {
        doubts.push(format!("certificate {} of the chain has not issued the one before it; order the file", at + 2));
    }
    let names = names(leaf);
    if names.is_empty() {
        let why = "the certificate has no name that clients look at (subjectAltName); they ignore the CN. Have it issued anew";
        doubts.push(why.into());
        return doubts;
    }
    let missing: Vec<&str> =
        hosts.iter().map(String::as_str).filter(|host| !names.iter().any(|name| covers(name, host))).collect();
    if !missing.is_empty() {
        let (missing, names) = (missing.join(", "), names.join(", "));
        doubts
            .push(format!("the certificate is not for {missing}, but for {names}; correct hosts, or give another one"));
    }
    doubts
}

/// Whether a certificate's name is good for a host of the configuration, which may be a wildcard itself.
fn covers(name: &str, host: &str) -> bool {
    name.eq_ignore_ascii_case(host) || !host.starts_with("*.") && matches(name, host)
}

/// Names and addresses that a certificate is for, as `hosts` has them.
fn names(certificate: &X509Certificate<'_>) -> Vec<String> {
    let alternative = certificate.subject_alternative_name().ok().flatten();
    let names = alternative.iter().flat_map(|extension| &extension.value.general_names);
    let text = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(|v4| std::net::Ipv4Addr::from(v4).to_string()),
            _ => <[u8; 16]>::try_from(*bytes).ok().map(|v6| format!("[{}]", std::net::Ipv6Addr::from(v6))),
        },
        _ => None,
    };
    names.filter_map(text).collect()
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    const NOON: u64 = 1_800_000_000;

    fn certificate(names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> (String, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>()).unwrap();
        params.distinguished_name.push(DnType::CommonName, "a.example");
        params.not_before = time::OffsetDateTime::from_unix_timestamp(NOON as i64 - 1000).unwrap();
        params.not_after = time::OffsetDateTime::from_unix_timestamp(NOON as i64 + 1000).unwrap();
        change(&mut params);
        (params.self_signed(&key).unwrap().pem(), key)
    }

    fn doubts_of(pem: &str, hosts: &[&str], unix: u64) -> String {
        let chain: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes()).map(Result::unwrap).collect();
        doubts(&chain, &hosts.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>(), unix).join("; ")
    }

    #[test]
    fn what_clients_will_not_like_is_said() {
        let (pem, _) = certificate(&["a.example", "*.b.example", "10.0.0.1", "::1"], |_| {});
        let fine = ["a.example", "x.b.example", "*.b.example", "10.0.0.1", "[::1]"];
        assert_eq!(doubts_of(&pem, &fine, NOON), "");
        assert!(doubts_of(&pem, &fine, NOON + 2000).contains("the certificate ended at"));
        assert!(doubts_of(&pem, &fine, NOON - 2000).contains("does not begin before"));
        for other in ["b.example", "x.y.b.example", "*.a.example", "10.0.0.2"] {
            let said = doubts_of(&pem, &["a.example", other], NOON);
            assert!(said.contains(&format!("is not for {other}, but for a.example")), "{other}: {said}");
        }
        let (only_cn, _) = certificate(&[], |_| {});
        assert!(doubts_of(&only_cn, &["a.example"], NOON).contains("they ignore the CN"));
        let (other, _) = certificate(&["c.example"], |params| {
            params.distinguished_name.push(DnType::CommonName, "somebody else");
        });
        assert!(doubts_of(&(pem + &other), &fine, NOON).contains("certificate 2 of the chain has not issued"));
    }

    #[test]
    fn files_that_cannot_be_used_say_why() {
        let dir = tempfile::tempdir().unwrap();
        let (pem, key) = certificate(&["a.example"], |_| {});
        let files = Files { cert: dir.path().join("a.pem"), key: dir.path().join("a.key") };
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let said = |cert: &[u8], key: &[u8]| {
            std::fs::write(&files.cert, cert).unwrap();
            std::fs::write(&files.key, key).unwrap();
            read(&files, &provider).err().unwrap_or_default()
        };
        let (cert, good) = (pem.as_bytes(), key.serialize_pem());
        let with_bom = |text: &[u8]| [BOM, text].concat();
        let wide = |text: &str| [vec![0xff, 0xfe], text.encode_utf16().flat_map(u16::to_le_bytes).collect()].concat();
        assert_eq!(said(cert, good.as_bytes()), []);
        assert_eq!(said(&with_bom(cert), &with_bom(good.as_bytes())), [], "it changes nothing");
        let encrypted = good.replace("PRIVATE", "ENCRYPTED PRIVATE");
        let old = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nAAAA\n-----END RSA PRIVATE KEY-----\n";
        let der = CertificateDer::from_pem_slice(cert).unwrap();
        for (cert, key, part, why) in [
            (cert, encrypted.as_bytes(), KEY, "passphrase"),
            (cert, old.as_bytes(), KEY, "passphrase"),
            (cert, cert, KEY, "no private key"),
            (cert, &key.serialize_der(), KEY, "DER"),
            (cert, &wide(&good), KEY, "UTF-16"),
            (cert, KeyPair::generate().unwrap().serialize_pem().as_bytes(), KEY, "does not go with cert"),
            (good.as_bytes(), good.as_bytes(), CERT, "no certificate"),
            (&der, good.as_bytes(), CERT, "DER"),
            (&wide(&pem), good.as_bytes(), CERT, "UTF-16"),
        ] {
            let said = said(cert, key);
            assert!(matches!(&said[..], [(at, text)] if *at == part && text.contains(why)), "{why}: {said:?}");
        }
        assert_eq!(said(b"", b"").len(), 2);
    }
}
