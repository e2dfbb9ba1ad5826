//! Power cuts: what was flushed survives, what was not may be there whole, torn at blocks, or not at all.

mod common;

use cofferdam_device::Transport as _;
use cofferdam_sim::{Drive, PowerCut};
use common::{Do, FLUSH, Rig, sim, sim_with};
use proptest::collection::vec;
use proptest::prelude::*;

/// A step of the model: a write of `value` over some sectors, or a flush.
#[derive(Clone, Debug)]
enum Step {
    Write { sector: u64, sectors: usize },
    Zero { sector: u64, sectors: usize },
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..40u64, 1..8usize).prop_map(|(sector, sectors)| Step::Write { sector, sectors }),
        1 => (0..40u64, 1..8usize).prop_map(|(sector, sectors)| Step::Zero { sector, sectors }),
        1 => Just(Step::Flush),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// The oracle keeps, per sector, every value that it may have after a cut.
    #[test]
    fn after_a_cut_every_sector_is_one_of_its_versions_since_the_flush(lives in vec(vec(step(), 1..30), 1..4), seed: u64) {
        let sim = sim_with(&[], |options| options.seed = seed);
        let mut allowed = vec![vec![0u8]; 48];
        let mut value = 0u8;
        for steps in &lives {
            let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
            for step in steps {
                let (what, written) = match step {
                    Step::Write { sector, sectors } => {
                        value = value.wrapping_add(1);
                        (Do::Write { sector: *sector, data: vec![value; sectors * 512] }, Some((*sector, *sectors, value)))
                    }
                    Step::Zero { sector, sectors } => {
                        (Do::WriteZeroes { sector: *sector, sectors: *sectors as u32 }, Some((*sector, *sectors, 0)))
                    }
                    Step::Flush => (Do::Flush, None),
                };
                prop_assert_eq!(rig.status(0, &what), 0);
                match written {
                    Some((sector, sectors, value)) => {
                        allowed[sector as usize..sector as usize + sectors].iter_mut().for_each(|versions| versions.push(value));
                    }
                    None => allowed.iter_mut().for_each(|versions| drop(versions.drain(..versions.len() - 1))),
                }
            }
            sim.power_cut();
            prop_assert!(rig.transport.is_lost());
            for (sector, versions) in allowed.iter_mut().enumerate() {
                let found = sim.contents(sector as u64 * 512, 512).unwrap();
                prop_assert!(found.iter().all(|byte| *byte == found[0]), "torn inside a sector");
                prop_assert!(versions.contains(&found[0]), "sector {}: {} is none of {:?}", sector, found[0], versions);
                *versions = vec![found[0]];
            }
        }
    }
}

#[test]
fn a_cut_keeps_tears_and_drops_and_is_the_same_for_the_same_seed() {
    let run = |seed| -> (PowerCut, Vec<u8>) {
        let sim = sim_with(&[], |options| options.seed = seed);
        let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
        for write in 0..60 {
            assert_eq!(rig.status(0, &Do::Write { sector: write * 8, data: vec![1; 4096] }), 0);
        }
        (sim.power_cut(), sim.contents(0, 1 << 20).unwrap())
    };
    let (cut, contents) = run(1);
    assert!(cut.kept > 0 && cut.torn > 0 && cut.dropped > 0, "{cut:?}");
    assert!(run(1) == (cut, contents.clone()));
    assert!(run(2).1 != contents);
}

#[test]
fn blocks_are_not_torn() {
    let sim = sim_with(&[], |options| options.profile.block_bytes = Some(4096));
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
    assert_eq!(rig.status(0, &Do::Write { sector: 1, data: vec![1; 4096] }), 1, "not a whole block");
    for write in 0..30 {
        assert_eq!(rig.status(0, &Do::Write { sector: write * 64, data: vec![1; 32768] }), 0);
    }
    assert!(sim.power_cut().torn > 0);
    let contents = sim.contents(0, 1 << 20).unwrap();
    assert!(contents.chunks(4096).all(|block| block.iter().all(|byte| *byte == block[0])));
}

#[test]
fn without_flush_negotiated_nothing_is_lost() {
    let sim = sim(&[]);
    let mut rig = Rig::with_features(sim.transport(Drive::Threads).unwrap(), !FLUSH);
    for sector in 0..64 {
        assert_eq!(rig.status(0, &Do::Write { sector, data: vec![1; 512] }), 0);
    }
    assert_eq!(sim.power_cut(), PowerCut::default());
    assert!(sim.contents(0, 64 * 512).unwrap().iter().all(|byte| *byte == 1));
}

#[test]
fn a_scripted_cut_comes_before_its_request() {
    let sim = sim(&["power-cut@nth=2,op=flush"]);
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
    assert_eq!(rig.status(0, &Do::Write { sector: 0, data: vec![7; 512] }), 0);
    assert_eq!(rig.status(0, &Do::Flush), 0);
    for sector in 1..33 {
        assert_eq!(rig.status(0, &Do::Write { sector, data: vec![7; 512] }), 0);
    }
    rig.submit(0, &Do::Flush);
    assert!(sim.wait_until(common::LIMIT, |stats| stats.deaths == 1));
    assert!(rig.transport.is_lost());
    assert_eq!(rig.pop(), Ok(None));
    assert_eq!(sim.contents(0, 512).unwrap(), [7; 512], "flushed before");
    assert!(sim.power_cuts()[0].dropped > 0);
    // The next driver finds the medium as it is.
    drop(rig);
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
    assert_eq!(rig.status(0, &Do::Read { sector: 0, sectors: 1 }), 0);
    assert_eq!(rig.data(0, 512), [7; 512]);
    let mut other = sim.transport(Drive::Threads);
    assert!(matches!(other, Err(cofferdam_sim::SimError::Claimed)));
    rig.transport.release();
    other = sim.transport(Drive::Threads);
    other.unwrap().release();
}
