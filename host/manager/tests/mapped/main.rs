//! Memory that clients map for themselves: it arrives, it is nobody else's, and it goes.
//!
//! What another process does with a descriptor is done here through a second mapping of it, or through the descriptor itself.

mod rig;

use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_manager::{Binding, EventKind, IoError, IoOp, LoadSpec, MapError, MappedUse, RegionError, Residual};
use cofferdam_sim::{Drive, Effect, Rule};
use rig::*;

fn data_arrives(binding: &Arc<Binding>, name: &str) {
    let handle = open(binding);
    let mapped = handle.map(MIB).unwrap();
    assert_eq!(mapped.len(), MIB);
    assert!(mappings("self", name) >= 1);
    let fd = mapped.descriptor().unwrap();
    let outside = foreign(&fd, MIB);
    // Another process fills it at an odd place; the device takes it from there and puts it into another.
    let pattern: Vec<u8> = (0..65_536u32).map(|at| (at * 7 + 3) as u8).collect();
    outside.write(12_345, &pattern).unwrap();
    assert_eq!(carry_out(&handle, IoOp::Write, 8192, mapped.window(12_345, 65_536).unwrap()), Ok(()));
    assert_eq!(carry_out(&handle, IoOp::Read, 8192, mapped.window(MIB - 65_536, 65_536).unwrap()), Ok(()));
    assert!(read(&outside, MIB - 65_536, 65_536) == pattern, "not what was written");
    assert!(seen(&mapped, MIB - 65_536, 65_536) == pattern);
    // A lease of the arena sees the same medium, from the same handle.
    let lease = handle.lease(65_536).unwrap();
    submit(&handle, IoOp::Read, 8192, lease);
    let done = answer(&handle);
    let mut bytes = vec![0; 65_536];
    done.buffer.unwrap().read_at(0, &mut bytes).unwrap();
    assert!(bytes == pattern);
}

#[test]
fn data_goes_through_a_region_without_a_copy_in_process_and_to_another_process() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let binding = load(&manager, &sim, "arrives");
    data_arrives(&binding, "arrives");
    unload_clean(&manager, &binding);

    let process = Process::start();
    let binding = manager.load(spec("arrives-behind", process.transport())).unwrap();
    data_arrives(&binding, "arrives-behind");
    unload_clean(&manager, &binding);
}

#[test]
fn a_window_is_good_for_its_own_handle_alone() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let binding = load(&manager, &sim, "own");
    let (victim, thief) = (open(&binding), open(&binding));
    let secret = victim.map(PAGE).unwrap();
    secret.write_at(0, b"secret").unwrap();
    for own_region in [false, true] {
        if own_region {
            thief.map(PAGE).unwrap();
        }
        for op in [IoOp::Read, IoOp::Write] {
            let stolen = secret.window(0, 512).unwrap();
            assert_eq!(carry_out(&thief, op, 0, stolen), Err(IoError::Invalid));
        }
    }
    assert_eq!(seen(&secret, 0, 6), b"secret");
    assert_eq!(carry_out(&thief, IoOp::Read, 0, thief.lease(512).unwrap()), Ok(()));
    assert_eq!(sim.contents(0, 6).unwrap(), [0; 6], "the secret is on the medium");
    assert_eq!(carry_out(&victim, IoOp::Write, 0, secret.window(0, 512).unwrap()), Ok(()));
    assert_eq!(sim.contents(0, 6).unwrap(), b"secret");
}

