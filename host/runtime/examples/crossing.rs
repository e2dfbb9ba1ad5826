//! What one crossing costs: host to guest `submit` with batches of 1 and 32, and `complete`, best and median of many rounds.
//!
//! ```text
//! cargo run --release -p cofferdam-runtime --example crossing
//! ```
//!
//! The guest does next to nothing (one chain of three words per request), so that the figures are those of the boundary: gate, deadline, lowering the words,
//! the call, lifting the answer. They mean something only beside each other, on one quiet machine.

#[path = "../tests/support/mod.rs"]
mod support;

use std::hint::black_box;
use std::time::Instant;

use cofferdam_runtime::LaneDriver;
use support::{Guest, instance, requests, runtime, setup};

const ROUNDS: usize = 200;
const CALLS_PER_ROUND: u32 = 2_000;

fn main() {
    let runtime = runtime();
    let mut lane = instance(&runtime, &Guest::default());
    lane.start(&setup()).expect("the lane starts");
    let mut out = Vec::new();
    println!("{:<28} {:>10} {:>10} {:>14}", "call", "best ns", "median ns", "best ns/request");
    for batch in [1, 8, 32, 64] {
        let words = requests(batch);
        let (best, median) = measure(|| {
            lane.submit(black_box(&words), &mut out).expect("submit");
            black_box(&out);
        });
        println!(
            "{:<28} {best:>10.1} {median:>10.1} {:>14.1}",
            format!("submit, {batch} requests"),
            best / batch as f64
        );
    }
    let (best, median) = measure(|| {
        lane.complete(black_box(&[7, 0, 1, 0]), &mut out).expect("complete");
        black_box(&out);
    });
    println!("{:<28} {best:>10.1} {median:>10.1} {best:>14.1}", "complete, 1 response");
}

/// Nanoseconds per call: best and median round.
fn measure(mut call: impl FnMut()) -> (f64, f64) {
    let mut rounds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let begun = Instant::now();
            for _ in 0..CALLS_PER_ROUND {
                call();
            }
            begun.elapsed().as_secs_f64() * 1e9 / f64::from(CALLS_PER_ROUND)
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    (rounds[0], rounds[ROUNDS / 2])
}
