//! What an authority is to find here while it looks whether a name is ours.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
};

use rcgen::{CertificateParams, CustomExtension, KeyPair};
use rustls::{crypto::CryptoProvider, server::ClientHello, sign::CertifiedKey};
use rustls_pki_types::PrivatePkcs8KeyDer;
use sha2::{Digest, Sha256};
use starling_protocol::ShowChallenge;

/// The protocol of the handshake by which it looks (RFC 8737 §6.2).
pub(crate) const ALPN: &[u8] = b"acme-tls/1";
/// Where it looks over HTTP (RFC 8555 §8.3).
const PATH: &str = "/.well-known/acme-challenge/";

/// Everything that is to be found at the moment. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Challenges(Arc<Mutex<Found>>);

#[derive(Debug, Default)]
struct Found {
    /// How many were shown so far.
    count: u64,
    /// Key authorizations, by token, each with its number and the host that is looked at.
    texts: HashMap<String, (u64, String, String)>,
    /// Certificates, by the name that is looked at.
    certificates: HashMap<String, (u64, Arc<CertifiedKey>)>,
}

/// What is to be found until this is dropped.
#[derive(Debug)]
pub(crate) struct Shown {
    challenges: Challenges,
    number: u64,
    what: What,
}

#[derive(Debug)]
enum What {
    Text { token: String },
    Certificate { host: String },
}

impl Challenges {
    /// A text, at the token's path, to whoever asks for that host.
    pub(crate) fn show_text(&self, host: &str, token: &str, authorization: &str) -> Shown {
        let mut found = self.found();
        found.count += 1;
        let number = found.count;
        found.texts.insert(token.to_owned(), (number, host.to_owned(), authorization.to_owned()));
        Shown { challenges: self.clone(), number, what: What::Text { token: token.to_owned() } }
    }

    /// A certificate that has the digest of the authorization in it, for a handshake with that host's name.
    pub(crate) fn show_certificate(
        &self,
        host: &str,
        authorization: &str,
        provider: &CryptoProvider,
    ) -> Result<Shown, String> {
        let made = || -> Result<CertifiedKey, Box<dyn std::error::Error>> {
            let key = KeyPair::generate()?;
            let mut params = CertificateParams::new([host.to_owned()])?;
            params.custom_extensions.push(CustomExtension::new_acme_identifier(&Sha256::digest(authorization)));
            let certificate = params.self_signed(&key)?.der().clone();
            let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
            // Not looked through: the extension is critical, and rustls does not know it.
            Ok(CertifiedKey::new(vec![certificate], provider.key_provider.load_private_key(key)?))
        };
        let certificate = made().map_err(|e| format!("the certificate for the challenge cannot be made: {e}"))?;
        let mut found = self.found();
        found.count += 1;
        let number = found.count;
        found.certificates.insert(host.to_owned(), (number, Arc::new(certificate)));
        Ok(Shown { challenges: self.clone(), number, what: What::Certificate { host: host.to_owned() } })
    }

    /// What an edge of the fleet asks for.
    pub(crate) fn show(&self, asked: &ShowChallenge, provider: &CryptoProvider) -> Result<Shown, String> {
        match asked.over_tls {
            false => Ok(self.show_text(&asked.host, &asked.token, &asked.authorization)),
            true => self.show_certificate(&asked.host, &asked.authorization, provider),
        }
    }

    /// The text at a path of a host, if an authority is to find one there.
    pub(crate) fn text(&self, host: &str, path: &str) -> Option<String> {
        let found = self.found();
        let (_, of, text) = found.texts.get(path.strip_prefix(PATH)?)?;
        of.eq_ignore_ascii_case(host).then(|| text.clone())
    }

    /// What a handshake of an authority gets, which no other client can want: nothing, if there is no challenge. `None` if it is
    /// one of any other client.
    pub(crate) fn certificate(&self, hello: &ClientHello<'_>) -> Option<Option<Arc<CertifiedKey>>> {
        let mut offered = hello.alpn()?;
        if offered.next() != Some(ALPN) || offered.next().is_some() {
            return None;
        }
        let host = hello.server_name().map(str::to_ascii_lowercase);
        Some(host.and_then(|host| self.found().certificates.get(&host).map(|(_, certificate)| certificate.clone())))
    }

    fn found(&self) -> MutexGuard<'_, Found> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        let mut found = self.challenges.found();
        // Another one may stand there by now.
        let is_ours = |number: u64| number == self.number;
        match &self.what {
            What::Text { token } if found.texts.get(token).is_some_and(|(number, ..)| is_ours(*number)) => {
                found.texts.remove(token);
            }
            What::Certificate { host } if found.certificates.get(host).is_some_and(|(number, _)| is_ours(*number)) => {
                found.certificates.remove(host);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_there_as_long_as_it_is_shown() {
        let challenges = Challenges::default();
        let shown = challenges.show_text("a.example", "token", "token.thumb");
        assert_eq!(challenges.text("a.example", "/.well-known/acme-challenge/token").as_deref(), Some("token.thumb"));
        for other in ["/.well-known/acme-challenge/", "/.well-known/acme-challenge/other", "/token", "token"] {
            assert_eq!(challenges.text("a.example", other), None, "{other}");
        }
        assert_eq!(challenges.text("b.example", "/.well-known/acme-challenge/token"), None, "of another host");
        let again = challenges.show_text("a.example", "token", "token.thumb");
        drop(shown);
        assert!(
            challenges.text("a.example", "/.well-known/acme-challenge/token").is_some(),
            "it is another one's by now"
        );
        drop(again);
        assert_eq!(challenges.text("a.example", "/.well-known/acme-challenge/token"), None);
    }
}
