//! Random histories of a larger world than can be walked through, each ended by force at a random point.

mod world;

use std::cell::RefCell;
use std::collections::BTreeMap;

use cofferdam_lifecycle::{Event, State};
use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestRunner};
use world::claims::{MOST_STEPS, check, check_repetition};
use world::effects::carry_out;
use world::moves::{conclude, moves};
use world::{Broken, Move, Setting, Situation, Size};

const LARGE: Size = Size { handles: 5, requests: 12 };
/// One move in so many is somebody who wants the binding to leave, else nobody would get to use it.
const LEAVES_ONE_IN: usize = 24;

fn must<T>(result: Result<T, Broken>, names: &[String]) -> Result<T, TestCaseError> {
    result.map_err(|Broken(what)| TestCaseError::fail(format!("{what} after {names:#?}")))
}

/// One move: what clients, guests, the device and the effects do, and now and then a leave.
fn step(here: &Situation, choice: u32, names: &mut Vec<String>) -> Result<Situation, TestCaseError> {
    let choice = choice as usize;
    let leaves = |one: &Move| matches!(one.event, Some(Event::Leave { .. }));
    let (leave, others): (Vec<_>, Vec<_>) = moves(here, Setting::true_table(LARGE)).into_iter().partition(leaves);
    let wanted = choice.is_multiple_of(LEAVES_ONE_IN) || others.is_empty();
    let mut list = if wanted && !leave.is_empty() { leave } else { others };
    if list.is_empty() {
        return Ok(here.clone());
    }
    let one = list.swap_remove(choice / LEAVES_ONE_IN % list.len());
    names.push(one.name);
    let next = must(one.next, names)?;
    let past = !matches!(
        here.life.state(),
        State::Loading | State::Serving | State::Recovering | State::Failed | State::Closing
    );
    let admitted = next.world.given > here.world.given;
    prop_assert!(!(past && admitted), "something was admitted after gate-closed: {names:#?}");
    Ok(next)
}

#[test]
fn no_history_breaks_a_claim_and_force_ends_each() {
    let setting = Setting::true_table(LARGE);
    // Most requests that were in flight in each state: what the histories are worth.
    let been = RefCell::new(BTreeMap::<&str, u8>::new());
    let history = (
        any::<bool>(),
        prop::bool::weighted(0.9),
        prop::collection::vec(any::<u32>(), 0..400),
        prop::collection::vec(any::<u32>(), MOST_STEPS),
    );
    let config = ProptestConfig { cases: 6000, failure_persistence: None, ..ProptestConfig::default() };
    let run = TestRunner::new(config).run(&history, |(pinned, loads_well, choices, endings)| {
        let (mut names, mut been) = (Vec::new(), been.borrow_mut());
        let mut here = Situation::new(pinned, setting);
        while loads_well && here.life.state() == State::Loading {
            let first = must(carry_out(&here), &names)?.swap_remove(0);
            here = must(conclude(&here, setting, first), &names)?;
        }
        for choice in choices {
            here = step(&here, choice, &mut names)?;
            must(check(&here, setting), &names)?;
            must(check_repetition(&here), &names)?;
            let most = been.entry(here.life.state().as_str()).or_default();
            *most = (*most).max(here.world.given + here.world.published);
        }
        if here.life.state() != State::Detached {
            here = must(here.leave_by_force(setting), &names)?;
        }
        for choice in endings {
            if here.life.state() == State::Detached {
                break;
            }
            let mut turns = must(carry_out(&here), &names)?;
            turns.retain(|turn| turn.1 != Some(Event::GaveUp));
            prop_assert!(!turns.is_empty(), "it sticks at {:?} after {:#?}", here, names);
            let turn = turns.swap_remove(choice as usize % turns.len());
            here = must(conclude(&here, setting, turn), &names)?;
            must(check(&here, setting), &names)?;
        }
        prop_assert_eq!(here.life.state(), State::Detached, "after {:#?}", names);
        Ok(())
    });
    run.unwrap_or_else(|failure| panic!("{failure}"));
    let been = been.into_inner();
    println!("{been:?}");
    assert_eq!(been.len(), State::ALL.len(), "states that no history has come to: only {been:?}");
    assert!(been["draining"] >= 4 && been["waiting"] >= 4, "too little was in flight: {been:?}");
}
