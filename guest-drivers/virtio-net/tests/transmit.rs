//! What is sent: headers byte for byte, refusals, and any request against the contract's layout.

mod common;

use cofferdam_sdk::mock::{Outcome, Segment, check_answers, check_chains, response_words};
use cofferdam_sdk::{Operation, Request, Status};
use cofferdam_virtio_net::feature;
use common::{QUEUES, lane};
use proptest::prelude::*;

fn packet(flags: u8, argument: [u16; 4], length: u64) -> Request {
    let argument = (0..).zip(argument).map(|(at, field)| u64::from(field) << (16 * at)).sum();
    Request { token: 5, operation: Operation::Transmit, flags, argument, length }
}

fn one(offered: u64, request: Request) -> Outcome {
    let mut words = Vec::new();
    lane(offered).submit(&request.encode(), &mut words);
    check_chains(&[request], &words, &QUEUES).unwrap().remove(&request.token).unwrap()
}

/// The header of a packet that is sent, or why it is not.
fn header(offered: u64, request: Request) -> Result<Vec<u8>, Status> {
    match one(offered, request) {
        Outcome::Refused(status) => Err(status),
        Outcome::Chain(chain) => {
            assert_eq!(chain.queue, QUEUES[1], "the second queue of the set is for what is sent");
            let [Segment::HeaderOut(header), payload] = &chain.segments[..] else { panic!("{chain:?}") };
            assert_eq!(*payload, Segment::PayloadOut { offset: 0, length: request.length as u32 });
            Ok(header.clone())
        }
    }
}

const ALL: u64 = feature::OF_A_NET_DEVICE;
const PLAIN: [u16; 4] = [0; 4];

#[test]
fn every_kind_of_packet_has_the_header_of_section_5_1_6() {
    let cases = [
        (packet(0, PLAIN, 60), [0; 12]),
        // What no flag speaks of is not handed on.
        (packet(0, [1, 2, 3, 4], 60), [0; 12]),
        (packet(1, [34, 16, 3, 4], 1514), [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0]),
        (packet(0x11, [34, 16, 1448, 66], 65_550), [1, 1, 66, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0]),
        (packet(0x21, [54, 16, 8940, 74], 60_000), [1, 4, 74, 0, 0xec, 0x22, 54, 0, 16, 0, 0, 0]),
    ];
    for (request, expected) in cases {
        assert_eq!(header(ALL, request), Ok(expected.to_vec()), "{request:?}");
    }
}

#[test]
fn what_was_not_negotiated_is_refused_as_unsupported() {
    let checksum = packet(1, [34, 16, 0, 0], 60);
    let tcp4 = packet(0x11, [34, 16, 1448, 54], 9000);
    let tcp6 = packet(0x21, [54, 16, 1428, 74], 9000);
    let tso4 = feature::MTU | feature::CSUM | feature::HOST_TSO4;
    for (offered, request) in [
        (0, checksum),
        (feature::CSUM, tcp4),
        (tso4, tcp6),
        // Segmentation needs checksums, so it was not accepted.
        (feature::HOST_TSO4, tcp4),
        (ALL, packet(0x31, [34, 16, 1448, 54], 9000)),
        (ALL, Request { operation: Operation::Write, ..packet(0, PLAIN, 512) }),
    ] {
        let refusal = header(offered, request);
        assert_eq!(refusal, Err(Status::Unsupported), "{offered:#x} {request:?}");
    }
    assert!(header(tso4, tcp4).is_ok());
}

#[test]
fn what_would_break_the_specification_is_refused_as_invalid() {
    let good = packet(0x11, [34, 16, 1448, 54], 9014);
    assert!(header(ALL, good).is_ok());
    for request in [
        packet(0, PLAIN, 0),
        packet(0, PLAIN, 13),
        packet(0, PLAIN, 9015),
        packet(0, PLAIN, 1 << 32 | 60),
        packet(2, PLAIN, 60),
        packet(1, [34, 25, 0, 0], 60),
        packet(1, [0xffff, 0xffff, 0, 0], 60),
        packet(0x10, [34, 16, 1448, 54], 9014),
        packet(0x11, [34, 16, 0, 54], 9014),
        packet(0x11, [34, 16, 8961, 54], 9014),
        packet(0x21, [34, 16, 8941, 74], 9014),
        packet(0x11, [34, 16, 1448, 53], 9014),
        packet(0x21, [34, 16, 1448, 73], 9014),
        packet(0x11, [34, 16, 1448, 9015], 9014),
        packet(0x11, [34, 16, 1448, 54], 65_551),
    ] {
        assert_eq!(header(ALL, request), Err(Status::Invalid), "{request:?}");
    }
    assert!(header(ALL, packet(0, PLAIN, 9014)).is_ok());
    // Without an MTU of its own a device has Ethernet's.
    assert!(header(0, packet(0, PLAIN, 1514)).is_ok());
    assert_eq!(header(0, packet(0, PLAIN, 1515)), Err(Status::Invalid));
}

#[test]
fn a_device_that_says_it_wrote_into_what_it_only_reads_is_at_fault() {
    let words = [response_words(1, 0, &[]), response_words(2, 1, &[])].concat();
    let mut answers = Vec::new();
    lane(ALL).complete(&words, &mut answers);
    let answers = check_answers(&[1, 2], &answers).unwrap();
    assert_eq!((answers[&1], answers[&2]), (Status::Ok, Status::DeviceFault));
}

proptest! {
    #[test]
    fn any_requests_become_lawful_chains_or_refusals(
        offered in any::<u64>(),
        given in prop::collection::vec((0_u8..=9, any::<u8>(), any::<[u16; 4]>(), prop_oneof![0_u64..70_000, any::<u64>()]), 1..=64),
    ) {
        let requests: Vec<Request> = (0..)
            .zip(given)
            .map(|(token, (code, flags, argument, length))| {
                let operation = if code < 8 { Operation::Transmit } else { Operation::from_code(code) };
                Request { token, operation, ..packet(flags, argument, length) }
            })
            .collect();
        let encoded: Vec<u64> = requests.iter().flat_map(Request::encode).collect();
        let mut words = Vec::new();
        lane(offered & feature::OF_A_NET_DEVICE).submit(&encoded, &mut words);
        let outcomes = check_chains(&requests, &words, &QUEUES);
        prop_assert!(outcomes.is_ok(), "{outcomes:?}");
        for (token, outcome) in outcomes.unwrap() {
            let request = requests[token as usize];
            let plain = request.flags == 0 && (14..=1514).contains(&request.length);
            let refused = matches!(outcome, Outcome::Refused(_));
            prop_assert!(!(refused && plain && request.operation == Operation::Transmit), "{request:?}");
            prop_assert!(refused || request.length <= 65_550);
        }
    }
}
