//! The way in through a vhost-user socket, with the server as a library.
//!
//! No test of this file starts a process: a child holds its parent's sockets from fork to exec, and with them the claim on a
//! device that the parent has just given up.

mod common;

use std::time::Duration;

use cofferdam_sim::{OnDeath, ServeError};
use common::{Do, LIMIT, Rig, connect, sim, sim_with, wait_lost};

const READ: Do = Do::Read { sector: 0, sectors: 1 };

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn front_ends_are_served_one_after_another_and_nothing_is_left_of_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blk.sock");
    let sim = sim_with(&[], |options| options.profile.queues = 2);
    let server = sim.serve(&path, OnDeath::ServeAgain).unwrap();
    let mut before = 0;
    for round in 0..8u8 {
        let mut rig = Rig::new(connect(&path));
        assert_eq!(rig.status(0, &READ), 0);
        assert_eq!(rig.data(0, 512), vec![round; 512], "the medium stays");
        assert_eq!(rig.status(0, &Do::Write { sector: 0, data: vec![round + 1; 512] }), 0);
        drop(rig);
        if round == 1 {
            // From here on the numbers have to stay. The other tests of this file are in other processes or threads, which
            // is why a margin is left below.
            before = descriptors();
        }
    }
    assert!(descriptors() < before + 40, "{} descriptors, {before} before", descriptors());
    assert!(matches!(sim.serve(&path, OnDeath::End), Err(ServeError::InUse(_))));
    server.stop().unwrap();
    assert!(!path.exists());
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(sim.serve(&path, OnDeath::End), Err(ServeError::NotASocket(_))));
}

#[test]
fn a_stale_socket_is_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blk.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let server = sim(&[]).serve(&path, OnDeath::End).unwrap();
    assert_eq!(Rig::new(connect(&path)).status(0, &READ), 0);
    server.stop().unwrap();
}

#[test]
fn a_device_that_dies_behind_the_socket_is_lost_at_once_and_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blk.sock");
    let sim = sim(&["die@nth=2"]);
    let server = sim.serve(&path, OnDeath::ServeAgain).unwrap();
    let mut rig = Rig::new(connect(&path));
    assert_eq!(rig.status(0, &READ), 0);
    rig.submit(0, &READ);
    assert!(wait_lost(&mut rig));
    drop(rig);
    let mut rig = Rig::new(connect(&path));
    assert_eq!(rig.status(0, &READ), 0);
    sim.die();
    assert!(wait_lost(&mut rig));
    assert!(!server.is_finished());
    drop(rig);
    drop(server);
    assert!(!path.exists());
}

#[test]
fn a_hang_behind_the_socket_ends_with_the_release() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blk.sock");
    let sim = sim(&["hang@nth=1", "slow:3@nth=2"]);
    let server = sim.serve(&path, OnDeath::ServeAgain).unwrap();
    let mut rig = Rig::new(connect(&path));
    rig.submit(0, &READ);
    assert!(sim.wait_until(LIMIT, |stats| stats.hung));
    rig.submit(1, &READ);
    assert_eq!(rig.pop(), Ok(None));
    sim.release();
    assert_eq!((rig.next(0).unwrap().token, rig.next(0).unwrap().token), (0, 1));
    // A server that hangs can be stopped all the same.
    sim.hang(true);
    server.stop().unwrap();
    assert!(wait_lost(&mut rig));
}

#[test]
fn a_null_device_polls_behind_the_socket_and_stops() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blk.sock");
    let sim = sim_with(&[], |options| {
        options.storage = cofferdam_sim::Storage::Null(1 << 30);
        options.spin = Duration::MAX;
    });
    let server = sim.serve(&path, OnDeath::ServeAgain).unwrap();
    for _ in 0..2 {
        let mut rig = Rig::new(connect(&path));
        for token in 0..32 {
            assert_eq!(rig.status(token, &READ), 0);
        }
    }
    server.stop().unwrap();
}
