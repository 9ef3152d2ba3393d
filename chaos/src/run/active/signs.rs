//! What shows that a fault acts: counts of the switch, states of processes, and what the product shows of it.

use starling_protocol::admin::MemberStatus;

use super::{Active, Hands, system::state_of};
use crate::{
    history::{Call, Entry, Event, Side},
    plan::{CLIENTS, Fault, Misbehaviour},
    run::mesh::Mesh,
};

impl Active {
    /// Notes what the stage knows: counts, states of processes. To be called while it is still on.
    pub(crate) fn note_stage(&mut self, hands: &mut Hands<'_>) {
        let (found, what) = match self.stage_sign(hands.mesh) {
            Ok(what) => (true, what),
            Err(what) => (false, what),
        };
        hands.recorder.note(Event::Sign { fault: self.id, side: Side::Stage, found, what });
    }

    fn stage_sign(&self, mesh: &Mesh) -> Result<String, String> {
        let state = |victim: &String| {
            let pid = self.pids.get(victim).copied().flatten()?;
            Some(state_of(pid))
        };
        match &self.fault {
            _ if !self.rules.is_empty() => {
                let table = mesh.stage.table();
                let counts: Vec<_> = self.rules.iter().map(|rule| table.count(*rule)).collect();
                let links: usize = self.rules.iter().map(|rule| table.count_by_link(*rule).len()).sum();
                let (seen, touched) =
                    counts.iter().fold((0, 0), |(seen, touched), c| (seen + c.seen, touched + c.touched));
                let what = format!("{touched} of {seen} packets on {links} directed links");
                if touched > 0 { Ok(what) } else { Err(format!("the switch touched nothing: {what}")) }
            }
            Fault::Kill { .. } | Fault::Herd { .. } => {
                let gone = self.victims.iter().all(|victim| {
                    // Another process may have the number by now.
                    let now = mesh.at(victim).ok().and_then(|at| mesh.nodes[at].pid());
                    now != self.pids.get(victim).copied().flatten()
                });
                if gone { Ok("the processes were killed by signal 9".into()) } else { Err("they still run".into()) }
            }
            Fault::Pause { .. } => match self.victims.iter().all(|v| state(v) == Some('T')) {
                true => Ok("the kernel shows the processes as stopped".into()),
                false => Err("the kernel does not show them as stopped".into()),
            },
            Fault::Starve { .. } => {
                let (looks, stopped) = self.looks;
                let what = format!("stopped in {stopped} of {looks} looks at its state");
                if stopped * 4 > looks { Ok(what) } else { Err(what) }
            }
            Fault::Burst { times, .. } => Ok(format!("{times} times as many calls are due")),
            _ => match &self.probing {
                Some(probing) => match (probing.stage(), &self.stage) {
                    (_, Ok(what)) => Ok(what.clone()),
                    (other, _) => other,
                },
                None => self.stage.clone(),
            },
        }
    }

