//! cofferdam-example-zero-copy.
//! A program of its own that reads and writes a disk in memory that it shares with the device, until the disk is taken away.
//!
//! ```text
//! cofferdam port attach disk data:/run/disk.data
//! cargo run --release -p cofferdam-example-zero-copy -- /run/disk.data [FIRST-BLOCK] [--stay]
//! ```
//!
//! Writes to 32 blocks of the device and reads them back; with `--stay` goes on for as long as it may.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use cofferdam_client::{Client, Completion, Error, Op, Options, Request};

const BLOCKS: u64 = 32;
const BLOCK_BYTES: u32 = 4096;

fn main() -> anyhow::Result<()> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let stay = args.pop_if(|last| last == "--stay").is_some();
    let (Some(socket), first) = (args.first(), args.get(1).map_or("0", String::as_str)) else {
        bail!("usage: cofferdam-example-zero-copy SOCKET [FIRST-BLOCK] [--stay]");
    };
    let first: u64 = first.parse().context("FIRST-BLOCK is a number")?;
    let mut client = Client::connect(socket, Options { region_bytes: 256 << 10, ..Options::default() })?;
    println!("handle {}: {} bytes of disk", client.handle(), client.geometry().capacity_bytes);

    let mut rounds: u64 = 0;
    loop {
        match round(&mut client, first, rounds) {
            Ok(()) => rounds += 1,
            // Not a fault: the operator took the disk away, or the daemon ended. Connect again to go on.
            Err(error) if matches!(error.downcast_ref(), Some(Error::Revoked)) => {
                println!("revoked after {rounds} rounds; nothing is outstanding: {}", client.outstanding() == 0);
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        if rounds == 1 {
            println!("{BLOCKS} blocks written, flushed and read back");
        }
        if !stay {
            return Ok(());
        }
    }
}

/// Writes a pattern, makes it durable, reads it back: all blocks in flight at once.
fn round(client: &mut Client, first: u64, round: u64) -> anyhow::Result<()> {
    let mut writes = Vec::new();
    for block in first..first + BLOCKS {
        // The slot is what the device reads: nothing is copied on the way.
        let slot = client.slot(BLOCK_BYTES)?;
        slot.write_at(0, &pattern(block, round))?;
        writes.push(request(Op::Write, block, BLOCK_BYTES, Some(slot)));
    }
    answers(client, writes)?;
    if client.geometry().can_flush {
        answers(client, vec![request(Op::Flush, 0, 0, None)])?;
    }
    let mut reads = Vec::new();
    for block in first..first + BLOCKS {
        reads.push(request(Op::Read, block, BLOCK_BYTES, Some(client.slot(BLOCK_BYTES)?)));
    }
    for answer in answers(client, reads)? {
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        // Says so if the memory was taken away meanwhile, and does not show zeroes as if they were data.
        answer.slot.context("a read has a slot")?.read_at(0, &mut bytes)?;
        ensure!(bytes == pattern(answer.user, round), "block {} reads back differently", answer.user);
    }
    Ok(())
}

fn request(op: Op, block: u64, length: u32, slot: Option<cofferdam_client::Slot>) -> Request {
    Request { user: block, op, offset: block * u64::from(BLOCK_BYTES), length, may_unmap: false, slot }
}

/// Submits everything and waits until everything is answered.
fn answers(client: &mut Client, mut requests: Vec<Request>) -> anyhow::Result<Vec<Completion>> {
    let (wanted, mut done) = (requests.len(), Vec::new());
    let submitted = client.submit(&mut requests);
    while client.outstanding() > 0 {
        ensure!(client.wait(Duration::from_secs(10), &mut done)? > 0, "the device does not answer");
    }
    submitted?;
    if let Some(error) = done.iter().find_map(|answer| answer.result.err()) {
        // What was outstanding when the disk was taken away.
        ensure!(error == cofferdam_client::Status::Shutdown, error);
        return Err(Error::Revoked.into());
    }
    ensure!(done.len() == wanted, "an answer is missing");
    Ok(done)
}

fn pattern(block: u64, round: u64) -> Vec<u8> {
    (0..u64::from(BLOCK_BYTES)).map(|i| (block * 31 + round * 7 + i) as u8).collect()
}
