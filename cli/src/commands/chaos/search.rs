//! `starling chaos search` and `promote`.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use starling_simulation::Found;

use super::{UNKNOWN, read, unknown};
use crate::{Failure, args::ChaosSearchArgs};

/// How often it says how far it is, in seeds.
const TELL_EVERY: u64 = 100;

pub(super) fn search(args: &ChaosSearchArgs) -> Result<(), Failure> {
    let begun = Instant::now();
    let done = AtomicU64::new(0);
    let stop = Arc::new(AtomicBool::new(false));
    let each = |seed: u64, failed: bool| {
        let done = done.fetch_add(1, Relaxed) + 1;
        if failed {
            eprintln!("seed {seed} fails");
        }
        if done.is_multiple_of(TELL_EVERY) {
            eprintln!("{done} of {} seeds after {:.0} s", args.seeds, begun.elapsed().as_secs_f64());
        }
    };
    let found = starling_simulation::search(args.from..args.from + args.seeds, &stop, &each);
    let seconds = begun.elapsed().as_secs_f64();
    if found.is_empty() {
        println!("{} seeds, none fails, {seconds:.0} s", args.seeds);
        return Ok(());
    }
    std::fs::create_dir_all(&args.report)?;
    for found in &found {
        let Found { seed, plan, verdict } = starling_simulation::shrink(found);
        let file = args.report.join(format!("seed-{seed}.toml"));
        std::fs::write(&file, toml::to_string(&plan)?)?;
        println!("{}: {}", file.display(), verdict.line);
    }
    Err(Failure::failed(format!("{} of {} seeds fail", found.len(), args.seeds)))
}

pub(super) fn promote(file: &Path, to: &Path) -> Result<(), Failure> {
    let (name, plan) = read(&file.to_string_lossy())?;
    let history = starling_simulation::run(&name, &plan, String::new()).map_err(unknown)?;
    let verdict = starling_chaos::judge(&history).map_err(unknown)?;
    let target = to.join(format!("{name}.toml"));
    if target.exists() {
        return Err(Failure::coded(UNKNOWN, format!("{} is there already; rename the file", target.display())));
    }
    std::fs::create_dir_all(to)?;
    std::fs::copy(file, &target)?;
    println!("{} is kept; today: {}", target.display(), verdict.line);
    Ok(())
}
