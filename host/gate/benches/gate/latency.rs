//! The slow path: what closing, revoking and waking take.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use cofferdam_gate::{Cancel, Drain, Gate, Notify, Woken};
use rustix::thread::{MembarrierCommand, membarrier};

use crate::cases::tie_to;
use crate::report::{Row, median};

/// All latencies, medians of so many events each.
pub(crate) fn measure(events: usize) -> Vec<Row> {
    let mut rows = Vec::new();
    tie_to(0);
    transitions("idle", 1, events, &mut rows);
    with_busy_peer(|| transitions("busy", 2, events, &mut rows));
    with_sleeping_threads(512, || transitions("512-threads", 512, events / 4, &mut rows));
    rows.push(Row { case: "wake-sleeper".into(), threads: 2, gates: 1, ns: wake_sleeper(events / 4) });
    rows
}

/// A bare barrier, close and drain, and revoke and drain of a handle, by turns.
fn transitions(where_: &str, threads: usize, events: usize, rows: &mut Vec<Row>) {
    let (mut barrier, mut close, mut revoke) = (Vec::new(), Vec::new(), Vec::new());
    let cancel = Cancel::new();
    // Registered once: harmless where the gate did so before, or uses no barrier.
    let _ = membarrier(MembarrierCommand::RegisterPrivateExpeditedRseq);
    let sample = |kept: &mut Vec<f64>, act: &dyn Fn()| {
        let begun = Instant::now();
        act();
        kept.push(begun.elapsed().as_nanos() as f64);
    };
    for _ in 0..events {
        sample(&mut barrier, &|| {
            let _ = membarrier(MembarrierCommand::PrivateExpeditedRseq);
        });
        let gate = Gate::new();
        drop(gate.admit());
        let handle = gate.open_handle(None).expect("open");
        drop(handle.admit());
        sample(&mut revoke, &|| {
            handle.revoke();
            handle.drain(None, &cancel).expect("nothing is inside");
        });
        sample(&mut close, &|| {
            gate.close();
            gate.drain(Drain::Both, None, &cancel).expect("nothing is inside");
        });
        gate.retire().expect("closed and drained");
    }
    for (case, kept) in [("membarrier", barrier), ("close-drain", close), ("revoke-drain", revoke)] {
        rows.push(Row { case: format!("{case}-{where_}"), threads, gates: 1, ns: median(kept) });
    }
}

/// While another thread of this process computes on another core.
fn with_busy_peer(act: impl FnOnce()) {
    let done = AtomicBool::new(false);
    let started = Barrier::new(2);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            tie_to(1);
            started.wait();
            while !done.load(SeqCst) {
                std::hint::spin_loop();
            }
        });
        started.wait();
        act();
        done.store(true, SeqCst);
    });
}

/// While so many threads of this process sleep.
fn with_sleeping_threads(count: usize, act: impl FnOnce()) {
    let end = Notify::new().expect("a descriptor");
    std::thread::scope(|scope| {
        for _ in 0..count {
            scope.spawn(|| end.wait_past(0, None));
        }
        act();
        end.signal();
    });
}

/// From closing to drained, when what is inside sleeps.
fn wake_sleeper(events: usize) -> f64 {
    let mut kept = Vec::new();
    for _ in 0..events {
        let gate = Gate::new();
        let guard = gate.admit().expect("open");
        let notify = Notify::new().expect("a descriptor");
        let asleep = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                tie_to(1);
                asleep.store(true, SeqCst);
                assert_eq!(guard.sleep(&notify, notify.count(), None), Woken::Revoked);
                drop(guard);
            });
            while !asleep.load(SeqCst) {
                std::hint::spin_loop();
            }
            // Long enough to fall asleep in nearly every case; the median does not mind the rest.
            std::thread::sleep(Duration::from_micros(200));
            let begun = Instant::now();
            gate.close();
            gate.drain(Drain::Both, None, &Cancel::new()).expect("drains");
            kept.push(begun.elapsed().as_nanos() as f64);
        });
    }
    median(kept)
}
