//! A data lane: chains byte for byte, refusals, and what responses mean; then any batch against the contract's layout.

mod common;

use cofferdam_sdk::mock::{CheckedChain, MockDevice, Outcome, Segment, check_answers, check_chains, response_words};
use cofferdam_sdk::native::NativeLane;
use cofferdam_sdk::{BlockProperties, LaneSetup, Operation, Request, Status, VirtioDriver};
use cofferdam_virtio_blk::{VirtioBlk, feature};
use common::{device, everything};
use proptest::prelude::*;

const QUEUES: [u16; 2] = [1, 3];

struct Lane {
    lane: NativeLane<VirtioBlk>,
    properties: BlockProperties,
    max_segment_bytes: u32,
}

impl Lane {
    fn of(mut device: MockDevice) -> Self {
        let size_max = u32::from_le_bytes(device.config[8..12].try_into().unwrap());
        let (driver, attachment) = VirtioBlk::attach(&mut device).unwrap();
        let setup = LaneSetup { features: attachment.features, state: attachment.state, queues: QUEUES.to_vec() };
        let max_segment_bytes = if size_max == 0 { u32::MAX } else { size_max };
        Self { lane: NativeLane::start(&setup).unwrap(), properties: driver.properties(), max_segment_bytes }
    }

    fn submit(&mut self, requests: &[Request]) -> Vec<Outcome> {
        let words: Vec<u64> = requests.iter().flat_map(Request::encode).collect();
        let mut chains = Vec::new();
        self.lane.submit(&words, &mut chains);
        check_chains(requests, &chains, &QUEUES).unwrap().into_values().collect()
    }

    fn one(&mut self, request: Request) -> Outcome {
        self.submit(&[request]).remove(0)
    }

    fn judge(&mut self, token: u32, written: u32, status: &[u8]) -> Status {
        let mut answers = Vec::new();
        self.lane.complete(&response_words(token, written, status), &mut answers);
        check_answers(&[token], &answers).unwrap()[&token]
    }
}

fn request(operation: Operation, offset: u64, length: u64) -> Request {
    Request { token: 5, operation, flags: 0, argument: offset, length }
}

