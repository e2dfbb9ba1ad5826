//! The hot paths: enter and leave, the gate's and everybody else's.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Weak};
use std::time::{Duration, Instant};

use cofferdam_gate::{Gate, Handle};

use crate::report::{Row, median};

/// Runs its operation this often.
type Slice = Box<dyn FnMut(u64) + Send>;

/// One thing to measure.
pub(crate) struct Case {
    name: &'static str,
    /// How many gates (or other things) the operations go round.
    gates: usize,
    /// Operations that one turn of the loop makes.
    batch: u32,
    /// May put its thread to sleep.
    blocks: bool,
    /// Makes the operation for each of so many threads, over shared things.
    make: fn(gates: usize, threads: usize) -> Vec<Slice>,
}

/// Operations of the cases that let many in at once.
const BATCH: u32 = 32;

/// About how long one slice takes.
const SLICE: Duration = Duration::from_micros(1000);

/// The gate alone: also measured in its portable form.
pub(crate) fn gate_cases() -> Vec<Case> {
    let case = |name, gates, make| Case { name, gates, batch: 1, blocks: false, make };
    vec![
        case("empty", 1, empty),
        case("floor", 1, floor),
        case("gate-pair", 1, gate_pair),
        case("handle-call", 1, handle_call),
        case("crossing", 1, crossing),
        case("floor", 64, floor),
        case("gate-pair", 64, gate_pair),
        case("handle-call", 64, handle_call),
        Case { batch: BATCH, ..case("handle-batch-32", 1, handle_batch) },
    ]
}

pub(crate) fn all_cases() -> Vec<Case> {
    let mut cases = gate_cases();
    let case = |name, blocks, make| Case { name, gates: 1, batch: 1, blocks, make };
    cases.extend([
        case("pinned", false, pinned),
        case("pinned-handle-call", false, pinned_handle_call),
        case("shared-atomic", false, shared_atomic),
        case("arc-clone", false, arc_clone),
        case("weak-upgrade", false, weak_upgrade),
        case("arc-swap-load", false, arc_swap_load),
        case("crossbeam-epoch-pin", false, epoch_pin),
        case("seize-enter", false, seize_enter),
        case("haphazard-protect", false, haphazard_protect),
        case("parking-lot-rwlock-read", true, parking_lot_read),
        case("std-rwlock-read", true, std_read),
        case("parking-lot-mutex", true, parking_lot_mutex),
        case("std-mutex", true, std_mutex),
    ]);
    cases
}

/// Medians over the rounds, the empty loop taken off.
pub(crate) fn measure(cases: &[Case], cores: usize, rounds: usize) -> Vec<Row> {
    let threads: &[usize] = if cores > 1 { &[1, cores] } else { &[1] };
    let mut rows = Vec::new();
    for &threads in threads {
        let mut slices: Vec<Vec<Slice>> = cases.iter().map(|case| (case.make)(case.gates, threads)).collect();
        let sizes: Vec<u64> = cases.iter().zip(&mut slices).map(|(case, slices)| calibrate(case, slices)).collect();
        let mut samples = vec![Vec::new(); cases.len()];
        for _ in 0..rounds {
            for (at, case) in cases.iter().enumerate() {
                samples[at].push(round(case, &mut slices[at], sizes[at]));
            }
        }
        let medians: Vec<f64> = samples.into_iter().map(median).collect();
        for (case, ns) in cases.iter().zip(&medians).skip(1) {
            // The loop turns once for all of them.
            let ns = (ns - medians[0]).max(0.0) / f64::from(case.batch);
            rows.push(Row { case: case.name.to_owned(), threads, gates: case.gates, ns });
        }
    }
    rows
}

/// How many turns make a slice.
fn calibrate(case: &Case, slices: &mut [Slice]) -> u64 {
    let mut count = 1000;
    loop {
        let ns = round(case, slices, count) * count as f64;
        if ns >= SLICE.as_nanos() as f64 / 2.0 {
            return (count as f64 * SLICE.as_nanos() as f64 / ns).max(1.0) as u64;
        }
        count *= 2;
    }
}

