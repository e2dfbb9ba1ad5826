//! The transport against qemu-storage-daemon, the real thing.

mod common;

use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cofferdam_bus_vhost_user::{ConnectError, VhostUser};
use cofferdam_device::{Silence, Transport, TransportError};
use common::disk::{Disk, reason};
use common::qemu::Qemu;
use common::{PATIENCE, readable, readable_now};

/// VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_BLK_F_MQ.
const EXPECTED: u64 = 1 << 32 | 1 << 29 | 1 << 28 | 1 << 12;

#[test]
fn the_handshake_tells_features_queues_configuration_and_process() {
    let qemu = Qemu::null(2);
    let mut device = VhostUser::connect(&qemu.address()).unwrap();
    assert_eq!(device.address(), qemu.address());
    assert_eq!(device.device_type(), None);
    assert_eq!(device.offered_features() & EXPECTED, EXPECTED);
    assert_eq!(device.max_queues(), 2);
    assert_eq!(device.backend_pid(), Some(qemu.pid()));

    let mut whole = [0; 96];
    device.read_config(0, &mut whole).unwrap();
    assert_eq!(whole[..8], (2u64 << 20).to_le_bytes(), "capacity in sectors of 512");
    // Any piece of it is what the whole said, whatever qemu makes of offsets.
    let mut piece = [0; 4];
    device.read_config(20, &mut piece).unwrap();
    assert_eq!(piece, whole[20..24]);
    assert_eq!(u32::from_le_bytes(piece), 512, "blk_size");
    device.read_config(34, &mut piece[..2]).unwrap();
    assert_eq!(piece[..2], 2u16.to_le_bytes(), "num_queues");

    // More than qemu has is refused, and the connection is good afterwards.
    let refused = device.read_config(93, &mut piece).unwrap_err();
    assert!(matches!(refused, TransportError::Refused(_)), "{refused}");
    let invalid = device.read_config(u32::MAX, &mut piece).unwrap_err();
    assert!(matches!(invalid, TransportError::Invalid(_)), "{invalid}");
    device.read_config(0, &mut whole).unwrap();
    assert!(!device.is_lost());
}

#[test]
fn what_one_queue_writes_the_other_reads_and_the_file_holds() {
    let qemu = Qemu::file(16 << 20, 2);
    let mut disk = Disk::start(VhostUser::connect(&qemu.address()).unwrap(), 2);
    let pattern =
        |seed: u64| -> Vec<u8> { (0..65_536u64).map(|at| (at.wrapping_mul(0x9e37_79b9) ^ seed) as u8).collect() };
    for round in 0..40u64 {
        let (writer, reader) = if round % 2 == 0 { (0, 1) } else { (1, 0) };
        disk.write(writer, round * 128, &pattern(round));
        assert!(disk.read(reader, round * 128, 65_536) == pattern(round), "round {round}");
    }
    let image = qemu.image();
    for round in 0..40 {
        assert!(image[round * 65_536..][..65_536] == pattern(round as u64), "round {round}");
    }

    assert!(!readable_now(disk.device.event_fd().unwrap()));
    assert!(!disk.device.is_lost());
    assert_eq!(disk.quiesce(0, PATIENCE), Silence::Confirmed);
    assert_eq!(disk.quiesce(0, Duration::ZERO), Silence::Confirmed, "said once, it stays");
    disk.device.release();
    disk.device.release();
    assert!(disk.device.event_fd().is_none());
    assert!(disk.device.is_lost());
    assert_eq!(disk.quiesce(0, Duration::ZERO), Silence::Confirmed);
    disk.ring(0);

    // Claim and backend are free again, and the data is still there.
    let mut again = Disk::start(VhostUser::connect(&qemu.address()).unwrap(), 1);
    assert!(again.read(0, 39 * 128, 65_536) == pattern(39));
}

#[test]
fn a_killed_backend_is_noticed_at_once_and_is_silent() {
    let mut qemu = Qemu::null(1);
    let mut disk = Disk::start(VhostUser::connect(&qemu.address()).unwrap(), 1);
    assert_eq!(disk.read(0, 0, 512), [0; 512]);
    qemu.kill();
    // The kernel closes one descriptor of the process after the other, and that of the backend channel may be the first.
    for _ in 0..2 {
        assert!(readable(disk.device.event_fd().unwrap()), "event_fd says nothing");
        if disk.device.is_lost() {
            break;
        }
    }
    assert!(disk.device.is_lost());
    disk.ring(0);
    let lost = disk.device.read_config(0, &mut [0; 8]).unwrap_err();
    assert!(matches!(lost, TransportError::Lost), "{lost}");
    // The socket hangs up before the process has wholly ended; quiesce waits for the rest.
    assert_eq!(disk.quiesce(3, PATIENCE), Silence::Confirmed);
}

