//! Who calls: by an API key, a token or a certificate, whichever a route takes.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use starling_http::{Problem, accept};

use crate::{
    api_key,
    client_certificate::{Authorities, Presented, Refusal},
    config::{AuthMethod, Route},
    gateway::{Arrival, Standing},
    jwt::{self, JwtError},
    policy::Policy,
};

/// Tokens of one address that wait for an issuer.
const MAX_LOOKING_OF_ONE: usize = 64;

/// Proof that the caller may use the route.
pub(crate) struct Caller {
    /// Who; `None` on a public route.
    pub(crate) consumer: Option<String>,
    pub(crate) plan: Option<String>,
    /// What is known of it, for the service.
    pub(crate) told: Vec<(HeaderName, HeaderValue)>,
}

impl Caller {
    /// Anybody.
    pub(crate) fn nobody() -> Self {
        Self { consumer: None, plan: None, told: Vec::new() }
    }

    /// Who it is to a limit, from that address.
    pub(crate) fn key(&self, from: IpAddr) -> String {
        caller_key(self.consumer.as_deref(), from)
    }
}

impl Standing {
    /// Who calls, if a way that the route takes shows it.
    pub(crate) async fn authenticate(
        &self,
        policy: &Policy,
        route: &Route,
        fields: &HeaderMap,
        arrival: &Arrival,
        client: IpAddr,
    ) -> Result<Caller, Problem> {
        if route.auth.is_empty() {
            return Ok(Caller::nobody());
        }
        let mut reason = "credentials are needed".to_string();
        let mut challenge = HeaderValue::from_static("Bearer");
        // Why a token was not looked at: there may be another way.
        let mut undecided = None;
        for method in &route.auth {
            match method {
                AuthMethod::ApiKey => match api_key::presented(fields) {
                    Ok(Some(key)) => match self.keys.verify(key) {
                        Some(key) => {
                            let consumer = Some(key.consumer.to_string());
                            return Ok(Caller { consumer, plan: key.plan, told: Vec::new() });
                        }
                        None => reason = "the API key is not valid".into(),
                    },
                    Ok(None) => {}
                    Err(why) => reason = why.into(),
                },
                AuthMethod::Jwt => match (&policy.jwt, jwt::bearer(fields)) {
                    (_, Err(why)) => reason = why.into(),
                    (Some(verifier), Ok(Some(token))) if !api_key::is_api_key(token) => {
                        match self.verify(verifier, token, client).await {
                            Ok(Ok(claims)) => return permitted(route, claims),
                            Err(problem) => undecided = Some(problem),
                            Ok(Err(error)) => {
                                reason = error.to_string();
                                challenge = error.challenge();
                            }
                        }
                    }
                    _ => {}
                },
                // What a request says of its caller goes before what the connection does.
                AuthMethod::ClientCertificate => {}
            }
        }
        if route.auth.contains(&AuthMethod::ClientCertificate) {
            let shown = arrival.certificate.as_ref().zip(policy.client_authorities.as_ref());
            let named = match shown {
                Some((certificate, authorities)) => Some((certificate, self.named(certificate, authorities, client)?)),
                None => None,
            };
            match named {
                Some((certificate, Ok(name))) if is_for(route, &name) => {
                    let told = route.forward_client_certificate.then(|| certificate.field());
                    return Ok(Caller {
                        consumer: Some(format!("cert:{name}")),
                        plan: None,
                        told: told.into_iter().collect(),
                    });
                }
                Some((_, Ok(name))) => {
                    let detail = format!("the client certificate names {name}, who may not use this route");
                    return Err(Problem::policy(StatusCode::FORBIDDEN, "forbidden", detail));
                }
                Some((_, Err(refusal))) => reason = refusal.to_string(),
                None if route.auth.len() == 1 => reason = "a client certificate is needed".into(),
                None => {}
            }
            if route.auth.len() == 1 {
                // There is nothing that a request could say for it (RFC 9110 §15.5.2).
                return Err(Problem::policy(StatusCode::FORBIDDEN, "client-certificate", reason));
            }
        }
        if let Some(problem) = undecided {
            return Err(problem);
        }
        Err(Problem::policy(StatusCode::UNAUTHORIZED, "unauthorized", reason)
            .with_header(header::WWW_AUTHENTICATE, challenge))
    }

    /// Who a certificate names, unless too many from that address were bad: to look at one costs more than to show it.
    fn named(
        &self,
        certificate: &Presented,
        authorities: &Authorities,
        client: IpAddr,
    ) -> Result<Result<Arc<str>, Refusal>, Problem> {
        if let Some(known) = certificate.known(authorities) {
            return Ok(known);
        }
        let address = self.not_too_many_failures(client, "certificates")?;
        let named = certificate.judge(authorities);
        if named.is_err() {
            self.failures.take(&address, 1, Instant::now());
        }
        Ok(named)
    }

