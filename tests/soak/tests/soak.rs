//! The soak: alone in its process, because it looks at the whole of it.

use cofferdam_soak_tests::run::{Span, alone};

#[test]
fn a_thousand_cycles_of_load_use_and_leave_grow_nothing() -> anyhow::Result<()> {
    alone(
        "a_thousand_cycles_of_load_use_and_leave_grow_nothing",
        Span { seed: 4, first: 0, cycles: 1000 }.or_asked_for()?,
    )
}

#[test]
#[ignore = "long: 100,000 cycles take about half an hour"]
fn a_hundred_thousand_cycles_of_load_use_and_leave_grow_nothing() -> anyhow::Result<()> {
    let since = std::time::SystemTime::UNIX_EPOCH.elapsed()?;
    let span = Span { seed: since.as_secs(), first: 0, cycles: 100_000 }.or_asked_for()?;
    alone("a_hundred_thousand_cycles_of_load_use_and_leave_grow_nothing", span)
}