/// One slice on every thread at once; the mean of the threads, in ns per turn.
fn round(case: &Case, slices: &mut [Slice], count: u64) -> f64 {
    let threads = slices.len();
    let start = Barrier::new(threads);
    let running = AtomicUsize::new(0);
    let total: f64 = std::thread::scope(|scope| {
        let handles: Vec<_> = slices
            .iter_mut()
            .enumerate()
            .map(|(core, slice)| {
                let (start, running) = (&start, &running);
                scope.spawn(move || {
                    tie_to(core);
                    slice(count / 20 + 1);
                    start.wait();
                    // The barrier lets go one after the other: begin together.
                    running.fetch_add(1, Ordering::SeqCst);
                    let patience = Instant::now();
                    while running.load(Ordering::SeqCst) < threads && patience.elapsed() < Duration::from_millis(2) {
                        std::hint::spin_loop();
                    }
                    let begun = now(case.blocks);
                    slice(count);
                    (now(case.blocks) - begun).as_nanos() as f64 / count as f64
                })
            })
            .collect();
        handles.into_iter().map(|handle| handle.join().expect("no slice panics")).sum()
    });
    total / threads as f64
}

fn now(wall: bool) -> Duration {
    use rustix::time::{ClockId, clock_gettime};
    let clock = if wall { ClockId::Monotonic } else { ClockId::ThreadCPUTime };
    let time = clock_gettime(clock);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

pub(crate) fn tie_to(core: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(core);
    // Not permitted in some containers: then the scheduler spreads the threads.
    let _ = rustix::thread::sched_setaffinity(None, &set);
}

/// The same operation for every thread.
fn each<F: FnMut(u64) + Send + 'static>(threads: usize, make: impl Fn() -> F) -> Vec<Slice> {
    (0..threads).map(|_| Box::new(make()) as Slice).collect()
}

fn empty(_: usize, threads: usize) -> Vec<Slice> {
    each(threads, || {
        |count| {
            for turn in 0..count {
                black_box(turn);
            }
        }
    })
}