    /// What the product shows of it, if it does yet.
    pub(crate) fn product_sign(&self, entries: &[Entry], mesh: &Mesh) -> Result<String, String> {
        let since = entries.iter().filter(|entry| entry.at >= self.at);
        let victim = |name: &String| self.victims.contains(name);
        let views = since.clone().filter_map(|entry| match &entry.event {
            Event::View { observer, subject, status, .. } => Some((entry.at, observer, subject, *status)),
            _ => None,
        });
        let alive = Some(MemberStatus::Alive);
        let told = |at: f64, o: &String, s: &String, status: Option<MemberStatus>| {
            let status = status.map_or("not at all".into(), |status| status.to_string());
            format!("{o} shows {s} as {status} after {:.2} s", at - self.at)
        };
        let seen_gone = || {
            let mut gone = views.clone().filter(|(_, o, s, status)| victim(s) && !victim(o) && *status != alive);
            gone.next().map(|(at, o, s, status)| told(at, o, s, status)).ok_or("no node shows a victim as gone".into())
        };
        let new_life = || {
            let lives = since.clone().filter_map(|entry| match &entry.event {
                Event::View { observer, subject, generation, .. } if victim(subject) && observer != subject => {
                    Some((subject, *generation))
                }
                _ => None,
            });
            let before = |subject: &String| {
                let all = entries.iter().filter(|entry| entry.at < self.at);
                let seen = all.filter_map(|entry| match &entry.event {
                    Event::View { subject: s, generation, .. } if s == subject => Some(*generation),
                    _ => None,
                });
                seen.max().unwrap_or(0)
            };
            let newer: Vec<&String> = lives.filter(|(s, life)| *life > before(s)).map(|(s, _)| s).collect();
            let all = self.victims.iter().all(|v| newer.contains(&v));
            if all { Ok("others show a new life of it".to_string()) } else { Err("no new life is shown".to_string()) }
        };
        let crossing = || {
            let calls = since.clone().filter(
                |entry| matches!(&entry.event, Event::Call(call) if call.good() && crosses(call, &self.victims)),
            );
            match calls.count() {
                0 => Err("no call went over the touched links".to_string()),
                count => Ok(format!("{count} calls were answered over the touched links")),
            }
        };
        let served_elsewhere = || {
            let by_victims = |from: f64, to: f64| {
                let calls = entries.iter().filter(|entry| entry.at >= from && entry.at < to);
                calls.filter(|e| matches!(&e.event, Event::Call(c) if victim(&c.by) && c.good())).count()
            };
            let now = entries.last().map_or(self.at, |entry| entry.at);
            let (before, after) = (by_victims(self.at - 3.0, self.at), by_victims(self.at + 0.5, now));
            match before > 0 && after * 10 < before {
                true => Ok(format!("victims answered {before} calls in the 3 s before, {after} since")),
                false => Err(format!("victims answered {before} calls in the 3 s before, and {after} since")),
            }
        };
        match &self.fault {
            Fault::Kill { back: Some(_), .. } => new_life(),
            Fault::Kill { .. } | Fault::Partition { .. } | Fault::Pause { .. } | Fault::UdpBlocked { .. } => {
                seen_gone().or_else(|_| served_elsewhere())
            }
            Fault::Herd { .. } => new_life().or_else(|_| seen_gone()),
            Fault::Starve { .. } | Fault::Mute { .. } | Fault::Deaf { .. } | Fault::HoldBack { .. } => {
                seen_gone().or_else(|_| served_elsewhere()).or_else(|_| slower(entries, self.at, &self.victims))
            }
            Fault::Roll { .. } | Fault::Upgrade { .. } | Fault::OtherVersion { .. } => new_life(),
            Fault::TruncatedState { .. } | Fault::RestoredState { .. } | Fault::SwappedAddresses { .. } => new_life(),
            Fault::Loss { .. } | Fault::Corrupt { .. } | Fault::Duplicate { .. } | Fault::Reorder { .. } => crossing(),
            Fault::Mtu { .. } | Fault::NatForgets { .. } | Fault::Rebind { .. } => crossing(),
            Fault::Delay { .. } | Fault::Rate { .. } => slower(entries, self.at, &self.victims).or_else(|_| crossing()),
            Fault::Cut { .. } | Fault::Stuck { .. } => self.shown.clone(),
            Fault::Descriptors { .. } => descriptors_sign(entries, self.at, &self.victims, mesh),
            Fault::DiskFull { .. } => log_sign(mesh, &self.victims, &["No space left"]),
            Fault::Service { does: Misbehaviour::Crash | Misbehaviour::Hang, .. } => served_elsewhere(),
            Fault::Service { does: Misbehaviour::Stumble, .. } => {
                let stumbled = since.clone().filter(|e| matches!(&e.event, Event::Call(c) if c.status == 500));
                match stumbled.count() {
                    0 => Err("no call was answered 500".into()),
                    count => Ok(format!("{count} calls were answered 500")),
                }
            }
            Fault::Service { does: Misbehaviour::Slow, .. } => {
                slower_answers(entries, self.at, &self.victims).or_else(|_| served_elsewhere())
            }
            Fault::Service { .. } => crossing(),
            Fault::Burst { times, .. } => {
                let rate = |from: f64, to: f64| {
                    let calls = entries.iter().filter_map(|e| match &e.event {
                        Event::Call(call) => Some(call.due),
                        _ => None,
                    });
                    calls.filter(|due| *due >= from && *due < to).count() as f64 / (to - from).max(0.1)
                };
                let now = entries.last().map_or(self.at, |entry| entry.at);
                let (before, after) = (rate(self.at - 3.0, self.at), rate(self.at, now));
                let what = format!("{after:.0} calls a second came to an end, {before:.0} before");
                if after > before * f64::from(*times) * 0.3 { Ok(what) } else { Err(what) }
            }
            Fault::Clone { .. } | Fault::Strangers { .. } | Fault::KeyRevoked { .. } | Fault::Reload { .. } => {
                match &self.probing {
                    Some(probing) => probing.product(self.id, entries, mesh),
                    None => Err("it never began".into()),
                }
            }
            Fault::ShortCertificates { .. } => log_sign(mesh, &[], &["certificate renewed"]),
            Fault::Clock { .. } => Err("not here".into()),
        }
    }
}

