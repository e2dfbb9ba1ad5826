//! Every lie is really told, and told by the name it has.

mod common;

use std::time::Duration;

use cofferdam_device::{DeviceFault, Transport as _};
use cofferdam_sim::{ConfigLie, Drive, Lie, Rule, Sim};
use common::{Do, EVENT_IDX, LIMIT, Rig, sim, sim_with};

/// Its virtio device id.
const BLOCK: u32 = 2;
const READ: Do = Do::Read { sector: 0, sectors: 2 };

fn stepped(rule: &str) -> (Sim, Rig) {
    let sim = sim(&[rule]);
    let rig = Rig::new(sim.transport(Drive::Stepped).unwrap());
    (sim, rig)
}

/// Publishes one read, lets the device take one step, and looks.
fn one(sim: &Sim, rig: &mut Rig) -> Result<Option<cofferdam_device::Used>, DeviceFault> {
    rig.fill(0, 0xee);
    rig.submit(0, &READ);
    sim.step();
    rig.pop()
}

fn is_told(lie: Lie, name: &str) {
    let (sim, mut rig) = stepped(&format!("lie:{name}@nth=1"));
    match lie {
        Lie::UsedIdUnknown => assert!(matches!(one(&sim, &mut rig), Err(DeviceFault::UnknownId { .. }))),
        Lie::UsedIdIdle => assert!(matches!(one(&sim, &mut rig), Err(DeviceFault::NotInFlight { .. }))),
        Lie::UsedIdTwice => {
            rig.add(0, 1, &READ);
            rig.add(0, 2, &READ);
            rig.publish(0);
            sim.step();
            // Enough is in flight for the used index to be believed; the second element is the lie.
            let outcomes: Vec<_> = std::iter::from_fn(|| rig.pop().transpose()).take(3).collect();
            assert!(outcomes.iter().any(Result::is_err), "{outcomes:?}");
        }
        Lie::LengthLong => assert!(matches!(one(&sim, &mut rig), Err(DeviceFault::Overrun { .. }))),
        Lie::LengthZero => {
            let used = one(&sim, &mut rig).unwrap().unwrap();
            assert_eq!((used.written, used.status()), (0, &[0][..]));
        }
        Lie::LengthOne => assert_eq!(one(&sim, &mut rig).unwrap().unwrap().written, 1),
        Lie::UsedIndexJump | Lie::UsedIndexBack => {
            assert!(matches!(one(&sim, &mut rig), Err(DeviceFault::UsedIndex { .. })));
        }
        Lie::StatusUnwritten => assert_eq!(one(&sim, &mut rig).unwrap().unwrap().status(), [0xff]),
        Lie::StatusUnknown => assert!((3..0xff).contains(&one(&sim, &mut rig).unwrap().unwrap().status()[0])),
        Lie::PayloadFlipped => {
            assert_eq!(one(&sim, &mut rig).unwrap().unwrap().status(), [0]);
            assert_eq!(rig.data(0, 2), [1, 0]);
        }
        Lie::PayloadUnwritten => {
            assert_eq!(one(&sim, &mut rig).unwrap().unwrap().status(), [0]);
            assert_eq!(rig.data(0, 1024), [0xee; 1024]);
        }
        Lie::WriteForgotten => {
            rig.submit(0, &Do::Write { sector: 0, data: vec![1; 512] });
            sim.step();
            assert_eq!(rig.pop().unwrap().unwrap().status(), [0]);
            assert_eq!(sim.contents(0, 512).unwrap(), [0; 512]);
        }
        Lie::FlushForgotten => {
            // The rule's first request has to be the flush.
            let sim = sim_with(&["lie:flush-forgotten@always,op=flush"], |_| {});
            let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
            let mut sectors = 0;
            for sector in 0..32 {
                assert_eq!(rig.status(0, &Do::Write { sector, data: vec![1; 512] }), 0);
                assert_eq!(rig.status(1, &Do::Flush), 0);
                sectors += 1;
            }
            let cut = sim.power_cut();
            assert!(cut.dropped > 0 && cut.kept + cut.torn + cut.dropped == sectors, "{cut:?}");
        }
        Lie::AnswerForgotten => {
            assert_eq!(one(&sim, &mut rig), Ok(None));
            assert_eq!(rig.data(0, 1), [0], "it is executed all the same");
            assert_eq!(sim.stats().waiting, 0);
        }
        Lie::NotificationLost => {
            assert!(!rig.lines[0].queue.arm());
            assert!(one(&sim, &mut rig).unwrap().is_some());
            assert!(!rig.wait_call(0, Duration::ZERO));
            assert!(!rig.lines[0].queue.arm());
            assert!(one(&sim, &mut rig).unwrap().is_some());
            assert!(rig.wait_call(0, LIMIT), "only the first was lost");
        }
        Lie::NotificationSpurious => {
            rig.lines[0].queue.disarm();
            assert!(one(&sim, &mut rig).unwrap().is_some());
            assert!(rig.wait_call(0, LIMIT));
        }
        Lie::DescriptorScribbled | Lie::AvailableScribbled => {
            let before = ring_bytes(&rig);
            let honest = one(&sim, &mut rig).unwrap().unwrap();
            assert_eq!(honest.status(), [0], "the driver does not read its own ring back");
            let scribbled = ring_bytes(&rig);
            // What an honest device leaves there, to tell the driver's own writes apart.
            let (sim, mut rig) = stepped("reorder");
            assert_eq!(before, ring_bytes(&rig));
            assert!(one(&sim, &mut rig).unwrap().is_some());
            assert_ne!(scribbled, ring_bytes(&rig));
        }
        other => panic!("{other:?} is not about block requests"),
    }
}

