//! How often a caller may call: by the rate of a plan, its quotas, or both.

mod counter;
mod quota;
mod rate;
mod store;

use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderValue};
use jiff::tz::TimeZone;
use rand::RngExt;
use sfv::{BareItem, KeyRef, ListSerializer, StringRef, key_ref};
use starling_node::unix_now;
use starling_protocol::admin;

pub(crate) use self::{
    counter::Counter,
    quota::{Period, Quota},
    rate::Limiter,
};
use self::{counter::Left, quota::Clock};
use crate::config::Plan;

/// The most that is added to the time after which a caller is to try again, so that not all come back at once.
const MAX_JITTER: Duration = Duration::from_secs(60);

/// What a plan lets a caller do.
pub(crate) struct Limit {
    pub(crate) plan: Plan,
    rate: Option<Limiter>,
    quotas: Vec<(Quota, Clock)>,
}

/// What becomes of a call.
pub(crate) struct Outcome {
    /// The policies by which it may not pass; none if it may.
    pub(crate) violated: Vec<String>,
    /// When it may, if it may not now.
    pub(crate) retry_after: Duration,
    /// RateLimit-Policy and RateLimit (draft-ietf-httpapi-ratelimit-headers-10 §3, §4).
    pub(crate) fields: HeaderMap,
}

/// One of several policies in force.
struct Standing {
    name: String,
    limit: u64,
    /// Seconds.
    window: u64,
    left: u64,
    /// Seconds.
    reset: u64,
}

impl Limit {
    pub(crate) fn new(plan: &Plan) -> Self {
        let zone = plan.time_zone.clone().map_or(TimeZone::UTC, |zone| zone.0);
        let clock = |quota: &Quota| (quota.clone(), Clock::new(quota.period, zone.clone()));
        Self {
            plan: plan.clone(),
            rate: plan.rate.map(|rate| Limiter::new(rate, plan.burst(rate))),
            quotas: plan.quotas.iter().map(clock).collect(),
        }
    }

    /// Takes a call of that cost from what a caller may, unless it may not: then it costs nothing. `caller` is what the gateway knows
    /// for sure, never something that a client may choose.
    pub(crate) fn take(&self, caller: &str, cost: u32, counter: &Counter) -> Outcome {
        let at = Instant::now();
        let now = unix_now();
        let keys: Vec<String> = self.keys(caller).collect();
        let quotas = || keys.iter().zip(&self.quotas);
        let mut may = quotas().all(|(key, (quota, clock))| counter.look(key, quota, clock, cost.into(), now).allowed);
        let (mut violated, mut wait, mut in_force) = (Vec::new(), Duration::ZERO, Vec::new());
        if let Some(rate) = &self.rate {
            let decision = if may { rate.take(caller, cost, at) } else { rate.look(caller, cost, at) };
            may &= decision.allowed;
            if !decision.allowed {
                violated.push(self.plan.name.clone());
                wait = decision.retry_after;
            }
            in_force.push(Standing {
                name: self.plan.name.clone(),
                limit: decision.limit.into(),
                window: seconds(decision.window),
                left: decision.remaining.into(),
                reset: seconds(decision.reset),
            });
        }
        for (key, (quota, clock)) in quotas() {
            let Left { allowed, used, reset } = match may {
                true => counter.take(key, quota, clock, cost.into(), now),
                false => counter.look(key, quota, clock, cost.into(), now),
            };
            let name = format!("{}-{}", self.plan.name, quota.period);
            if !allowed {
                violated.push(name.clone());
                wait = wait.max(Duration::from_secs(reset));
            }
            let (limit, window) = (quota.count.get(), quota.period.seconds());
            in_force.push(Standing { name, limit, window, left: limit.saturating_sub(used), reset });
        }
        if !violated.is_empty() {
            wait += (wait / 10).min(MAX_JITTER).mul_f64(rand::rng().random_range(0.0..1.0));
        }
        Outcome { violated, retry_after: wait, fields: fields(&in_force) }
    }

    /// What it lets a caller do, in words.
    pub(crate) fn words(&self) -> Vec<String> {
        let rate = self.plan.rate.map(|rate| {
            let (burst, seconds) = (self.plan.burst(rate), rate.window.as_secs());
            format!("{} calls in {seconds} s, {burst} at once", rate.count)
        });
        let quotas = self.quotas.iter().map(|(quota, _)| format!("{} calls a {}", quota.count, quota.period));
        rate.into_iter().chain(quotas).collect()
    }

