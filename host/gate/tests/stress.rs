//! Threads that come and go and change cores, guards and batches that move between them, and a payload that
//! is poisoned when the gate says that nobody is inside: in the best form that the machine has,
//! and once more, in a process of its own, in the portable form.
//!
//! `COFFERDAM_STRESS_SECONDS` sets the bound of each run (3 by default).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use cofferdam_gate::{
    Cancel, Drain, Gate, Guard, Guards, Handle, HandleRefused, MECHANISM_VARIABLE, Mechanism, Refused, mechanism,
};

fn bound() -> Duration {
    let seconds = std::env::var("COFFERDAM_STRESS_SECONDS").ok();
    Duration::from_secs(seconds.and_then(|seconds| seconds.parse().ok()).unwrap_or(3))
}

/// A small generator: the seed is printed by nobody, because the order of threads decides.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// What is guarded: alive as long as anybody may be inside.
#[derive(Default)]
struct Payload {
    poisoned: AtomicBool,
    used: AtomicU64,
}

impl Payload {
    fn touch(&self) {
        assert!(!self.poisoned.load(Relaxed), "somebody is inside after the drain");
        self.used.fetch_add(1, Relaxed);
    }
}

fn flip_core(dice: &mut Dice) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut set = rustix::thread::CpuSet::new();
    if dice.below(2) == 0 {
        set.set(usize::try_from(dice.below(cores as u64)).expect("small"));
    } else {
        (0..cores).for_each(|core| set.set(core));
    }
    // Not permitted in some containers: then the scheduler alone moves threads.
    let _ = rustix::thread::sched_setaffinity(None, &set);
}

