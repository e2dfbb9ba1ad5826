//! What is let through and what is not.

use proptest::prelude::*;

use super::*;
use crate::handshake::tests::geometry;

fn raw(kind: u16, flags: u16, offset: u64, length: u32) -> RawRequest {
    RawRequest { flags, kind, cookie: 7, offset, length }
}

fn rules(structured: bool) -> Rules {
    Rules::new(&geometry(), structured, 1 << 18)
}

#[test]
fn a_request_is_read_as_the_specification_draws_it() {
    let bytes = [0x25, 0x60, 0x95, 0x13, 0, 1, 0, 6, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 2, 0];
    let parsed = RawRequest { flags: 1, kind: 6, cookie: 0x0102_0304_0506_0708, offset: 4096, length: 512 };
    assert_eq!(RawRequest::parse(&bytes), Some(parsed));
    let mut wrong = bytes;
    wrong[3] ^= 1;
    assert_eq!(RawRequest::parse(&wrong), None);
}

#[test]
fn errors_are_those_of_section_error_values() {
    let end = 1 << 20;
    for (request, error) in [
        (raw(cmd::READ, 0, end, 512), Errno::Inval),
        (raw(cmd::TRIM, 0, end, 512), Errno::Inval),
        (raw(cmd::WRITE, 0, end - 512, 1024), Errno::NoSpc),
        (raw(cmd::WRITE_ZEROES, 0, end, 512), Errno::NoSpc),
        (raw(cmd::WRITE, 0, u64::MAX - 511, 512), Errno::NoSpc),
        (raw(cmd::READ, 0, 1, 512), Errno::Inval),
        (raw(cmd::READ, 0, 0, 100), Errno::Inval),
        (raw(cmd::FLUSH, 0, 512, 0), Errno::Inval),
        (raw(5, 0, 0, 512), Errno::Inval),
        (raw(7, 0, 0, 512), Errno::Inval),
        (raw(999, 0, 0, 0), Errno::Inval),
        (raw(cmd::READ, cmd_flag::NO_HOLE, 0, 512), Errno::Inval),
        (raw(cmd::WRITE_ZEROES, 1 << 4, 0, 512), Errno::Inval),
        (raw(cmd::WRITE, 1 << 15, 0, 512), Errno::Inval),
    ] {
        assert_eq!(rules(true).judge(&request), Err(error), "{request:?}");
    }
}

#[test]
fn what_the_device_does_not_honour_is_neither_offered_nor_done() {
    let mut poor = geometry();
    (poor.can_flush, poor.can_discard, poor.can_write_zeroes) = (false, false, false);
    let rules = Rules::new(&poor, false, 1 << 18);
    assert_eq!(rules.transmission_flags, flag::HAS_FLAGS | flag::CAN_MULTI_CONN);
    for request in [
        raw(cmd::FLUSH, 0, 0, 0),
        raw(cmd::TRIM, 0, 0, 512),
        raw(cmd::WRITE_ZEROES, 0, 0, 512),
        raw(cmd::WRITE, cmd_flag::FUA, 0, 512),
        raw(cmd::READ, cmd_flag::DF, 0, 512),
    ] {
        assert_eq!(rules.judge(&request), Err(Errno::Inval), "{request:?}");
    }
    let mut read_only = geometry();
    read_only.read_only = true;
    let rules = Rules::new(&read_only, false, 1 << 18);
    assert_eq!(
        rules.transmission_flags & (flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::READ_ONLY),
        flag::READ_ONLY
    );
    for kind in [cmd::WRITE, cmd::TRIM, cmd::WRITE_ZEROES] {
        assert_eq!(rules.judge(&raw(kind, 0, 0, 512)), Err(Errno::Perm));
    }
}

#[test]
fn reads_are_bounded_by_payload_and_window() {
    let mut large = geometry();
    large.capacity_bytes = 1 << 40;
    for structured in [false, true] {
        let rules = Rules::new(&large, structured, 1 << 18);
        assert_eq!(rules.judge(&raw(cmd::READ, 0, 0, MAX_PAYLOAD_BYTES)), Ok(Action::Read { df: false }));
        let too_long = if structured { Errno::Overflow } else { Errno::Inval };
        assert_eq!(rules.judge(&raw(cmd::READ, 0, 0, MAX_PAYLOAD_BYTES + 512)), Err(too_long));
        assert_eq!(rules.judge(&raw(cmd::WRITE, 0, 0, MAX_PAYLOAD_BYTES + 512)), Err(Errno::Inval));
        assert_eq!(rules.judge(&raw(cmd::TRIM, 0, 0, u32::MAX - 511)), Ok(Action::Trim { fua: false }));
    }
    let rules = Rules::new(&large, true, 1 << 18);
    assert_eq!(rules.judge(&raw(cmd::READ, cmd_flag::DF, 0, 1 << 18)), Ok(Action::Read { df: true }));
    assert_eq!(rules.judge(&raw(cmd::READ, cmd_flag::DF, 0, (1 << 18) + 512)), Err(Errno::Overflow));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_is_let_through_leaves_the_export(
        kind in 0u16..9, flags in 0u16..32, offset in any::<u64>(), near in 0u64..(1 << 21), wild in any::<bool>(), blocks in 0u32..5000, odd in 0u32..3,
    ) {
        let offset = if wild { offset } else { near / 512 * 512 };
        let request = raw(kind, flags, offset, blocks * 512 + odd / 2);
        match rules(true).judge(&request) {
            Ok(Action::Read { .. } | Action::Write { .. } | Action::Trim { .. } | Action::WriteZeroes { .. }) => {
                prop_assert!(request.offset + u64::from(request.length) <= 1 << 20);
                prop_assert!(request.offset.is_multiple_of(512) && request.length.is_multiple_of(512) && request.length > 0);
            }
            Ok(Action::Flush) => prop_assert!(request.offset == 0 && request.length == 0),
            Ok(Action::Nothing | Action::Disconnect) | Err(_) => {}
        }
    }
}
