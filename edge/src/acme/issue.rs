//! One order: from an account with an authority to a chain and its key (RFC 8555 §7.4).

use std::{
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt as _, Full};
use instant_acme::{
    Account, AuthorizationStatus, BodyWrapper, BytesResponse, CertificateIdentifier, ChallengeStatus, ChallengeType,
    ExternalAccountKey, HttpClient, Identifier, NewAccount, NewOrder, Order, OrderStatus, RetryPolicy,
};
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use starling_node::{
    Fleet,
    web::{self, Web},
};
use starling_protocol::ShowChallenge;

use super::{
    challenge::{Challenges, Shown},
    fleet,
    store::{Begun, Id, Store},
};
use crate::config::{self, ChallengeKind};

/// How long one answer of an authority may take.
const ANSWER: Duration = Duration::from_secs(30);
/// An answer has a chain at most.
const MAX_ANSWER_BYTES: usize = 1 << 20;
/// How long an authority may take to look at names, and again to issue.
const PATIENCE: Duration = Duration::from_secs(4 * 60);
/// Pause before the first look at how far it is; the next ones are longer.
const FIRST_LOOK: Duration = Duration::from_millis(500);

/// What was issued, in PEM.
pub(super) struct Issued {
    pub(super) key: String,
    pub(super) chain: String,
}

/// Why nothing was.
#[derive(Debug, thiserror::Error)]
pub(super) enum IssueError {
    /// The authority's word, or none.
    #[error("{0}")]
    Authority(#[from] instant_acme::Error),
    /// It looked, and did not find what it should.
    #[error("{host}: {why} ({})", hint(*.kind))]
    NotProven { host: String, kind: ChallengeKind, why: String },
    /// It does not look that way.
    #[error("{host}: the authority does not offer {}", .kind.as_str())]
    NotOffered { host: String, kind: ChallengeKind },
    /// Something of our own.
    #[error("{0}")]
    Own(String),
}

impl IssueError {
    /// Whether an order may still come to something: then it was the way to the authority that failed, or its patience with us.
    fn leaves_hope(&self) -> bool {
        match self {
            Self::Authority(instant_acme::Error::Api(_)) => {
                ["badNonce", "rateLimited", "serverInternal"].iter().any(|kind| self.is(kind))
            }
            Self::Authority(_) => true,
            Self::NotProven { .. } | Self::NotOffered { .. } | Self::Own(_) => false,
        }
    }

    /// Whether the authority says that it is this (RFC 8555 §6.7).
    pub(super) fn is(&self, kind: &str) -> bool {
        let Self::Authority(instant_acme::Error::Api(problem)) = self else { return false };
        let said = problem.r#type.as_deref().and_then(|kind| kind.strip_prefix("urn:ietf:params:acme:error:"));
        said == Some(kind)
    }
}

/// What is wanted of an authority.
pub(super) struct Wanted<'a> {
    pub(super) id: &'a Id,
    pub(super) hosts: &'a [String],
    /// The certificate that it is to replace.
    pub(super) former: Option<CertificateIdentifier<'static>>,
    pub(super) kind: ChallengeKind,
}

fn hint(kind: ChallengeKind) -> &'static str {
    match kind {
        ChallengeKind::Http => "port 80 of that name must lead to the redirect port of an edge",
        ChallengeKind::TlsAlpn => "port 443 of that name must lead to the public port of an edge, with TLS as it is",
    }
}

/// An authority, and our account with it.
pub(super) struct Authority {
    account: Account,
    asked: Asked,
}

/// For how long the authority wanted to be left alone, when it answered last.
#[derive(Clone, Default)]
struct Asked(Arc<Mutex<Option<Duration>>>);

impl Asked {
    fn set(&self, wait: Duration) {
        *self.0.lock().unwrap_or_else(|e| e.into_inner()) = Some(wait);
    }

    fn take(&self) -> Option<Duration> {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).take()
    }
}

