//! Every situation that a binding can get into in a small world, and wrong tables that the walk must find out.

mod world;

use std::collections::{HashMap, HashSet, VecDeque};

use cofferdam_lifecycle::{EventKind as E, State as S, TABLE, Transition, When};
use world::claims::{Ends, check, check_end, check_repetition};
use world::moves::moves;
use world::{Broken, Move, Setting, Situation, Size};

/// Requests on the ring, in the driver and waiting, of clients that do different things.
const WHOLE: Size = Size { handles: 2, requests: 3 };
/// The smallest in which a request can be on the ring while another is in the driver.
const SMALL: Size = Size { handles: 1, requests: 2 };

/// What a walk has seen.
struct Walked {
    situations: usize,
    detached: usize,
    longest_end: usize,
    rows: HashSet<(S, E, S)>,
}

/// Where a situation was first come from, and by which move.
type Seen = HashMap<Situation, Option<(Situation, String)>>;

/// Visits everything that can be reached, nearest first, until a claim does not hold. The answer is then the claim and the way there.
fn walk(setting: Setting<'_>) -> Result<Walked, (Broken, Vec<String>)> {
    let (mut seen, mut ends, mut queue) = (Seen::new(), Ends::new(), VecDeque::new());
    for pinned in [false, true] {
        let first = Situation::new(pinned, setting);
        seen.insert(first.clone(), None);
        queue.push_back(first);
    }
    let (mut detached, mut rows) = (0, HashSet::new());
    while let Some(here) = queue.pop_front() {
        detached += usize::from(here.life.state() == S::Detached);
        let claims = check(&here, setting)
            .and_then(|()| check_repetition(&here))
            .and_then(|()| check_end(&here, setting, &mut ends));
        claims.map_err(|broken| (broken, way_to(&seen, &here)))?;
        for Move { name, event, next } in moves(&here, setting) {
            let next = next.map_err(|broken| {
                let mut way = way_to(&seen, &here);
                way.push(name.clone());
                (broken, way)
            })?;
            rows.extend(event.map(|event| (here.life.state(), event.kind(), next.life.state())));
            if !seen.contains_key(&next) {
                seen.insert(next.clone(), Some((here.clone(), name)));
                queue.push_back(next);
            }
        }
    }
    let longest_end = ends.values().flatten().max().copied().unwrap_or(0);
    Ok(Walked { situations: seen.len(), detached, longest_end, rows })
}

fn way_to(seen: &Seen, here: &Situation) -> Vec<String> {
    let (mut way, mut at) = (Vec::new(), here);
    while let Some(Some((before, name))) = seen.get(at) {
        way.push(name.clone());
        at = before;
    }
    way.reverse();
    way
}

#[test]
fn everything_that_can_be_reached_keeps_every_claim() {
    let walked = walk(Setting::true_table(WHOLE)).unwrap_or_else(|(broken, way)| panic!("{broken:?} by {way:#?}"));
    println!("{} situations, {} ended, {} steps", walked.situations, walked.detached, walked.longest_end);
    let unused: Vec<_> = TABLE.iter().filter(|row| !walked.rows.contains(&(row.from, row.event, row.to))).collect();
    assert!(unused.is_empty(), "the walk never took these rows, so it shows nothing about them: {unused:#?}");
    assert!(walked.detached > 100, "too few ends to show anything");
}

/// A wrong table: each row that `change` says something about is replaced by what it says.
fn wrong(change: impl Fn(&Transition) -> Option<Vec<Transition>>) -> Vec<Transition> {
    let table: Vec<_> = TABLE.iter().flat_map(|row| change(row).unwrap_or_else(|| vec![*row])).collect();
    assert_ne!(table, TABLE, "the change changes nothing");
    table
}

/// The row of `from` and `event` leads elsewhere.
fn redirected(from: S, event: E, to: S) -> Vec<Transition> {
    wrong(|row| (row.from == from && row.event == event).then(|| vec![Transition { to, ..*row }]))
}

/// Instead of this row another condition.
fn conditioned(from: S, event: E, to: S, when: When) -> Vec<Transition> {
    wrong(|row| (row.from == from && row.event == event && row.to == to).then(|| vec![Transition { when, ..*row }]))
}

/// There is no such row.
fn without(from: S, event: E) -> Vec<Transition> {
    wrong(|row| (row.from == from && row.event == event).then(Vec::new))
}

/// What a state leads to, and what leads to it, are joined: it is passed over.
fn skipped(state: S, next: S) -> Vec<Transition> {
    wrong(|row| (row.to == state && row.from != state).then(|| vec![Transition { to: next, ..*row }]))
}

/// The walk finds the wrong table out, and for the reason that is expected.
fn caught(table: &[Transition], reason: &str) {
    match walk(Setting { table, size: SMALL }) {
        Ok(walked) => panic!("{} situations, and nothing was found; '{reason}' was expected", walked.situations),
        Err((Broken(found), way)) => assert!(found.contains(reason), "'{reason}' was expected: {found} by {way:#?}"),
    }
}

