//! Network devices, consoles and sources of entropy that lie: whatever they say, nothing is answered twice, nothing arrives that was not sent, the host lives, and the binding ends on
//! the ladder. (`lies.rs` has the disks.)

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cofferdam_conformance::{Ask, Class, Client, driver_path};
use cofferdam_manager::{Arrivals, Binding, Config, IoOp, LoadSpec, Manager, UnloadOptions};
use cofferdam_sim::{
    Behaviour, ConfigLie, ConsoleProfile, Drive, Effect, EntropyProfile, Lie, NetProfile, Rule, SimConsole, SimDevice,
    SimNet, SimRng, Transmit, When,
};

const SEED: u64 = 0x11e5;

/// Virtio device ids (virtio 1.2, section 5).
const NET: u32 = 1;
const CONSOLE: u32 = 3;
const RNG: u32 = 4;

/// A device whose other side sends back what it is sent.
fn device(class: Class, rule: Rule) -> anyhow::Result<SimDevice> {
    let behaviour = Behaviour { seed: SEED, rules: vec![rule], ..Behaviour::default() };
    match class {
        Class::Net => {
            let sim = SimNet::new(NetProfile::default(), behaviour)?;
            sim.set_transmit(Transmit::Echo);
            Ok((*sim).clone())
        }
        Class::Stream => {
            let sim = SimConsole::new(ConsoleProfile::default(), behaviour)?;
            sim.set_echo(0, true);
            Ok((*sim).clone())
        }
        _ => Ok((*SimRng::new(EntropyProfile::default(), behaviour)?).clone()),
    }
}

fn spec(class: Class, sim: &SimDevice) -> anyhow::Result<LoadSpec> {
    let path = driver_path(class.driver());
    let component =
        std::fs::read(&path).with_context(|| format!("{}: run 'cargo xtask build' first", path.display()))?;
    let mut spec = LoadSpec::new(class.driver(), component, Box::new(sim.transport(Drive::Threads)?));
    spec.queues = None;
    Ok(spec)
}

/// A request with a number; of a stream, a byte.
fn ask(class: Class, number: u64) -> Ask {
    let mut frame = SimNet::test_frame(100);
    frame[20..28].copy_from_slice(&number.to_le_bytes());
    match class {
        Class::Net => Ask::payload(IoOp::Transmit, 0, &frame),
        Class::Stream => Ask::payload(IoOp::Send, 0, &[number as u8]),
        _ => Ask::new(IoOp::Fill, 0, 64),
    }
}

/// Sends and receives for a while. How many were answered well, and how much arrived. Packets are as long as they were sent, unless the device `joins` them.
fn traffic(class: Class, binding: &Arc<Binding>, joins: bool) -> anyhow::Result<(usize, usize)> {
    // A binding that has left already has nothing to say.
    let Ok(mut client) = Client::open(binding, 0, class.receives()) else { return Ok((0, 0)) };
    if class == Class::Stream {
        let _ = binding.set_open(0, true);
    }
    let (mut well, mut seen, mut arrivals) = (0, HashSet::new(), Arrivals::new());
    let until = Instant::now() + Duration::from_millis(200);
    let mut sent = 0;
    while Instant::now() < until {
        if sent < 64 && client.ask(&ask(class, sent)).is_ok() {
            sent += 1;
        }
        // One that was answered twice is an error.
        well += client.answers()?.iter().filter(|answer| answer.result.is_ok()).count();
        client.receive(Duration::from_millis(1), &mut arrivals);
        for arrival in arrivals.iter() {
            let mut bytes = Vec::new();
            if arrival.read(&mut bytes).is_err() || class != Class::Net {
                continue;
            }
            let number = bytes.get(20..28).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
            ensure!(joins || bytes.len() <= 100, "a packet of {} bytes, and 100 were sent", bytes.len());
            if let Some(number) = number.filter(|number| *number != 0) {
                ensure!(number < sent && seen.insert(number), "packet {number} of {sent}, once more or never sent");
            }
        }
        arrivals.clear();
    }
    Ok((well, seen.len()))
}

/// The binding ends in time and leaves nothing, whatever its device was.
fn ends(manager: &Manager, binding: &Arc<Binding>) -> anyhow::Result<()> {
    let before = Instant::now();
    let options = UnloadOptions { deadline: Duration::from_millis(500), force: true, ..UnloadOptions::default() };
    let certificate = manager.unload_binding(binding, &options)?;
    ensure!(before.elapsed() < Duration::from_secs(8), "took {:?}", before.elapsed());
    ensure!(certificate.residual.is_zero(), "{:?}", certificate.residual);
    ensure!(manager.bindings().is_empty(), "something is left");
    Ok(())
}

/// A device for which every third request, buffer or message is a lie, of each kind in turn.
fn liars(class: Class, id: u32) -> anyhow::Result<()> {
    let manager = Manager::new(Config { cache_dir: Some(driver_path("../test-cache")) })?;
    let mut served = 0;
    for (name, lie) in Lie::NAMES.iter().filter(|(_, lie)| lie.class().is_none_or(|class| class == id)) {
        let rule = Rule { effect: Effect::Lie(*lie), when: When::Every(3), op: None, queue: None };
        let sim = device(class, rule)?;
        match manager.load(spec(class, &sim)?) {
            Err(error) => println!("{name}: refused: {error}"),
            Ok(binding) => {
                // What a device says belongs to a packet, a driver cannot know better.
                let joins = matches!(lie, Lie::BuffersMore | Lie::BuffersHuge);
                let outcome = traffic(class, &binding, joins).with_context(|| (*name).to_owned())?;
                println!("{name}: {outcome:?}, fault: {:?}", binding.status().fault);
                served += usize::from(outcome.0 > 0);
                ends(&manager, &binding).with_context(|| (*name).to_owned())?;
            }
        }
    }
    ensure!(served > 4, "only {served} of the liars were of any use before they were found out");
    Ok(())
}

#[test]
fn no_lie_of_a_network_device_is_believed_and_every_binding_ends() -> anyhow::Result<()> {
    liars(Class::Net, NET)
}

#[test]
fn no_lie_of_a_console_is_believed_and_every_binding_ends() -> anyhow::Result<()> {
    liars(Class::Stream, CONSOLE)
}

#[test]
fn no_lie_of_a_source_of_entropy_is_believed_and_every_binding_ends() -> anyhow::Result<()> {
    liars(Class::Entropy, RNG)
}

#[test]
fn no_lie_in_the_configuration_space_of_another_class_harms_the_host() -> anyhow::Result<()> {
    let manager = Manager::new(Config { cache_dir: Some(driver_path("../test-cache")) })?;
    for (class, id) in [(Class::Net, NET), (Class::Stream, CONSOLE), (Class::Entropy, RNG)] {
        for (name, lie) in ConfigLie::NAMES.iter().filter(|(_, lie)| lie.class().is_none_or(|class| class == id)) {
            let sim = device(class, Rule::always(Effect::Config(*lie)))?;
            match manager.load(spec(class, &sim)?) {
                Err(error) => println!("{class}, {name}: refused: {error}"),
                Ok(binding) => {
                    let outcome = traffic(class, &binding, false).with_context(|| format!("{class}, {name}"))?;
                    println!("{class}, {name}: served, {outcome:?}");
                    ends(&manager, &binding).with_context(|| format!("{class}, {name}"))?;
                }
            }
            ensure!(manager.bindings().is_empty(), "{class}, {name}: something is left");
        }
    }
    Ok(())
}
