//! The handshake, byte for byte.

use proptest::prelude::*;

use super::*;
use crate::proto::flag;

struct Export {
    opened: u32,
    refuse: bool,
}

impl Exports for Export {
    fn name(&self) -> &str {
        "disk"
    }

    fn description(&self) -> &str {
        "a disk"
    }

    fn geometry(&self) -> Option<BlockGeometry> {
        Some(geometry())
    }

    fn open(&mut self) -> Result<(), String> {
        self.opened += 1;
        if self.refuse { Err("the binding is closed".to_owned()) } else { Ok(()) }
    }
}

pub(crate) fn geometry() -> BlockGeometry {
    BlockGeometry {
        capacity_bytes: 1 << 20,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        max_transfer_bytes: 1 << 16,
        read_only: false,
        can_flush: true,
        can_discard: true,
        can_write_zeroes: true,
        max_discard_bytes: 1 << 16,
        discard_align_bytes: 4096,
        max_write_zeroes_bytes: 1 << 16,
        write_zeroes_may_unmap: true,
        has_id: false,
    }
}

fn export() -> Export {
    Export { opened: 0, refuse: false }
}

fn client_flags(flags: u32) -> Vec<u8> {
    flags.to_be_bytes().to_vec()
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn go_data(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(wanted.len() as u16).to_be_bytes());
    wanted.iter().for_each(|w| data.extend_from_slice(&w.to_be_bytes()));
    data
}

/// Feeds all of `input` after the client flags; gives output (without the greeting), leftover and verdict.
fn talk(exports: &mut Export, input: &[u8]) -> (Vec<u8>, usize, Verdict) {
    let mut machine = Handshake::new();
    machine.output.clear();
    let (taken, verdict) = machine.feed(&client_flags(3), exports);
    assert_eq!((taken, verdict), (4, Verdict::More));
    let (taken, verdict) = machine.feed(input, exports);
    (machine.output, input.len() - taken, verdict)
}

const ALL: u16 = flag::HAS_FLAGS
    | flag::SEND_FLUSH
    | flag::SEND_FUA
    | flag::SEND_TRIM
    | flag::SEND_WRITE_ZEROES
    | flag::CAN_MULTI_CONN;

#[test]
fn the_greeting_is_fixed_newstyle() {
    assert_eq!(Handshake::new().output, b"NBDMAGICIHAVEOPT\0\x03");
}

#[test]
fn export_name_answers_size_flags_and_padding_unless_it_was_declined() {
    for (flags, zeroes) in [(1, 124), (3, 0)] {
        let mut machine = Handshake::new();
        machine.output.clear();
        let mut exports = export();
        machine.feed(&client_flags(flags), &mut exports);
        let mut input = option(opt::EXPORT_NAME, b"disk");
        input.extend_from_slice(b"next");
        let (taken, verdict) = machine.feed(&input, &mut exports);
        assert_eq!(verdict, Verdict::Enter { structured: false });
        assert_eq!(&input[taken..], b"next", "what follows belongs to the transmission phase");
        let mut expected = (1u64 << 20).to_be_bytes().to_vec();
        expected.extend_from_slice(&ALL.to_be_bytes());
        expected.resize(10 + zeroes, 0);
        assert_eq!(machine.output, expected);
        assert_eq!(exports.opened, 1);
    }
}

#[test]
fn go_answers_export_block_size_and_what_was_asked_for() {
    let mut exports = export();
    let mut input = option(opt::STRUCTURED_REPLY, &[]);
    input.extend(option(opt::GO, &go_data("", &[info::NAME, 77, info::DESCRIPTION])));
    let (output, left, verdict) = talk(&mut exports, &input);
    assert_eq!((left, verdict), (0, Verdict::Enter { structured: true }));
    let mut expected = reply(opt::STRUCTURED_REPLY, rep::ACK, &[]);
    let mut export_info = vec![0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0];
    export_info.extend_from_slice(&(ALL | flag::SEND_DF).to_be_bytes());
    expected.extend(reply(opt::GO, rep::INFO, &export_info));
    expected.extend(reply(opt::GO, rep::INFO, &[0, 3, 0, 0, 2, 0, 0, 0, 0x10, 0, 2, 0, 0, 0]));
    expected.extend(reply(opt::GO, rep::INFO, b"\0\x01disk"));
    expected.extend(reply(opt::GO, rep::INFO, b"\0\x02a disk"));
    expected.extend(reply(opt::GO, rep::ACK, &[]));
    assert_eq!(output, expected);
}

#[test]
fn info_opens_nothing_and_go_may_follow() {
    let mut exports = export();
    let mut input = option(opt::INFO, &go_data("disk", &[]));
    input.extend(option(opt::INFO, &go_data("other", &[])));
    let (output, _, verdict) = talk(&mut exports, &input);
    assert_eq!(verdict, Verdict::More);
    assert_eq!(exports.opened, 0);
    assert!(output.ends_with(&reply(opt::INFO, rep::ERR_UNKNOWN, b"no such export")));
}

#[test]
fn an_export_that_cannot_be_opened_is_an_error_to_go_and_the_end_for_export_name() {
    let mut exports = Export { opened: 0, refuse: true };
    let (output, _, verdict) = talk(&mut exports, &option(opt::GO, &go_data("", &[])));
    assert_eq!((output, verdict), (reply(opt::GO, rep::ERR_SHUTDOWN, b"the binding is closed"), Verdict::More));
    let (output, _, verdict) = talk(&mut exports, &option(opt::EXPORT_NAME, b""));
    assert!(output.is_empty() && matches!(verdict, Verdict::Close(_)));
}

