//! What is wrong with a plan, and where.

use std::{fmt, time::Duration};

use super::{Backend, DoorKind, Fault, Plan, Role, Victims};

/// Something wrong with a plan file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line in the file, from 1; 0 if it is about the file as a whole.
    pub line: usize,
    /// What is wrong, and what to write instead.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => f.write_str(&self.what),
            line => write!(f, "line {line}: {}", self.what),
        }
    }
}

impl Problem {
    pub(super) fn of_toml(text: &str, error: &toml::de::Error) -> Self {
        let line = error.span().map_or(0, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        Self { line, what: error.message().to_string() }
    }
}

/// Longer than any run: such a time is a slip of the pen.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
const MOST_NODES: usize = 5_000;
const MOST_PROCESSES: usize = 200;
const MOST_RATE: u32 = 20_000;
const NO_EDGE: &str = "there is no edge: write edges = 1 under [mesh]";

pub(super) fn of(plan: &Plan, text: &str) -> Vec<Problem> {
    let mut found = Found { text, problems: Vec::new() };
    mesh(plan, &mut found);
    load(plan, &mut found);
    if plan.steps.is_empty() {
        found.add(0, "no [[step]]: a plan without a fault shows nothing".into());
    }
    for (index, step) in plan.steps.iter().enumerate() {
        let line = found.step(index);
        if step.faults.is_empty() {
            found.add(line, format!("step {:?} has no faults", step.name));
        }
        if step.hold < Duration::from_millis(100) || step.hold > LONGEST {
            found.add(line, "hold: must be between 100ms and 1day".into());
        }
        if step.stagger > LONGEST {
            found.add(line, "stagger: at most 1day".into());
        }
        if step.expect.goodput.is_some_and(|share| !(0.0..=1.0).contains(&share)) {
            found.add(line, "expect.goodput: a share, from 0 to 1".into());
        }
        for fault in &step.faults {
            for what in fault_problems(plan, fault, step.hold) {
                found.add(line, format!("{}: {what}", fault.kind()));
            }
        }
    }
    if plan.duration.is_some_and(|d| d.is_zero() || d > LONGEST) {
        found.add(found.key("duration"), "duration: must be above 0 and at most 1day".into());
    }
    if Backend::ALL.iter().all(|backend| !plan.cannot(*backend).is_empty()) && found.problems.is_empty() {
        let why: Vec<_> = Backend::ALL.iter().map(|b| format!("{b}: {}", plan.cannot(*b).join(", "))).collect();
        found.add(0, format!("no backend can run all of it ({}); split it into two plans", why.join("; ")));
    }
    found.problems.sort_by_key(|problem| problem.line);
    found.problems
}

struct Found<'a> {
    text: &'a str,
    problems: Vec<Problem>,
}

impl Found<'_> {
    fn add(&mut self, line: usize, what: String) {
        self.problems.push(Problem { line, what });
    }

    /// The line on which a key stands first.
    fn key(&self, key: &str) -> usize {
        let is_it = |line: &str| line.trim_start().strip_prefix(key).is_some_and(|r| r.trim_start().starts_with('='));
        self.text.lines().position(is_it).map_or(0, |at| at + 1)
    }

    /// The line on which the step begins.
    fn step(&self, index: usize) -> usize {
        let mut starts = self.text.lines().enumerate().filter(|(_, line)| line.trim() == "[[step]]");
        starts.nth(index).map_or(0, |(at, _)| at + 1)
    }
}

fn mesh(plan: &Plan, found: &mut Found) {
    let mesh = &plan.mesh;
    if !(3..=MOST_NODES).contains(&mesh.nodes) {
        let line = found.key("nodes");
        found.add(line, format!("nodes: {}: from 3 to {MOST_NODES} make a mesh in which one can fail", mesh.nodes));
    }
    if mesh.nodes + mesh.edges > MOST_PROCESSES && plan.backends.iter().any(|b| *b != Backend::Sim) {
        let line = found.key("nodes");
        found.add(line, format!("nodes: lab and relay start a process a node, at most {MOST_PROCESSES}"));
    }
    for (what, count) in [("issuers", mesh.issuers), ("seeds", mesh.seeds)] {
        if count == 0 || count > mesh.nodes {
            let line = found.key(what);
            found.add(line, format!("{what}: from 1 to the number of nodes, {}", mesh.nodes));
        }
    }
    if mesh.services.is_empty() {
        found.add(found.key("services"), "services: at least one, for the load to call".into());
    }
    for service in &mesh.services {
        let line = found.key("services");
        if service.instances == 0 || service.instances >= mesh.nodes {
            let most = mesh.nodes.saturating_sub(1);
            found.add(line, format!("{}: from 1 instance to one a node but the first, {most}", service.name));
        }
        if !starling_protocol::is_label(&service.name) {
            found.add(line, format!("{:?} is no name of a service", service.name));
        }
    }
}

fn load(plan: &Plan, found: &mut Found) {
    let load = &plan.load;
    if load.rate == 0 || load.rate > MOST_RATE {
        found.add(found.key("rate"), format!("rate: from 1 to {MOST_RATE} calls a second"));
    }
    if load.doors.is_empty() {
        found.add(found.key("doors"), "doors: at least one".into());
    }
    if plan.mesh.edges == 0 && load.doors.iter().any(|door| door.is_public()) {
        let door = load.doors.iter().find(|door| door.is_public()).copied().unwrap_or(DoorKind::EdgeHttp1);
        found.add(found.key("doors"), format!("doors: {door} needs an edge: write edges = 1 under [mesh]"));
    }
    let mix = load.mix;
    if load.quota.is_some() != (mix.counted > 0) {
        found.add(found.key("quota"), "quota: it goes with mix = { counted = … }; write both, or none".into());
    }
    if mix.counted > 0 && !load.doors.iter().any(|door| door.is_public()) {
        found.add(found.key("mix"), "mix: counted calls need a door of an edge, such as \"edge-http2\"".into());
    }
    if mix.get + mix.post + mix.download + mix.upload + mix.stream + mix.talk + mix.socket + mix.counted == 0 {
        found.add(found.key("mix"), "mix: at least one weight above 0".into());
    }
    if load.deadline < Duration::from_millis(100) || load.deadline > Duration::from_secs(600) {
        found.add(found.key("deadline"), "deadline: from 100ms to 10m".into());
    }
}