/// A plain increment and a plain decrement of a word of the thread's own.
fn floor(gates: usize, threads: usize) -> Vec<Slice> {
    #[derive(Default)]
    #[repr(align(64))]
    struct Line(AtomicU64);
    each(threads, || {
        let lines: Vec<Line> = (0..gates).map(|_| Line::default()).collect();
        let mask = gates as u64 - 1;
        // Relaxed loads and stores of an atomic are plain ones that the compiler may not merge.
        let step = |line: &Line, by: u64| {
            line.0.store(line.0.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
        };
        move |count| {
            if let [line] = &lines[..] {
                for turn in 0..count {
                    black_box(turn);
                    step(line, 1);
                    step(line, u64::MAX);
                }
                return;
            }
            for turn in 0..count {
                let line = &lines[(black_box(turn) & mask) as usize];
                step(line, 1);
                step(line, u64::MAX);
            }
        }
    })
}

fn gates(count: usize) -> Vec<Gate> {
    (0..count).map(|_| Gate::new()).collect()
}

fn gate_pair(gates_used: usize, threads: usize) -> Vec<Slice> {
    let gates = gates(gates_used);
    each(threads, || {
        let gates = gates.clone();
        let mask = gates_used as u64 - 1;
        move |count| {
            if let [gate] = *gates {
                for turn in 0..count {
                    black_box(turn);
                    let guard = gate.admit();
                    black_box(&guard);
                }
                return;
            }
            for turn in 0..count {
                let guard = gates[(black_box(turn) & mask) as usize].admit();
                black_box(&guard);
            }
        }
    })
}

fn handle_call(gates_used: usize, threads: usize) -> Vec<Slice> {
    let gates = gates(gates_used);
    each(threads, || {
        let handles: Vec<Handle> = gates.iter().map(|gate| gate.open_handle(None).expect("open")).collect();
        let mask = gates_used as u64 - 1;
        move |count| {
            if let [handle] = *handles {
                for turn in 0..count {
                    black_box(turn);
                    let guard = handle.admit();
                    black_box(&guard);
                }
                return;
            }
            for turn in 0..count {
                let guard = handles[(black_box(turn) & mask) as usize].admit();
                black_box(&guard);
            }
        }
    })
}

fn handle_batch(_: usize, threads: usize) -> Vec<Slice> {
    let gate = Gate::new();
    each(threads, || {
        let handle = gate.open_handle(None).expect("open");
        move |count| {
            for turn in 0..count {
                black_box(turn);
                let mut guards = handle.admit_many(black_box(BATCH)).expect("open");
                guards.leave(black_box(BATCH));
                black_box(&guards);
            }
        }
    })
}

fn crossing(_: usize, threads: usize) -> Vec<Slice> {
    let gate = Gate::new();
    each(threads, || {
        move |count| {
            for turn in 0..count {
                black_box(turn);
                black_box(&gate.cross());
            }
        }
    })
}

fn pinned(_: usize, threads: usize) -> Vec<Slice> {
    let gate = Gate::pinned();
    each(threads, || {
        move |count| {
            for turn in 0..count {
                black_box(turn);
                black_box(&gate.admit());
            }
        }
    })
}

fn pinned_handle_call(_: usize, threads: usize) -> Vec<Slice> {
    let handle = Gate::pinned().open_handle(None).expect("open");
    each(threads, || {
        move |count| {
            for turn in 0..count {
                black_box(turn);
                black_box(&handle.admit());
            }
        }
    })
}

fn shared_atomic(_: usize, threads: usize) -> Vec<Slice> {
    let count_inside = Arc::new(AtomicU64::new(0));
    each(threads, || {
        let inside = Arc::clone(&count_inside);
        move |count| {
            for turn in 0..count {
                black_box(turn);
                inside.fetch_add(1, Ordering::AcqRel);
                inside.fetch_sub(1, Ordering::AcqRel);
            }
        }
    })
}

fn arc_clone(_: usize, threads: usize) -> Vec<Slice> {
    let shared = Arc::new(0u64);
    each(threads, || {
        let shared = Arc::clone(&shared);
        move |count| {
            for turn in 0..count {
                black_box(turn);
                black_box(&Arc::clone(&shared));
            }
        }
    })
}

fn weak_upgrade(_: usize, threads: usize) -> Vec<Slice> {
    let shared = Arc::new(0u64);
    each(threads, || {
        let (_strong, weak): (Arc<u64>, Weak<u64>) = (Arc::clone(&shared), Arc::downgrade(&shared));
        move |count| {
            let _ = &_strong;
            for turn in 0..count {
                black_box(turn);
                black_box(&weak.upgrade());
            }
        }
    })
}

fn arc_swap_load(_: usize, threads: usize) -> Vec<Slice> {
    let shared = Arc::new(arc_swap::ArcSwap::from_pointee(0u64));
    each(threads, || {
        let shared = Arc::clone(&shared);
        move |count| {
            for turn in 0..count {
                black_box(turn);
                black_box(&shared.load());
            }
        }
    })
}

fn epoch_pin(_: usize, threads: usize) -> Vec<Slice> {
    each(threads, || {
        |count| {
            for turn in 0..count {
                black_box(turn);
                black_box(&crossbeam_epoch::pin());
            }
        }
    })
}

fn seize_enter(_: usize, threads: usize) -> Vec<Slice> {
    use seize::Guard as _;
    let collector = Arc::new(seize::Collector::new());
    let shared = Arc::new(std::sync::atomic::AtomicPtr::new(Box::into_raw(Box::new(0u64))));
    each(threads, || {
        let (collector, shared) = (Arc::clone(&collector), Arc::clone(&shared));
        move |count| {
            for turn in 0..count {
                black_box(turn);
                let guard = collector.enter();
                black_box(guard.protect(&shared, Ordering::Acquire));
                black_box(&guard);
            }
        }
    })
}

fn haphazard_protect(_: usize, threads: usize) -> Vec<Slice> {
    let shared = Arc::new(haphazard::AtomicPtr::from(Box::new(0u64)));
    each(threads, || {
        let shared = Arc::clone(&shared);
        move |count| {
            let mut hazard = haphazard::HazardPointer::new();
            for turn in 0..count {
                black_box(turn);
                black_box(shared.safe_load(&mut hazard));
                hazard.reset_protection();
            }
        }
    })
}

fn parking_lot_read(_: usize, threads: usize) -> Vec<Slice> {
    let shared = Arc::new(parking_lot::RwLock::new(0u64));
    each(threads, || {
        let shared = Arc::clone(&shared);
        move |count| {
            for turn in 0..count {
                black_box(turn);
                black_box(&shared.read());
            }
        }
    })
}

fn std_read(_: usize, threads: usize) -> Vec<Slice> {
    let shared = Arc::new(std::sync::RwLock::new(0u64));
    each(threads, || {
        let shared = Arc::clone(&shared);
        move |count| {
            for turn in 0..count {
                black_box(turn);
                black_box(&shared.read());
            }
        }
    })
}

fn parking_lot_mutex(_: usize, threads: usize) -> Vec<Slice> {
    let shared = Arc::new(parking_lot::Mutex::new(0u64));
    each(threads, || {
        let shared = Arc::clone(&shared);
        move |count| {
            for turn in 0..count {
                black_box(turn);
                black_box(&shared.lock());
            }
        }
    })
}

fn std_mutex(_: usize, threads: usize) -> Vec<Slice> {
    let shared = Arc::new(std::sync::Mutex::new(0u64));
    each(threads, || {
        let shared = Arc::clone(&shared);
        move |count| {
            for turn in 0..count {
                black_box(turn);
                black_box(&shared.lock());
            }
        }
    })
}
