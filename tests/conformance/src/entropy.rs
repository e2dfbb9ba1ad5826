//! What has to hold of sources of entropy.

use std::collections::HashSet;

use anyhow::{Context, ensure};
use cofferdam_manager::{Completion, IoError, IoOp, Offer};

use crate::bed::Wish;
use crate::client::{Ask, contents};
use crate::{Case, Fixture};

pub(crate) const CASES: &[Case] = &[
    Case { name: "the_longest_request_is_in_the_offer", wish: Wish::of, check: longest_request },
    Case { name: "no_bytes_are_given_twice", wish: Wish::of, check: no_repetition },
    Case { name: "no_bytes_are_given_twice_over_a_plain_ring", wish: Wish::plain_ring, check: no_repetition },
    Case { name: "lengths_are_honoured", wish: Wish::of, check: lengths },
    Case { name: "requests_that_cannot_be_are_refused_and_harm_nothing", wish: Wish::of, check: impossible_requests },
    Case { name: "two_handles_are_given_different_bytes", wish: Wish::of, check: two_handles },
];

/// What a buffer holds before the device has it.
const MARK: u8 = 0x5a;

/// A request for so many bytes, into a buffer with room behind them.
fn fill(length: u32) -> Ask {
    Ask::new(IoOp::Fill, 0, length).with(&vec![MARK; length as usize + 64])
}

/// What the device gave.
fn given(completion: &Completion) -> anyhow::Result<Vec<u8>> {
    contents(completion, completion.bytes)
}

fn longest(fixture: &Fixture<'_>) -> anyhow::Result<u32> {
    match fixture.binding.offer().as_deref() {
        Some(Offer::Entropy(entropy)) => Ok(entropy.max_request_bytes),
        other => anyhow::bail!("no entropy: {other:?}"),
    }
}

fn longest_request(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let longest = longest(fixture)?;
    ensure!((1..=65_536).contains(&longest), "{longest} bytes");
    let answer = fixture.client(0)?.whole(&Ask::new(IoOp::Fill, 0, longest))??;
    ensure!((1..=longest).contains(&answer.bytes), "{} of {longest} bytes", answer.bytes);
    Ok(())
}

/// Pieces of 16 bytes: of a good source, two of so few are never the same.
fn pieces(bytes: &[u8]) -> impl Iterator<Item = [u8; 16]> {
    bytes.as_chunks().0.iter().copied()
}

fn no_repetition(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.client(0)?;
    let (mut seen, mut counts) = (HashSet::new(), [0_u32; 256]);
    for round in 0..8 {
        let mut started = Vec::new();
        for _ in 0..16 {
            started.push(client.ask(&fill(1024))?);
        }
        for user in started {
            let answer = client.finish(user)?;
            answer.result?;
            let bytes = given(&answer)?;
            ensure!(!bytes.is_empty(), "an answer without a byte");
            bytes.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
            ensure!(pieces(&bytes).all(|piece| seen.insert(piece)), "round {round}: bytes that came before");
        }
    }
    // Some 128 KiB: each value about 512 times, with a deviation of 23.
    let total: u32 = counts.iter().sum();
    ensure!(total >= 64 << 10, "{total} bytes came of {}", 128 << 10);
    let mean = total / 256;
    ensure!(counts.iter().all(|count| (mean / 2..mean * 2).contains(count)), "mean {mean}: {counts:?}");
    Ok(())
}

fn lengths(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.client(0)?;
    let longest = longest(fixture)?;
    for length in [1, 2, 3, 63, 64, 65, 4095, 4096, longest] {
        let length = length.min(longest);
        let answer = client.whole(&fill(length))??;
        ensure!((1..=length).contains(&answer.bytes), "{} of {length} bytes", answer.bytes);
        let all = contents(&answer, length + 64)?;
        let behind = &all[answer.bytes as usize..];
        ensure!(behind.iter().all(|byte| *byte == MARK), "{length}: bytes behind the {} given", answer.bytes);
        let untouched = all[..answer.bytes as usize].iter().filter(|byte| **byte == MARK).count();
        ensure!(length < 63 || untouched < 32 + length as usize / 64, "{length}: {untouched} bytes are as they were");
    }
    Ok(())
}

fn impossible_requests(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.client(0)?;
    let cases = [
        ("no bytes", Ask::new(IoOp::Fill, 0, 0)),
        ("too many bytes", Ask::new(IoOp::Fill, 0, longest(fixture)? + 1)),
        ("an offset", Ask::new(IoOp::Fill, 8, 64)),
        ("a modifier", Ask::new(IoOp::Fill, 0, 64).flags(1)),
    ];
    for (what, ask) in cases {
        let answer = client.whole(&ask)?;
        ensure!(answer.as_ref().err() == Some(&IoError::Invalid), "{what}: answered {answer:?}");
    }
    client.whole(&fill(64))??;
    Ok(())
}

fn two_handles(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let (mut first, mut second) = (fixture.client(0)?, fixture.client(0)?);
    let mut seen = HashSet::new();
    for round in 0..50 {
        let (a, b) = (first.ask(&fill(64))?, second.ask(&fill(64))?);
        for answer in [second.finish(b)?, first.finish(a)?] {
            answer.result.with_context(|| format!("round {round}"))?;
            ensure!(pieces(&given(&answer)?).all(|piece| seen.insert(piece)), "round {round}: bytes of the other");
        }
    }
    ensure!(seen.len() >= 100, "{} pieces", seen.len());
    Ok(())
}
