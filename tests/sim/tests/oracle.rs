//! Whatever is written is read back: random requests against a plain vector, by every way in.

mod common;

use cofferdam_bus_vhost_user::VhostUser;
use cofferdam_sim::{Drive, OnDeath, Sim};
use common::{Do, EVENT_IDX, INDIRECT, Rig, sim, sim_with};
use proptest::collection::vec;
use proptest::prelude::*;

const SECTORS: u64 = (1 << 20) / 512;
/// A batch is in flight at once, so its requests keep to a part of the medium each.
const PARTS: u64 = 8;

fn request(part: u64) -> impl Strategy<Value = Do> {
    let first = SECTORS / PARTS * part;
    (0..6u8, 0..SECTORS / PARTS - 32, 1..32u32, any::<u8>()).prop_map(move |(kind, at, sectors, value)| {
        let sector = first + at;
        match kind {
            0 | 1 => Do::Read { sector, sectors },
            2 | 3 => Do::Write {
                sector,
                data: (0..sectors * 512).map(|index| value.wrapping_add((index / 512) as u8)).collect(),
            },
            4 if value & 1 == 0 => Do::Discard { sector, sectors },
            4 => Do::WriteZeroes { sector, sectors },
            _ => Do::Flush,
        }
    })
}

fn batches() -> impl Strategy<Value = Vec<Vec<Do>>> {
    let batch = (0..PARTS).map(request).collect::<Vec<_>>();
    vec(batch, 1..12)
}

/// Runs the batches and compares each read with the oracle, which is the only judge; `turn` makes a stepped device go.
fn check(rig: &mut Rig, batches: &[Vec<Do>], mut turn: impl FnMut()) {
    let mut oracle = vec![0u8; 1 << 20];
    let queues = rig.lines.len() as u16;
    for batch in batches {
        for (token, what) in (0..).zip(batch) {
            rig.fill(token, 0xee);
            rig.add(token as u16 % queues, token, what);
        }
        (0..queues).for_each(|queue| rig.publish(queue));
        turn();
        let mut seen = 0u64;
        for index in 0..batch.len() as u16 {
            let used = rig.next(index % queues).expect("an honest device");
            assert_eq!(used.status(), [0], "{:?}", batch[used.token as usize]);
            assert_eq!(seen & 1 << used.token, 0, "answered twice");
            seen |= 1 << used.token;
            let range = |sector: u64, bytes: usize| sector as usize * 512..sector as usize * 512 + bytes;
            match &batch[used.token as usize] {
                Do::Read { sector, sectors } => {
                    let bytes = *sectors as usize * 512;
                    assert_eq!(used.written as usize, bytes + 1);
                    assert!(rig.data(used.token, bytes) == oracle[range(*sector, bytes)], "wrong data");
                }
                Do::Write { sector, data } => oracle[range(*sector, data.len())].copy_from_slice(data),
                Do::Discard { sector, sectors } | Do::WriteZeroes { sector, sectors } => {
                    oracle[range(*sector, *sectors as usize * 512)].fill(0);
                }
                _ => {}
            }
        }
    }
}

fn no_violations(sim: &Sim) {
    assert_eq!(sim.violations(), []);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn in_process_threads_read_back_what_was_written(batches in batches(), features in prop_oneof![Just(u64::MAX), Just(!EVENT_IDX), Just(!INDIRECT)]) {
        let sim = sim_with(&[], |options| options.profile.queues = 2);
        let mut rig = Rig::with_features(sim.transport(Drive::Threads).unwrap(), features);
        check(&mut rig, &batches, || {});
        drop(rig);
        no_violations(&sim);
    }

    #[test]
    fn a_stepped_device_that_reorders_and_is_slow_reads_back_what_was_written(batches in batches(), seed: u64) {
        let sim = sim_with(&["reorder", "slow:0..4@chance=0.5"], |options| options.seed = seed);
        let mut rig = Rig::new(sim.transport(Drive::Stepped).unwrap());
        check(&mut rig, &batches, || (0..5).for_each(|_| { sim.step(); }));
        drop(rig);
        no_violations(&sim);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 15, ..ProptestConfig::default() })]

    #[test]
    fn through_the_socket_what_was_written_is_read_back(batches in batches()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("blk.sock");
        let sim = sim_with(&["slow:0..2@chance=0.1"], |options| options.profile.queues = 2);
        let server = sim.serve(&path, OnDeath::ServeAgain).unwrap();
        let mut rig = Rig::new(VhostUser::connect(&format!("vhost-user:{}", path.display())).unwrap());
        check(&mut rig, &batches, || {});
        rig.transport.release();
        server.stop().unwrap();
        no_violations(&sim);
    }
}

