//! What a changed configuration changes while the node runs, and what it cannot.

use super::{Running, life::zone_of};
use crate::config::Config;

impl Running {
    pub(super) fn reconfigure(&self, new: &Config, runtime: &tokio::runtime::Handle) -> Result<(), String> {
        if let Some((key, problem)) = new.problems().into_iter().next() {
            return Err(format!("{key}: {problem}"));
        }
        let old = &self.config;
        let fixed = |c: &Config| {
            let services: Vec<_> =
                c.service.iter().map(|s| (s.name.clone(), s.addr, s.protocol, s.health.clone())).collect();
            let upstreams: Vec<_> = c.upstream.iter().map(|u| (u.service.clone(), u.listen)).collect();
            (
                services,
                upstreams,
                c.node.listen,
                c.node.advertise,
                c.node.name.clone(),
                c.admin.listen,
                c.outbound.listen,
                c.node.workers,
                c.telemetry.clone(),
            )
        };
        if fixed(old) != fixed(new) {
            let what = "name, addresses, workers, telemetry, and which services and upstreams there are";
            return Err(format!("{what} change only with a restart; nothing was changed"));
        }
        let bound = self.identity.grants().zone;
        if !bound.is_empty() && !new.node.zone.is_empty() && new.node.zone != bound {
            return Err(format!("node.zone: the certificate binds this node to zone {bound:?}; nothing was changed"));
        }
        self.seeds.send_replace(new.node.seeds.clone());
        let (gossip, zone, services) = (self.gossip.clone(), zone_of(new, &self.identity), new.service.clone());
        runtime.spawn(async move {
            gossip
                .announce(move |a| {
                    a.zone = zone;
                    for service in services {
                        if let Some(own) = a.services.iter_mut().find(|s| s.name == service.name) {
                            service.tell(own);
                        }
                    }
                })
                .await;
        });
        Ok(())
    }
}