impl Authority {
    /// With the account that is kept, or with a new one. Whoever has it made agrees to the authority's terms.
    pub(super) async fn meet(acme: &config::Acme, store: &Store) -> Result<Self, (IssueError, Option<Duration>)> {
        let asked = Asked::default();
        let met = async {
            let web = Web::trusting(acme.ca.as_deref()).map_err(|e| IssueError::Own(e.to_string()))?;
            let builder = Account::builder_with_http(Box::new(Http { web, asked: asked.clone() }));
            if let Some(kept) = store.account(acme) {
                return Ok(builder.from_credentials(kept).await?);
            }
            let contact = acme.email.as_ref().map(|email| format!("mailto:{email}"));
            let contact: Vec<&str> = contact.as_deref().into_iter().collect();
            let new = NewAccount { contact: &contact, terms_of_service_agreed: true, only_return_existing: false };
            let bound = acme.eab.as_ref().map(|eab| Ok(ExternalAccountKey::new(eab.kid.clone(), &eab.key()?)));
            let bound = bound.transpose().map_err(IssueError::Own)?;
            let (account, credentials) = builder.create(&new, acme.directory.0.clone(), bound.as_ref()).await?;
            store.keep_account(acme, &credentials);
            tracing::info!(directory = acme.directory.0, id = account.id(), "there is an account with the authority");
            Ok(account)
        };
        match met.await {
            Ok(account) => Ok(Self { account, asked }),
            Err(error) => Err((error, asked.take())),
        }
    }

    /// For how long it asked to be left alone when it refused something last.
    pub(super) fn asked(&self) -> Option<Duration> {
        self.asked.take()
    }

    /// The time in which it wants a certificate renewed, in seconds since 1970, and after how long to ask again; `None` if it has no
    /// opinion (RFC 9773).
    pub(super) async fn suggestion(&self, id: &CertificateIdentifier<'_>) -> Option<((u64, u64), Duration)> {
        let (info, again) = self.account.renewal_info(id).await.ok()?;
        let unix = |time: time::OffsetDateTime| u64::try_from(time.unix_timestamp()).ok();
        Some(((unix(info.suggested_window.start)?, unix(info.suggested_window.end)?), again))
    }

    /// Has a certificate issued: goes on with an order that was begun and not ended, as by a process that was killed, if the authority
    /// still knows it. What comes has been paid for, with a place among the few orders that an authority takes in a week.
    pub(super) async fn issue(
        &self,
        wanted: Wanted<'_>,
        store: &Store,
        challenges: &Challenges,
        fleet: &Fleet,
    ) -> Result<Issued, IssueError> {
        let id = wanted.id;
        if let Some((order, key)) = self.begun(id, store).await {
            match finish(order, &key, &wanted, challenges, fleet).await {
                // It may have been looked for us while nobody was there.
                Err(error) if !error.leaves_hope() => {
                    tracing::info!(certificate = %id, %error, "the order that was begun comes to nothing; another one is begun");
                }
                // Until what comes of it is kept, it is kept itself.
                outcome => return Ok(Issued { key: key.serialize_pem(), chain: outcome? }),
            }
        }
        let (order, key) = self.begin(&wanted, store).await?;
        let finished = finish(order, &key, &wanted, challenges, fleet).await;
        if finished.as_ref().is_err_and(|error| !error.leaves_hope()) {
            store.forget_begun(id);
        }
        Ok(Issued { key: key.serialize_pem(), chain: finished? })
    }

    /// The order that was begun, with its key; `None` if there is none that can come to anything.
    async fn begun(&self, id: &Id, store: &Store) -> Option<(Order, KeyPair)> {
        let Begun { order, key } = store.begun(id)?;
        let key = KeyPair::from_pem(&key).ok()?;
        let mut order = self.account.order(order).await.ok()?;
        if order.state().status == OrderStatus::Invalid {
            return None;
        }
        tracing::info!(certificate = %id, "goes on with an order that was begun");
        Some((order, key))
    }

    async fn begin(&self, wanted: &Wanted<'_>, store: &Store) -> Result<(Order, KeyPair), IssueError> {
        let identifiers: Vec<_> = wanted.hosts.iter().map(|host| Identifier::Dns(host.clone())).collect();
        let key = KeyPair::generate().map_err(|e| IssueError::Own(e.to_string()))?;
        let order = self.order(&identifiers, wanted.former.clone()).await?;
        store.keep_begun(wanted.id, &Begun { order: order.url().to_owned(), key: key.serialize_pem() });
        Ok((order, key))
    }

    /// An order that says which certificate it renews, if the authority knows of such things: those of the account that had ordered the
    /// former one are not counted against limits.
    async fn order(
        &self,
        identifiers: &[Identifier],
        former: Option<CertificateIdentifier<'static>>,
    ) -> Result<Order, instant_acme::Error> {
        if let Some(former) = former
            && let Ok(order) = self.account.new_order(&NewOrder::new(identifiers).replaces(former)).await
        {
            return Ok(order);
        }
        self.account.new_order(&NewOrder::new(identifiers)).await
    }
}

