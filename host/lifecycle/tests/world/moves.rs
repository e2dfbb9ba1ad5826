//! Everything that can happen next: the effect and its result, threads that die, operators and watchers that ask, clients, guests and the device.

use cofferdam_lifecycle::{Cause, Effect, Event, Phase, Refused, State};

use super::effects::{Turn, carry_out};
use super::{Broken, Built, Call, Code, Device, Move, Setting, Situation, World};

/// Every move that is possible here, by name.
pub(crate) fn moves(here: &Situation, setting: Setting<'_>) -> Vec<Move> {
    let mut moves = Vec::new();
    for (next, name) in interference(here) {
        moves.push(Move { name: name.to_owned(), event: None, next: Ok(here.with(next)) });
    }
    entries(here, setting, &mut moves);
    if here.life.state() == State::Serving && here.world.call != Call::None && here.world.call != Call::Stuck {
        let mut down = here.world.clone();
        (down.call, down.down) = (Call::None, true);
        let (name, event) = ("the driver breaks down".to_owned(), Some(Event::Faulted));
        moves.push(Move { name, event, next: here.with(down).apply(setting, Event::Faulted) });
    }
    let is_away = matches!(here.world.device, Device::Gone | Device::CutOff | Device::Broken);
    if here.life.state() == State::Serving && is_away {
        let mut away = here.world.clone();
        away.away = true;
        let (name, event) = ("the device is to be brought back".to_owned(), Some(Event::DeviceAway));
        moves.push(Move { name, event, next: here.with(away).apply(setting, Event::DeviceAway) });
    }
    let effect = here.life.effect();
    match carry_out(here) {
        Err(broken) => moves.push(Move { name: effect.to_string(), event: None, next: Err(broken) }),
        Ok(turns) => {
            for turn in turns {
                if turn.1.is_some() && turn.0 != here.world && !here.world.loading {
                    let name = format!("{effect}, and the thread dies");
                    moves.push(Move { name, event: None, next: Ok(here.with(turn.0.clone())) });
                }
                let event = turn.1;
                moves.push(Move { name: name_of(effect, &turn), event, next: conclude(here, setting, turn) });
            }
            // A caller that is cancelled.
            if effect == Effect::Drain && here.world.in_flight() && !here.world.loading {
                let (name, event) = ("drain is called off".to_owned(), Some(Event::GaveUp));
                moves.push(Move { name, event, next: here.apply(setting, Event::GaveUp) });
            }
        }
    }
    moves
}

pub(crate) fn name_of(effect: Effect, turn: &Turn) -> String {
    turn.1.map_or_else(|| format!("{effect} goes on"), |event| format!("{effect}: {event:?}"))
}

/// The world after an effect, and the state after its event.
pub(crate) fn conclude(here: &Situation, setting: Setting<'_>, (world, event): Turn) -> Result<Situation, Broken> {
    let there = here.with(world);
    let Some(event) = event else { return Ok(there) };
    there.apply(setting, event)
}

/// Whoever can ask for an end, and what must be refused.
fn entries(here: &Situation, setting: Setting<'_>, moves: &mut Vec<Move>) {
    let state = here.life.state();
    if state == State::Detached {
        return;
    }
    let mut ask = |cause: Cause, force: bool| {
        let event = Event::Leave { cause, force };
        let name = format!("leave ({cause}{})", if force { ", force" } else { "" });
        let mut next = here.clone();
        let bound = matches!(state, State::Loading | State::Serving | State::Recovering | State::Failed);
        let forbidden = bound && here.life.pinned() && cause == Cause::Unload;
        let next = match next.life.apply_by(setting.table, event) {
            Ok(_) if forbidden => Err(Broken("a pinned binding was unloaded".into())),
            Ok(_) => Ok(next),
            Err(Refused::Pinned) if forbidden => return,
            Err(refused) => Err(Broken(format!("refused: {refused}"))),
        };
        moves.push(Move { name, event: Some(event), next });
    };
    for cause in [Cause::Unload, Cause::Shutdown] {
        ask(cause, false);
        ask(cause, true);
    }
    // The watching thread, which always forces.
    if here.world.claimed && state != State::Loading {
        if matches!(here.world.device, Device::Gone | Device::CutOff) {
            ask(Cause::Removed, true);
        }
        if here.world.built == Built::Started {
            ask(Cause::Fault, true);
        }
    }
    // A load that is rolled back after it had succeeded, for want of its port.
    if state == State::Serving {
        ask(Cause::LoadFailed, true);
    }
}

/// What clients, guests and the device do.
fn interference(here: &Situation) -> Vec<(World, &'static str)> {
    let world = &here.world;
    let mut moves = Vec::new();
    let mut add = |name: &'static str, change: &dyn Fn(&mut World)| {
        let mut next = world.clone();
        change(&mut next);
        moves.push((next, name));
    };
    clients(here, &mut add);
    if here.life.state() == State::Failed && world.given > 0 {
        add("a request is answered with an error", &|next| next.given -= 1);
    }
    guest(world, &mut add);
    device(world, &mut add);
    moves
}

type Add<'a> = &'a mut dyn FnMut(&'static str, &dyn Fn(&mut World));

fn clients(here: &Situation, add: Add<'_>) {
    let world = &here.world;
    let served = !world.loading && world.built == Built::Started && here.life.phase() != Phase::Loading;
    if served && world.gate_open && world.handles < world.size.handles {
        add("a client opens a handle", &|next| next.handles += 1);
    }
    if world.handles > 0 {
        if world.gate_open && world.given + world.published < world.size.requests {
            add("a request is admitted", &|next| next.given += 1);
        }
        if world.sleepers < world.handles {
            add("a client falls asleep", &|next| next.sleepers += 1);
        }
        if world.gate_open && world.maps < world.handles {
            add("a client maps buffers", &|next| next.maps += 1);
        }
        add("a client closes its handle", &|next| {
            next.handles -= 1;
            next.sleepers = next.sleepers.min(next.handles);
            next.maps = next.maps.min(next.handles);
        });
    }
}

fn guest(world: &World, add: Add<'_>) {
    let enters =
        world.call == Call::None && !world.down && !world.killed && world.code == Code::Live && world.given > 0;
    if enters && !world.loading {
        add("a call begins", &|next| next.call = Call::Running);
        add("a call begins that loops", &|next| next.call = Call::Looping);
        add("a call begins that gets stuck", &|next| next.call = Call::Stuck);
    }
    if matches!(world.call, Call::Running | Call::Stuck) {
        add("a call ends", &|next| {
            next.call = Call::None;
            if next.given > 0 && !next.withdrawn {
                next.given -= 1;
                next.published += 1;
            }
        });
    }
}

fn device(world: &World, add: Add<'_>) {
    if !world.claimed {
        return;
    }
    if world.published > 0 && world.device == Device::Healthy && !world.stopped {
        add("the device completes", &|next| next.published -= 1);
    }
    match world.device {
        Device::Healthy => {
            add("the device hangs", &|next| next.device = Device::Hung);
            add("the device breaks a rule", &|next| next.device = Device::Broken);
        }
        Device::Hung => add("the device goes on", &|next| next.device = Device::Healthy),
        Device::Gone | Device::CutOff | Device::Broken => {}
    }
    if world.device != Device::Gone {
        add("the device is gone", &|next| next.device = Device::Gone);
    }
    if matches!(world.device, Device::Healthy | Device::Hung) {
        add("the connection is cut", &|next| next.device = Device::CutOff);
    }
}
