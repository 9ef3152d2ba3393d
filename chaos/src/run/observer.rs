//! Looks at every node's members again and again, and notes what changes.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use starling_protocol::admin::{Member, MemberStatus};
use tokio::task::JoinSet;

use super::mesh::{Mesh, get};
use crate::{
    history::{Event, Recorder},
    stage::Place,
};

/// How often each node is asked in a small mesh.
const PERIOD: Duration = Duration::from_millis(200);
/// Questions a second over all nodes, at most: looking must not be the load.
const MOST_PER_SECOND: f64 = 60.0;

/// What a node shows of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) status: MemberStatus,
    pub(crate) generation: u64,
}

/// What each node shows now, by observer and subject.
pub(crate) type Views = BTreeMap<String, BTreeMap<String, Seen>>;

/// Whom the next look shows as down, although he is not: sabotage.
type Lie = Arc<Mutex<Option<String>>>;

/// Looks until it is dropped.
pub(crate) struct Observers {
    views: Arc<Mutex<Views>>,
    lie: Lie,
    _tasks: JoinSet<()>,
}

impl Observers {
    /// One for each node.
    pub(crate) fn start(mesh: &Mesh, recorder: &Arc<Recorder>) -> Self {
        let views = Arc::new(Mutex::new(Views::new()));
        let lie = Lie::default();
        let mut tasks = JoinSet::new();
        let period = PERIOD.max(Duration::from_secs_f64(mesh.nodes.len() as f64 / MOST_PER_SECOND));
        for node in &mesh.nodes {
            let look = Look {
                name: node.name.clone(),
                place: node.place.clone(),
                admin: node.admin,
                views: views.clone(),
                recorder: recorder.clone(),
                lie: lie.clone(),
            };
            tasks.spawn(look.again_and_again(period));
        }
        Self { views, lie, _tasks: tasks }
    }

    /// Shows a member as down, once, whatever he is.
    pub(crate) fn lie_about(&self, member: &str) {
        *self.lie.lock().unwrap_or_else(|e| e.into_inner()) = Some(member.into());
    }

    /// What is shown now.
    pub(crate) fn views(&self) -> Views {
        self.views.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

struct Look {
    name: String,
    place: Place,
    admin: SocketAddr,
    views: Arc<Mutex<Views>>,
    recorder: Arc<Recorder>,
    lie: Lie,
}

impl Look {
    async fn again_and_again(self, period: Duration) {
        let mut answers = true;
        let mut ticks = tokio::time::interval(period);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let answer = get(&self.place, self.admin, "/v1/members").await;
            let members: Option<Vec<Member>> =
                answer.ok().filter(|(status, _)| *status == 200).and_then(|(_, b)| serde_json::from_slice(&b).ok());
            if members.is_some() != answers {
                answers = members.is_some();
                self.recorder.note(Event::Admin { node: self.name.clone(), answers });
            }
            match members {
                Some(mut members) => {
                    self.falsify(&mut members);
                    self.note(&members);
                }
                // What it showed before its death is nobody's view any more.
                None => drop(self.views.lock().unwrap_or_else(|e| e.into_inner()).remove(&self.name)),
            }
        }
    }

    fn falsify(&self, members: &mut [Member]) {
        let mut lie = self.lie.lock().unwrap_or_else(|e| e.into_inner());
        let Some(victim) = lie.take_if(|victim| *victim != self.name) else { return };
        members.iter_mut().filter(|m| m.name == victim).for_each(|m| m.status = MemberStatus::Down);
    }

    fn note(&self, members: &[Member]) {
        let mut views = self.views.lock().unwrap_or_else(|e| e.into_inner());
        let before = views.entry(self.name.clone()).or_default();
        let seen = |m: &Member| Seen { status: m.status, generation: m.generation };
        for member in members {
            let now = seen(member);
            if before.insert(member.name.clone(), now) == Some(now) {
                continue;
            }
            self.recorder.note(Event::View {
                observer: self.name.clone(),
                subject: member.name.clone(),
                status: Some(now.status),
                generation: now.generation,
            });
        }
        let gone: Vec<String> =
            before.keys().filter(|name| members.iter().all(|m| m.name != **name)).cloned().collect();
        for subject in gone {
            let generation = before.remove(&subject).map_or(0, |seen| seen.generation);
            let observer = self.name.clone();
            self.recorder.note(Event::View { observer, subject, status: None, generation });
        }
    }
}
