//! What goes wrong on a data lane: the words of the well-behaved driver, spoiled.

use cofferdam_sdk::words::{KIND_HEADER_OUT, KIND_STATUS_IN};
use cofferdam_sdk::{
    Answers, ChainWriter, DriverError, Lane, LaneSetup, Operation, Request, Requests, Responses, VirtioDriver, log,
};
use cofferdam_virtio_blk::{VirtioBlk, VirtioBlkLane};

use crate::{behaviour, eat, spin};

/// Where the second word and the payload segment of the first chain are, when that is a read or a write: token, head, header segment with
/// its four words, payload segment, payload offset, status segment.
const HEAD: usize = 1;
const HEADER: usize = 2;
const PAYLOAD: usize = 7;
const PAYLOAD_OFFSET: usize = 8;
const STATUS: usize = 9;
/// One segment more, in the second word.
const ONE_SEGMENT: u32 = 1 << 16;

/// Where the commands of `on-command` begin: at the last MiB of a disk of 16 MiB. The n-th command is a write at the n-th 4,096 bytes from here.
pub const COMMANDS_OFFSET: u64 = 15 << 20;

/// What `on-command` does when it is told to, in the order of their offsets.
pub const COMMANDS: [&str; 6] = ["trap", "loop", "eat", "no-words", "trap-complete", "loop-complete"];

/// The command that a request is.
fn command(request: &Request) -> Option<&'static str> {
    let place = request.offset().checked_sub(COMMANDS_OFFSET).filter(|_| request.operation == Operation::Write)?;
    COMMANDS.get(usize::try_from(place / 4096).ok()?).copied().filter(|_| place.is_multiple_of(4096))
}

/// The data lane of every driver of this crate.
#[derive(Debug)]
pub struct HostileLane {
    inner: VirtioBlkLane,
    requests: u64,
    /// The command that came last, of those that `submit` or `complete` carries out.
    told: Option<&'static str>,
}

impl HostileLane {
    pub(crate) fn new(setup: &LaneSetup) -> Result<Self, DriverError> {
        Ok(Self { inner: VirtioBlk::start(setup)?, requests: 0, told: None })
    }
}

impl Lane for HostileLane {
    fn submit(&mut self, requests: Requests<'_>, chains: &mut ChainWriter<'_>) {
        let behaviour = behaviour();
        self.requests += requests.len() as u64;
        match behaviour {
            "trap-submit" => panic!("this driver panics in submit"),
            "trap-at-100" if self.requests >= 100 => panic!("this driver panics at its 100th request"),
            "loop-submit" => spin(),
            "eat-submit" => eat(),
            "slow-submit" => (0..200_000_u32).for_each(|turn| {
                std::hint::black_box(turn);
            }),
            "flood-log-submit" => (0..10_000).for_each(|line| log::warn(&format!("flood line {line}"))),
            "on-command" => self.told = requests.clone().find_map(|request| command(&request)).or(self.told),
            _ => {}
        }
        match self.told {
            Some("trap") => panic!("this driver was told to panic in submit"),
            Some("loop") => spin(),
            Some("eat") => eat(),
            _ => {}
        }
        self.inner.submit(requests, chains);
        if self.told == Some("no-words") {
            chains.words_mut().clear();
        }
        spoil_chains(behaviour, chains.words_mut());
    }

    fn complete(&mut self, responses: Responses<'_>, answers: &mut Answers<'_>) {
        match behaviour() {
            "trap-complete" => panic!("this driver panics in complete"),
            "loop-complete" => spin(),
            "eat-complete" => eat(),
            _ => {}
        }
        match self.told {
            Some("trap-complete") => panic!("this driver was told to panic in complete"),
            Some("loop-complete") => spin(),
            _ => {}
        }
        self.inner.complete(responses, answers);
        let words = answers.words_mut();
        match behaviour() {
            "missing-answer" => words.truncate(words.len() - 2),
            "duplicate-answer" => words.extend_from_within(..2),
            "wrong-answer-token" => words[0] = words[0].wrapping_add(1 << 30),
            "unknown-status" => words[1] = 77,
            "half-answer" => words.truncate(words.len() - 1),
            _ => {}
        }
    }
}

/// Breaks the first chain, which is that of a read or a write in every test that uses these.
fn spoil_chains(behaviour: &str, words: &mut Vec<u32>) {
    let has_payload = words.len() > STATUS && words[HEAD] & 0xffff != 0xffff && words[PAYLOAD] & 0xf != KIND_STATUS_IN;
    match behaviour {
        "empty-list" => words.clear(),
        "huge-list" => words.resize(4 << 20, 0),
        "truncated-words" => words.truncate(words.len() - 1),
        "wrong-token" => words[0] = words[0].wrapping_add(1 << 30),
        "missing-token" => {
            words.drain(..if has_payload { STATUS + 1 } else { words.len() });
        }
        "duplicate-token" => words.extend_from_within(..if has_payload { STATUS + 1 } else { words.len() }),
        "wrong-queue" => words[HEAD] = words[HEAD] & !0xffff | 4321,
        "empty-segment" => words[HEADER] &= 0xf,
        "no-segments" => {
            words[HEAD] &= 0xffff;
            words.truncate(HEADER);
        }
        "unknown-kind" => words[HEADER] |= 0xf,
        "too-many-segments" => {
            words.truncate(HEADER);
            words[HEAD] = words[HEAD] & 0xffff | 200 << 16;
            (0..200).for_each(|_| words.extend([KIND_HEADER_OUT | 1 << 4, 0]));
        }
        "long-header" => {
            words.truncate(HEADER);
            words[HEAD] = words[HEAD] & 0xffff | ONE_SEGMENT;
            words.push(KIND_HEADER_OUT | 4096 << 4);
            words.resize(words.len() + 1024, 0);
        }
        "status-first" => words.splice(HEADER..HEADER, [KIND_STATUS_IN | 1 << 4]).for_each(drop),
        "refuse-ok" => spoil_refusal(words, 0),
        "refuse-unknown" => spoil_refusal(words, 200),
        _ if has_payload => spoil_payload(behaviour, words),
        _ => {}
    }
    if behaviour == "status-first" {
        words[HEAD] += ONE_SEGMENT;
    }
}

fn spoil_refusal(words: &mut Vec<u32>, status: u32) {
    words.truncate(HEADER);
    words[HEAD] = 0xffff | status << 24;
}

fn spoil_payload(behaviour: &str, words: &mut Vec<u32>) {
    let length = words[PAYLOAD] >> 4;
    match behaviour {
        "payload-out-of-range" => words[PAYLOAD_OFFSET] = length,
        "payload-short" => words[PAYLOAD] -= 1 << 4,
        "payload-overflow" => words[PAYLOAD_OFFSET] = u32::MAX - 1,
        "payload-direction" => words[PAYLOAD] ^= 1 | 2,
        "payload-overlap" => {
            let twice = [words[PAYLOAD], words[PAYLOAD_OFFSET]];
            words.splice(STATUS..STATUS, twice).for_each(drop);
            words[HEAD] += ONE_SEGMENT;
        }
        "long-status" => words[STATUS] = KIND_STATUS_IN | 4096 << 4,
        _ => {}
    }
}