#[test]
fn a_stepped_run_is_the_same_for_the_same_seed() {
    let run = |seed| {
        let sim = sim_with(&["reorder", "slow:0..9", "fail:io@chance=0.3"], |options| options.seed = seed);
        let mut rig = Rig::new(sim.transport(Drive::Stepped).unwrap());
        (0..32).for_each(|token| rig.add(0, token, &Do::Read { sector: 0, sectors: 1 }));
        rig.publish(0);
        let mut order = Vec::new();
        while order.len() < 32 {
            sim.step();
            while let Some(used) = rig.pop().unwrap() {
                order.push((used.token, used.status()[0]));
            }
        }
        order
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn what_is_not_legal_is_answered_with_the_right_status() {
    let sim = sim(&[]);
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
    let outside = SECTORS - 1;
    assert_eq!(rig.status(0, &Do::Read { sector: outside, sectors: 2 }), 1);
    assert_eq!(rig.status(1, &Do::Write { sector: u64::MAX, data: vec![0; 512] }), 1);
    assert_eq!(rig.status(2, &Do::Write { sector: 0, data: vec![0; 100] }), 1, "not whole sectors");
    assert_eq!(rig.status(3, &Do::Discard { sector: 0, sectors: 8193 }), 1);
    assert_eq!(rig.status(4, &Do::Raw { kind: 77 }), 2);
    assert_eq!(rig.status(5, &Do::GetId), 0);
    assert_eq!(&rig.data(5, 13), b"cofferdam-sim");
    rig.transport.release();
    drop(rig);

    // A feature that was not negotiated is not there.
    let mut rig = Rig::with_features(sim.transport(Drive::Threads).unwrap(), !common::FLUSH);
    assert_eq!(rig.status(0, &Do::Flush), 2);
    drop(rig);

    let sim = sim_with(&[], |options| options.profile.read_only = true);
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
    assert_eq!(rig.status(0, &Do::Write { sector: 0, data: vec![1; 512] }), 1);
    assert_eq!(rig.status(1, &Do::Read { sector: 0, sectors: 1 }), 0);
    assert_eq!(sim.contents(0, 512).unwrap(), [0; 512]);
}

#[test]
fn a_null_device_answers_and_touches_no_payload() {
    let sim = sim_with(&[], |options| options.storage = cofferdam_sim::Storage::Null(1 << 30));
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
    rig.fill(3, 0x77);
    assert_eq!(rig.status(3, &Do::Read { sector: 9, sectors: 8 }), 0);
    assert_eq!(rig.data(3, 4096), [0x77; 4096]);
    assert_eq!(rig.status(4, &Do::GetId), 0);
    assert_eq!(&rig.data(4, 13), b"cofferdam-sim");
    // Faults may be added while it runs.
    sim.add_rule("fail:io@nth=1".parse().unwrap());
    assert_eq!(rig.status(5, &Do::Read { sector: 9, sectors: 8 }), 1);
    assert_eq!(rig.status(6, &Do::Read { sector: 9, sectors: 8 }), 0);
    assert_eq!(sim.stats().answered, 4);
}

#[test]
fn a_file_is_served_and_keeps_what_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    std::fs::write(&path, vec![5; 8192]).unwrap();
    let sim = sim_with(&[], |options| options.storage = cofferdam_sim::Storage::File(path.clone()));
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
    assert_eq!(rig.status(0, &Do::Write { sector: 1, data: vec![9; 512] }), 0);
    assert_eq!(rig.status(1, &Do::Flush), 0);
    assert_eq!(rig.status(2, &Do::Read { sector: 0, sectors: 16 }), 0);
    let mut expected = vec![5; 8192];
    expected[512..1024].fill(9);
    assert!(rig.data(2, 8192) == expected);
    assert!(std::fs::read(&path).unwrap() == expected);
}

#[test]
fn a_driver_that_passes_the_limits_is_put_on_record() {
    use cofferdam_sim::ring::Violation;
    let sim = sim_with(&[], |options| {
        options.profile.seg_max = Some(1);
        options.profile.size_max = Some(1024);
    });
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
    let read = |sectors| Do::Read { sector: 0, sectors };
    assert_eq!(rig.status(0, &read(1)), 0);
    assert_eq!(sim.violations(), []);
    assert_eq!(rig.status(0, &read(8)), 0);
    let told = sim.violations();
    assert!(matches!(told[..], [Violation::Limits { segments: 2, longest_bytes: 2048, .. }]), "{told:?}");
}
