//! A client of the data port: it is in this process, the binding in another, and the device reads and writes memory that both have mapped.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{anyhow, bail, ensure};
use cofferdam_client::{Client, Completion, Error, Op, Options, Request, Slot, Status};
use cofferdam_process_tests::wait::until_true;

/// Requests at once.
const DEPTH: u64 = 32;
const BLOCK_BYTES: u32 = 4096;
/// One page for each request and one that is kept.
const REGION_BYTES: u64 = 256 << 10;
/// Answers of traffic before the entry comes.
const WARM: u64 = 500;
/// Longest wait for an answer, and for being told that it is over.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where the data port listens, beside the NBD port's socket.
#[must_use]
pub fn socket_beside(nbd: &Path) -> PathBuf {
    nbd.with_file_name("disk.data")
}

/// Writes and reads back on a thread of its own, until it is told that it is over.
pub struct DataClient(JoinHandle<anyhow::Result<()>>);

impl DataClient {
    /// Returns when traffic flows.
    pub fn start(socket: &Path) -> anyhow::Result<DataClient> {
        let client = Client::connect(socket, Options { region_bytes: REGION_BYTES, ..Options::default() })?;
        let answered = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&answered);
        let thread = std::thread::Builder::new().name("data-traffic".into()).spawn(move || work(client, &count))?;
        until_true("the data client's traffic", || answered.load(Ordering::Acquire) > WARM || thread.is_finished());
        ensure!(answered.load(Ordering::Acquire) > WARM, "{:?}", thread.join());
        Ok(DataClient(thread))
    }

    /// What it saw, once it is over.
    pub fn end(self) -> anyhow::Result<()> {
        until_true("the data client's end", || self.0.is_finished());
        self.0.join().map_err(|_| anyhow!("the data client panicked"))?
    }
}

fn work(mut client: Client, answered: &AtomicU64) -> anyhow::Result<()> {
    let kept = client.slot(BLOCK_BYTES)?;
    let mut round = 0_u8;
    while write_and_read(&mut client, round, answered)? {
        round = round.wrapping_add(1);
    }
    loop {
        match client.wait(PATIENCE, &mut Vec::new()) {
            Err(Error::Revoked) => break,
            Ok(0) => bail!("the data client is not told that it is over"),
            other => drop(other?),
        }
    }
    ensure!(client.is_revoked() && client.outstanding() == 0, "{} requests are not answered", client.outstanding());
    let late = client.submit(&mut vec![request(Op::Flush, 0, None)]);
    ensure!(matches!(late, Err(Error::Revoked)), "a client that was revoked is told {late:?}");
    let late = kept.read_at(0, &mut [0]);
    ensure!(matches!(late, Err(Error::Revoked)), "memory that was revoked is read: {late:?}");
    Ok(())
}

/// False when it is over.
fn write_and_read(client: &mut Client, round: u8, answered: &AtomicU64) -> anyhow::Result<bool> {
    let bytes = |block: u64| [round ^ block as u8; BLOCK_BYTES as usize];
    let mut writes = Vec::new();
    for block in 0..DEPTH {
        let slot = client.slot(BLOCK_BYTES)?;
        if let Err(Error::Revoked) = slot.write_at(0, &bytes(block)) {
            return Ok(false);
        }
        writes.push(request(Op::Write, block, Some(slot)));
    }
    let Some(_) = answers(client, writes, answered)? else { return Ok(false) };
    let mut reads = Vec::new();
    for block in 0..DEPTH {
        reads.push(request(Op::Read, block, Some(client.slot(BLOCK_BYTES)?)));
    }
    let Some(reads) = answers(client, reads, answered)? else { return Ok(false) };
    for Completion { user, slot, .. } in reads {
        let mut read = [0; BLOCK_BYTES as usize];
        match slot.map(|slot| slot.read_at(0, &mut read)) {
            Some(Ok(())) => ensure!(read == bytes(user), "block {user} was read back differently"),
            Some(Err(Error::Revoked)) => return Ok(false),
            other => bail!("the answer to a read has {other:?} for its memory"),
        }
    }
    Ok(true)
}

/// Submits everything and takes every answer; `None` when it is over. A guest or a device that fails does so to requests that are under way.
fn answers(
    client: &mut Client,
    mut requests: Vec<Request>,
    answered: &AtomicU64,
) -> anyhow::Result<Option<Vec<Completion>>> {
    let mut done = Vec::new();
    let over = match client.submit(&mut requests) {
        Ok(()) => false,
        Err(Error::Revoked) => true,
        Err(error) => return Err(error.into()),
    };
    while client.outstanding() > 0 {
        let found = client.wait(PATIENCE, &mut done)?;
        ensure!(found > 0, "a request of the data client is not answered");
        answered.fetch_add(found as u64, Ordering::AcqRel);
    }
    match done.iter().find_map(|answer| answer.result.err()) {
        None if !over => Ok(Some(done)),
        None | Some(Status::Shutdown | Status::Io | Status::DeviceFault) => Ok(None),
        Some(other) => bail!("a request of the data client was answered with {other:?}"),
    }
}

fn request(op: Op, block: u64, slot: Option<Slot>) -> Request {
    let length = if slot.is_some() { BLOCK_BYTES } else { 0 };
    Request { user: block, op, offset: block * u64::from(BLOCK_BYTES), length, may_unmap: false, slot }
}
