//! The soak: alone in its process, because it looks at the whole of it.

use cofferdam_soak_tests::run::{Span, soak};

#[test]
fn a_thousand_cycles_of_load_use_and_leave_grow_nothing() -> anyhow::Result<()> {
    soak(Span { seed: 4, first: 0, cycles: 1000 }.or_asked_for()?)
}

#[test]
#[ignore = "long: 100,000 cycles take over an hour"]
fn a_hundred_thousand_cycles_of_load_use_and_leave_grow_nothing() -> anyhow::Result<()> {
    let since = std::time::SystemTime::UNIX_EPOCH.elapsed()?;
    soak(Span { seed: since.as_secs(), first: 0, cycles: 100_000 }.or_asked_for()?)
}
