//! The suite on the sim in this process.

use anyhow::ensure;
use cofferdam_conformance::{Bed, Class, Device, Lever, Pull, Wish};
use cofferdam_manager::Transport;
use cofferdam_sim::{
    Behaviour, ConsoleProfile, Drive, EntropyProfile, NetProfile, Options, PortProfile, Profile, Rings, Sim,
    SimConsole, SimDevice, SimNet, SimRng, Storage, Transmit,
};

struct InProcess;

impl Bed for InProcess {
    fn name(&self) -> &'static str {
        "sim in process"
    }

    fn device(&self, wish: &Wish) -> anyhow::Result<Option<Device>> {
        let (sim, pull) = match wish.class {
            Class::Block => (disk(wish)?, None),
            Class::Net => network(wish)?,
            Class::Stream => console(wish)?,
            Class::Entropy => {
                // Another seed each time: nothing in the suite knows what comes.
                let behaviour = Behaviour { seed: fastrand::u64(..), ..Behaviour::default() };
                ((*SimRng::new(EntropyProfile { rings: rings(wish) }, behaviour)?).clone(), None)
            }
        };
        let same = sim.clone();
        let connect = move || Ok(Box::new(sim.transport(Drive::Threads)?) as Box<dyn Transport>);
        let verdict = move || {
            ensure!(same.violations().is_empty(), "the driver broke the rules: {:?}", same.violations());
            Ok(())
        };
        Ok(Some(Device { pull, ..Device::new(wish, connect, verdict) }))
    }
}

fn rings(wish: &Wish) -> Rings {
    let offered = !wish.plain_ring;
    Rings { event_idx: offered, indirect: offered, ..Rings::default() }
}

fn disk(wish: &Wish) -> anyhow::Result<SimDevice> {
    let mut profile = Profile { read_only: wish.read_only, queues: wish.queues, ..Profile::default() };
    if wish.plain_ring {
        profile.event_idx = false;
        profile.indirect = false;
    }
    let options = Options { profile, storage: Storage::Memory(wish.capacity_bytes), ..Options::default() };
    Ok((*Sim::new(options)?).clone())
}

fn network(wish: &Wish) -> anyhow::Result<(SimDevice, Option<Pull>)> {
    let offloads = wish.offloads.unwrap_or(true);
    let profile = NetProfile {
        mtu: Some(wish.mtu),
        checksum: offloads,
        guest_checksum: offloads,
        host_tso: offloads,
        guest_tso: offloads,
        mergeable: !wish.single_buffers,
        pairs: wish.queues,
        rings: rings(wish),
        ..NetProfile::default()
    };
    let sim = SimNet::new(profile, Behaviour::default())?;
    sim.set_transmit(Transmit::Echo);
    let device = SimDevice::clone(&sim);
    let pull = move |lever| {
        if let Lever::Link(up) = lever {
            sim.set_link(up);
        }
    };
    Ok((device, Some(Box::new(pull))))
}

fn console(wish: &Wish) -> anyhow::Result<(SimDevice, Option<Pull>)> {
    let port = |number: usize| PortProfile { name: Some(format!("port{number}")), console: number == 0 };
    let ports = (0..wish.ports).map(port).collect();
    let profile = ConsoleProfile { ports, rings: Rings { size: 64, ..rings(wish) }, ..ConsoleProfile::default() };
    let ports = profile.max_ports;
    let sim = SimConsole::new(profile, Behaviour::default())?;
    (0..ports).for_each(|port| sim.set_echo(port, true));
    let device = SimDevice::clone(&sim);
    let pull = move |lever| match lever {
        Lever::Open(open) => sim.set_open(0, open),
        Lever::Size(columns, rows) => sim.resize(columns, rows),
        Lever::Plug(true) => {
            sim.add_port(1, port(1));
            sim.set_echo(1, true);
        }
        Lever::Plug(false) => sim.remove_port(1),
        Lever::Link(_) => {}
    };
    Ok((device, Some(Box::new(pull))))
}

#[test]
fn a_block_driver_conforms_on_the_sim_in_process() -> anyhow::Result<()> {
    assert_eq!(cofferdam_conformance::run(&InProcess, Class::Block)?, 34);
    Ok(())
}

#[test]
fn a_net_driver_conforms_on_the_sim_in_process() -> anyhow::Result<()> {
    assert_eq!(cofferdam_conformance::run(&InProcess, Class::Net)?, 43);
    Ok(())
}

#[test]
fn a_stream_driver_conforms_on_the_sim_in_process() -> anyhow::Result<()> {
    assert_eq!(cofferdam_conformance::run(&InProcess, Class::Stream)?, 40);
    Ok(())
}

#[test]
fn an_entropy_driver_conforms_on_the_sim_in_process() -> anyhow::Result<()> {
    assert_eq!(cofferdam_conformance::run(&InProcess, Class::Entropy)?, 28);
    Ok(())
}