#[test]
fn requests_and_windows_out_of_bounds_are_refused_and_overlaps_are_the_clients_own() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let binding = load(&manager, &sim, "hostile");
    let handle = open(&binding);
    let mapped = handle.map(2 * PAGE).unwrap();
    for (offset, bytes) in [(0, 0), (0, 8193), (8192, 1), (u64::MAX, 1), (u64::MAX - 511, 512), (1, u32::MAX)] {
        let refused = mapped.window(offset, bytes);
        assert!(matches!(refused, Err(RegionError::OutOfRange { .. })), "{bytes} at {offset}: {refused:?}");
    }
    assert!(mapped.write_at(8190, &[0; 3]).is_err() && mapped.read_at(u64::MAX, &mut [0; 1]).is_err());
    assert!(mapped.fill(0, u64::MAX, 1).is_err());
    // A request that is longer than its window, one that is no whole sector, and one past the medium.
    for (length, offset) in [(8192, 0), (u32::MAX, 0), (513, 0), (512, u64::MAX - 511), (512, 1 << 40)] {
        let mut given = request(IoOp::Write, offset, mapped.window(4096, 4096).unwrap());
        given.length = length;
        handle.submit(&mut vec![given]).unwrap();
        assert!(answer(&handle).result.is_err(), "{length} bytes at {offset}");
    }
    // The same bytes twice at once: each request gets its answer, and the medium has what was there.
    mapped.fill(0, 8192, 0x33).unwrap();
    let windows = [mapped.window(0, 4096).unwrap(), mapped.window(512, 4096).unwrap()];
    let mut both = windows.into_iter().zip([0, 4096]).map(|(w, at)| request(IoOp::Write, at, w)).collect();
    handle.submit(&mut both).unwrap();
    let mut out = Vec::new();
    while out.len() < 2 {
        handle.wait(PATIENCE, &mut out);
    }
    assert!(out.iter().all(|done| done.result == Ok(())));
    assert!(sim.contents(0, 8192).unwrap() == [0x33; 8192]);
}

#[test]
fn what_counts_is_bounded_and_comes_back_when_the_memory_is_gone() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let transport = Box::new(sim.transport(Drive::Threads).unwrap());
    let limits = LoadSpec { mapped_handles: 3, mapped_bytes: 4 * MIB, ..spec("bounds", transport) };
    let binding = manager.load(limits).unwrap();
    let handles: Vec<_> = (0..5).map(|_| open(&binding)).collect();
    for bytes in [0, 1, 4095, PAGE + 1, 4 * MIB + PAGE, u64::MAX, u64::MAX - 4095, 1 << 63] {
        let refused = handles[0].map(bytes).unwrap_err();
        assert_eq!(refused, MapError::Size { bytes, max_bytes: 4 * MIB });
    }
    let first = handles[0].map(3 * MIB).unwrap();
    assert_eq!(handles[0].map(PAGE).unwrap_err(), MapError::AlreadyMapped);
    let busy = handles[1].map(MIB + PAGE).unwrap_err();
    assert_eq!(busy, MapError::Busy { limit: "4194304 bytes of mapped memory".into() });
    // A refused handle may try again.
    handles[1].map(PAGE).unwrap();
    handles[2].map(PAGE).unwrap();
    let busy = handles[3].map(PAGE).unwrap_err();
    assert_eq!(busy, MapError::Busy { limit: "3 mapped handles".into() });
    assert_eq!(binding.mapped_use(), MappedUse { regions: 3, bytes: 3 * MIB + 2 * PAGE, retired_bytes: 0 });

    drop(handles.into_iter().next());
    until("the region of a closed handle is gone", || first.is_gone());
    let after = open(&binding);
    until("its bytes are free again", || after.map(3 * MIB).is_ok() || binding.mapped_use().bytes > 3 * MIB);
    unload_clean(&manager, &binding);
}

