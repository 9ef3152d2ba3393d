//! Certificates of callers: who shows one that a listed authority issued, and has not revoked, is known by its name.
//!
//! A handshake only proves that the caller holds the key. Whether the certificate is good is decided at each request, by what
//! the files say by then: one that is revoked opens no route any more, also on connections that are open, and callers of public
//! routes are not turned away over a certificate that nobody asked them for.

use std::{
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderName, HeaderValue};
use rustls::{
    CertificateError, DistinguishedName, RootCertStore,
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
};
use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, UnixTime,
    pem::{self, PemObject},
};
use starling_node::{rfc3339, unix_now};
use x509_parser::prelude::{CertificateRevocationList, FromDer, GeneralName, ParsedExtension, X509Certificate};

use crate::config::{ClientCertificate, NamedBy};

/// Longest name, in bytes: it goes into a field and into the limiter's memory.
const MAX_NAME: usize = 256;
/// How long a verdict holds: a certificate may end, and a clock may be set.
const HOLDS: Duration = Duration::from_secs(30);

/// Who issues certificates to callers, and what they have revoked, as their files said when they were read.
pub(crate) struct Authorities {
    verifier: Arc<dyn ClientCertVerifier>,
    named_by: Option<NamedBy>,
    /// Another one for each time that files were read.
    edition: u64,
    /// Until when the lists of revoked certificates are said to be current, in seconds since 1970: the earliest.
    current_until: Option<u64>,
}

impl Authorities {
    /// Reads the files.
    ///
    /// # Errors
    /// The key that is wrong, why, and what to do.
    pub(crate) fn load(config: &ClientCertificate) -> Result<Self, (&'static str, String)> {
        static EDITIONS: AtomicU64 = AtomicU64::new(1);
        let at = |key, file: &Path, why: String| (key, format!("{}: {why}", file.display()));
        let roots = read_roots(&config.ca).map_err(|why| at("ca", &config.ca, why))?;
        let lists = match &config.crl {
            Some(file) => read_lists(file).map_err(|why| at("crl", file, why))?,
            None => Vec::new(),
        };
        let issuers: Vec<Vec<u8>> = lists.iter().filter_map(issuer).collect();
        let is_twice = issuers.iter().enumerate().any(|(nth, issuer)| issuers[..nth].contains(issuer));
        if let Some(file) = config.crl.as_ref().filter(|_| is_twice) {
            // Only one of them would be looked at.
            return Err(at("crl", file, "there are two lists of one issuer; leave the older one out".into()));
        }
        let current_until = lists.iter().filter_map(current_until).min();
        let builder = WebPkiClientVerifier::builder_with_provider(roots.into(), starling_node::crypto_provider());
        let verifier = builder.with_crls(lists).build().map_err(|error| match &config.crl {
            Some(file) => at("crl", file, format!("it cannot be used ({error})")),
            None => at("ca", &config.ca, error.to_string()),
        })?;
        Ok(Self { verifier, named_by: config.name, edition: EDITIONS.fetch_add(1, Relaxed), current_until })
    }

    /// Names of the authorities, by which clients choose what they show.
    pub(crate) fn subjects(&self) -> &[DistinguishedName] {
        self.verifier.root_hint_subjects()
    }

    /// Until when the lists of revoked certificates are said to be current, in seconds since 1970.
    pub(crate) fn current_until(&self) -> Option<u64> {
        self.current_until
    }

    /// What is not as it should be; no reason not to go by them, which would turn everybody away.
    pub(crate) fn doubt(&self) -> Option<String> {
        let until = self.current_until.filter(|until| *until <= unix_now())?;
        let at = rfc3339(until);
        Some(format!(
            "a new list of revoked certificates should have come by {at}; what was revoked since is not known"
        ))
    }

