//! What holds in every situation, and that from every situation there is an end.

use std::collections::HashMap;

use cofferdam_lifecycle::{Cause, Event, EventKind, Outcome, State};

use super::effects::carry_out;
use super::moves::conclude;
use super::{Broken, Built, Call, Code, Memory, Setting, Situation};

/// Most steps from a forced leave to the end: the states of the longest way down the ladder.
pub(crate) const MOST_STEPS: usize = 11;

/// What holds at any time.
pub(crate) fn check(here: &Situation, setting: Setting<'_>) -> Result<(), Broken> {
    let (life, world) = (&here.life, &here.world);
    let claim = |holds: bool, what: &str| if holds { Ok(()) } else { Err(Broken(what.to_owned())) };
    claim(
        !(world.memory == Memory::Freed && world.device_may_act()),
        "memory is freed that the device may write (L1)",
    )?;
    claim(
        !(world.memory == Memory::Freed && world.abandoned),
        "memory is freed that was abandoned to the device (L1)",
    )?;
    claim(!(world.memory == Memory::Freed && world.call != Call::None), "memory is freed under a call (G9)")?;
    claim(!(world.code == Code::Dropped && world.call != Call::None), "code is dropped under a call (G9)")?;
    claim(!(is_past_closing(life.state()) && world.gate_open), "something can be admitted after gate-closed (G1)")?;
    claim(!(life.state() == State::Serving && world.down), "it serves without a driver")?;
    claim(!(life.state() == State::Serving && world.away), "it serves without its device")?;
    let by_itself = matches!(life.cause(), Some(Cause::Removed | Cause::Fault));
    claim(life.state() != State::Interrupting || life.forced() || by_itself, "guests are interrupted without force")?;
    if !life.forced() && life.state() == State::Draining {
        let mut cut = life.clone();
        let refused = cut.apply_by(setting.table, Event::CutShort).is_err();
        claim(refused, "a drain was cut short although nobody forced")?;
    }
    if life.state() == State::Detached { at_the_end(here) } else { Ok(()) }
}

fn is_past_closing(state: State) -> bool {
    !matches!(state, State::Loading | State::Serving | State::Recovering | State::Failed | State::Closing)
}

/// Nothing is left but what is declared, and nothing is declared without need.
fn at_the_end(here: &Situation) -> Result<(), Broken> {
    let (life, world) = (&here.life, &here.world);
    let claim = |holds: bool, what: &str| if holds { Ok(()) } else { Err(Broken(what.to_owned())) };
    claim(world.handles == 0, "a handle is left")?;
    claim(world.sleepers == 0, "a sleeper is left")?;
    claim(world.maps == 0, "a client's mapping is left")?;
    claim(world.given + world.published == 0, "a request is left")?;
    claim(!world.port, "a port is left")?;
    claim(!world.claimed, "the device is left")?;
    claim(!world.loading, "a load is left")?;
    claim(world.memory != Memory::Mapped, "memory is left")?;
    claim(world.code != Code::Live, "code is left")?;
    claim(world.call == Call::None || world.code == Code::Kept, "a call is left, and its code is not declared")?;
    let pinned = life.pinned() && matches!(life.cause(), Some(Cause::Removed | Cause::Fault));
    let silent = life.silent() == Some(true);
    claim(world.memory != Memory::Retired || !silent || pinned, "memory is retired without need")?;
    claim(!pinned || world.memory != Memory::Freed, "memory of a pinned binding is freed while the process lives")?;
    claim(!pinned || world.code != Code::Dropped, "code of a pinned binding is dropped while the process lives")?;
    claim(life.silent().is_some() || world.built < Built::Started, "the device was never asked to be silent")?;
    let outcome = match life.cause() {
        Some(Cause::Unload) if life.forced() => Outcome::Forced,
        Some(Cause::Unload) => Outcome::Unloaded,
        Some(Cause::Removed) => Outcome::Removed,
        Some(Cause::Fault) => Outcome::Failed,
        Some(Cause::LoadFailed) => Outcome::RolledBack,
        Some(Cause::Shutdown) => Outcome::Shutdown,
        None => return Err(Broken("it ended without a cause".into())),
    };
    claim(life.outcome() == Some(outcome), "the outcome is not that of the cause")
}

/// Carrying the effect out once more after it was carried out can lead to the very same again, and never to anything broken.
pub(crate) fn check_repetition(here: &Situation) -> Result<(), Broken> {
    if here.world.loading {
        return Ok(());
    }
    for turn in carry_out(here)? {
        let again = carry_out(&here.with(turn.0.clone()))?;
        if !again.contains(&turn) {
            return Err(Broken(format!("{} carried out twice is not the same as once", here.life.effect())));
        }
    }
    Ok(())
}

/// Most steps to the end that are known of a situation; `None` while it is being found out.
pub(crate) type Ends = HashMap<Situation, Option<usize>>;

/// A leave that is forced, heard from here, ends within [`MOST_STEPS`], however the effects turn out. Only giving up is left to others.
pub(crate) fn check_end(here: &Situation, setting: Setting<'_>, known: &mut Ends) -> Result<(), Broken> {
    if here.life.state() == State::Detached {
        return Ok(());
    }
    let steps = steps_to_the_end(&here.leave_by_force(setting)?, setting, known)?;
    if steps > MOST_STEPS {
        Err(Broken(format!("{steps} steps to the end, {MOST_STEPS} were promised")))
    } else {
        Ok(())
    }
}

fn steps_to_the_end(here: &Situation, setting: Setting<'_>, known: &mut Ends) -> Result<usize, Broken> {
    if here.life.state() == State::Detached {
        return Ok(0);
    }
    match known.get(here) {
        Some(Some(steps)) => return Ok(*steps),
        Some(None) => return Err(Broken(format!("it goes round in circles at {}", here.life.state()))),
        None => {}
    }
    known.insert(here.clone(), None);
    let mut most = None;
    for turn in carry_out(here)? {
        if turn.1.is_some_and(|event| event.kind() == EventKind::GaveUp) {
            continue;
        }
        let next = conclude(here, setting, turn)?;
        most = most.max(Some(steps_to_the_end(&next, setting, known)?));
    }
    let Some(most) = most else {
        return Err(Broken(format!("it sticks at {}: nobody can say anything", here.life.state())));
    };
    known.insert(here.clone(), Some(most + 1));
    Ok(most + 1)
}