#[test]
fn a_revoked_region_is_empty_for_everybody_and_costs_the_host_nothing() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let binding = load(&manager, &sim, "revoked");
    let (handle, neighbour) = (open(&binding), open(&binding));
    let (mapped, other) = (handle.map(MIB).unwrap(), neighbour.map(MIB).unwrap());
    mapped.fill(0, MIB, 0x5a).unwrap();
    other.fill(0, MIB, 0x77).unwrap();
    let window = mapped.window(0, 4096).unwrap();
    let fd = mapped.descriptor().unwrap();
    let outside = foreign(&fd, MIB);
    assert_eq!(read(&outside, MIB - 1, 1), [0x5a]);

    binding.revoke_handle(handle.id(), PATIENCE).unwrap();
    assert!(mapped.is_revoked());
    assert!(matches!(mapped.window(0, 512), Err(RegionError::Revoked)));
    assert_eq!(mapped.descriptor().unwrap_err(), MapError::Revoked);
    assert_eq!(handle.map(PAGE).unwrap_err(), MapError::Revoked);
    until("the pages are gone", || mapped.is_gone());
    assert!(matches!(mapped.read_at(0, &mut [0; 1]), Err(RegionError::Revoked)));
    assert!(matches!(mapped.write_at(0, &[1]), Err(RegionError::Revoked)));
    assert!(matches!(mapped.fill(0, 1, 1), Err(RegionError::Revoked)));
    assert!(matches!(window.read_at(0, &mut [0; 1]), Err(RegionError::Revoked)));
    assert!(read(&outside, 0, MIB as usize) == vec![0; MIB as usize], "somebody's bytes are left");

    // The other process fills it again: what it gets is its own, up to the old length, and in neither the device nor a new region of this host.
    outside.write(0, &vec![0xbd; MIB as usize]).unwrap();
    assert!(rustix::fs::ftruncate(&fd, 2 * MIB).is_err() && rustix::fs::ftruncate(&fd, 0).is_err());
    assert!(matches!(mapped.read_at(0, &mut [0; 1]), Err(RegionError::Revoked)));
    let mut again = vec![0xee; 4096];
    let next = open(&binding);
    let region = next.map(MIB).unwrap();
    region.read_at(0, &mut again).unwrap();
    assert!(again == [0; 4096], "a region was used twice");
    assert_eq!(seen(&other, MIB - 4, 4), [0x77; 4], "the neighbour's is as it was");
    assert_eq!(carry_out(&neighbour, IoOp::Write, 0, other.window(0, 4096).unwrap()), Ok(()));
    drop(fd);
    drop(outside);
    // With the last foreign reference the file is gone: nothing of the host or the device held it.
    assert_eq!(mappings("self", "revoked"), 4, "two regions, mapped by the host and by the device in it");
    unload_clean(&manager, &binding);
}

#[test]
fn a_region_stays_for_as_long_as_a_request_of_its_closed_handle_is_in_flight() {
    let (manager, sim) = (manager(), sim(gate()));
    let binding = load(&manager, &sim, "orphan");
    let handle = open(&binding);
    let mapped = handle.map(MIB).unwrap();
    let outside = Holder::new(&mapped);
    outside.write(0, &[0x11; 4096]);
    submit(&handle, IoOp::Write, 0, mapped.window(0, 4096).unwrap());
    assert!(sim.wait_until(PATIENCE, |stats| stats.gated == 1));
    let begun = Instant::now();
    drop(handle);
    assert!(begun.elapsed() < Duration::from_secs(1), "close has waited");
    assert!(mapped.is_revoked());
    // Several looks of the watching thread later it is still there, because the device may read it.
    for round in 0..3 {
        looked_at(&binding);
        assert!(!mapped.is_gone(), "round {round}: taken away under the device");
    }
    assert_eq!(outside.read(0, 4096), [0x11; 4096]);
    sim.open_gate(u64::MAX);
    until("the region goes when the request is answered", || mapped.is_gone());
    assert_eq!(sim.contents(0, 4096).unwrap(), [0x11; 4096], "the request was carried out");
    assert_eq!(outside.read(0, 4096), [0; 4096]);
    unload_clean(&manager, &binding);
}

/// A region that comes and goes: when it is gone, the watching thread has looked at every region.
fn looked_at(binding: &Arc<Binding>) {
    let handle = open(binding);
    let mapped = handle.map(PAGE).unwrap();
    drop(handle);
    until("another region goes", || mapped.is_gone());
}

#[test]
fn a_binding_that_leaves_takes_the_regions_of_clients_that_hold_on() {
    for force in [false, true] {
        let (manager, sim) = (manager(), sim(vec![Rule::always(Effect::Slow { from: 20, below: 21 })]));
        let binding = load(&manager, &sim, "leaving");
        let handle = open(&binding);
        let mapped = handle.map(MIB).unwrap();
        mapped.fill(0, MIB, 0x5a).unwrap();
        let outside = Holder::new(&mapped);
        let held = mapped.window(0, 8192).unwrap();
        let mut requests =
            (0..32).map(|n| request(IoOp::Write, n * 4096, mapped.window(n * 4096, 4096).unwrap())).collect();
        handle.submit(&mut requests).unwrap();
        let certificate = manager.unload_binding(&binding, &options(5000, force)).unwrap();
        assert!(certificate.residual.is_zero(), "{certificate:?}");
        assert_eq!((certificate.leaked.bytes, mappings("self", "leaving")), (0, 0));
        assert!(mapped.is_gone());
        assert!(matches!(held.write_at(0, &[1]), Err(RegionError::Revoked)));
        assert_eq!(handle.map(PAGE).unwrap_err(), MapError::Revoked);
        assert!(outside.read(0, MIB as usize) == vec![0; MIB as usize]);
    }
}