fn fault_problems(plan: &Plan, fault: &Fault, hold: Duration) -> Vec<String> {
    let mut found = Vec::new();
    if let Some(victims) = fault.victims() {
        found.extend(victims_problem(plan, fault, victims));
    }
    let share = |found: &mut Vec<String>, share: f64| {
        if !(share > 0.0 && share <= 1.0) {
            found.push(format!("share = {share}: must be above 0 and at most 1"));
        }
    };
    let within = |found: &mut Vec<String>, what: &str, time: Duration| {
        if time.is_zero() || time >= hold {
            let hold = humantime::format_duration(hold);
            found.push(format!("{what}: must be above 0 and shorter than the step's hold, {hold}"));
        }
    };
    match fault {
        Fault::Kill { back: Some(back), for_good, .. } => {
            within(&mut found, "back", *back);
            if *for_good {
                found.push("back and for_good exclude each other".into());
            }
        }
        Fault::Starve { share: s, .. } => {
            share(&mut found, *s);
            if *s >= 1.0 {
                found.push("share = 1 is `pause`".into());
            }
        }
        Fault::Loss { share: s, burst, .. } => {
            share(&mut found, *s);
            if *burst < 1.0 || (*s >= 1.0 && *burst > 1.0) {
                found.push("burst: at least 1, and only below a share of 1".into());
            }
        }
        Fault::Duplicate { share: s, .. } | Fault::Reorder { share: s, .. } | Fault::Corrupt { share: s, .. } => {
            share(&mut found, *s);
        }
        Fault::Partition { flip: Some(flip), .. } => within(&mut found, "flip", *flip),
        Fault::Rebind { every, .. } | Fault::Reload { every, .. } => within(&mut found, "every", *every),
        Fault::Rate { kbit: 0, .. } => found.push("kbit: above 0; 0 is `partition`".into()),
        Fault::Mtu { bytes, .. } if *bytes < 1200 => {
            found.push(format!("bytes = {bytes}: QUIC needs 1200 (RFC 9000 §14), so nothing could get through"));
        }
        Fault::Burst { times, .. } if *times < 2 => found.push("times: at least 2".into()),
        Fault::Stuck { clients, .. } if *clients == 0 || *clients > 10_000 => {
            found.push("clients: from 1 to 10000".into());
        }
        Fault::ShortCertificates { lifetime } if *lifetime < Duration::from_secs(5) => {
            found.push("lifetime: at least 5s".into());
        }
        _ => {}
    }
    found
}

fn victims_problem(plan: &Plan, fault: &Fault, victims: &Victims) -> Option<String> {
    let all = plan.mesh.nodes;
    let of = match &victims.role {
        Role::Any | Role::Half => all,
        Role::Idle => {
            let serving = plan.serving();
            plan.node_names().skip(plan.mesh.seeds).filter(|n| serving.iter().all(|(node, _)| node != n)).count()
        }
        Role::AllBut(n) => all.saturating_sub(*n),
        Role::Edge => plan.mesh.edges,
        Role::Issuer => plan.mesh.issuers,
        Role::Seed => plan.mesh.seeds,
        Role::Instance(service) => match plan.mesh.services.iter().find(|s| s.name == *service) {
            Some(service) => service.instances,
            None => {
                let known: Vec<_> = plan.mesh.services.iter().map(|s| s.name.as_str()).collect();
                return Some(format!("there is no service {service:?}; there are {}", known.join(", ")));
            }
        },
        Role::Clients if !fault.is_of_links() => {
            return Some(
                "the clients are no nodes: only their links can be hit, such as with `loss` or `rebind`".into(),
            );
        }
        Role::Clients if plan.mesh.edges == 0 => return Some(NO_EDGE.into()),
        Role::Clients => 1,
        Role::Named(name) => {
            let known = plan.node_names().chain(plan.edge_names()).any(|n| n == *name);
            if !known {
                let names = format!("n1 to n{all}");
                return Some(format!("there is no node {name:?}; there are {names}"));
            }
            1
        }
    };
    let wanted = victims.count.unwrap_or(1);
    if of == 0 && victims.role == Role::Edge {
        return Some(NO_EDGE.into());
    }
    if of < wanted || of == 0 {
        return Some(format!("{victims}: the mesh has only {of}"));
    }
    let everybody = matches!(victims.role, Role::Any) && victims.count.is_none_or(|count| count >= all);
    let leaves_nobody = matches!(fault, Fault::Partition { .. } | Fault::Kill { .. } | Fault::Pause { .. });
    if everybody && leaves_nobody && plan.mesh.edges == 0 {
        return Some("nobody would be left to see it: leave at least one out, such as `all but 1`".into());
    }
    if matches!(fault, Fault::Cut { .. } | Fault::SwappedAddresses { .. }) && of.min(victims.count.unwrap_or(of)) < 2 {
        return Some("needs two victims or more".into());
    }
    if matches!(fault, Fault::Reload { .. } | Fault::KeyRevoked { .. }) && victims.role != Role::Edge {
        return Some("only edges have a public file and keys: write `an edge` or `all edges`".into());
    }
    None
}