/// Calls over the victims' links take longer than before.
fn slower(entries: &[Entry], at: f64, victims: &[String]) -> Result<String, String> {
    compare(entries, at, 5, |call| crosses(call, victims))
}

/// Whether a call goes over a victim's links.
fn crosses(call: &Call, victims: &[String]) -> bool {
    victims.iter().any(|v| *v == call.node || *v == call.by || v == CLIENTS && call.door.is_public())
}

/// Answers of the victims take longer than before; as soon as they do, they are asked less.
fn slower_answers(entries: &[Entry], at: f64, victims: &[String]) -> Result<String, String> {
    compare(entries, at, 1, |call| victims.contains(&call.by))
}

fn compare(entries: &[Entry], at: f64, fewest: usize, of: impl Fn(&Call) -> bool) -> Result<String, String> {
    let median = |from: f64, to: f64| {
        let calls = entries.iter().filter_map(|entry| match &entry.event {
            Event::Call(call) if call.due >= from && call.due < to && call.good() => Some(call),
            _ => None,
        });
        let mut ms: Vec<f64> = calls.filter(|call| of(call)).map(|call| call.ms).collect();
        ms.sort_by(f64::total_cmp);
        (ms.len() >= fewest).then(|| ms[ms.len() / 2])
    };
    match (median(at - 5.0, at), median(at, f64::MAX)) {
        (Some(before), Some(after)) if after > before * 1.5 => {
            Ok(format!("the median is {after:.1} ms, {before:.1} before"))
        }
        (before, after) => Err(format!("they are not slower: {after:?} ms, {before:?} before")),
    }
}

fn descriptors_sign(entries: &[Entry], at: f64, victims: &[String], mesh: &Mesh) -> Result<String, String> {
    let silent = entries.iter().filter(|e| e.at >= at).find_map(|e| match &e.event {
        Event::Admin { node, answers: false } if victims.contains(node) => Some(node.clone()),
        _ => None,
    });
    match silent {
        Some(node) => Ok(format!("{node} takes no new connection")),
        None => log_sign(mesh, victims, &["Too many open files", "os error 24"]),
    }
}

/// A victim's log, or anybody's, has one of these words.
fn log_sign(mesh: &Mesh, victims: &[String], words: &[&str]) -> Result<String, String> {
    let nodes = mesh.nodes.iter().filter(|node| victims.is_empty() || victims.contains(&node.name));
    for node in nodes {
        if let Some(word) = words.iter().find(|word| node.log().contains(**word)) {
            return Ok(format!("{}'s log says {word:?}", node.name));
        }
    }
    Err(format!("no log says {}", words.join(" or ")))
}
