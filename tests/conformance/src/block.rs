//! What has to hold of disks.

use std::collections::HashMap;

use anyhow::{Context, ensure};
use cofferdam_manager::{IoError, IoOp};

use crate::bed::{Class, Wish};
use crate::client::contents;
use crate::{Case, Client, Fixture};

pub(crate) const CASES: &[Case] = &[
    Case { name: "properties_are_the_devices", wish: Wish::of, check: properties_are_the_devices },
    Case { name: "random_operations_agree_with_an_oracle", wish: Wish::of, check: random_operations },
    Case { name: "random_operations_agree_on_a_plain_ring", wish: Wish::plain_ring, check: random_operations },
    Case { name: "more_requests_than_the_ring_holds_are_all_answered", wish: Wish::small_ring, check: overfull_ring },
    Case { name: "the_longest_transfer_reads_back", wish: Wish::of, check: longest_transfer },
    Case { name: "requests_that_cannot_be_are_refused_and_harm_nothing", wish: Wish::of, check: impossible_requests },
    Case { name: "a_read_only_device_refuses_changes", wish: read_only, check: read_only_refuses },
    Case { name: "write_zeroes_reads_as_zeroes", wish: ranges, check: write_zeroes },
    Case { name: "discard_is_served_and_spares_its_neighbours", wish: ranges, check: discard },
    Case { name: "flush_is_answered_after_writes", wish: Wish::of, check: flush },
    Case { name: "two_lanes_work_side_by_side", wish: Wish::two_queues, check: two_lanes },
    Case { name: "two_handles_of_a_lane_get_their_own_answers", wish: Wish::of, check: two_handles },
];

fn read_only(class: Class) -> Wish {
    Wish { read_only: true, ..Wish::of(class) }
}

fn ranges(class: Class) -> Wish {
    Wish { ranges: true, ..Wish::of(class) }
}

fn properties_are_the_devices(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let geometry = fixture.client(0)?.geometry();
    ensure!(geometry.capacity_bytes == fixture.wish.capacity_bytes, "capacity {}", geometry.capacity_bytes);
    ensure!(geometry.logical_block_bytes.is_power_of_two() && geometry.logical_block_bytes >= 512);
    ensure!(geometry.max_transfer_bytes >= geometry.logical_block_bytes);
    ensure!(geometry.max_transfer_bytes.is_multiple_of(geometry.logical_block_bytes));
    ensure!(geometry.read_only == fixture.wish.read_only);
    Ok(())
}

/// Random reads and writes of random length, many in flight, none overlapping another in flight; a byte vector is the oracle.
fn random_operations(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    const SEED: u64 = 0x00c0_ffe2;
    let mut random = fastrand::Rng::with_seed(SEED);
    let mut client = fixture.client(0)?;
    let geometry = client.geometry();
    let block = u64::from(geometry.logical_block_bytes);
    let area_blocks = (2 << 20) / block;
    let mut oracle = vec![0_u8; (area_blocks * block) as usize];
    for round in 0..60 {
        let depth = 1 + random.usize(..64);
        let mut busy = vec![false; area_blocks as usize];
        let mut started = HashMap::new();
        for _ in 0..depth {
            let blocks = 1 + random.u64(..16);
            let first = random.u64(..area_blocks - blocks);
            let range = first as usize..(first + blocks) as usize;
            if busy[range.clone()].iter().any(|taken| *taken) {
                continue;
            }
            busy[range].fill(true);
            let (offset, length) = (first * block, blocks * block);
            let place = offset as usize..(offset + length) as usize;
            if random.bool() {
                random.fill(&mut oracle[place.clone()]);
                let user = client.start(IoOp::Write, offset, length as u32, Some(&oracle[place]))?;
                started.insert(user, None);
            } else {
                let user = client.start(IoOp::Read, offset, length as u32, None)?;
                started.insert(user, Some(place));
            }
        }
        for (user, place) in started {
            let completion = client.finish(user)?;
            completion.result.with_context(|| format!("round {round}, seed {SEED:#x}"))?;
            if let Some(place) = place {
                let bytes = contents(&completion, place.len() as u32)?;
                ensure!(
                    bytes == oracle[place.clone()],
                    "round {round}, seed {SEED:#x}: {place:?} reads back differently"
                );
            }
        }
    }
    Ok(())
}

fn overfull_ring(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.client(0)?;
    let mut started = Vec::new();
    for number in 0..300_u64 {
        let data = [number as u8; 4096];
        started.push(client.start(IoOp::Write, number * 4096, 4096, Some(&data))?);
    }
    for user in started {
        client.finish(user)?.result?;
    }
    for number in [0, 1, 17, 150, 299] {
        ensure!(client.read(number * 4096, 4096)? == [number as u8; 4096], "block {number}");
    }
    Ok(())
}