    fn judge(&self, chain: &[CertificateDer<'static>]) -> Result<Arc<str>, Refusal> {
        let (leaf, rest) = chain.split_first().ok_or(Refusal::Unreadable)?;
        self.verifier.verify_client_cert(leaf, rest, UnixTime::now()).map_err(|error| Refusal::of(&error))?;
        name(leaf, self.named_by)
    }
}

/// The certificate that a caller has shown, and proven to hold.
#[derive(Debug)]
pub(crate) struct Presented {
    /// Leaf first; at least one.
    chain: Vec<CertificateDer<'static>>,
    verdict: Mutex<Option<Verdict>>,
}

#[derive(Debug)]
struct Verdict {
    edition: u64,
    at: Instant,
    name: Result<Arc<str>, Refusal>,
}

impl Presented {
    /// `None` if there is none.
    pub(crate) fn of(chain: &[CertificateDer<'static>]) -> Option<Self> {
        (!chain.is_empty()).then(|| Self { chain: chain.to_vec(), verdict: Mutex::default() })
    }

    /// Who it names, if those authorities vouch for it, as was found out a moment ago; `None` if it was not.
    pub(crate) fn known(&self, authorities: &Authorities) -> Option<Result<Arc<str>, Refusal>> {
        let verdict = self.verdict();
        let known = verdict.as_ref().filter(|v| v.edition == authorities.edition && v.at.elapsed() < HOLDS);
        known.map(|verdict| verdict.name.clone())
    }

    /// Finds that out.
    pub(crate) fn judge(&self, authorities: &Authorities) -> Result<Arc<str>, Refusal> {
        let name = authorities.judge(&self.chain);
        *self.verdict() = Some(Verdict { edition: authorities.edition, at: Instant::now(), name: name.clone() });
        name
    }

    fn verdict(&self) -> MutexGuard<'_, Option<Verdict>> {
        self.verdict.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The field that tells a service of it (RFC 9440 §2.2).
    pub(crate) fn field(&self) -> (HeaderName, HeaderValue) {
        let text = format!(":{}:", BASE64_STANDARD.encode(&self.chain[0]));
        (HeaderName::from_static("client-cert"), HeaderValue::try_from(text).expect("ASCII"))
    }
}

/// Why a certificate lets nobody in. The text is for the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("the client certificate has ended")]
    Ended,
    #[error("the client certificate is not valid yet")]
    NotYet,
    #[error("the client certificate is revoked")]
    Revoked,
    #[error("whether the client certificate is revoked is not known: no list of its issuer is there")]
    UnknownStatus,
    #[error("the client certificate is from another authority")]
    Authority,
    #[error("the client certificate is not for clients")]
    Purpose,
    #[error("the client certificate names nobody")]
    Nameless,
    #[error("whether the client certificate is revoked cannot be told: the list of its issuer is not by that issuer")]
    List,
    #[error("the client certificate is not valid")]
    Unreadable,
}

impl Refusal {
    fn of(error: &rustls::Error) -> Self {
        use CertificateError::*;
        let error = match error {
            rustls::Error::InvalidCertificate(error) => error,
            rustls::Error::InvalidCertRevocationList(_) => return Self::List,
            _ => return Self::Unreadable,
        };
        match error {
            Expired | ExpiredContext { .. } => Self::Ended,
            NotValidYet | NotValidYetContext { .. } => Self::NotYet,
            Revoked => Self::Revoked,
            UnknownRevocationStatus => Self::UnknownStatus,
            UnknownIssuer | BadSignature => Self::Authority,
            InvalidPurpose | InvalidPurposeContext { .. } => Self::Purpose,
            _ => Self::Unreadable,
        }
    }
}

/// What names the caller: what it is to be, or the first that there is.
fn name(leaf: &CertificateDer<'_>, by: Option<NamedBy>) -> Result<Arc<str>, Refusal> {
    let (_, leaf) = X509Certificate::from_der(leaf).map_err(|_| Refusal::Unreadable)?;
    let all = NamedBy::ALL;
    let wanted = by.as_ref().map_or(&all[..], std::slice::from_ref);
    let found = wanted.iter().find_map(|by| named(&leaf, *by)).ok_or(Refusal::Nameless)?;
    let is_plain = (1..=MAX_NAME).contains(&found.len())
        && found.bytes().all(|b| matches!(b, b' '..=b'~'))
        && found.trim().len() == found.len();
    if is_plain { Ok(found.into()) } else { Err(Refusal::Nameless) }
}

fn named<'a>(leaf: &'a X509Certificate<'_>, by: NamedBy) -> Option<&'a str> {
    if by == NamedBy::Cn {
        let mut names = leaf.subject().iter_common_name();
        // Of two, everybody takes another one.
        return names.next().filter(|_| names.next().is_none())?.as_str().ok();
    }
    let extensions = leaf.extensions().iter().map(|extension| extension.parsed_extension());
    let names = extensions.filter_map(|extension| match extension {
        ParsedExtension::SubjectAlternativeName(names) => Some(&names.general_names),
        _ => None,
    });
    names.flatten().find_map(|name| match (by, name) {
        (NamedBy::Uri, GeneralName::URI(name))
        | (NamedBy::Dns, GeneralName::DNSName(name))
        | (NamedBy::Email, GeneralName::RFC822Name(name)) => Some(*name),
        _ => None,
    })
}

fn read_roots(file: &Path) -> Result<RootCertStore, String> {
    const NEXT: &str = "give a PEM file of the authorities that issue to callers";
    let text = std::fs::read(file).map_err(|e| format!("it cannot be read ({e})"))?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&text) {
        let certificate = certificate.map_err(|e| format!("it cannot be read ({e}); {NEXT}"))?;
        roots.add(certificate).map_err(|e| format!("a certificate in it is none ({e}); {NEXT}"))?;
    }
    match roots.is_empty() {
        true if text.first() == Some(&0x30) => Err("it is DER, not PEM; try openssl x509 -inform der -in FILE".into()),
        true => Err(format!("it has no certificate; {NEXT}")),
        false => Ok(roots),
    }
}

