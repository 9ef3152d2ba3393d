//! What liars can do: nothing but harm themselves.

use std::time::Duration;

use starling_gossip::Refused;
use starling_protocol::MemberHealth;

use super::{mesh, settles};
use crate::{
    MS, S,
    world::{Action, World, index_of},
};

/// Pause between two rounds of lies of one member. Each is told to every honest node that has a link to it, and one more.
const ROUND: Duration = Duration::from_millis(200);
impl World {
    /// What an honest node has refused of each member, by index.
    fn refused(&self, observer: usize) -> Vec<(usize, Refused)> {
        let details = self.nodes[observer].gossip.as_ref().expect("it runs").details(self.instant());
        details.into_iter().map(|detail| (index_of(&detail.id), detail.refused)).collect()
    }
}

/// A mesh with liars in it, for two minutes, in which one honest node dies and comes back.
fn with_liars(nodes: usize, liars: &[usize], seed: u64) -> String {
    let mut world = mesh(nodes, seed);
    let start = world.now;
    let end = start + 120 * S;
    world.truth.liars = liars.to_vec();
    for (turn, liar) in liars.iter().enumerate() {
        let mut at = start + MS * 7 * turn as u32;
        while at < end {
            world.plan(at, Action::Lie(*liar));
            at += ROUND;
        }
    }
    let victim = nodes / 2 + 1;
    world.run_until(start + 30 * S);
    world.plan(world.now, Action::Kill(victim));
    let honest = |world: &World| {
        let honest = world.running().into_iter().filter(|node| !liars.contains(node));
        honest.filter(|node| *node != victim).collect::<Vec<_>>()
    };
    let known = world.run_until_holds(30 * S, |w| {
        honest(w).into_iter().all(|observer| w.view_of(observer, victim).is_some_and(|(h, _)| h == MemberHealth::Down))
    });
    let known = known.expect("a real death is noticed among all the lies");
    world.plan(world.now + S, Action::Start(victim));
    world.run_until(end);

    assert_eq!(world.invariants.false_downs, [""; 0], "healthy nodes were shown as down");
    assert!(world.lies > 100);
    let longest = world.truth.longest_lost;
    assert!(longest < 10 * S, "an honest node was locked out for {longest:?}");
    let (mut of_liars, mut of_honest) = (u64::MAX, 0);
    for observer in honest(&world) {
        for (member, refused) in world.refused(observer) {
            match liars.contains(&member) {
                true => of_liars = of_liars.min(refused.total()),
                false => of_honest = of_honest.max(refused.total()),
            }
        }
    }
    assert!(of_liars >= 10 && of_liars > 3 * of_honest, "liars stand out: {of_liars} against {of_honest}");
    let settled = settles(&mut world, 30 * S, "after the lies");
    format!(
        "{} of {nodes}: {} lies, no honest node down, a death known after {known:?}, longest lost {longest:?}, \
         refused of a liar at least {of_liars}, of an honest node at most {of_honest}, settled after {settled:?}",
        liars.len(),
        world.lies,
    )
}

#[test]
fn one_liar_hurts_nobody() {
    println!("{}", with_liars(20, &[5], 1));
    println!("{}", with_liars(5, &[4], 2));
    println!("{}", with_liars(3, &[0], 3));
}

#[test]
fn three_that_collude_hurt_nobody() {
    println!("{}", with_liars(30, &[3, 7, 11], 3));
    println!("{}", with_liars(10, &[0, 1, 9], 4));
}

#[test]
fn ten_of_a_hundred_hurt_nobody() {
    println!("{}", with_liars(100, &[0, 7, 13, 21, 34, 42, 60, 71, 85, 99], 5));
}