/// Descriptor table and available ring: what is the driver's to write.
fn ring_bytes(rig: &Rig) -> Vec<u8> {
    let addresses = rig.lines[0].queue.addresses();
    let mut bytes = vec![0; (addresses.used - addresses.descriptors) as usize];
    rig.region.read_at(addresses.descriptors - common::IOVA, &mut bytes).unwrap();
    bytes
}

#[test]
fn every_lie_about_a_request_is_told() {
    for (name, lie) in Lie::NAMES.iter().filter(|(_, lie)| lie.class().is_none_or(|class| class == BLOCK)) {
        is_told(*lie, name);
    }
}

#[test]
fn without_a_lie_none_of_it_happens() {
    let (sim, mut rig) = stepped("reorder");
    let used = one(&sim, &mut rig).unwrap().unwrap();
    assert_eq!((used.written, used.status()), (1025, &[0][..]));
    assert_eq!(rig.pop(), Ok(None));
    assert_eq!(sim.violations(), []);
}

#[test]
fn every_lie_in_configuration_is_told() {
    let read = |sim: &Sim| {
        let mut transport = sim.transport(Drive::Stepped).unwrap();
        let mut bytes = [0; 60];
        transport.read_config(0, &mut bytes).map(|()| (bytes, transport.offered_features())).ok()
    };
    let honest = read(&sim(&[])).unwrap();
    let word = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    for (name, lie) in ConfigLie::NAMES.iter().filter(|(_, lie)| lie.class().is_none_or(|class| class == BLOCK)) {
        let sim = sim(&[&format!("config:{name}")]);
        let told = read(&sim);
        assert_ne!(told, Some(honest), "{name}");
        match (lie, told) {
            (ConfigLie::Short, None) => {}
            (ConfigLie::CapacityZero, Some((bytes, _))) => assert_eq!(bytes[..8], [0; 8]),
            (ConfigLie::CapacityHuge, Some((bytes, _))) => assert_eq!(bytes[..8], [0xff; 8]),
            (ConfigLie::CapacityChanging | ConfigLie::Garbage, told) => assert_ne!(told, read(&sim)),
            (ConfigLie::BlockSizeZero, Some((bytes, _))) => assert_eq!(word(&bytes, 20), 0),
            (ConfigLie::BlockSizeOdd, Some((bytes, _))) => assert_eq!(word(&bytes, 20), 1000),
            (ConfigLie::BlockSizeHuge, Some((bytes, _))) => assert_eq!(word(&bytes, 20), 1 << 31),
            (ConfigLie::SegMaxZero, Some((bytes, _))) => assert_eq!(word(&bytes, 12), 0),
            (ConfigLie::SegMaxHuge, Some((bytes, _))) => assert_eq!(word(&bytes, 12), u32::MAX),
            (ConfigLie::SizeMaxZero, Some((bytes, bits))) => assert_eq!((word(&bytes, 8), bits & 2), (0, 2)),
            (ConfigLie::SizeMaxTiny, Some((bytes, bits))) => assert_eq!((word(&bytes, 8), bits & 2), (1, 2)),
            (ConfigLie::QueuesZero, Some((bytes, bits))) => {
                assert_eq!((&bytes[34..36], bits & 1 << 12), (&[0, 0][..], 1 << 12))
            }
            (ConfigLie::QueuesHuge, Some((bytes, bits))) => {
                assert_eq!((&bytes[34..36], bits & 1 << 12), (&[255, 255][..], 1 << 12))
            }
            (ConfigLie::RangesZero, Some((bytes, _))) => assert_eq!(bytes[36..56], [0; 20]),
            (ConfigLie::TopologyHuge, Some((bytes, _))) => assert_eq!(bytes[24], 255),
            (lie, told) => panic!("{lie:?}: {told:?}"),
        }
    }
}

