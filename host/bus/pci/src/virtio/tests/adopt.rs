//! A device that goes from one process to another, both of which are here: it is told nothing.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_device::{DmaRegion, Exported, QueueEvents, Silence, Transport};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;

use crate::adopt::{self, Descriptors};
use crate::virtio::VirtioPci;
use crate::virtio::device::feature;
use crate::virtio::testing::{CAPACITY, Did, Gone, Model, Sim, prepared, setup};

/// A device with queues 2 and 0, behind an IOMMU, that runs.
struct Bed {
    sim: Sim,
    device: VirtioPci,
    region: Arc<DmaRegion>,
    queues: Vec<QueueEvents>,
}

fn bed(change: impl FnOnce(&mut Model)) -> Bed {
    let sim = Sim::new(|model| {
        model.isolated = true;
        model.offered |= feature::ACCESS_PLATFORM;
        change(model);
    });
    let (mut device, region) = prepared(&sim);
    let queues = [2, 0].map(|index| device.setup_queue(setup(index, &region)).unwrap());
    device.start().unwrap();
    Bed { sim, device, region, queues: queues.into() }
}

fn adopted(sim: &Sim, exported: Exported) -> Result<VirtioPci, String> {
    let adopt::State { address, device, .. } = serde_json::from_str(&exported.state).map_err(|why| why.to_string())?;
    let mut received = Descriptors::new(exported.descriptors);
    let new = VirtioPci::adopt(sim.received(), address, device, &mut received)?;
    received.end()?;
    Ok(new)
}

/// All that the manager has a transport do.
fn taken(bed: &mut Bed) -> VirtioPci {
    let exported = bed.device.export().unwrap();
    let mut new = adopted(&bed.sim, exported).unwrap();
    let region = bed.region.duplicate().unwrap();
    let region = new.adopt_region(region, bed.region.len(), bed.region.iova()).unwrap();
    new.adopt_memory(region).unwrap();
    new
}

/// What was done to the device since it started.
fn since(sim: &Sim) -> Vec<Did> {
    let did = sim.did();
    let start = did.iter().position(|did| *did == Did::Status(15)).unwrap();
    did[start + 1..].to_vec()
}

fn readable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 10, tv_nsec: 0 })).unwrap() > 0
}

#[test]
fn the_device_hears_nothing_until_it_is_rung_by_the_one_that_has_it() {
    let mut bed = bed(|_| {});
    let iova = bed.region.iova();
    let mut new = taken(&mut bed);
    assert_eq!((new.offered_features(), new.max_queues(), new.max_queue_size(2)), {
        let old = &bed.device;
        (old.offered_features(), old.max_queues(), old.max_queue_size(2))
    });
    let mut capacity = [0; 8];
    new.read_config(0, &mut capacity).unwrap();
    assert_eq!(u64::from_le_bytes(capacity), CAPACITY, "it may be asked what its configuration is");
    let kick = bed.queues[0].call.try_clone().unwrap();
    let bell = new.adopt_queue(2, kick).unwrap();
    new.resume();
    drop(bed.device);
    assert!(!new.is_lost());
    assert_eq!(since(&bed.sim), [Did::Export, Did::AdoptMemory(iova), Did::Resume(false)]);
    bell.ring();
    assert_eq!(since(&bed.sim).last(), Some(&Did::Notify(8, 2)));
    // The kernel signals the events that it was given; both processes have them.
    bed.sim.model().interrupt(1);
    assert!(readable(bed.queues[0].call.as_fd()));
    bed.sim.model().interrupt(0);
    assert!(readable(new.event_fd().unwrap()));
    assert!(!new.is_lost() && new.take_config_change());
    assert_eq!(new.quiesce(1, Instant::now() + Duration::from_secs(2)), Silence::Confirmed);
    new.release();
    let end = [Did::Status(0), Did::Status(1), Did::Status(0), Did::Quiet, Did::Release];
    assert!(since(&bed.sim).ends_with(&end), "{:?}", since(&bed.sim));
    assert_eq!(bed.sim.model().violations, Vec::<String>::new());
}

#[test]
fn one_that_comes_to_nothing_leaves_no_trace_and_the_other_goes_on() {
    let mut bed = bed(|_| {});
    for _ in 0..3 {
        let mut new = taken(&mut bed);
        let still = Instant::now() + Duration::from_secs(2);
        for dormant in [&mut bed.device, &mut new] {
            assert!(matches!(dormant.quiesce(0, still), Silence::Unconfirmed { .. }), "it is not to be silenced");
            assert!(dormant.exportable().is_err() && dormant.export().is_err());
        }
        new.release();
        drop(new);
        bed.device.resume();
    }
    let iova = bed.region.iova();
    let round = [Did::Export, Did::AdoptMemory(iova), Did::Resume(false)];
    assert_eq!(since(&bed.sim), round.iter().cycle().take(9).cloned().collect::<Vec<_>>());
    bed.queues[1].doorbell.ring();
    assert_eq!(since(&bed.sim).last(), Some(&Did::Notify(0, 0)));
    bed.device.release();
    assert!(since(&bed.sim).ends_with(&[Did::Quiet, Did::Release]), "its own end is as ever");
}

