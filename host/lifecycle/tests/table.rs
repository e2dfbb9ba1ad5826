//! The table by itself, as a graph: whatever the world is like.

use std::collections::{HashSet, VecDeque};

use cofferdam_lifecycle::{
    Cause, Effect, Event, EventKind, Life, Marks, Outcome, Phase, Refused, State, TABLE, Transition, When,
};

/// Every combination of marks.
fn every_marks() -> Vec<Marks> {
    let causes = Cause::ALL.iter().copied().map(Some).chain([None]);
    let mut all = Vec::new();
    for cause in causes {
        for silent in [None, Some(false), Some(true)] {
            for (forced, pinned) in [(false, false), (false, true), (true, false), (true, true)] {
                all.push(Marks { cause, forced, silent, pinned });
            }
        }
    }
    all
}

fn rows(state: State, event: EventKind) -> impl Iterator<Item = &'static Transition> {
    TABLE.iter().filter(move |row| row.from == state && row.event == event)
}

#[test]
fn no_situation_has_two_answers() {
    for &state in State::ALL {
        for &event in EventKind::ALL {
            for marks in every_marks() {
                let answers: Vec<_> = rows(state, event).filter(|row| row.when.holds(&marks)).collect();
                assert!(answers.len() <= 1, "{answers:?} for {marks:?}");
            }
        }
    }
}

#[test]
fn a_row_has_a_condition_only_where_the_rules_name_one() {
    let conditional = [
        (State::Loading, EventKind::Leave),
        (State::Serving, EventKind::Leave),
        (State::Recovering, EventKind::Leave),
        (State::Failed, EventKind::Leave),
        (State::Draining, EventKind::CutShort),
        (State::DetachingPorts, EventKind::PortsDetached),
        (State::Retiring, EventKind::Retired),
    ];
    for row in TABLE {
        let expected = conditional.contains(&(row.from, row.event));
        assert_eq!(row.when != When::Always, expected, "{row:?}");
    }
}

#[test]
fn every_result_of_an_effect_has_an_answer_whatever_the_marks() {
    for &state in State::ALL {
        for &event in state.effect().results() {
            for marks in every_marks() {
                let answered = rows(state, event).any(|row| row.when.holds(&marks));
                let excused = rows(state, event).all(|row| match row.when {
                    When::Forced => !marks.forced,
                    When::MayLeave => marks.pinned && marks.cause == Some(Cause::Unload),
                    _ => false,
                });
                assert!(answered || excused, "{event} in {state} with {marks:?}");
            }
        }
    }
}

#[test]
fn nothing_but_its_effects_results_and_leave_moves_a_state() {
    for row in TABLE {
        let expected = row.event == EventKind::Leave || row.from.effect().results().contains(&row.event);
        assert!(expected, "{row:?}");
    }
}

#[test]
fn a_leave_is_heard_everywhere_and_moves_only_who_is_not_on_the_way() {
    for &state in State::ALL.iter().filter(|state| **state != State::Detached) {
        let answers: Vec<_> = rows(state, EventKind::Leave).map(|row| row.to).collect();
        let next = match state {
            State::Loading | State::Serving | State::Recovering | State::Failed => State::Closing,
            State::Waiting => State::Draining,
            other => other,
        };
        assert_eq!(answers, [next], "{state}");
    }
}

#[test]
fn nothing_leaves_detached_and_everything_else_can_be_left() {
    for &state in State::ALL {
        let leads_on = TABLE.iter().any(|row| row.from == state && row.to != state);
        assert_eq!(leads_on, state != State::Detached, "{state}");
    }
    assert_eq!(State::Detached.effect(), Effect::Nothing);
}

#[test]
fn the_drain_alone_can_pause() {
    let pauses: Vec<_> = TABLE.iter().filter(|row| row.to == State::Waiting).collect();
    assert!(pauses.iter().all(|row| row.from.effect() == Effect::Drain && row.event == EventKind::GaveUp));
    assert_eq!(pauses.len(), 1);
    for &effect in Effect::ALL {
        assert_eq!(effect.results().contains(&EventKind::GaveUp), effect == Effect::Drain, "{effect}");
    }
}

#[test]
fn an_effect_belongs_to_one_state_and_every_state_can_be_reached() {
    let effects: HashSet<_> = State::ALL.iter().map(|state| state.effect()).collect();
    assert_eq!(effects.len(), State::ALL.len());
    assert_eq!(effects.len(), Effect::ALL.len());
    let (mut seen, mut queue) = (HashSet::from([State::Loading]), VecDeque::from([State::Loading]));
    while let Some(here) = queue.pop_front() {
        for row in TABLE.iter().filter(|row| row.from == here) {
            if seen.insert(row.to) {
                queue.push_back(row.to);
            }
        }
    }
    assert_eq!(seen.len(), State::ALL.len());
}

/// What every way out passes, in this order. Of those in one line there is one, or the second after the first.
const ORDER: &[&[Effect]] = &[
    &[Effect::CloseGate],
    &[Effect::RevokeHandles],
    &[Effect::Quiesce],
    &[Effect::Answer, Effect::Abandon],
    &[Effect::DetachPorts],
    &[Effect::Unmap, Effect::Retire],
    &[Effect::DropCode, Effect::KeepCode],
    &[Effect::Release],
];

/// How far along [`ORDER`] somebody is who was at `passed` and now carries out `effect`.
fn along(passed: usize, effect: Effect) -> Result<usize, String> {
    match ORDER.iter().position(|step| step.contains(&effect)) {
        None => Ok(passed),
        Some(step) if step == passed => Ok(passed + 1),
        Some(step) if step + 1 == passed => Ok(passed),
        Some(_) => Err(format!("{effect} after {passed} steps")),
    }
}

