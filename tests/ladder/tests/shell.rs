//! The matrix from a shell: what people and scripts do, see and get back.

use std::panic::AssertUnwindSafe;
use std::time::Instant;

use cofferdam_ladder_tests::shell::cell;
use cofferdam_ladder_tests::shell::plan::{Entry, Situation, plan};
use cofferdam_ladder_tests::sleeper;
use cofferdam_ladder_tests::table::{conclude, spread, target, wanted};

/// Cells at once: most of them wait most of the time, for five seconds that a drain is given.
const AT_ONCE: usize = 4;

#[test]
fn every_way_out_from_a_shell_says_what_happened_and_leaves_nothing() {
    let begin = Instant::now();
    let sleeper = sleeper::file(&target());
    let name = |entry: &Entry, situation: &Situation| format!("{entry} x {situation}");
    let pairs = || Entry::ALL.iter().flat_map(|entry| Situation::ALL.map(|situation| (*entry, situation)));
    let cells: Vec<_> = pairs()
        .filter(|(entry, situation)| plan(*entry, *situation).is_ok() && wanted(&name(entry, situation)))
        .collect();
    assert!(!cells.is_empty(), "no cell has such a name");
    let outcomes = spread(&cells, AT_ONCE, |(entry, situation)| {
        // The helpers of these tests assert: what they have to say is the cell's failure.
        let ran = std::panic::catch_unwind(AssertUnwindSafe(|| cell::run(*entry, *situation, &sleeper)));
        match ran {
            Ok(result) => result.map_err(|error| format!("{error:#}")),
            Err(panic) => Err(panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                .unwrap_or_else(|| "a panic without a message".to_owned())),
        }
    });
    let names: Vec<_> = cells.iter().map(|(entry, situation)| name(entry, situation)).collect();
    let left_out: Vec<_> = pairs()
        .filter_map(|(entry, situation)| Some((name(&entry, &situation), plan(entry, situation).err()?)))
        .collect();
    conclude("shell", &names, &outcomes, &left_out, begin.elapsed());
}