#[test]
fn a_region_of_a_device_that_hangs_is_retired_with_the_rest_and_counted() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let binding = load(&manager, &sim, "hanging");
    let (handle, idle) = (open(&binding), open(&binding));
    let (mapped, other) = (handle.map(MIB).unwrap(), idle.map(2 * MIB).unwrap());
    sim.hang(true);
    mapped.fill(0, 4096, 0x5a).unwrap();
    submit(&handle, IoOp::Write, 0, mapped.window(0, 4096).unwrap());
    let certificate = manager.unload_binding(&binding, &options(3000, true)).unwrap();
    let expected = 3 * MIB + (64 << 20);
    assert!((expected..expected + MIB).contains(&certificate.leaked.bytes), "{:?}", certificate.leaked);
    // The device is in this process, and a hanging one keeps its descriptors.
    let residual = Residual { fds: 0, ..certificate.residual };
    assert!(residual.is_zero(), "{residual:?}");
    assert_eq!(binding.mapped_use(), MappedUse { regions: 0, bytes: 3 * MIB, retired_bytes: 3 * MIB });
    for region in [&mapped, &other] {
        assert!(region.is_gone() && region.read_at(0, &mut [0; 1]).is_err());
    }
    // The device acts after all: on memory that is still there, so on nobody else's.
    sim.release();
    until("the device acts", || sim.contents(0, 4096).unwrap() == [0x5a; 4096]);
}