/// What somebody is inside by.
enum Inside {
    One(#[expect(dead_code, reason = "held until it is dropped")] Guard),
    Many(Guards),
}

/// A guard or a batch on its way to another thread, with what it guards.
type Parcel = (Inside, Arc<Payload>);

/// Uses what is guarded; some of a batch leave, and what stays uses it again.
fn touch(inside: &mut Inside, payload: &Payload, dice: &mut Dice) {
    match inside {
        Inside::One(_) => payload.touch(),
        // Nobody of an empty batch is inside.
        Inside::Many(guards) if guards.count() == 0 => {}
        Inside::Many(guards) => {
            payload.touch();
            guards.leave(dice.below(u64::from(guards.count())) as u32);
            payload.touch();
        }
    }
}

/// Operates until refused for good; sends some of its guards away, and keeps some of its batches to
/// join them with the next.
fn work(gate: Gate, handle: Option<Handle>, payload: &Arc<Payload>, post: &mpsc::Sender<Parcel>, mut dice: Dice) {
    let mut kept: Option<Guards> = None;
    loop {
        if dice.below(64) == 0 {
            flip_core(&mut dice);
        }
        let admitted = match handle {
            None => gate.admit().map(Inside::One).map_err(|refused| refused == Refused::Closed),
            Some(handle) if dice.below(2) == 0 => {
                let count = dice.below(70) as u32;
                handle.admit_many(count).map(Inside::Many).map_err(|refused| refused == HandleRefused::Revoked)
            }
            Some(handle) => handle.admit().map(Inside::One).map_err(|refused| refused == HandleRefused::Revoked),
        };
        match admitted {
            Ok(mut inside) => {
                touch(&mut inside, payload, &mut dice);
                match (&mut kept, inside) {
                    (_, inside) if dice.below(16) == 0 => {
                        let _ = post.send((inside, Arc::clone(payload)));
                    }
                    (None, Inside::Many(guards)) => kept = Some(guards),
                    (Some(kept), Inside::Many(guards)) if kept.count() < 1000 => {
                        kept.join(guards).expect("of the same handle");
                        if kept.count() > 0 {
                            payload.touch();
                        }
                    }
                    (_, mut inside) => {
                        let _crossing = (dice.below(4) == 0).then(|| gate.cross());
                        touch(&mut inside, payload, &mut dice);
                        drop(inside);
                        kept = None;
                    }
                }
            }
            Err(true) => return,
            Err(false) => {
                kept = None;
                std::thread::yield_now();
            }
        }
    }
}

/// Ends guards and batches that others began.
fn finish(parcels: &Mutex<mpsc::Receiver<Parcel>>, mut dice: Dice) {
    loop {
        let parcel = parcels.lock().expect("no finisher panics inside").recv();
        let Ok((mut inside, payload)) = parcel else { return };
        if dice.below(32) == 0 {
            flip_core(&mut dice);
        }
        touch(&mut inside, &payload, &mut dice);
        drop(inside);
    }
}

/// One gate from opening to poison; threads are new each time.
fn round(number: u64) -> u64 {
    let gate = Gate::new();
    let all = Arc::new(Payload::default());
    let ones: Vec<(Handle, Arc<Payload>)> =
        (0..2).map(|_| (gate.open_handle(None).expect("open"), Arc::default())).collect();
    let (post, parcels) = mpsc::channel();
    let parcels = Mutex::new(parcels);
    let mut dice = Dice(number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    std::thread::scope(|scope| {
        for seed in 0..2 {
            let parcels = &parcels;
            scope.spawn(move || finish(parcels, Dice(number << 8 | seed | 1)));
        }
        for seed in 2..4 {
            let (all, post) = (&all, post.clone());
            scope.spawn(move || work(gate, None, all, &post, Dice(number << 8 | seed | 1)));
        }
        for (handle, payload) in &ones {
            let post = post.clone();
            let seed = u64::from(handle.id().index) + 4;
            scope.spawn(move || work(gate, Some(*handle), payload, &post, Dice(number << 8 | seed | 1)));
        }
        drop(post);
        let patience = Some(Instant::now() + Duration::from_secs(60));
        let cancel = Cancel::new();
        for step in 0..4 + dice.below(4) {
            if step == 1 {
                // One handle goes while the others work on.
                let (handle, payload) = &ones[0];
                handle.revoke();
                handle.drain(patience, &cancel).expect("its calls end");
                payload.poisoned.store(true, Relaxed);
            } else if step % 2 == 0 {
                gate.hold();
                gate.drain(Drain::Operations, patience, &cancel).expect("operations end");
                // Nobody is inside: what it would poison for good if it did not open again.
                for payload in ones.iter().map(|one| &one.1).chain([&all]) {
                    let used = payload.used.load(Relaxed);
                    std::hint::spin_loop();
                    assert_eq!(used, payload.used.load(Relaxed), "used while held and drained");
                }
                gate.open();
            }
            for _ in 0..dice.below(2000) {
                std::hint::spin_loop();
            }
        }
        gate.close();
        gate.drain(Drain::Both, patience, &cancel).expect("everything ends");
        all.poisoned.store(true, Relaxed);
        ones[1].1.poisoned.store(true, Relaxed);
    });
    gate.retire().expect("closed, drained, and everybody gone");
    all.used.load(Relaxed)
}

#[test]
fn nobody_is_inside_after_a_drain() {
    let end = Instant::now() + bound();
    let (mut rounds, mut used) = (0, 0);
    while Instant::now() < end {
        rounds += 1;
        used += round(rounds);
    }
    println!("{rounds} rounds, {used} uses, by {}", mechanism());
    assert!(rounds > 1);
}

#[test]
fn the_same_in_the_portable_form() {
    if mechanism() == Mechanism::Xadd {
        // This is the portable form; the test above ran in it.
        return;
    }
    let program = std::env::current_exe().expect("this program has a path");
    let output = std::process::Command::new(program)
        .args(["--exact", "nobody_is_inside_after_a_drain", "--nocapture"])
        .env(MECHANISM_VARIABLE, "xadd")
        .output()
        .expect("the child starts");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("by xadd"), "{said}");
}
