//! Fills a role with nodes, by the seed.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};
use rand::{rngs::StdRng, seq::SliceRandom};

use super::{CLIENTS, Plan, Role, Victims};

impl Victims {
    /// Who it is now: none that is gone for good; while there are others, none that another fault of the step has taken, and
    /// those first that were hit least often, as `hits` says, which is counted up.
    ///
    /// # Errors
    /// If there are not so many left.
    pub fn pick(
        &self,
        plan: &Plan,
        gone: &BTreeSet<String>,
        taken: &[String],
        hits: &mut BTreeMap<String, usize>,
        rng: &mut StdRng,
    ) -> Result<Vec<String>> {
        let nodes: Vec<String> = plan.node_names().filter(|name| !gone.contains(name)).collect();
        let serving = plan.serving();
        let (mut candidates, count): (Vec<String>, Option<usize>) = match &self.role {
            Role::Any if self.count.is_none() => {
                let edges = plan.edge_names().filter(|name| !gone.contains(name));
                (nodes.iter().cloned().chain(edges).collect(), None)
            }
            Role::Any => (nodes, self.count),
            Role::Idle => {
                let idle = nodes.into_iter().skip(plan.mesh.seeds.max(plan.mesh.issuers));
                (idle.filter(|name| serving.iter().all(|(node, _)| node != name)).collect(), self.count)
            }
            Role::Half => {
                let half = nodes.len() / 2;
                (nodes, Some(half))
            }
            Role::AllBut(spared) => {
                let count = nodes.len().saturating_sub(*spared);
                (nodes, Some(count))
            }
            Role::Edge => (plan.edge_names().filter(|name| !gone.contains(name)).collect(), self.count),
            Role::Issuer => (nodes.into_iter().take(plan.mesh.issuers).collect(), self.count),
            Role::Seed => (nodes.into_iter().take(plan.mesh.seeds).collect(), self.count),
            Role::Instance(service) => {
                let serves = |name: &String| serving.iter().any(|(node, s)| node == name && s == service);
                (nodes.into_iter().filter(serves).collect(), self.count)
            }
            Role::Named(name) => (vec![name.clone()], Some(1)),
            Role::Clients => (vec![CLIENTS.into()], Some(1)),
        };
        candidates.shuffle(rng);
        // A stable sort: the order within each half stays the seed's.
        candidates.sort_by_key(|name| (taken.contains(name), hits.get(name).copied().unwrap_or(0)));
        let count = count.unwrap_or(candidates.len());
        if candidates.len() < count || count == 0 {
            bail!("{self}: only {} are left", candidates.len());
        }
        candidates.truncate(count);
        candidates.sort();
        candidates.iter().for_each(|name| *hits.entry(name.clone()).or_default() += 1);
        Ok(candidates)
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn picked(text: &str, gone: &[&str], taken: &[&str], seed: u64) -> Vec<String> {
        let plan = Plan::named("smoke").unwrap();
        let gone = gone.iter().map(ToString::to_string).collect();
        let taken: Vec<String> = taken.iter().map(ToString::to_string).collect();
        let victims: Victims = text.parse().unwrap();
        victims.pick(&plan, &gone, &taken, &mut BTreeMap::new(), &mut StdRng::seed_from_u64(seed)).unwrap_or_default()
    }

    #[test]
    fn roles_are_filled_by_the_seed() {
        assert_eq!(picked("a seed", &[], &[], 1), ["n1"]);
        assert_eq!(picked("half", &[], &[], 1).len(), 2);
        assert_eq!(picked("all but 2", &[], &[], 1).len(), 3);
        assert_eq!(picked("all instances of orders", &[], &[], 1), ["n3", "n4", "n5"]);
        assert_eq!(picked("an instance of orders", &["n3", "n5"], &[], 1), ["n4"]);
        assert!(picked("2 instances of orders", &["n3", "n5"], &[], 1).is_empty());
        assert_eq!(picked("any 2", &[], &[], 5), picked("any 2", &[], &[], 5));
        let all: BTreeSet<_> = (0..20).map(|seed| picked("any 1", &[], &[], seed)).collect();
        assert!(all.len() > 2, "{all:?}");
        for seed in 0..20 {
            assert_ne!(picked("an instance of stock", &[], &["n2"], seed), ["n2"]);
        }
    }
}