fn header(kind: u32, sector: u64) -> Segment {
    Segment::HeaderOut([&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat())
}

fn range(sector: u64, sectors: u32, flags: u32) -> Segment {
    Segment::HeaderOut([&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat())
}

const STATUS: Segment = Segment::StatusIn { length: 1 };

#[test]
fn every_operation_has_the_layout_of_section_5_2_6() {
    let mut lane = Lane::of(everything());
    let payload_in = |offset, length| Segment::PayloadIn { offset, length };
    let payload_out = |offset, length| Segment::PayloadOut { offset, length };
    let unmap = Request { flags: 1, ..request(Operation::WriteZeroes, 0, 4096) };
    let cases = [
        (request(Operation::Read, 4096, 8192), vec![header(0, 8), payload_in(0, 8192), STATUS]),
        (
            request(Operation::Write, 0, 135_168),
            vec![header(1, 0), payload_out(0, 65_536), payload_out(65_536, 65_536), payload_out(131_072, 4096), STATUS],
        ),
        (request(Operation::Flush, 0, 0), vec![header(4, 0), STATUS]),
        (request(Operation::GetId, 0, 20), vec![header(8, 0), payload_in(0, 20), STATUS]),
        (request(Operation::Discard, 8192, 65_536), vec![header(11, 0), range(16, 128, 0), STATUS]),
        (request(Operation::WriteZeroes, 1 << 41, 4096), vec![header(13, 0), range(1 << 32, 8, 0), STATUS]),
        (unmap, vec![header(13, 0), range(0, 8, 1), STATUS]),
    ];
    for (at, (request, segments)) in cases.into_iter().enumerate() {
        let queue = QUEUES[at % QUEUES.len()];
        assert_eq!(lane.one(request), Outcome::Chain(CheckedChain { queue, segments }), "{request:?}");
    }
}

#[test]
fn the_unmap_flag_is_only_set_where_the_device_may_unmap() {
    let mut device = everything();
    device.set_config(56, &[0]);
    let unmap = Request { flags: 1, ..request(Operation::WriteZeroes, 0, 4096) };
    let Outcome::Chain(chain) = Lane::of(device).one(unmap) else { panic!("refused") };
    assert_eq!(chain.segments[1], range(0, 8, 0));
}

#[test]
fn what_the_device_does_not_do_is_refused_without_asking_it() {
    let mut plain = Lane::of(device(0));
    let mut writable = everything();
    writable.offered |= feature::RO;
    let mut read_only = Lane::of(writable);
    let mut full = Lane::of(everything());
    let refused = |status| Outcome::Refused(status);
    for operation in [Operation::Flush, Operation::Discard, Operation::WriteZeroes, Operation::Other(9)] {
        assert_eq!(plain.one(request(operation, 0, 512)), refused(Status::Unsupported));
    }
    for operation in [Operation::Write, Operation::Discard, Operation::WriteZeroes] {
        assert_eq!(read_only.one(request(operation, 0, 4096)), refused(Status::ReadOnly));
    }
    let invalid = [
        request(Operation::Read, 0, 0),
        request(Operation::Read, 1, 512),
        request(Operation::Write, 0, 100),
        request(Operation::Read, 0, u64::from(full.properties.max_transfer_bytes) + 512),
        request(Operation::Read, 0, 1 << 40),
        request(Operation::GetId, 0, 21),
        request(Operation::Discard, 0, 1 << 33),
    ];
    for bad in invalid {
        assert_eq!(full.one(bad), refused(Status::Invalid), "{bad:?}");
    }
}

#[test]
fn status_bytes_become_typed_statuses() {
    let mut lane = Lane::of(everything());
    lane.one(request(Operation::Write, 0, 4096));
    for (status, expected) in
        [(1, Status::Io), (2, Status::Unsupported), (3, Status::DeviceFault), (0xff, Status::DeviceFault)]
    {
        assert_eq!(lane.judge(5, 1, &[status]), expected);
    }
    assert_eq!(lane.judge(5, 0, &[]), Status::DeviceFault);
    assert_eq!(lane.judge(5, 2, &[0, 0]), Status::DeviceFault);
}

#[test]
fn a_read_that_succeeds_with_too_little_written_is_the_devices_fault() {
    let mut lane = Lane::of(everything());
    lane.one(request(Operation::Read, 0, 4096));
    assert_eq!(lane.judge(5, 4095, &[0]), Status::DeviceFault);
    assert_eq!(lane.judge(5, 0, &[0]), Status::DeviceFault);
    // The status byte is there, whether the device counted it or not.
    assert_eq!(lane.judge(5, 4096, &[0]), Status::Ok);
}

#[test]
fn a_write_may_report_less_than_it_wrote() {
    let mut lane = Lane::of(everything());
    lane.one(request(Operation::Write, 0, 4096));
    assert_eq!(lane.judge(5, 0, &[0]), Status::Ok);
}

#[test]
fn a_lane_that_replaced_another_takes_the_devices_word_for_what_it_never_submitted() {
    let mut lane = Lane::of(everything());
    assert_eq!(lane.judge(5, 0, &[0]), Status::Ok, "it may be a write; of a read the host looks at the length");
    assert_eq!(lane.judge(u32::MAX, 1 << 20, &[0]), Status::Ok);
    assert_eq!(lane.judge(5, 1, &[7]), Status::DeviceFault);
    assert_eq!(lane.judge(5, 1, &[1]), Status::Io);
}

#[test]
fn a_lane_refuses_a_setup_that_attach_did_not_make() {
    for (state, queues) in [(vec![], vec![0]), (vec![1; 18], vec![]), (vec![9; 18], vec![0])] {
        assert!(NativeLane::<VirtioBlk>::start(&LaneSetup { features: 0, state, queues }).is_err());
    }
}

fn any_request() -> impl Strategy<Value = Request> {
    let length = prop_oneof![Just(0), Just(20), (0_u64..700).prop_map(|n| n * 4096), 0_u64..1 << 21, any::<u64>()];
    let offset = prop_oneof![(0_u64..1 << 20).prop_map(|n| n * 512), any::<u64>()];
    (0_u8..8, any::<bool>(), offset, length).prop_map(|(code, may_unmap, argument, length)| Request {
        token: 0,
        operation: Operation::from_code(code),
        flags: u8::from(may_unmap),
        argument,
        length,
    })
}

fn any_device() -> impl Strategy<Value = MockDevice> {
    let size_max = prop_oneof![Just(0_u32), 4096_u32..100_000, any::<u32>().prop_map(|n| n | 4096)];
    (any::<u64>(), size_max, 0_u32..300, 9_u32..13, any::<bool>()).prop_map(
        |(bits, size_max, seg_max, block, small)| {
            let mut device = everything();
            device.offered = bits & feature::WANTED;
            device.max_queue_size = if small { 4 } else { 256 };
            device.set_config(8, &size_max.to_le_bytes());
            device.set_config(12, &seg_max.to_le_bytes());
            device.set_config(20, &(1_u32 << block).to_le_bytes());
            device
        },
    )
}

proptest! {
    /// Whatever is asked, of whatever device: the words keep the contract, segments keep the device's limits, and payload is named once and whole.
    #[test]
    fn every_batch_obeys_the_layout(device in any_device(), mut requests in prop::collection::vec(any_request(), 1..=64)) {
        let seg_max = u32::from_le_bytes(device.config[12..16].try_into().unwrap()).max(1);
        let limited = device.offered & feature::SEG_MAX != 0;
        let sized = device.offered & feature::SIZE_MAX != 0;
        let queue_size = usize::from(device.max_queue_size);
        let mut lane = Lane::of(device);
        for (token, request) in requests.iter_mut().enumerate() {
            request.token = token as u32 * 3;
        }
        let outcomes = lane.submit(&requests);
        for (request, outcome) in requests.iter().zip(outcomes) {
            let payload = matches!(request.operation, Operation::Read | Operation::Write | Operation::GetId);
            let legal = payload && request.length > 0 && request.length.is_multiple_of(512) && request.offset().is_multiple_of(512)
                && request.length <= u64::from(lane.properties.max_transfer_bytes);
            let Outcome::Chain(chain) = outcome else {
                let refusable = !legal || request.operation == Operation::GetId || lane.properties.read_only;
                prop_assert!(refusable, "{request:?} was refused");
                continue;
            };
            prop_assert!(chain.segments.len() <= queue_size);
            prop_assert_eq!(chain.segments.last(), Some(&STATUS));
            let mut next = 0;
            let mut pieces = 0;
            for segment in &chain.segments {
                if let Segment::PayloadIn { offset, length } | Segment::PayloadOut { offset, length } = segment {
                    prop_assert_eq!(*offset, next);
                    prop_assert!(!sized || *length <= lane.max_segment_bytes);
                    next += length;
                    pieces += 1;
                }
            }
            prop_assert_eq!(u64::from(next), if payload { request.length } else { 0 });
            prop_assert!(!limited || pieces <= seg_max);
        }
    }

    /// Configuration space is an allegation: whatever it says, properties keep the contract's bounds or the device is refused.
    #[test]
    fn any_configuration_space_is_refused_or_gives_lawful_properties(
        config in prop::collection::vec(any::<u8>(), 60), block in 0_u32..40, bits in any::<u64>(), size in any::<u16>(),
    ) {
        let mut device = MockDevice { offered: bits & feature::OF_A_BLOCK_DEVICE, config, max_queue_size: size, ..MockDevice::new(2) };
        device.set_config(5, &[0; 3]);
        device.set_config(20, &1_u32.checked_shl(block).unwrap_or(3).to_le_bytes());
        if let Ok((driver, attachment)) = VirtioBlk::attach(&mut device) {
            let p = driver.properties();
            let block = p.logical_block_bytes;
            prop_assert!(block.is_power_of_two() && (512..=65_536).contains(&block));
            prop_assert!(p.physical_block_bytes.is_power_of_two() && p.physical_block_bytes >= block);
            prop_assert!(p.capacity_bytes.is_multiple_of(u64::from(block)));
            prop_assert!(p.max_transfer_bytes >= block);
            for bytes in [p.max_transfer_bytes, p.max_discard_bytes, p.max_write_zeroes_bytes] {
                prop_assert!(bytes.is_multiple_of(block));
            }
            prop_assert!(p.discard_align_bytes >= block);
            prop_assert!(attachment.state.len() <= 4096);
            prop_assert!(attachment.queues.iter().all(|queue| queue.size.is_power_of_two() && queue.size <= size));
        }
    }
}