/// From wherever an order stands to the chain.
async fn finish(
    mut order: Order,
    key: &KeyPair,
    Wanted { hosts, kind, .. }: &Wanted<'_>,
    challenges: &Challenges,
    fleet: &Fleet,
) -> Result<String, IssueError> {
    let policy = RetryPolicy::new().initial_delay(FIRST_LOOK).backoff(1.5).timeout(PATIENCE);
    if order.state().status == OrderStatus::Pending {
        let _shown = prove(&mut order, *kind, challenges, fleet).await?;
        match order.poll_ready(&policy).await {
            Ok(OrderStatus::Invalid) | Err(instant_acme::Error::Api(_)) => {
                return Err(blame(&mut order, *kind).await);
            }
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if order.state().status == OrderStatus::Ready {
        let own = |error: rcgen::Error| IssueError::Own(error.to_string());
        let mut params = CertificateParams::new(hosts.to_vec()).map_err(own)?;
        params.distinguished_name = DistinguishedName::new();
        order.finalize_csr(params.serialize_request(key).map_err(own)?.der()).await?;
    }
    Ok(order.poll_certificate(&policy).await?)
}

/// Shows what the authority is to find, here and at all other edges, for it may come to any; and asks it to look.
async fn prove(
    order: &mut Order,
    kind: ChallengeKind,
    challenges: &Challenges,
    fleet: &Fleet,
) -> Result<Vec<Shown>, IssueError> {
    let provider = starling_node::crypto_provider();
    let of_kind = match kind {
        ChallengeKind::Http => ChallengeType::Http01,
        ChallengeKind::TlsAlpn => ChallengeType::TlsAlpn01,
    };
    let (mut asked, mut shown) = (Vec::new(), Vec::new());
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        if authorization.status == AuthorizationStatus::Valid {
            continue;
        }
        let host = authorization.identifier().to_string();
        let Some(challenge) = authorization.challenge(of_kind.clone()) else {
            return Err(IssueError::NotOffered { host, kind });
        };
        let (token, authorization) = (challenge.token.clone(), challenge.key_authorization().as_str().to_owned());
        let show = ShowChallenge { host, token, authorization, over_tls: kind == ChallengeKind::TlsAlpn };
        shown.push(challenges.show(&show, &provider).map_err(IssueError::Own)?);
        asked.push(show);
    }
    fleet::show_everywhere(fleet, &asked).await;
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        if authorization.status != AuthorizationStatus::Valid
            && let Some(mut challenge) = authorization.challenge(of_kind.clone())
            // In an order that was begun it may have been asked already.
            && challenge.status == ChallengeStatus::Pending
        {
            challenge.set_ready().await?;
        }
    }
    Ok(shown)
}

/// What the authority found wrong, name by name.
async fn blame(order: &mut Order, kind: ChallengeKind) -> IssueError {
    let mut authorizations = order.authorizations();
    while let Some(Ok(mut authorization)) = authorizations.next().await {
        if authorization.refresh().await.is_err() {
            break;
        }
        let error = authorization.challenges.iter().find_map(|challenge| challenge.error.clone());
        if let Some(error) = error {
            let host = authorization.identifier().to_string();
            return IssueError::NotProven { host, kind, why: error.to_string() };
        }
    }
    IssueError::Own("the authority gave the order up, and does not say why".into())
}

/// The way to an authority.
struct Http {
    web: Web,
    asked: Asked,
}

impl HttpClient for Http {
    fn request(
        &self,
        request: Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, instant_acme::Error>> + Send>> {
        let (web, asked) = (self.web.clone(), self.asked.clone());
        Box::pin(async move {
            let (head, body) = request.into_parts();
            let Ok(body) = body.collect().await;
            let request = Request::from_parts(head, body.to_bytes());
            let answer = web.fetch(request, MAX_ANSWER_BYTES, ANSWER).await;
            let answer = answer.map_err(|e| instant_acme::Error::Other(Box::new(e)))?;
            let status = answer.status();
            let failed = status.is_client_error() || status.is_server_error();
            if let Some(wait) = answer.headers().get(header::RETRY_AFTER).filter(|_| failed).and_then(web::retry_after)
            {
                asked.set(wait);
            }
            let says_why = answer
                .headers()
                .get(header::CONTENT_TYPE)
                .is_some_and(|kind| kind.to_str().is_ok_and(|kind| kind.starts_with("application/problem+json")));
            if failed && !says_why {
                return Err(instant_acme::Error::Other(format!("the authority answers {status}").into()));
            }
            Ok(answer.map(Full::new).into())
        })
    }
}
