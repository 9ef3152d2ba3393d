//! What a node's certificate says.

use rustls::pki_types::CertificateDer;
use starling_protocol::{MeshName, Name, NodeId, service_of_host};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{CertificateError, sha256};

/// Organizational unit of an edge's certificate.
pub(crate) const EDGE_UNIT: &str = "edge";

/// Organizational unit of the admin key's certificate.
pub(crate) const ADMIN_UNIT: &str = "admin";

/// The names in a node's certificate. Parsing does not verify: see `Identity::check_chain`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MeshCertificate {
    pub(crate) mesh: MeshName,
    pub(crate) name: Name,
    pub(crate) id: NodeId,
    pub(crate) services: Vec<Name>,
    /// Whether its node may be an edge: the subject's organizational unit says so.
    pub(crate) edge: bool,
    /// The zone that its node stands in, if that is bound: the subject's locality; empty if not.
    pub(crate) zone: String,
    /// Uncompressed P-256 point.
    pub(crate) public_key: Vec<u8>,
    /// Unix seconds.
    pub(crate) not_before: u64,
    /// Unix seconds.
    pub(crate) not_after: u64,
}

impl MeshCertificate {
    /// Reads a leaf: exactly one URI SAN, of the form `spiffe://<mesh>/node/<name>` (SPIFFE X.509-SVID §2), and a DNS SAN
    /// for each service.
    pub(crate) fn parse(der: &CertificateDer<'_>) -> Result<Self, CertificateError> {
        let names = |why: &str| CertificateError::Names(why.to_string());
        let (rest, cert) = X509Certificate::from_der(der).map_err(|e| CertificateError::Names(e.to_string()))?;
        if !rest.is_empty() {
            return Err(names("bytes after the certificate"));
        }
        if cert.is_ca() {
            return Err(names("it is an issuer's"));
        }
        let san = cert
            .subject_alternative_name()
            .map_err(|e| CertificateError::Names(e.to_string()))?
            .ok_or_else(|| names("no alternative names"))?;
        let mut uri = None;
        let mut services = Vec::new();
        for general in &san.value.general_names {
            match general {
                GeneralName::URI(_) if uri.is_some() => return Err(names("more than one URI")),
                GeneralName::URI(text) => uri = Some(*text),
                GeneralName::DNSName(host) => {
                    services.push(service_of_host(host).ok_or_else(|| names("a DNS name that is no service"))?);
                }
                _ => return Err(names("a name that is neither URI nor DNS")),
            }
        }
        let uri = uri.ok_or_else(|| names("no URI"))?;
        let (mesh, name) = uri
            .strip_prefix("spiffe://")
            .and_then(|rest| rest.split_once("/node/"))
            .ok_or_else(|| names("the URI is not spiffe://<mesh>/node/<name>"))?;
        let time = |t: i64| u64::try_from(t).unwrap_or(0);
        Ok(Self {
            mesh: mesh.parse().map_err(|_| names("the URI's mesh"))?,
            name: name.parse().map_err(|_| names("the URI's node"))?,
            id: id_of_spki(cert.public_key().raw),
            services,
            edge: cert.subject().iter_organizational_unit().any(|unit| unit.as_str() == Ok(EDGE_UNIT)),
            zone: cert.subject().iter_locality().next().and_then(|l| l.as_str().ok()).unwrap_or_default().to_owned(),
            public_key: cert.public_key().subject_public_key.data.to_vec(),
            not_before: time(cert.validity().not_before.timestamp()),
            not_after: time(cert.validity().not_after.timestamp()),
        })
    }
}

/// The id of a public key, given as SubjectPublicKeyInfo (DER).
pub(crate) fn id_of_spki(spki: &[u8]) -> NodeId {
    let mut id = [0; 16];
    id.copy_from_slice(&sha256(spki)[..16]);
    NodeId(id)
}
