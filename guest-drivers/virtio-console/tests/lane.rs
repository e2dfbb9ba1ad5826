//! The bytes of a port: writes to chains, used buffers to arrivals.

use cofferdam_sdk::mock::{self, CheckedArrival, CheckedChain, Outcome, Segment, UsedBuffer};
use cofferdam_sdk::native::NativeLane;
use cofferdam_sdk::{DriverError, LaneSetup, Operation, Piece, Request, Status};
use cofferdam_virtio_console::{MAX_WRITE_BYTES, VirtioConsole, feature};
use proptest::prelude::*;

fn start(features: u64, queues: &[u16]) -> Result<NativeLane<VirtioConsole>, DriverError> {
    NativeLane::start(&LaneSetup { features, state: Vec::new(), queues: queues.to_vec() })
}

/// The queues of a port, as section 5.3.2 counts them.
fn queues_of(port: u16) -> [u16; 2] {
    if port == 0 { [0, 1] } else { [2 * port + 2, 2 * port + 3] }
}

fn lane(port: u16) -> NativeLane<VirtioConsole> {
    start(feature::MULTIPORT, &queues_of(port)).unwrap_or_else(|error| panic!("port {port}: {error}"))
}

fn send(token: u32, port: u64, length: u64) -> Request {
    Request { token, operation: Operation::Send, flags: 0, argument: port, length }
}

#[test]
fn a_lane_is_started_with_the_queues_of_one_port_and_no_others() {
    assert!(start(0, &[0, 1]).is_ok());
    for queues in [&[][..], &[0], &[1], &[0, 1, 4], &[1, 0], &[0, 5], &[2, 3], &[3, 4], &[4, 6], &[65_535, 0]] {
        let refused = start(feature::MULTIPORT, queues);
        assert!(matches!(refused, Err(DriverError::Host(_))), "{queues:?}");
    }
    assert!(start(feature::MULTIPORT, &[65_534, 65_535]).is_ok());
    assert!(start(0, &[4, 5]).is_err(), "without MULTIPORT there is port 0 alone");
}

#[test]
fn a_write_is_one_buffer_that_the_device_reads_whole() {
    for port in [0, 1, 30] {
        let [_, transmit] = queues_of(port);
        let port = u64::from(port);
        let requests =
            [send(1, port, 1), send(2, port, 65_536), send(3, port, 0), send(4, port, 65_537), send(5, port + 1, 1)];
        let read = Request { operation: Operation::Read, ..send(6, port, 1) };
        let huge = [send(7, port | 1 << 32, 1), send(8, port, 1 << 32 | 1), read];
        let requests: Vec<_> = requests.into_iter().chain(huge).collect();
        let encoded: Vec<u64> = requests.iter().flat_map(Request::encode).collect();
        let mut words = Vec::new();
        lane(port as u16).submit(&encoded, &mut words);
        let outcomes = mock::check_chains(&requests, &words, &[transmit]).unwrap();
        for (token, length) in [(1, 1), (2, 65_536)] {
            let segments = vec![Segment::PayloadOut { offset: 0, length }];
            assert_eq!(outcomes[&token], Outcome::Chain(CheckedChain { queue: transmit, segments }));
        }
        for token in [3, 4, 5, 7, 8] {
            assert_eq!(outcomes[&token], Outcome::Refused(Status::Invalid), "token {token}");
        }
        assert_eq!(outcomes[&6], Outcome::Refused(Status::Unsupported));
    }
}

#[test]
fn a_device_that_writes_where_there_is_nothing_to_write_is_at_fault() {
    let words = [mock::response_words(1, 0, &[]), mock::response_words(2, 1, &[]), mock::response_words(3, 0, &[0])];
    let mut answers = Vec::new();
    lane(0).complete(&words.concat(), &mut answers);
    let answers = mock::check_answers(&[1, 2, 3], &answers).unwrap();
    assert_eq!([answers[&1], answers[&2], answers[&3]], [Status::Ok, Status::DeviceFault, Status::DeviceFault]);
}

#[test]
fn what_came_is_one_arrival_for_each_buffer_in_order_and_empty_buffers_are_none() {
    let used = [(3, 5), (9, 0), (0, 4096), (65_535, 1)].map(|(buffer, written)| UsedBuffer {
        buffer,
        written,
        head: Vec::new(),
    });
    let mut words = Vec::new();
    lane(7).received(&mock::buffer_words(&used), &mut words);
    let arrival = |buffer, length| CheckedArrival {
        flags: 0,
        argument: 7,
        goes_on: false,
        pieces: vec![Piece { buffer, offset: 0, length }],
    };
    let arrivals = [arrival(3, 5), arrival(0, 4096), arrival(65_535, 1)];
    assert_eq!(mock::check_arrivals(&used, &words).unwrap(), arrivals);
}

/// Mostly a write that the port could take.
fn any_request(port: u64) -> impl Strategy<Value = Request> {
    let length = prop_oneof![3 => 1..=u64::from(MAX_WRITE_BYTES), 1 => any::<u64>()];
    let argument = prop_oneof![4 => Just(port), 1 => any::<u64>()];
    let operation = prop_oneof![4 => Just(7), 1 => any::<u8>()].prop_map(Operation::from_code);
    (operation, any::<u8>(), argument, length).prop_map(|(operation, flags, argument, length)| Request {
        token: 0,
        operation,
        flags,
        argument,
        length,
    })
}

proptest! {
    /// Whatever is asked: the words keep the contract, and a chain is there exactly for what the port can send.
    #[test]
    fn every_batch_obeys_the_layout(
        (port, mut requests) in (0_u16..31).prop_flat_map(|port| (Just(port), prop::collection::vec(any_request(u64::from(port)), 1..=64)))
    ) {
        for (token, request) in (0..).zip(&mut requests) {
            request.token = token;
        }
        let encoded: Vec<u64> = requests.iter().flat_map(Request::encode).collect();
        let mut words = Vec::new();
        let [_, transmit] = queues_of(port);
        lane(port).submit(&encoded, &mut words);
        let outcomes = mock::check_chains(&requests, &words, &[transmit]).unwrap();
        for request in requests {
            let legal = request.operation == Operation::Send && request.argument == u64::from(port)
                && (1..=u64::from(MAX_WRITE_BYTES)).contains(&request.length);
            prop_assert_eq!(matches!(outcomes[&request.token], Outcome::Chain(_)), legal, "{:?}", request);
        }
    }

    /// Whatever the device wrote comes whole and once.
    #[test]
    fn every_byte_that_came_is_named_once(
        buffers in prop::collection::btree_map(any::<u16>(), prop_oneof![Just(0), 1..=4096_u32], 1..=64),
    ) {
        let used: Vec<_> =
            buffers.into_iter().map(|(buffer, written)| UsedBuffer { buffer, written, head: Vec::new() }).collect();
        let mut words = Vec::new();
        lane(2).received(&mock::buffer_words(&used), &mut words);
        let arrivals = mock::check_arrivals(&used, &words).unwrap();
        let came: Vec<_> = arrivals.iter().flat_map(|arrival| &arrival.pieces).map(|piece| (piece.buffer, piece.length)).collect();
        let written: Vec<_> =
            used.iter().filter(|used| used.written > 0).map(|used| (u32::from(used.buffer), used.written)).collect();
        prop_assert_eq!(came, written);
        prop_assert!(arrivals.iter().all(|arrival| arrival.argument == 2 && !arrival.goes_on && arrival.flags == 0));
    }
}