#[test]
fn requests_in_flight_are_not_silenced_by_stopping_rings() {
    let mut qemu = Qemu::null(1);
    let mut disk = Disk::start(VhostUser::connect(&qemu.address()).unwrap(), 1);
    let begun = Instant::now();
    let why = reason(disk.quiesce(1, Duration::from_millis(100)));
    assert!(begun.elapsed() >= Duration::from_millis(100));
    assert!(why.contains("the backend has: 1") && why.contains("still runs"), "{why}");
    // The rings go on: unconfirmed is not stopped.
    assert_eq!(disk.read(0, 8, 512), [0; 512]);
    qemu.kill();
    assert_eq!(disk.quiesce(1, PATIENCE), Silence::Confirmed);
}

#[test]
fn a_backend_that_closes_and_runs_on_is_silent_only_without_requests() {
    let mut qemu = Qemu::null(1);
    let mut disk = Disk::start(VhostUser::connect(&qemu.address()).unwrap(), 1);
    qemu.remove_export();
    assert!(readable(disk.device.event_fd().unwrap()));
    assert!(disk.device.is_lost());
    let why = reason(disk.quiesce(1, Duration::from_millis(50)));
    assert!(why.contains(&format!("process {} still runs", qemu.pid())), "{why}");
    assert_eq!(disk.quiesce(0, PATIENCE), Silence::Confirmed);
}

#[test]
fn a_device_is_claimed_once_under_any_name() {
    let qemu = Qemu::null(1);
    let first = VhostUser::connect(&qemu.address()).unwrap();
    let link = qemu.folder().join("link.sock");
    symlink(qemu.path(), &link).unwrap();
    for address in [qemu.address(), format!("vhost-user:{}", link.display())] {
        let begun = Instant::now();
        let refused = VhostUser::connect(&address).err().unwrap();
        assert!(matches!(refused, ConnectError::AlreadyClaimed(_)), "{refused}");
        assert!(begun.elapsed() < Duration::from_secs(1), "not by a time-out");
    }
    drop(first);
    VhostUser::connect(&format!("vhost-user:{}", link.display())).unwrap();
}

#[test]
fn a_claim_holds_against_another_process_and_ends_with_it() {
    let qemu = Qemu::null(1);
    let mut holder = Command::new(std::env::current_exe().unwrap())
        .args(["hold_a_claim", "--exact", "--ignored", "--nocapture"])
        .env("CLAIMED_DEVICE", qemu.address())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(holder.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("the claim is held")), "the holder got no claim");
    let refused = VhostUser::connect(&qemu.address()).err().unwrap();
    assert!(matches!(refused, ConnectError::AlreadyClaimed(_)), "{refused}");
    holder.kill().unwrap();
    holder.wait().unwrap();
    VhostUser::connect(&qemu.address()).unwrap();
}

#[test]
#[ignore = "the other process of a_claim_holds_against_another_process_and_ends_with_it"]
fn hold_a_claim() {
    let device = VhostUser::connect(&std::env::var("CLAIMED_DEVICE").unwrap()).unwrap();
    println!("the claim is held");
    // Until the input ends, should the kill not come.
    let _ = std::io::stdin().lines().count();
    drop(device);
}

#[test]
fn a_resize_is_announced_and_the_new_size_can_be_read() {
    let mut qemu = Qemu::file(16 << 20, 1);
    let mut disk = Disk::start(VhostUser::connect(&qemu.address()).unwrap(), 1);
    let sectors = |disk: &mut Disk| {
        let mut capacity = [0; 8];
        disk.device.read_config(0, &mut capacity).unwrap();
        u64::from_le_bytes(capacity)
    };
    assert_eq!(sectors(&mut disk), 32 << 10);
    assert!(!disk.device.is_lost() && !disk.device.take_config_change(), "nothing was announced");
    for bytes in [64 << 20, 32 << 20] {
        qemu.resize(bytes);
        assert!(readable(disk.device.event_fd().unwrap()), "it was not announced");
        assert!(!disk.device.is_lost() && disk.device.take_config_change());
        assert!(!disk.device.take_config_change(), "said once");
        assert!(!readable_now(disk.device.event_fd().unwrap()), "and taken");
        assert_eq!(sectors(&mut disk), bytes / 512);
    }
    // A storm: qemu waits in its send for room, so that it goes on shows that somebody reads.
    for turn in 0..400u64 {
        qemu.resize((16 << 20) + (turn % 2) * (1 << 20));
        assert!(!disk.device.is_lost());
    }
    disk.write(0, 0, &[0x33; 4096]);
    assert_eq!(disk.read(0, 0, 4096), [0x33; 4096], "the device serves on");
}