fn read_lists(file: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
    const NEXT: &str = "give a list of revoked certificates, in PEM or DER";
    let text = std::fs::read(file).map_err(|e| format!("it cannot be read ({e})"))?;
    // Authorities publish them in DER.
    if text.first() == Some(&0x30) {
        return Ok(vec![text.into()]);
    }
    let lists: Result<Vec<_>, pem::Error> = CertificateRevocationListDer::pem_slice_iter(&text).collect();
    match lists {
        Ok(lists) if lists.is_empty() => Err(format!("there is no list in it; {NEXT}")),
        Ok(lists) => Ok(lists),
        Err(e) => Err(format!("it cannot be read ({e}); {NEXT}")),
    }
}

/// Whose list it is.
fn issuer(list: &CertificateRevocationListDer<'_>) -> Option<Vec<u8>> {
    let (_, list) = CertificateRevocationList::from_der(list).ok()?;
    Some(list.issuer().as_raw().to_vec())
}

/// When the next list is to be there, in seconds since 1970.
fn current_until(list: &CertificateRevocationListDer<'_>) -> Option<u64> {
    let (_, list) = CertificateRevocationList::from_der(list).ok()?;
    u64::try_from(list.next_update()?.timestamp()).ok()
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};

    use super::*;

    fn certificate(change: impl FnOnce(&mut CertificateParams)) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        change(&mut params);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    #[test]
    fn a_certificate_names_its_caller() {
        let full = certificate(|params| {
            params.distinguished_name.push(DnType::CommonName, "Acme Corp");
            params.subject_alt_names = vec![
                SanType::DnsName("acme.example".try_into().unwrap()),
                SanType::URI("spiffe://mesh/acme".try_into().unwrap()),
                SanType::Rfc822Name("ops@acme.example".try_into().unwrap()),
            ];
        });
        for (by, want) in [
            (None, "Acme Corp"),
            (Some(NamedBy::Cn), "Acme Corp"),
            (Some(NamedBy::Uri), "spiffe://mesh/acme"),
            (Some(NamedBy::Dns), "acme.example"),
            (Some(NamedBy::Email), "ops@acme.example"),
        ] {
            assert_eq!(&*name(&full, by).unwrap(), want);
        }
        let dns = certificate(|params| {
            params.subject_alt_names = vec![SanType::DnsName("acme.example".try_into().unwrap())];
        });
        assert_eq!(&*name(&dns, None).unwrap(), "acme.example");
        assert_eq!(name(&dns, Some(NamedBy::Cn)), Err(Refusal::Nameless));
        for bad in ["", " a", "a ", "a\nb", "ä", &"a".repeat(257)] {
            let bad = certificate(|params| params.distinguished_name.push(DnType::CommonName, bad));
            assert_eq!(name(&bad, Some(NamedBy::Cn)), Err(Refusal::Nameless));
        }
    }

    #[test]
    fn wrong_files_say_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let (ca, crl) = (dir.path().join("ca.pem"), dir.path().join("crl.pem"));
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let made = params.self_signed(&key).unwrap();
        let list = rcgen::CertificateRevocationListParams {
            this_update: rcgen::date_time_ymd(2024, 1, 1),
            next_update: rcgen::date_time_ymd(2024, 2, 1),
            crl_number: 1u64.into(),
            issuing_distribution_point: None,
            revoked_certs: Vec::new(),
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&Issuer::from_params(&params, &key)).unwrap();
        let load = |ca_text: &[u8], crl_text: Option<&[u8]>| {
            std::fs::write(&ca, ca_text).unwrap();
            let config = ClientCertificate {
                ca: ca.clone(),
                crl: crl_text.map(|text| {
                    std::fs::write(&crl, text).unwrap();
                    crl.clone()
                }),
                name: None,
            };
            Authorities::load(&config).map(|authorities| (authorities.subjects().len(), authorities.current_until()))
        };
        let (pem, list_pem) = (made.pem(), list.pem().unwrap());
        assert_eq!(load(pem.as_bytes(), None), Ok((1, None)));
        let until = Some(1_706_745_600);
        assert_eq!(load(pem.as_bytes(), Some(list_pem.as_bytes())), Ok((1, until)));
        assert_eq!(load(pem.as_bytes(), Some(list.der())), Ok((1, until)));
        for (ca, crl, key, want) in [
            (&b""[..], None, "ca", "has no certificate"),
            (made.der(), None, "ca", "is DER"),
            (b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n", None, "ca", "is none"),
            (pem.as_bytes(), Some(&b""[..]), "crl", "no list in it"),
            (pem.as_bytes(), Some(pem.as_bytes()), "crl", "no list in it"),
            (pem.as_bytes(), Some(list_pem.repeat(2).as_bytes()), "crl", "two lists of one issuer"),
            (pem.as_bytes(), Some(&[0x30, 0x00][..]), "crl", "cannot be used"),
        ] {
            let (at, why) = load(ca, crl).unwrap_err();
            assert!(at == key && why.contains(want), "{at}: {why}");
        }
    }
}