#[test]
fn closing_skipped_is_caught() {
    caught(&skipped(S::Closing, S::Revoking), "can be admitted after gate-closed");
}

#[test]
fn revoking_skipped_is_caught() {
    caught(&skipped(S::Revoking, S::Draining), "handle is left");
}

#[test]
fn memory_unmapped_before_the_device_is_silent_is_caught() {
    caught(&redirected(S::Draining, E::Drained, S::Unmapping), "freed that the device may write");
}

#[test]
fn missing_silence_taken_for_silence_is_caught() {
    caught(&redirected(S::Quiescing, E::NotSilent, S::Answering), "may yet happen");
}

#[test]
fn memory_freed_whatever_the_silence_is_caught() {
    caught(&redirected(S::DetachingPorts, E::PortsDetached, S::Unmapping), "is freed");
}

#[test]
fn memory_retired_whatever_the_silence_is_caught() {
    caught(&redirected(S::DetachingPorts, E::PortsDetached, S::Retiring), "retired without need");
}

#[test]
fn retiring_skipped_is_caught() {
    caught(&skipped(S::Retiring, S::Dropping), "before memory and code are");
}

#[test]
fn unmapping_skipped_is_caught() {
    caught(&skipped(S::Unmapping, S::Dropping), "before memory and code are");
}

#[test]
fn waiting_without_a_way_out_is_caught() {
    caught(&without(S::Waiting, E::Leave), "refused");
}

#[test]
fn waiting_that_hears_and_stays_is_caught() {
    caught(&redirected(S::Waiting, E::Leave, S::Waiting), "it sticks at waiting");
}

#[test]
fn a_leave_that_a_drain_does_not_hear_is_caught() {
    caught(&without(S::Draining, E::Leave), "refused");
}

#[test]
fn interrupting_skipped_is_caught() {
    caught(&skipped(S::Interrupting, S::Quiescing), "never interrupted");
}

#[test]
fn quiescing_skipped_is_caught() {
    caught(&skipped(S::Quiescing, S::Answering), "may yet happen");
}

#[test]
fn ports_detached_before_the_answers_is_caught() {
    caught(&redirected(S::Quiescing, E::Silent, S::DetachingPorts), "before its answers");
}

#[test]
fn a_lane_that_is_not_vacant_taken_for_answered_is_caught() {
    caught(&redirected(S::Answering, E::NotSilent, S::DetachingPorts), "before its answers");
}

#[test]
fn ports_left_attached_is_caught() {
    caught(&skipped(S::DetachingPorts, S::Unmapping), "is freed");
}

#[test]
fn code_of_a_pinned_binding_dropped_is_caught() {
    caught(&skipped(S::Keeping, S::Dropping), "code of a pinned binding");
}

#[test]
fn serving_after_the_last_restart_is_caught() {
    caught(&redirected(S::Recovering, E::Exhausted, S::Serving), "it serves without a driver");
}

#[test]
fn serving_while_the_device_is_away_is_caught() {
    caught(&redirected(S::Recovering, E::Exhausted, S::Serving), "it serves without");
    caught(&without(S::Serving, E::DeviceAway), "refused");
}

#[test]
fn a_failed_binding_that_hears_nobody_is_caught() {
    caught(&without(S::Failed, E::Leave), "refused");
}

#[test]
fn releasing_skipped_is_caught() {
    caught(&skipped(S::Releasing, S::Detached), "the device is left");
}

#[test]
fn a_ladder_that_starts_again_at_its_end_is_caught() {
    caught(&redirected(S::Releasing, E::Released, S::Closing), "round in circles");
}

#[test]
fn a_drain_cut_short_without_force_is_caught() {
    caught(&conditioned(S::Draining, E::CutShort, S::Interrupting, When::Always), "although nobody forced");
}

#[test]
fn a_drain_that_cannot_be_cut_short_is_caught() {
    caught(&without(S::Draining, E::CutShort), "refused");
}

#[test]
fn a_pinned_binding_that_can_be_unloaded_is_caught() {
    caught(&conditioned(S::Serving, E::Leave, S::Closing, When::Always), "pinned binding was unloaded");
}

#[test]
fn a_load_that_cannot_be_called_off_is_caught() {
    caught(&without(S::Loading, E::Leave), "refused");
}

#[test]
fn no_row_can_be_missing() {
    for row in TABLE {
        let table = wrong(|other| (other == row).then(Vec::new));
        assert!(
            walk(Setting { table: &table, size: SMALL }).is_err(),
            "nothing is found when this is missing: {row:?}"
        );
    }
}

#[test]
fn a_caller_that_gave_up_and_cuts_the_drain_short_is_caught() {
    caught(&redirected(S::Draining, E::GaveUp, S::Interrupting), "interrupted without force");
}

#[test]
fn a_device_that_nobody_asked_to_be_silent_is_caught() {
    caught(&redirected(S::Interrupting, E::Interrupted, S::Abandoning), "never asked");
}

#[test]
fn code_kept_for_nothing_is_caught() {
    caught(&redirected(S::Retiring, E::Retired, S::Keeping), "kept without need");
}
