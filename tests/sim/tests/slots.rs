//! Memory that is added to the running device and taken away again, through either way in.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_device::{Direction, DmaRegion, Silence, TransportError};
use cofferdam_sim::{Drive, OnDeath, Server, Sim};
use common::{Do, LIMIT, Rig, connect, sim};

const BASE: u64 = 0x100_0000_0000;
const BYTES: u64 = 256 << 10;

fn region(name: &str, iova: u64) -> Arc<DmaRegion> {
    Arc::new(DmaRegion::new(name, BYTES, iova).unwrap())
}

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(30)
}

fn late() -> Instant {
    Instant::now() + LIMIT
}

/// Mappings in this process: the host's and, because the device is in it too, the device's.
fn mappings(name: &str) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains(&format!("/memfd:{name}"))).count()
}

/// The device in this process, and the same behind a socket.
fn both(check: impl Fn(&Sim, &mut dyn FnMut() -> Rig, &str)) {
    let inside = sim(&[]);
    check(&inside, &mut || Rig::new(inside.transport(Drive::Threads).unwrap()), "inside");
    let behind = sim(&[]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blk.sock");
    let server = serve(&behind, &path);
    check(&behind, &mut || Rig::new(connect(&path)), "behind");
    server.stop().unwrap();
}

fn serve(sim: &Sim, path: &Path) -> Server {
    sim.serve(path, OnDeath::ServeAgain).unwrap()
}

#[test]
fn a_running_device_reaches_what_is_mapped_and_nothing_that_was_unmapped() {
    both(|sim, rig, way| {
        let mut rig = rig();
        assert_eq!(rig.status(0, &Do::Write { sector: 0, data: vec![3; 512] }), 0);
        let name = format!("sim-slots-{way}");
        let (one, two) = (region(&name, BASE), region(&format!("{name}-two"), BASE + 2 * BYTES));
        rig.transport.map(Arc::clone(&one)).unwrap();
        rig.transport.map(Arc::clone(&two)).unwrap();
        assert_eq!(mappings(&name), 4, "{way}: two of the host, two of the device");

        one.write_at(BYTES - 4096, &[0x77; 4096]).unwrap();
        assert_eq!(rig.status_at(1, 8, BASE + BYTES - 4096, 4096, Direction::Out), 0);
        assert_eq!(sim.contents(4096, 4096).unwrap(), [0x77; 4096], "{way}");
        assert_eq!(rig.status_at(2, 8, BASE + 2 * BYTES + 100, 4096, Direction::In), 0);
        let mut seen = [0; 4096];
        two.read_at(100, &mut seen).unwrap();
        assert_eq!(seen, [0x77; 4096], "{way}");

        assert_eq!(rig.transport.unmap(BASE, late()), Silence::Confirmed, "{way}");
        assert_eq!(mappings(&name), 3, "{way}: the device maps it still");
        assert_eq!(Arc::strong_count(&one), 1, "{way}");
        assert_eq!(rig.transport.unmap(BASE, late()), Silence::Confirmed, "{way}: again");
        // The rings and the other region are as they were.
        assert_eq!(rig.status(3, &Do::Read { sector: 0, sectors: 1 }), 0);
        assert_eq!(rig.data(3, 512), [3; 512]);
        assert_eq!(rig.status_at(4, 8, BASE + 2 * BYTES, 4096, Direction::In), 0);
        assert!(sim.violations().is_empty());
        drop(rig);
        drop((one, two));
        // A server's worker lets go a moment after its front end has.
        let end = late();
        while mappings(&name) > 0 {
            assert!(Instant::now() < end, "{way}: {} mappings are left", mappings(&name));
        }
    });
}

#[test]
fn a_driver_that_unmaps_under_a_request_gets_an_error_and_no_memory_is_touched() {
    both(|sim, rig, way| {
        sim.add_rule("gate@nth=1".parse().unwrap());
        let mut rig = rig();
        let pulled = region("sim-pulled", BASE);
        rig.transport.map(Arc::clone(&pulled)).unwrap();
        rig.add_at(0, 0, 0, BASE, 4096, Direction::In);
        rig.publish(0);
        assert!(sim.wait_until(LIMIT, |stats| stats.gated == 1), "{way}");
        assert_eq!(rig.transport.unmap(BASE, late()), Silence::Confirmed);
        pulled.fill(0, 4096, 0x44).unwrap();
        sim.open_gate(1);
        assert_eq!(rig.next(0).unwrap().status(), [1], "{way}: VIRTIO_BLK_S_IOERR");
        let mut seen = [0; 4096];
        pulled.read_at(0, &mut seen).unwrap();
        assert_eq!(seen, [0x44; 4096], "{way}");
        sim.clear_rules();
    });
}

#[test]
fn a_device_whose_queues_stand_still_lets_go_and_a_frozen_one_does_not() {
    both(|sim, rig, way| {
        let mut rig = rig();
        assert_eq!(rig.status(0, &Do::Read { sector: 0, sectors: 1 }), 0);
        rig.transport.map(region("sim-still", BASE)).unwrap();
        rig.transport.map(region("sim-frozen", BASE + BYTES)).unwrap();
        sim.hang(false);
        assert_eq!(rig.transport.unmap(BASE, late()), Silence::Confirmed, "{way}");
        sim.hang(true);
        for _ in 0..2 {
            let silence = rig.transport.unmap(BASE + BYTES, soon());
            assert!(matches!(silence, Silence::Unconfirmed { .. }), "{way}");
        }
        let error = rig.transport.map(region("sim-frozen", BASE + 2 * BYTES)).unwrap_err();
        assert!(matches!(error, TransportError::Timeout), "{way}: {error}");
        assert!(!rig.transport.is_lost(), "{way}");
        sim.release();
        assert_eq!(rig.transport.unmap(BASE + BYTES, late()), Silence::Confirmed, "{way}");
        assert_eq!(rig.transport.unmap(BASE + 2 * BYTES, late()), Silence::Confirmed, "{way}");
        assert_eq!(mappings("sim-frozen"), 0, "{way}");
        assert_eq!(rig.status(1, &Do::Read { sector: 0, sectors: 1 }), 0, "{way}");
    });
}

#[test]
fn a_dead_device_reaches_nothing_and_a_released_hanging_one_may() {
    let dead = sim(&[]);
    let mut rig = Rig::new(dead.transport(Drive::Threads).unwrap());
    rig.transport.map(region("sim-dead", BASE)).unwrap();
    dead.die();
    assert_eq!(rig.transport.unmap(BASE, soon()), Silence::Confirmed);
    assert_eq!(mappings("sim-dead"), 0);

    let hanging = sim(&[]);
    let mut transport = Rig::new(hanging.transport(Drive::Threads).unwrap()).transport;
    transport.map(region("sim-hanging", BASE)).unwrap();
    hanging.hang(false);
    transport.release();
    assert!(matches!(transport.unmap(BASE, soon()), Silence::Unconfirmed { .. }));
    assert!(matches!(transport.map(region("sim-hanging", BASE + BYTES)), Err(TransportError::Lost)));
}