    /// The address to count another failure against, unless it has had too many.
    fn not_too_many_failures(&self, client: IpAddr, of: &str) -> Result<String, Problem> {
        let address = address_key(client);
        match self.failures.spent(&address, Instant::now()) {
            Some(after) => {
                let detail = format!("too many {of} that are not valid came from this address");
                let problem = Problem::policy(StatusCode::TOO_MANY_REQUESTS, "too-many-failures", detail);
                Err(problem.retry_after(after))
            }
            None => Ok(address),
        }
    }

    /// Verifies a token, unless too many from that address were bad: each costs a signature's check. Those that were good
    /// before cost none, and stay good. Waits for the issuer if it may have a new key.
    async fn verify(
        &self,
        verifier: &jwt::Verifier,
        token: &str,
        client: IpAddr,
    ) -> Result<Result<jwt::Claims, JwtError>, Problem> {
        if let Some(claims) = verifier.remembered(token) {
            return Ok(Ok(claims));
        }
        let address = self.not_too_many_failures(client, "tokens")?;
        let mut verified = verifier.verify(token);
        if let Err(error) = verified
            && verifier.may_be_of_a_new_key(token, error)
        {
            let Some(_place) = self.looking.enter(client, MAX_LOOKING_OF_ONE) else {
                let detail = "too many tokens from this address wait for the issuer's keys";
                let problem = Problem::policy(StatusCode::SERVICE_UNAVAILABLE, "no-keys", detail);
                return Err(problem.retry_after(Duration::from_secs(1)));
            };
            if let Some(again) = verifier.verify_again(token).await {
                verified = again;
            }
        }
        if verified == Err(JwtError::UnknownKey) && verifier.keys().current().is_empty() {
            let detail = "the issuer has not told its keys yet";
            let problem = Problem::policy(StatusCode::SERVICE_UNAVAILABLE, "no-keys", detail);
            return Err(problem.retry_after(Duration::from_secs(5)));
        }
        if verified.is_err() {
            self.failures.take(&address, 1, Instant::now());
        }
        Ok(verified)
    }
}

/// Whether whoever has a certificate of that name may use the route.
fn is_for(route: &Route, name: &str) -> bool {
    route.client_names.is_empty() || route.client_names.iter().any(|known| known == name)
}

/// Whether a token lets its bearer use the route (RFC 6750 §3.1).
fn permitted(route: &Route, claims: jwt::Claims) -> Result<Caller, Problem> {
    let forbidden = |detail: String, challenge: String| {
        let problem = Problem::policy(StatusCode::FORBIDDEN, "forbidden", detail);
        match HeaderValue::try_from(challenge) {
            Ok(challenge) => problem.with_header(header::WWW_AUTHENTICATE, challenge),
            Err(_) => problem,
        }
    };
    if let Some(scope) = claims.lacks(&route.scopes) {
        let challenge = format!("Bearer error=\"insufficient_scope\", scope=\"{}\"", route.scopes.join(" "));
        return Err(forbidden(format!("the token lacks the scope {scope}"), challenge));
    }
    if let Some((claim, _)) = route.claims.iter().find(|(claim, values)| !claims.has(claim, &values.0)) {
        let challenge = "Bearer error=\"insufficient_scope\"".to_owned();
        return Err(forbidden(format!("the token's claim {claim} is not one that may do this"), challenge));
    }
    let told = route.claim_headers.iter().filter_map(|(name, claim)| Some((name.clone(), claims.field(claim)?)));
    Ok(Caller { told: told.collect(), consumer: Some(claims.consumer), plan: None })
}

/// Who a caller is to a limit: told apart, so that nobody can be named like an address.
pub(crate) fn caller_key(consumer: Option<&str>, client: IpAddr) -> String {
    match consumer {
        Some(consumer) => format!("consumer {consumer}"),
        None => format!("address {}", address_key(client)),
    }
}

/// An address as the key of a limit.
fn address_key(client: IpAddr) -> String {
    accept::source_of(client).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_subscriber_is_one_key() {
        assert_eq!(address_key("192.0.2.1".parse().unwrap()), "192.0.2.1");
        assert_eq!(address_key("::ffff:192.0.2.1".parse().unwrap()), "192.0.2.1");
        let (a, b) = ("2001:db8::1".parse().unwrap(), "2001:db8::ffff:2".parse().unwrap());
        assert_eq!(address_key(a), address_key(b));
    }
}
