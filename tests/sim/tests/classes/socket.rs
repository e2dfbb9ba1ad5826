//! The same devices behind a vhost-user socket.

use cofferdam_bus_vhost_user::VhostUser;
use cofferdam_sim::{
    Drive, EntropyProfile, Frame, NetHeader, NetProfile, OnDeath, SimDevice, SimError, SimNet, SimRng, Transmit,
};

use crate::rig::{Rig, behaviour};
use crate::{console, rig};

/// Serves `sim` to the driver that `with` is.
fn served(sim: &SimDevice, without: u64, with: impl FnOnce(&mut Rig)) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sim.sock");
    let server = sim.serve(&path, OnDeath::ServeAgain).unwrap();
    let transport = VhostUser::connect(&format!("vhost-user:{}", path.display())).expect("connect");
    assert!(matches!(sim.transport(Drive::Threads), Err(SimError::Claimed)));
    let mut rig = Rig::new(transport, without);
    with(&mut rig);
    drop(rig);
    server.stop().unwrap();
    assert_eq!(sim.violations(), []);
}

#[test]
fn entropy_comes_through_the_socket() {
    let sim = SimRng::new(EntropyProfile::default(), behaviour(&[])).unwrap();
    served(&sim, 0, |rig| {
        for token in 0..100 {
            rig.post(0, token, 100);
            assert_eq!(rig.receive(0).1.len(), 100);
        }
    });
    assert_eq!(sim.placed_bytes(), 10_000);
}

#[test]
fn frames_come_through_the_socket_both_ways() {
    let profile = NetProfile { pairs: 2, ..NetProfile::default() };
    let sim = SimNet::new(profile, behaviour(&[])).unwrap();
    served(&sim, 0, |rig| {
        assert_eq!(rig.config(12)[..6], [0x02, 0xcf, 0xda, 0, 0, 1]);
        sim.set_link(false);
        assert_eq!(rig.config(8)[6], 0, "configuration space is read anew");
        sim.set_link(true);
        rig.post(0, 0, 2048);
        assert!(sim.inject(Frame::plain(b"in")));
        assert_eq!(rig.receive(0).1[12..], *b"in");
        rig.command(4, 0, &[4, 0, 2, 0]);
        assert_eq!(rig.next(4).status(), [0]);
        sim.set_transmit(Transmit::Echo);
        for number in 0..500u32 {
            rig.post(2, number, 64);
            rig.send(3, number, &[&NetHeader::default().to_bytes()[..], &number.to_le_bytes()].concat());
            assert_eq!(rig.receive(2).1[12..], number.to_le_bytes());
            rig.next(3);
        }
    });
}

#[test]
fn a_console_comes_through_the_socket() {
    let sim = console::sim(&[]);
    sim.set_echo(0, true);
    served(&sim, 0, |rig| {
        console::open(rig);
        console::paste(rig, 1 << 20);
        sim.feed(1, b"port 1");
        rig.post(4, 0, rig::SLOT_BYTES);
        assert_eq!(rig.receive(4).1, b"port 1");
    });
}
