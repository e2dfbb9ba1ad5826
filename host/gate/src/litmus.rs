//! Directed tests of what only the machine itself can show: that the barrier is needed and
//! suffices, and that a thread without rseq is counted apart.
#![allow(unsafe_code)]

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::cells::Column;
use crate::gate::{Gate, State};
use crate::mechanism::{Mechanism, mechanism};
use crate::slot::CLOSED;
use crate::{Cancel, Drain, cpu};

/// Rounds with the barrier, of which none may go wrong.
const ROUNDS: u64 = 20_000;
/// Bound on looking for a round that goes wrong without it; it takes milliseconds on two cores.
const PATIENCE: Duration = Duration::from_secs(120);
/// Spins before the other side is given this core: it may not be running at all.
const SPINS: u32 = 1 << 12;

fn wait_for(word: &AtomicU64, good: impl Fn(u64) -> bool) -> u64 {
    let mut spins = 0;
    loop {
        let value = word.load(Ordering::Acquire);
        if good(value) {
            return value;
        }
        spins += 1;
        if spins % SPINS == 0 {
            std::thread::yield_now();
        }
        std::hint::spin_loop();
    }
}

/// A pair that meets needs two cores, so pairs take turns.
static PAIR: Mutex<()> = Mutex::new(());

/// Keeps this thread on the `index`-th core that it may use, if there is one. Two that the scheduler puts on one core take turns there and
/// never meet, for as long as other threads keep the other core busy.
fn stay_on_core(index: usize) {
    let Ok(allowed) = sched_getaffinity(None) else { return };
    if let Some(core) = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core)).nth(index) {
        let mut only = CpuSet::new();
        only.set(core);
        let _ = sched_setaffinity(None, &only);
    }
}

/// One entrant enters as often as it can until a closer turns it away, again and again. Wrong
/// is: more inside at the end than the closer saw (G1, G2). Answers rounds and wrong
/// ones; ends at the first wrong one if asked to. (That the barrier must also restart sections,
/// and not only order memory, shows itself too seldom for a test; the model has a mutant.)
fn meet(barrier: bool, rounds: u64, stop_at_wrong: bool) -> (u64, u64) {
    const OVER: u64 = u64::MAX;
    let _alone = PAIR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let gate = Gate::new();
    let (begin, inside, end) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            stay_on_core(1);
            for round in 1.. {
                if wait_for(&begin, |value| value >= round) == OVER {
                    return;
                }
                inside.store(round, Ordering::Release);
                while let Ok(guard) = gate.admit() {
                    // Nobody drains, so nobody needs to leave.
                    std::mem::forget(guard);
                }
                end.store(round, Ordering::Release);
            }
        });
        let closer = scope.spawn(|| {
            stay_on_core(0);
            let (mut done, mut wrong) = (0, 0);
            let patience = Instant::now() + PATIENCE;
            while done < rounds && Instant::now() < patience && !(stop_at_wrong && wrong > 0) {
                done += 1;
                begin.store(done, Ordering::Release);
                wait_for(&inside, |value| value == done);
                // Come at different moments.
                for _ in 0..done % 64 {
                    std::hint::spin_loop();
                }
                if barrier {
                    gate.slot.turn(gate.open | CLOSED);
                } else {
                    gate.slot.state.store(gate.open | CLOSED, Ordering::SeqCst);
                }
                let seen = gate.operations();
                wait_for(&end, |value| value == done);
                wrong += u64::from(gate.operations() > seen);
                gate.slot.state.store(gate.open, Ordering::SeqCst);
            }
            begin.store(OVER, Ordering::Release);
            (done, wrong)
        });
        closer.join().expect("the closer")
    })
}

#[test]
fn no_entrant_is_missed_with_the_barrier() {
    let (done, wrong) = meet(true, ROUNDS, false);
    assert_eq!(wrong, 0, "of {done} rounds");
}

/// The portable form orders by its atomic adds, and one core sees its own stores in order.
fn barrier_matters() -> bool {
    mechanism() == Mechanism::Rseq && std::thread::available_parallelism().map_or(1, usize::from) > 1
}

#[test]
fn entrants_are_missed_without_a_barrier() {
    if barrier_matters() {
        let (done, wrong) = meet(false, u64::MAX, true);
        assert!(wrong > 0, "none of {done} rounds went wrong: this test no longer shows the need");
    }
}

/// Takes the rseq registration of this thread away, as in a thread that the C library did not
/// make.
#[cfg(all(target_arch = "x86_64", target_env = "gnu"))]
fn unregister_rseq() -> bool {
    const UNREGISTER: libc::c_int = 1;
    const SIGNATURE: u32 = 0x5305_3053;
    let pointer: usize;
    // SAFETY: the first word of the thread control block is its own address (x86-64 psABI).
    unsafe {
        std::arch::asm!("mov {}, qword ptr fs:[0]", out(reg) pointer, options(nostack, readonly, preserves_flags))
    };
    // SAFETY: the symbol is of this type where it exists; the name is NUL-terminated.
    let offset = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()).cast::<isize>().as_ref() };
    let Some(offset) = offset else { return false };
    let area = pointer.wrapping_add_signed(*offset);
    // SAFETY: asks the kernel to forget the area; the kernel knows whether it is one.
    [32, 64, 28, 33]
        .into_iter()
        .any(|bytes| unsafe { libc::syscall(libc::SYS_rseq, area, bytes, UNREGISTER, SIGNATURE) == 0 })
}

#[cfg(all(target_arch = "x86_64", target_env = "gnu"))]
#[test]
fn a_thread_without_rseq_is_counted_apart() {
    if mechanism() == Mechanism::Xadd {
        return;
    }
    let gate = Gate::new();
    let handle = gate.open_handle(None).expect("open");
    let (guard, call, batch) = std::thread::spawn(move || {
        assert!(unregister_rseq(), "the registration of this thread is not as expected");
        let guard = gate.admit().expect("open");
        let call = handle.admit().expect("live");
        drop(gate.cross());
        drop(gate.admit().expect("open"));
        let mut batch = handle.admit_many(5).expect("live");
        batch.leave(2);
        (guard, call, batch)
    })
    .join()
    .expect("the thread without rseq");
    let apart = gate.slot.line.at(cpu::homeless(), Column::Entered).load(Ordering::SeqCst);
    assert_eq!((apart, gate.operations(), gate.crossings()), (2, 5, 0));
    assert_eq!(handle.calls(), 4);
    gate.close();
    let drainer = std::thread::spawn(move || gate.drain(Drain::Both, None, &Cancel::new()));
    std::thread::spawn(move || {
        assert!(unregister_rseq());
        drop(guard);
        assert_eq!(gate.state(), State::Closed);
        assert!(gate.admit().is_err());
        drop(call);
        drop(batch);
    })
    .join()
    .expect("the thread without rseq");
    assert_eq!(drainer.join().expect("drainer"), Ok(()));
}

#[test]
fn counters_of_different_cores_are_on_different_pages() {
    let gate = Gate::new();
    let addresses: Vec<usize> =
        cpu::Row::all().map(|row| std::ptr::from_ref(gate.slot.line.at(row, Column::Entered)).addr()).collect();
    assert!(addresses.windows(2).all(|pair| pair[1] - pair[0] == 4096));
    assert!(addresses.iter().all(|address| address % 64 == 0), "one line per core");
}
