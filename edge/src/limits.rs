//! How often a caller may call: by the rate of a plan, its quotas, or both.

mod counter;
mod counts;
mod line;
mod quota;
mod rate;
mod redis;
mod share;
mod store;
mod tally;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

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
    redis::Redis,
    tally::{Answerer, Members, Tally},
};
use self::{quota::Clock, rate::Decision, tally::Left};
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
    /// Whether it may not pass, because what is left of a quota cannot be told.
    pub(crate) unknown: bool,
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
    /// for sure, never something that a client may choose. Waits for another edge only where a quota's counter is that one's, and
    /// this one's lease of it is used up.
    pub(crate) async fn take(&self, caller: &str, cost: u32, tally: &Arc<Tally>) -> Outcome {
        let (mut violated, mut wait, mut in_force, mut unknown) = (Vec::new(), Duration::ZERO, Vec::new(), false);
        let rated = self.rate.as_ref().map(|rate| rate.look(caller, cost, Instant::now()).allowed);
        let mut may = rated != Some(false);
        let now = unix_now();
        let mut taken = Taken { tally, cost: cost.into(), items: Vec::with_capacity(self.quotas.len()) };
        for (quota, clock) in &self.quotas {
            let key = self.key(quota, caller);
            let left = match may {
                true => tally.take(&key, quota, clock, cost.into(), now).await,
                false => tally.stands(&key, quota, clock, cost.into(), now),
            };
            if may && left.allowed {
                taken.items.push((key, left));
            }
            may &= left.allowed;
            if left.unknown {
                unknown = true;
                continue;
            }
            let standing = self.standing_of(quota, left);
            if !left.allowed {
                violated.push(standing.name.clone());
                wait = wait.max(Duration::from_secs(left.reset));
            }
            in_force.push(standing);
        }
        if let Some(rate) = &self.rate {
            let at = Instant::now();
            let decision = if may { rate.take(caller, cost, at) } else { rate.look(caller, cost, at) };
            may &= decision.allowed;
            if !decision.allowed {
                violated.insert(0, self.plan.name.clone());
                wait = wait.max(decision.retry_after);
            }
            in_force.insert(0, self.standing(decision));
        }
        match may {
            true => taken.items.clear(),
            false => {
                let standings = in_force.iter_mut().skip(usize::from(self.rate.is_some()));
                standings.zip(&taken.items).for_each(|(standing, _)| standing.left += u64::from(cost));
            }
        }
        if !violated.is_empty() {
            wait += (wait / 10).min(MAX_JITTER).mul_f64(rand::rng().random_range(0.0..1.0));
        }
        Outcome { unknown, violated, retry_after: wait, fields: fields(&in_force) }
    }

    /// Takes what a call has cost besides, by its service's word, also more than there is; the fields that say how it stands then.
    pub(crate) fn charge(&self, caller: &str, cost: u32, tally: &Tally) -> HeaderMap {
        let (at, now, mut in_force) = (Instant::now(), unix_now(), Vec::new());
        if let Some(rate) = &self.rate {
            rate.charge(caller, cost, at);
            in_force.push(self.standing(rate.look(caller, 0, at)));
        }
        for (quota, clock) in &self.quotas {
            let key = self.key(quota, caller);
            tally.charge(&key, quota, clock, cost.into(), now);
            in_force.push(self.standing_of(quota, tally.stands(&key, quota, clock, 0, now)));
        }
        fields(&in_force)
    }

    fn standing(&self, decision: Decision) -> Standing {
        Standing {
            name: self.plan.name.clone(),
            limit: decision.limit.into(),
            window: seconds(decision.window),
            left: decision.remaining.into(),
            reset: seconds(decision.reset),
        }
    }

    fn standing_of(&self, quota: &Quota, left: Left) -> Standing {
        let (limit, window) = (quota.count.get(), quota.period.seconds());
        let name = format!("{}-{}", self.plan.name, quota.period);
        Standing { name, limit, window, left: limit.saturating_sub(left.used), reset: left.reset }
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
    pub(crate) fn shown(&self, caller: &str, tally: &Tally) -> Vec<admin::QuotaUse> {
        let now = unix_now();
        let shown = |(quota, clock): &(Quota, Clock)| {
            let Left { used, reset, .. } = tally.stands(&self.key(quota, caller), quota, clock, 0, now);
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

/// What was taken of quotas for a call that may not pass in the end, or whose caller goes while it waits: then it is given back.
struct Taken<'a> {
    tally: &'a Tally,
    cost: u64,
    items: Vec<(String, Left)>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.items.iter().for_each(|(key, left)| self.tally.give_back(key, *left, self.cost));
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

    #[tokio::test]
    async fn all_policies_in_force_are_told_and_the_first_that_forbids_costs_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let counter = Counter::new(dir.path().join("quota.redb"));
        counter.begin(true);
        let tally = tally::tests::alone(counter);
        let plan = "name = \"p\"\nrate = \"1/h\"\nburst = 3\nquota = [\"10/24h\", \"4/7d\"]";
        let limit = Limit::new(&toml::from_str::<Plan>(plan).unwrap());
        let first = limit.take("a", 1, &tally).await;
        let field = |name: &str| first.fields[name].to_str().unwrap().to_owned();
        assert_eq!(field("ratelimit-policy"), "\"p\";q=3;w=10800, \"p-1d\";q=10;w=86400, \"p-7d\";q=4;w=604800");
        assert!(field("ratelimit").starts_with("\"p\";r=2;t=3600, \"p-1d\";r=9;t="), "{}", field("ratelimit"));
        assert!(first.violated.is_empty());
        // Twice as dear: the rate is used up, and then forbids without a quota noticing.
        assert!(limit.take("a", 2, &tally).await.violated.is_empty());
        let refused = limit.take("a", 1, &tally).await;
        assert_eq!(refused.violated, ["p"]);
        assert!(refused.retry_after >= Duration::from_secs(3599) && refused.retry_after <= Duration::from_secs(3660));
        assert_eq!(limit.shown("a", &tally).iter().map(|q| q.used).collect::<Vec<_>>(), [3, 3]);
        assert_eq!(limit.take("b", 5, &tally).await.violated, ["p", "p-7d"], "more than there ever is");

        // Whichever forbids it, the others notice nothing.
        for quotas in ["[\"100/30d\", \"3/36h\"]", "[\"3/36h\", \"100/30d\"]"] {
            let limit = Limit::new(&toml::from_str::<Plan>(&format!("name = \"r\"\nquota = {quotas}")).unwrap());
            for _ in 0..9 {
                limit.take(quotas, 1, &tally).await;
            }
            assert_eq!(limit.shown(quotas, &tally).iter().map(|q| q.used).collect::<Vec<_>>(), [3, 3]);
        }

        let slow = Limit::new(&toml::from_str::<Plan>("name = \"q\"\nquota = \"2/month\"").unwrap());
        assert!(slow.take("a", 2, &tally).await.violated.is_empty());
        assert_eq!(slow.take("a", 1, &tally).await.violated, ["q-month"]);
        assert!(slow.take("b", 1, &tally).await.violated.is_empty(), "each caller has its own");
    }
}