#[test]
fn list_names_the_export_and_abort_is_acknowledged() {
    let mut input = option(opt::LIST, &[]);
    input.extend(option(opt::LIST, b"x"));
    input.extend(option(opt::ABORT, b"ignored"));
    let (output, _, verdict) = talk(&mut export(), &input);
    let mut expected = reply(opt::LIST, rep::SERVER, b"\0\0\0\x04disk");
    expected.extend(reply(opt::LIST, rep::ACK, &[]));
    expected.extend(reply(opt::LIST, rep::ERR_INVALID, b"this option takes no data"));
    expected.extend(reply(opt::ABORT, rep::ACK, &[]));
    assert_eq!(output, expected);
    assert!(matches!(verdict, Verdict::Close(_)));
}

#[test]
fn what_is_not_served_is_refused_politely() {
    for (kind, error) in [
        (opt::STARTTLS, rep::ERR_POLICY),
        (4, rep::ERR_UNSUP),
        (9, rep::ERR_UNSUP),
        (10, rep::ERR_UNSUP),
        (11, rep::ERR_UNSUP),
        (0xffff_ffff, rep::ERR_UNSUP),
    ] {
        let (output, left, verdict) = talk(&mut export(), &option(kind, &[]));
        assert_eq!((left, verdict), (0, Verdict::More));
        assert_eq!(output[8..16], reply(kind, error, &[])[8..16]);
    }
}

#[test]
fn malformed_go_is_invalid() {
    for data in [&[][..], &[0, 0, 0, 9, b'x', 0, 0], &[0xff; 6], &[0, 0, 0, 0, 0, 1], &[0, 0, 0, 0, 0, 0, 0]] {
        let (output, _, verdict) = talk(&mut export(), &option(opt::GO, data));
        assert_eq!((output, verdict), (reply(opt::GO, rep::ERR_INVALID, b"malformed request"), Verdict::More));
    }
}

#[test]
fn length_and_number_of_options_are_bounded() {
    let mut input = option(77, &vec![0; MAX_OPTION_BYTES as usize + 1]);
    input.extend(option(opt::ABORT, &[]));
    let (output, left, verdict) = talk(&mut export(), &input);
    let mut expected = reply(77, rep::ERR_TOO_BIG, b"option too long");
    expected.extend(reply(opt::ABORT, rep::ACK, &[]));
    assert_eq!((output, left), (expected, 0));
    assert!(matches!(verdict, Verdict::Close(_)));

    let long = option(77, &vec![0; MAX_OPTION_SKIP_BYTES as usize + 1]);
    assert_eq!(talk(&mut export(), &long).2, Verdict::Close("option too long"));
    let name = option(opt::EXPORT_NAME, &vec![b'x'; MAX_OPTION_BYTES as usize + 1]);
    assert_eq!(talk(&mut export(), &name).2, Verdict::Close("option too long"));

    let many: Vec<u8> = (0..=MAX_OPTIONS).flat_map(|_| option(77, &[])).collect();
    assert_eq!(talk(&mut export(), &many).2, Verdict::Close("too many options"));
}

#[test]
fn unknown_client_flags_and_a_wrong_magic_end_the_session() {
    for flags in [4, 0x8000_0003] {
        let mut machine = Handshake::new();
        assert_eq!(machine.feed(&client_flags(flags), &mut export()).1, Verdict::Close("unknown client flags"));
    }
    assert_eq!(talk(&mut export(), b"GET / HTTP/1.1\r\n").2, Verdict::Close("not an option"));
}

/// Options that are mostly well-formed, so that a random stream gets past the first one.
fn stream() -> impl Strategy<Value = Vec<u8>> {
    let one = prop_oneof![
        8 => (0u32..13, proptest::collection::vec(any::<u8>(), 0..40)).prop_map(|(kind, data)| option(kind, &data)),
        3 => prop_oneof![Just("disk"), Just(""), Just("no")].prop_map(|name| option(opt::INFO, &go_data(name, &[3, 3, 1]))),
        1 => (8190usize..8300).prop_map(|len| option(99, &vec![1; len])),
        1 => proptest::collection::vec(any::<u8>(), 0..60),
    ];
    proptest::collection::vec(one, 0..12).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// How the stream is cut into reads changes nothing, and nothing grows without bound.
    #[test]
    fn any_bytes_in_any_pieces_give_the_same_answer(input in stream(), cuts in proptest::collection::vec(1usize..50, 1..20)) {
        let whole = talk(&mut export(), &input);
        let mut machine = Handshake::new();
        machine.output.clear();
        let mut exports = export();
        machine.feed(&client_flags(3), &mut exports);
        let (mut at, mut verdict, mut cut) = (0, Verdict::More, cuts.iter().cycle());
        while at < input.len() && verdict == Verdict::More {
            let to = input.len().min(at + cut.next().copied().unwrap_or(1));
            let (taken, now) = machine.feed(&input[at..to], &mut exports);
            at += taken;
            verdict = now;
            prop_assert!(machine.partial.capacity() <= 2 * MAX_OPTION_BYTES as usize);
        }
        prop_assert!(machine.output.len() <= MAX_OPTIONS as usize * 1024);
        prop_assert_eq!((machine.output, input.len() - at, verdict), whole);
    }
}