#[test]
fn a_change_that_was_announced_meanwhile_is_the_next_ones_to_tell() {
    let mut bed = bed(|_| {});
    bed.sim.model().interrupt(0);
    assert!(!bed.device.is_lost(), "heard, and not asked for");
    let mut new = taken(&mut bed);
    assert!(new.take_config_change());
    bed.sim.model().interrupt(0);
    assert!(!new.is_lost() && !bed.device.is_lost());
    assert!(!new.take_config_change(), "nobody hears while nobody has it");
    assert!(bed.device.take_config_change(), "should it go on itself, it has to tell of the first");
    new.resume();
    assert!(!new.is_lost() && new.take_config_change());
}

#[test]
fn a_shared_vector_and_a_line_are_passed_on_by_the_one_that_has_the_device() {
    // Two vectors for two queues.
    let mut shared = bed(|model| model.msix = 2);
    let mut new = taken(&mut shared);
    shared.sim.model().interrupt(1);
    let taken_early = || shared.queues.iter().any(|queue| rustix::io::read(&queue.call, &mut [0; 8]).is_ok());
    assert!(!taken_early(), "nobody passes it on");
    new.resume();
    assert!(shared.queues.iter().all(|queue| readable(queue.call.as_fd())));

    let mut line = bed(|model| model.msix = 0);
    let mut new = taken(&mut line);
    assert!(line.sim.model().wired.is_none());
    new.resume();
    assert_eq!(since(&line.sim).last(), Some(&Did::Resume(true)));
    let wired = line.sim.model().wired.take();
    let Some(crate::claimed::Interrupts::Line { mut acknowledge, signal }) = wired else { panic!("no line") };
    assert_eq!(signal.len(), 2);
    line.sim.model().isr = 1;
    assert!(acknowledge());
}

#[test]
fn one_that_was_lost_or_reset_meanwhile_is_not_adopted_and_the_other_notices() {
    for gone in [Gone::Ones, Gone::Zero] {
        let mut bed = bed(|_| {});
        let exported = bed.device.export().unwrap();
        bed.sim.remove(gone);
        assert!(adopted(&bed.sim, exported).is_err(), "{gone:?}");
        assert!(!bed.device.is_lost(), "nobody looks");
        bed.device.resume();
        assert!(bed.device.is_lost(), "{gone:?}");
        assert!(bed.device.exportable().is_err());
    }
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let mut bed = bed(|_| {});
    let refused = |bed: &mut Bed, change: &dyn Fn(&mut Value, &mut Vec<std::os::fd::OwnedFd>)| {
        let mut exported = bed.device.export().unwrap();
        let mut state: Value = serde_json::from_str(&exported.state).unwrap();
        change(&mut state, &mut exported.descriptors);
        exported.state = state.to_string();
        let outcome = adopted(&bed.sim, exported).map(drop);
        bed.device.resume();
        outcome.expect_err("adopted all the same")
    };
    let set = |pointer: &'static str, value: Value| {
        move |state: &mut Value, _: &mut Vec<_>| *state.pointer_mut(pointer).unwrap() = value.clone()
    };
    refused(&mut bed, &set("/device/sizes", serde_json::json!([])));
    refused(&mut bed, &set("/device/sizes", serde_json::json!([256, 3, 256, 256])));
    refused(&mut bed, &set("/device/status", serde_json::json!(11)));
    refused(&mut bed, &set("/device/queues/0/index", serde_json::json!(9)));
    refused(&mut bed, &set("/device/queues/0/index", serde_json::json!(0)));
    for at in [1, 2, 0x0fff, 0x1000, u64::MAX] {
        refused(&mut bed, &set("/device/queues/0/notified_at", serde_json::json!(at)));
    }
    refused(&mut bed, &|_, descriptors| drop(descriptors.pop()));
    refused(&mut bed, &|_, descriptors| {
        let more = descriptors[0].try_clone().unwrap();
        descriptors.push(more);
    });
    let mut early = adopted(&bed.sim, bed.device.export().unwrap()).unwrap();
    assert!(early.adopt_queue(2, bed.region.duplicate().unwrap()).is_err(), "it reaches memory that nobody has");
    bed.device.resume();
    let mut new = taken(&mut bed);
    let file = || bed.region.duplicate().unwrap();
    assert!(new.adopt_region(file(), bed.region.len(), bed.region.iova()).is_err(), "it was adopted already");
    assert!(new.adopt_region(file(), 4096, 0).is_err(), "it was not given that");
    assert!(new.adopt_queue(1, file()).is_err(), "it does not run");
    assert!(!since(&bed.sim).iter().any(|did| matches!(did, Did::Status(_) | Did::Quiet | Did::Release)));
}

#[test]
fn a_device_that_does_not_run_yet_or_that_clients_share_memory_with_stays() {
    let sim = Sim::new(|_| {});
    let (device, _region) = prepared(&sim);
    assert!(device.exportable().unwrap_err().to_string().contains("does not run"));
    let mut bed = bed(|_| {});
    bed.device.exportable().unwrap();
    bed.device.map(Arc::new(DmaRegion::new("client", 8192, 0x9000_0000).unwrap())).unwrap();
    assert!(bed.device.exportable().unwrap_err().to_string().contains("data ports"));
    assert!(bed.device.export().is_err());
    assert_eq!(bed.device.unmap(0x9000_0000, Instant::now()), Silence::Confirmed, "and is as it was");
    bed.device.export().unwrap();
}