#[test]
fn rules_meet_the_requests_they_name() {
    let sim = sim(&["fail:io@nth=2,op=write", "fail:unsupported@every=2,op=read", "fail:io@from=2,op=flush"]);
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
    let write = Do::Write { sector: 0, data: vec![1; 512] };
    let writes: Vec<_> = (0..4).map(|token| rig.status(token, &write)).collect();
    let reads: Vec<_> = (0..4).map(|token| rig.status(token, &READ)).collect();
    let flushes: Vec<_> = (0..4).map(|token| rig.status(token, &Do::Flush)).collect();
    assert_eq!((&writes[..], &reads[..], &flushes[..]), (&[0, 1, 0, 0][..], &[0, 2, 0, 2][..], &[0, 1, 1, 1][..]));
}

#[test]
fn rules_print_as_they_are_read_and_nonsense_is_refused() {
    let good = [
        "slow:3@always",
        "slow:1..9@chance=0.5,op=write,queue=3",
        "gate@nth=1",
        "reorder@always",
        "fail:io@from=2",
        "hang@nth=7",
        "freeze@every=3",
        "die@nth=1",
        "power-cut@nth=5,op=flush",
    ];
    let lies = Lie::NAMES.iter().map(|(name, _)| format!("lie:{name}@always"));
    let configs = ConfigLie::NAMES.iter().map(|(name, _)| format!("config:{name}@always"));
    for text in good.iter().map(|text| (*text).to_owned()).chain(lies).chain(configs) {
        assert_eq!(text.parse::<Rule>().unwrap().to_string(), text);
    }
    for text in [
        "",
        "slow",
        "slow:x",
        "slow:5..5",
        "lie:",
        "lie:nothing",
        "die@",
        "die@nth",
        "die@nth=0",
        "die@chance=2",
        "die@chance=NaN",
        "die,op=eat",
        "die,queue=-1",
        "die,x",
        "fail:7",
    ] {
        assert!(text.parse::<Rule>().is_err(), "{text}");
    }
    let error = "lie:nothing".parse::<Rule>().unwrap_err().to_string();
    assert!(error.contains("used-id-unknown"), "{error}");
}

#[test]
fn without_event_idx_the_flags_rule_notifications() {
    let sim = sim(&[]);
    let mut rig = Rig::with_features(sim.transport(Drive::Stepped).unwrap(), !EVENT_IDX);
    rig.lines[0].queue.disarm();
    assert!(one(&sim, &mut rig).unwrap().is_some());
    assert!(!rig.wait_call(0, Duration::ZERO));
    assert!(!rig.lines[0].queue.arm());
    assert!(one(&sim, &mut rig).unwrap().is_some());
    assert!(rig.wait_call(0, Duration::ZERO));
}
