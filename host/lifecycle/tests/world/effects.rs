//! The effects, as the manager has to carry them out: every way in which one can turn out.

use cofferdam_lifecycle::{Cause, Effect, Event};

use super::{Broken, Built, Call, Code, Device, Memory, Situation, World};

/// One way in which an effect turns out: the world after it, and what there is to say. Without an event it goes on.
pub(crate) type Turn = (World, Option<Event>);

fn broken<T>(what: &str) -> Result<T, Broken> {
    Err(Broken(what.to_owned()))
}

/// Every way in which the effect of this situation can turn out.
pub(crate) fn carry_out(here: &Situation) -> Result<Vec<Turn>, Broken> {
    let world = &here.world;
    let effect = here.life.effect();
    if world.loading {
        return Ok(build(world, effect == Effect::Build));
    }
    let said = |world: World, event: Event| Ok(vec![(world, Some(event))]);
    let mut next = world.clone();
    match effect {
        // The loading thread has died.
        Effect::Build => said(next, Event::Leave { cause: Cause::LoadFailed, force: true }),
        Effect::Serve | Effect::Pause | Effect::Nothing => Ok(Vec::new()),
        Effect::Recover if world.away => Ok(bring_back(world)),
        Effect::Recover => {
            let mut given_up = next.clone();
            next.down = false;
            (given_up.down, given_up.given) = (true, 0);
            Ok(vec![(next, Some(Event::Recovered)), (given_up, Some(Event::Exhausted))])
        }
        // An operator's wish; what comes in the meantime is answered by itself.
        Effect::Refuse => said(next, Event::Restarted),
        Effect::CloseGate => {
            next.gate_open = false;
            said(next, Event::GateClosed)
        }
        Effect::RevokeHandles => {
            (next.handles, next.sleepers, next.maps) = (0, 0, 0);
            said(next, Event::HandlesRevoked)
        }
        Effect::Drain => Ok(drain(world, here.life.forced())),
        Effect::Interrupt => {
            next.killed = true;
            if matches!(next.call, Call::Running | Call::Looping) {
                next.call = Call::None;
            }
            said(next, Event::Interrupted)
        }
        Effect::Quiesce => Ok(quiesce(world)),
        Effect::Answer => answer(world),
        Effect::Abandon => {
            next.abandoned |= next.published > 0;
            (next.given, next.published) = (0, 0);
            said(next, Event::Abandoned)
        }
        Effect::DetachPorts => {
            if world.given + world.published > 0 {
                return broken("the port goes before its answers");
            }
            next.port = false;
            said(next, Event::PortsDetached)
        }
        Effect::Unmap => {
            // A device that may act, or a call that may still use it, is noticed by the claims.
            if next.memory == Memory::Mapped {
                next.memory = Memory::Freed;
            }
            said(next, Event::Unmapped)
        }
        Effect::Retire => {
            if next.memory == Memory::Mapped {
                next.memory = Memory::Retired;
            }
            said(next, Event::Retired)
        }
        Effect::DropCode => drop_code(world),
        Effect::KeepCode => {
            let stays = here.life.pinned() && matches!(here.life.cause(), Some(Cause::Removed | Cause::Fault));
            if next.code == Code::Live && !stays {
                return broken("code is kept without need");
            }
            if next.code == Code::Live {
                next.code = Code::Kept;
            }
            next.killed = true;
            said(next, Event::CodeKept)
        }
        Effect::Release => {
            if world.memory == Memory::Mapped || world.code == Code::Live {
                return broken("the device is given back before memory and code are");
            }
            next.claimed = false;
            said(next, Event::Released)
        }
    }
}

/// The loading thread goes on, fails, dies or finishes; if the load was called off it lets go.
fn build(world: &World, wanted: bool) -> Vec<Turn> {
    let mut let_go = world.clone();
    let_go.loading = false;
    if !wanted {
        return vec![(let_go, None)];
    }
    let mut next = world.clone();
    let finished = world.built == Built::Started;
    match world.built {
        Built::Nothing => (next.built, next.claimed) = (Built::Claimed, true),
        Built::Claimed => (next.built, next.code) = (Built::Instantiated, Code::Live),
        Built::Instantiated => (next.built, next.memory) = (Built::Mapped, Memory::Mapped),
        Built::Mapped => next.built = Built::Started,
        Built::Started => (next.loading, next.port) = (false, true),
    }
    let failed = Event::Leave { cause: Cause::LoadFailed, force: true };
    vec![(next, finished.then_some(Event::Loaded)), (let_go.clone(), Some(failed)), (let_go, None)]
}