#[test]
fn every_way_out_passes_every_step_in_order_whatever_the_conditions_say() {
    for entry in [State::Loading, State::Serving] {
        let (mut seen, mut queue) = (HashSet::from([(entry, 0)]), VecDeque::from([(entry, 0)]));
        let mut ends = 0;
        while let Some((here, passed)) = queue.pop_front() {
            if here == State::Detached {
                assert_eq!(passed, ORDER.len());
                ends += 1;
            }
            for row in TABLE.iter().filter(|row| row.from == here) {
                let passed = along(passed, row.to.effect()).unwrap_or_else(|error| panic!("{row:?}: {error}"));
                if seen.insert((row.to, passed)) {
                    queue.push_back((row.to, passed));
                }
            }
        }
        assert_eq!(ends, 1, "from {entry}");
    }
}

#[test]
fn the_drain_is_passed_by_every_way_out() {
    let without_drain = |row: &&Transition| row.from.effect() != Effect::Drain;
    let (mut seen, mut queue) = (HashSet::new(), VecDeque::from([State::Serving]));
    while let Some(here) = queue.pop_front() {
        for row in TABLE.iter().filter(without_drain).filter(|row| row.from == here) {
            if seen.insert(row.to) {
                queue.push_back(row.to);
            }
        }
    }
    assert!(seen.contains(&State::Draining) && !seen.contains(&State::Detached), "{seen:?}");
}

const UNLOAD: Event = Event::Leave { cause: Cause::Unload, force: false };

fn life_after(pinned: bool, events: &[Event]) -> Life {
    let mut life = Life::new(pinned);
    for event in events {
        life.apply(*event).unwrap_or_else(|refused| panic!("{refused}"));
    }
    life
}

#[test]
fn a_refused_event_changes_nothing() {
    let mut life = life_after(true, &[Event::Loaded]);
    let before = life.clone();
    assert_eq!(life.apply(Event::Leave { cause: Cause::Unload, force: true }), Err(Refused::Pinned));
    let illegal = Refused::Illegal { state: State::Serving, event: EventKind::NotSilent };
    assert_eq!(life.apply(Event::NotSilent), Err(illegal));
    assert_eq!(life, before);
}

#[test]
fn a_load_that_was_called_off_hears_of_it_when_it_is_done() {
    let mut life = life_after(false, &[UNLOAD]);
    assert!(life.apply(Event::Loaded).is_err());
    assert_eq!((life.state(), life.phase()), (State::Closing, Phase::Draining));
}

#[test]
fn what_happened_overtakes_what_was_wanted_and_nothing_else_does() {
    for &first in Cause::ALL {
        for &second in Cause::ALL {
            let leave = |cause| Event::Leave { cause, force: false };
            let life = life_after(false, &[Event::Loaded, leave(first), leave(second)]);
            let wanted = matches!(first, Cause::Unload | Cause::Shutdown);
            let happened = !matches!(second, Cause::Unload | Cause::Shutdown);
            assert_eq!(life.cause(), Some(if wanted && happened { second } else { first }));
        }
    }
}

#[test]
fn what_the_drain_finds_out_about_the_device_is_the_cause() {
    for (found, cause) in [(Event::DeviceLost, Cause::Removed), (Event::DeviceBroken, Cause::Fault)] {
        let draining = [Event::Loaded, UNLOAD, Event::GateClosed, Event::HandlesRevoked, found];
        assert_eq!(life_after(false, &draining).cause(), Some(cause));
    }
}

#[test]
fn the_cause_stands_once_silence_is_decided() {
    let settled = [Event::Loaded, UNLOAD, Event::GateClosed, Event::HandlesRevoked, Event::Drained, Event::Silent];
    let mut life = life_after(false, &settled);
    let step = life.apply(Event::Leave { cause: Cause::Removed, force: true }).expect("it is heard");
    assert_eq!((step.from, step.to, step.cause), (State::Answering, State::Answering, Some(Cause::Unload)));
}

#[test]
fn force_is_asked_for_once_by_whoever_it_is() {
    let mut life = life_after(false, &[Event::Loaded, UNLOAD, Event::GateClosed, Event::HandlesRevoked]);
    assert!(life.apply(Event::CutShort).is_err());
    life.apply(Event::Leave { cause: Cause::Unload, force: true }).expect("heard");
    life.apply(UNLOAD).expect("heard");
    assert!(life.forced());
    life.apply(Event::CutShort).expect("forced");
    for event in [Event::Interrupted, Event::Silent, Event::Answered, Event::PortsDetached, Event::Unmapped] {
        life.apply(event).expect("down");
    }
    assert_eq!(life.outcome(), None);
    life.apply(Event::CodeDropped).and_then(|_| life.apply(Event::Released)).expect("down");
    assert_eq!(life.outcome(), Some(Outcome::Forced));
}

#[test]
fn names_are_kebab_case_and_tell_members_apart() {
    fn check(names: Vec<&str>) {
        let distinct: HashSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len(), "{names:?}");
        for name in names {
            assert!(!name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c == '-'), "{name}");
        }
    }
    check(State::ALL.iter().map(|x| x.as_str()).collect());
    check(Phase::ALL.iter().map(|x| x.as_str()).collect());
    check(Effect::ALL.iter().map(|x| x.as_str()).collect());
    check(Cause::ALL.iter().map(|x| x.as_str()).collect());
    check(EventKind::ALL.iter().map(|x| x.as_str()).collect());
    check(Outcome::ALL.iter().map(|x| x.as_str()).collect());
}