    /// How it stands with a caller's quotas.
    pub(crate) fn shown(&self, caller: &str, counter: &Counter) -> Vec<admin::QuotaUse> {
        let now = unix_now();
        let shown = |(quota, clock): &(Quota, Clock)| {
            let Left { used, reset, .. } = counter.look(&self.key(quota, caller), quota, clock, 0, now);
            let (limit, period) = (quota.count.get(), quota.period.to_string());
            admin::QuotaUse { plan: self.plan.name.clone(), period, limit, used, resets_in_s: reset }
        };
        self.quotas.iter().map(shown).collect()
    }

    /// Under what a caller's quotas are counted.
    pub(crate) fn keys(&self, caller: &str) -> impl Iterator<Item = String> {
        self.quotas.iter().map(move |(quota, _)| self.key(quota, caller))
    }

    /// Another number of calls is the same quota; another time is another one.
    fn key(&self, quota: &Quota, caller: &str) -> String {
        format!("{} {} {caller}", self.plan.name, quota.period)
    }
}

/// Whole seconds, rounded up.
fn seconds(time: Duration) -> u64 {
    time.as_nanos().div_ceil(1_000_000_000) as u64
}

fn fields(in_force: &[Standing]) -> HeaderMap {
    let list = |params: &dyn Fn(&Standing) -> [(&'static KeyRef, u64); 2]| {
        let mut list = ListSerializer::new();
        for standing in in_force {
            // A name that cannot stand in a field, which one from a file always can.
            let Ok(name) = StringRef::from_str(&standing.name) else { continue };
            let mut item = list.bare_item(name);
            for (key, value) in params(standing) {
                let value = i64::try_from(value).ok().and_then(|value| sfv::Integer::try_from(value).ok());
                item = item.parameter(key, &BareItem::Integer(value.unwrap_or(sfv::Integer::MAX)));
            }
        }
        list.finish().and_then(|list| HeaderValue::try_from(list).ok())
    };
    let policy = list(&|standing| [(key_ref("q"), standing.limit), (key_ref("w"), standing.window)]);
    let limit = list(&|standing| [(key_ref("r"), standing.left), (key_ref("t"), standing.reset)]);
    let mut fields = HeaderMap::new();
    for (name, value) in [("ratelimit-policy", policy), ("ratelimit", limit)] {
        fields.extend(value.map(|value| (http::HeaderName::from_static(name), value)));
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_policies_in_force_are_told_and_the_first_that_forbids_costs_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let counter = Counter::new(dir.path().join("quota.redb"));
        counter.begin(true);
        let plan = "name = \"p\"\nrate = \"1/h\"\nburst = 3\nquota = [\"10/24h\", \"4/7d\"]";
        let limit = Limit::new(&toml::from_str::<Plan>(plan).unwrap());
        let first = limit.take("a", 1, &counter);
        let field = |name: &str| first.fields[name].to_str().unwrap().to_owned();
        assert_eq!(field("ratelimit-policy"), "\"p\";q=3;w=10800, \"p-1d\";q=10;w=86400, \"p-7d\";q=4;w=604800");
        assert!(field("ratelimit").starts_with("\"p\";r=2;t=3600, \"p-1d\";r=9;t="), "{}", field("ratelimit"));
        assert!(first.violated.is_empty());
        // Twice as dear: the rate is used up, and then forbids without a quota noticing.
        assert!(limit.take("a", 2, &counter).violated.is_empty());
        let refused = limit.take("a", 1, &counter);
        assert_eq!(refused.violated, ["p"]);
        assert!(refused.retry_after >= Duration::from_secs(3599) && refused.retry_after <= Duration::from_secs(3660));
        assert_eq!(limit.shown("a", &counter).iter().map(|q| q.used).collect::<Vec<_>>(), [3, 3]);
        assert_eq!(limit.take("b", 5, &counter).violated, ["p", "p-7d"], "more than there ever is");

        // Whichever forbids it, the others notice nothing.
        for quotas in ["[\"100/30d\", \"3/36h\"]", "[\"3/36h\", \"100/30d\"]"] {
            let limit = Limit::new(&toml::from_str::<Plan>(&format!("name = \"r\"\nquota = {quotas}")).unwrap());
            for _ in 0..9 {
                limit.take(quotas, 1, &counter);
            }
            assert_eq!(limit.shown(quotas, &counter).iter().map(|q| q.used).collect::<Vec<_>>(), [3, 3]);
        }

        let slow = Limit::new(&toml::from_str::<Plan>("name = \"q\"\nquota = \"2/month\"").unwrap());
        assert!(slow.take("a", 2, &counter).violated.is_empty());
        assert_eq!(slow.take("a", 1, &counter).violated, ["q-month"]);
        assert!(slow.take("b", 1, &counter).violated.is_empty(), "each caller has its own");
    }
}