fn longest_transfer(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.client(0)?;
    let block = client.geometry().logical_block_bytes;
    let half = u32::try_from(fixture.wish.capacity_bytes / 2)?;
    let longest = client.geometry().max_transfer_bytes.min(half - half % block);
    let mut data = vec![0; longest as usize];
    fastrand::Rng::with_seed(7).fill(&mut data);
    client.write(u64::from(block), &data)?;
    ensure!(client.read(u64::from(block), longest)? == data, "{longest} bytes read back differently");
    Ok(())
}

fn impossible_requests(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.client(0)?;
    let geometry = client.geometry();
    let (capacity, block) = (geometry.capacity_bytes, geometry.logical_block_bytes);
    let cases = [
        ("beyond the end", capacity, block),
        ("across the end", capacity - u64::from(block), 2 * block),
        ("offset wraps", u64::MAX - u64::from(block) + 1, block),
        ("misaligned offset", 1, block),
        ("misaligned length", 0, block + 1),
        ("no length", 0, 0),
    ];
    for (what, offset, length) in cases {
        for op in [IoOp::Read, IoOp::Write] {
            let answer = client.one(op, offset, length, None)?;
            ensure!(answer.as_ref().err() == Some(&IoError::Invalid), "{what}: {op:?} answered {answer:?}");
        }
    }
    client.write(0, &vec![9; block as usize])?;
    ensure!(client.read(0, block)? == vec![9; block as usize]);
    Ok(())
}

fn read_only_refuses(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.client(0)?;
    let block = client.geometry().logical_block_bytes;
    for op in [IoOp::Write, IoOp::Discard, IoOp::WriteZeroes] {
        let answer = client.one(op, 0, block, None)?;
        ensure!(answer.as_ref().err() == Some(&IoError::ReadOnly), "{op:?} answered {answer:?}");
    }
    ensure!(client.read(0, block)? == vec![0; block as usize]);
    Ok(())
}

fn pattern_around(client: &mut Client) -> anyhow::Result<u64> {
    let unit = 64 * 1024_u64;
    for piece in 0..3_u64 {
        client.write(piece * unit, &vec![0xa0 + piece as u8; unit as usize])?;
    }
    Ok(unit)
}

fn neighbours_are_whole(client: &mut Client, unit: u64) -> anyhow::Result<()> {
    for piece in [0, 2_u64] {
        ensure!(
            client.read(piece * unit, unit as u32)? == vec![0xa0 + piece as u8; unit as usize],
            "neighbour {piece} changed"
        );
    }
    Ok(())
}

fn write_zeroes(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.client(0)?;
    ensure!(client.geometry().can_write_zeroes, "the device was to serve write-zeroes");
    let unit = pattern_around(&mut client)?;
    client.one(IoOp::WriteZeroes, unit, unit as u32, None)??;
    ensure!(client.read(unit, unit as u32)? == vec![0; unit as usize], "the range does not read as zeroes");
    neighbours_are_whole(&mut client, unit)
}

fn discard(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.client(0)?;
    ensure!(client.geometry().can_discard, "the device was to serve discard");
    let unit = pattern_around(&mut client)?;
    client.one(IoOp::Discard, unit, unit as u32, None)??;
    neighbours_are_whole(&mut client, unit)
}

fn flush(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.client(0)?;
    client.write(0, &[5; 4096])?;
    let answer = client.one(IoOp::Flush, 0, 0, None)?;
    let expected = if client.geometry().can_flush { None } else { Some(IoError::Unsupported) };
    ensure!(answer.as_ref().err() == expected.as_ref(), "flush answered {answer:?}");
    Ok(())
}

fn two_lanes(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    ensure!(fixture.binding.lanes() == 2, "{} lanes", fixture.binding.lanes());
    let half = fixture.wish.capacity_bytes / 2;
    std::thread::scope(|scope| {
        let side = |lane: usize| {
            let mut client = fixture.client(lane)?;
            for round in 0..50_u64 {
                let offset = lane as u64 * half + round * 8192;
                client.write(offset, &[round as u8 + lane as u8; 8192])?;
                ensure!(client.read(offset, 8192)? == [round as u8 + lane as u8; 8192], "lane {lane}, round {round}");
            }
            Ok(())
        };
        let other = scope.spawn(move || side(1));
        side(0)?;
        other.join().map_err(|_| anyhow::anyhow!("a client panicked"))?
    })
}

fn two_handles(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let (mut first, mut second) = (fixture.client(0)?, fixture.client(0)?);
    for round in 0..50_u64 {
        let a = first.start(IoOp::Write, round * 8192, 4096, Some(&[1; 4096]))?;
        let b = second.start(IoOp::Write, round * 8192 + 4096, 4096, Some(&[2; 4096]))?;
        // Whoever looks first reaps both; the other must still get its own.
        second.finish(b)?.result?;
        first.finish(a)?.result?;
    }
    ensure!(first.read(4096, 4096)? == [2; 4096] && second.read(0, 4096)? == [1; 4096]);
    Ok(())
}