#[test]
fn what_a_backend_does_not_let_go_of_is_retired_shown_and_freed_when_it_is_silent_after_all() {
    let process = Process::start();
    let manager = manager();
    let mut events = manager.events(None);
    let transport = process.transport();
    let binding = manager.load(LoadSpec { mapped_handles: 2, ..spec("stopped", transport) }).unwrap();
    let (one, two, three) = (open(&binding), open(&binding), open(&binding));
    let (first, second) = (one.map(MIB).unwrap(), two.map(2 * MIB).unwrap());
    second.fill(0, 4096, 0x66).unwrap();
    let outside = Holder::new(&first);
    outside.write(0, b"mine");
    process.stop();
    let begun = Instant::now();
    drop(one);
    assert!(begun.elapsed() < Duration::from_secs(1), "close has waited for the backend");
    let mut told = 0;
    while told == 0 {
        let record = events.next(PATIENCE).expect("nobody was told");
        if let EventKind::Retired { bytes, reason } = record.what {
            assert!(reason.contains("in time"), "{reason}");
            told = bytes;
        }
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(told, MIB);
    assert!(first.is_gone() && !second.is_gone());
    assert_eq!(outside.read(0, 4), b"mine", "the device may reach it, so it is neither freed nor emptied");
    // It counts for as long as it is there, and the others are served as soon as the backend goes on.
    assert_eq!(binding.mapped_use(), MappedUse { regions: 2, bytes: 3 * MIB, retired_bytes: MIB });
    assert!(matches!(three.map(PAGE), Err(MapError::Busy { .. })));
    process.go_on();
    assert_eq!(carry_out(&two, IoOp::Write, 0, second.window(0, 4096).unwrap()), Ok(()));
    unload_clean(&manager, &binding);
    assert_eq!(outside.read(0, 4), [0; 4]);
}

#[test]
fn a_map_that_a_backend_does_not_answer_is_bounded_and_leaves_the_others_alone() {
    let process = Process::start();
    let manager = manager();
    let binding = manager.load(spec("silent", process.transport())).unwrap();
    let (handle, other) = (open(&binding), open(&binding));
    process.stop();
    let begun = Instant::now();
    let error = handle.map(MIB).unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert!(matches!(error, MapError::Host(_)), "{error}");
    assert_eq!(binding.mapped_use().regions, 1, "the backend has had the descriptor");
    process.go_on();
    until("the region that nobody got goes", || binding.mapped_use().regions == 0);
    assert_eq!(carry_out(&other, IoOp::Read, 0, other.lease(4096).unwrap()), Ok(()));
    // It may try again.
    let mapped = handle.map(MIB).unwrap();
    assert_eq!(carry_out(&handle, IoOp::Read, 0, mapped.window(0, 4096).unwrap()), Ok(()));
    unload_clean(&manager, &binding);
}

#[test]
fn a_killed_backend_takes_no_region_with_it() {
    let mut process = Process::start();
    let manager = manager();
    let binding = manager.load(spec("killed", process.transport())).unwrap();
    let handle = open(&binding);
    let mapped = handle.map(MIB).unwrap();
    process.stop();
    submit(&handle, IoOp::Read, 0, mapped.window(0, 4096).unwrap());
    process.child.kill().unwrap();
    until("the binding has left", || binding.certificate().is_some());
    let certificate = binding.certificate().unwrap();
    assert!(certificate.residual.is_zero() && certificate.leaked.bytes == 0, "{certificate:?}");
    assert!(mapped.is_gone());
    assert_eq!(binding.mapped_use(), MappedUse::default());
}

#[test]
fn a_thousand_maps_and_closes_grow_nothing() {
    let process = Process::start();
    let pid = process.pid().to_string();
    let manager = manager();
    let binding = manager.load(spec("cycles", process.transport())).unwrap();
    let mut before = (0, 0);
    for round in 0..1000u32 {
        let handle = open(&binding);
        // Bounded by 16: a client that is faster than the watching thread has to wait its turn.
        let mapped = loop {
            match handle.map(64 * 1024) {
                Ok(mapped) => break mapped,
                Err(MapError::Busy { .. }) => std::thread::yield_now(),
                Err(error) => panic!("round {round}: {error}"),
            }
        };
        if round % 50 == 0 {
            mapped.fill(0, 4096, round as u8).unwrap();
            assert_eq!(carry_out(&handle, IoOp::Write, 0, mapped.window(0, 4096).unwrap()), Ok(()));
        }
        drop(handle);
        if round == 100 {
            until("all are gone", || binding.mapped_use() == MappedUse::default());
            before = (descriptors(&pid), mappings(&pid, "cycles"));
        }
    }
    until("all are gone", || binding.mapped_use() == MappedUse::default());
    assert_eq!((descriptors(&pid), mappings(&pid, "cycles")), before, "in the backend");
    assert_eq!(mappings("self", "cycles"), 0);
    let own = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let links = own.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    assert_eq!(links.filter(|link| link.to_string_lossy().contains("-cycles-mapped-")).count(), 0);
    unload_clean(&manager, &binding);
}

#[test]
fn clients_that_map_while_the_binding_leaves_end_with_an_error_or_a_region_that_is_gone() {
    for round in 0..20u32 {
        let (manager, sim) = (manager(), sim(Vec::new()));
        let binding = load(&manager, &sim, "racing");
        let handles: Vec<_> = (0..4).map(|_| open(&binding)).collect();
        let start = &std::sync::Barrier::new(5);
        let mapped: Vec<_> = std::thread::scope(|scope| {
            let clients: Vec<_> = handles
                .iter()
                .map(|handle| {
                    scope.spawn(move || {
                        start.wait();
                        handle.map(MIB)
                    })
                })
                .collect();
            start.wait();
            let certificate = manager.unload_binding(&binding, &options(5000, false)).unwrap();
            assert_eq!(certificate.leaked.bytes, 0, "round {round}");
            clients.into_iter().map(|client| client.join().unwrap()).collect()
        });
        for outcome in mapped {
            match outcome {
                Ok(mapped) => assert!(mapped.is_gone(), "round {round}"),
                Err(error) => assert!(matches!(error, MapError::Revoked | MapError::Host(_)), "round {round}: {error}"),
            }
        }
        assert_eq!(binding.mapped_use(), MappedUse::default(), "round {round}");
        assert_eq!(mappings("self", "racing"), 0, "round {round}");
    }
}