/// The device that is away: silence first, and without it there is no way but out. Then it comes back and is given again what it had not done, or it does not come back.
fn bring_back(world: &World) -> Vec<Turn> {
    if world.call != Call::None {
        // The lane's lease is waited for.
        return Vec::new();
    }
    if world.device == Device::CutOff {
        return vec![(world.clone(), Some(Event::Leave { cause: Cause::Removed, force: true }))];
    }
    let mut back = world.clone();
    (back.given, back.published) = (world.given + world.published, 0);
    (back.away, back.down, back.device) = (false, false, Device::Healthy);
    let mut given_up = world.clone();
    (given_up.down, given_up.given, given_up.published) = (true, 0, 0);
    let mut turns = vec![(back, Some(Event::Recovered)), (given_up, Some(Event::Exhausted))];
    if world.device == Device::Broken {
        // It cannot be made silent.
        turns.push((world.clone(), Some(Event::Leave { cause: Cause::Fault, force: true })));
    }
    turns
}

/// Waits. What the device completes meanwhile is a move of its own.
fn drain(world: &World, forced: bool) -> Vec<Turn> {
    let mut world = world.clone();
    if world.down {
        // Nobody will take them to the device any more.
        world.given = 0;
    }
    let world = &world;
    if !world.in_flight() {
        return vec![(world.clone(), Some(Event::Drained))];
    }
    let mut turns = match world.device {
        Device::Gone | Device::CutOff => vec![(world.clone(), Some(Event::DeviceLost))],
        Device::Broken => vec![(world.clone(), Some(Event::DeviceBroken))],
        Device::Healthy | Device::Hung => vec![(world.clone(), Some(Event::GaveUp))],
    };
    if forced {
        turns.push((world.clone(), Some(Event::CutShort)));
    }
    turns
}

fn quiesce(world: &World) -> Vec<Turn> {
    let mut next = world.clone();
    next.withdrawn = true;
    if next.call == Call::None {
        // Never given to the device: that needs no silence.
        next.given = 0;
    }
    let mut silent = next.clone();
    silent.stopped = true;
    let not_silent = (next.clone(), Some(Event::NotSilent));
    if world.stopped || world.built < Built::Started {
        return vec![(silent, Some(Event::Silent))];
    }
    match world.device {
        Device::Gone => vec![(silent, Some(Event::Silent))],
        Device::CutOff if !world.device_may_act() => vec![(silent, Some(Event::Silent))],
        Device::CutOff | Device::Hung => vec![not_silent],
        // Stopping it waits for what it was given; or it is too slow.
        Device::Healthy => {
            silent.published = 0;
            vec![(silent, Some(Event::Silent)), not_silent]
        }
        // Some can be reset whatever they did.
        Device::Broken => vec![(silent, Some(Event::Silent)), not_silent],
    }
}

fn answer(world: &World) -> Result<Vec<Turn>, Broken> {
    if world.call != Call::None {
        return Ok(vec![(world.clone(), Some(Event::NotSilent))]);
    }
    if world.published > 0 && world.device_may_act() {
        return broken("a request is answered as failed and may yet happen (L1)");
    }
    let mut next = world.clone();
    (next.given, next.published) = (0, 0);
    Ok(vec![(next, Some(Event::Answered))])
}

fn drop_code(world: &World) -> Result<Vec<Turn>, Broken> {
    let mut next = world.clone();
    if world.code != Code::Live {
        let event = if world.code == Code::Kept { Event::CodeKept } else { Event::CodeDropped };
        return Ok(vec![(next, Some(event))]);
    }
    match world.call {
        Call::None => {
            next.code = Code::Dropped;
            Ok(vec![(next, Some(Event::CodeDropped))])
        }
        Call::Stuck if world.killed => {
            next.code = Code::Kept;
            Ok(vec![(next, Some(Event::CodeKept))])
        }
        _ => broken("a guest was never interrupted and is still in its code"),
    }
}
