//! The suite on the sim in this process.

use cofferdam_conformance::{Bed, Device, Wish};
use cofferdam_sim::{Drive, Options, Profile, Sim, Storage};

struct InProcess;

pub(crate) fn options(wish: &Wish) -> Options {
    let mut profile = Profile { read_only: wish.read_only, queues: wish.queues, ..Profile::default() };
    if wish.plain_ring {
        profile.event_idx = false;
        profile.indirect = false;
    }
    Options { profile, storage: Storage::Memory(wish.capacity_bytes), ..Options::default() }
}

impl Bed for InProcess {
    fn name(&self) -> &'static str {
        "sim in process"
    }

    fn device(&self, wish: &Wish) -> anyhow::Result<Option<Device>> {
        let sim = Sim::new(options(wish))?;
        let transport = Box::new(sim.transport(Drive::Threads)?);
        Ok(Some(Device { transport, capacity_bytes: wish.capacity_bytes, keep: Box::new(sim) }))
    }
}

#[test]
fn a_block_driver_conforms_on_the_sim_in_process() -> anyhow::Result<()> {
    assert_eq!(cofferdam_conformance::run(&InProcess)?, 22);
    Ok(())
}
