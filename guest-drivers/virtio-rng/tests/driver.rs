//! The driver against the SDK's mock device, natively.

use cofferdam_sdk::mock::{self, CheckedChain, MockDevice, Outcome, Segment};
use cofferdam_sdk::native::NativeLane;
use cofferdam_sdk::{DriverError, LaneSetup, Operation, Request, Status, VirtioDriver};
use cofferdam_virtio_rng::{DEVICE_TYPE, VirtioRng};

fn lane() -> NativeLane<VirtioRng> {
    let (_, attachment) = VirtioRng::attach(&mut MockDevice::new(DEVICE_TYPE)).unwrap();
    NativeLane::start(&LaneSetup { features: 0, state: attachment.state, queues: vec![0] }).unwrap()
}

fn fill(token: u32, length: u64) -> Request {
    Request { token, operation: Operation::Fill, flags: 0, argument: 0, length }
}

#[test]
fn an_entropy_device_is_taken_and_others_are_not() {
    let mut device = MockDevice::new(DEVICE_TYPE);
    let (_, attachment) = VirtioRng::attach(&mut device).unwrap();
    assert_eq!((attachment.queues.len(), attachment.queues[0].size), (1, 64));
    assert_eq!(device.negotiated, Some(0));
    assert!(matches!(VirtioRng::attach(&mut MockDevice::new(2)), Err(DriverError::NotMine(_))));
    let unknown = MockDevice { device_type: None, ..MockDevice::new(0) };
    assert!(VirtioRng::attach(&mut unknown.clone()).is_ok());
    let disk = MockDevice { offered: 1 << 9, ..unknown };
    assert!(matches!(VirtioRng::attach(&mut disk.clone()), Err(DriverError::NotMine(_))));
}

#[test]
fn a_device_without_a_queue_is_refused() {
    let mut device = MockDevice { max_queues: 0, ..MockDevice::new(DEVICE_TYPE) };
    assert!(matches!(VirtioRng::attach(&mut device), Err(DriverError::Device(_))));
}

#[test]
fn a_request_becomes_one_buffer_that_the_device_writes() {
    let requests = [fill(1, 65_536), fill(2, 1), fill(3, 65_537), fill(4, 0)];
    let write = Request { operation: Operation::Write, ..fill(5, 16) };
    let requests: Vec<_> = requests.into_iter().chain([write]).collect();
    let encoded: Vec<u64> = requests.iter().flat_map(Request::encode).collect();
    let mut words = Vec::new();
    lane().submit(&encoded, &mut words);
    let outcomes = mock::check_chains(&requests, &words, &[0]).unwrap();
    let chain =
        |length| Outcome::Chain(CheckedChain { queue: 0, segments: vec![Segment::PayloadIn { offset: 0, length }] });
    assert_eq!((&outcomes[&1], &outcomes[&2]), (&chain(65_536), &chain(1)));
    for refused in [3, 4, 5] {
        assert_eq!(outcomes[&refused], Outcome::Refused(Status::Unsupported));
    }
}

#[test]
fn fewer_bytes_are_a_success_and_none_are_a_fault_of_the_device() {
    let words = [mock::response_words(1, 5, &[]), mock::response_words(2, 0, &[])].concat();
    let mut answers = Vec::new();
    lane().complete(&words, &mut answers);
    assert_eq!(answers, [1, Status::Ok.code(), 2, Status::DeviceFault.code()]);
}
