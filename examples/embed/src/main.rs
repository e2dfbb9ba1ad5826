//! The host as a library: load a driver, open a handle, write and read blocks in process, unload, print the certificate.
//!
//! ```text
//! cargo run --release -p cofferdam-example-embed -- target/drivers/virtio-blk.wasm vhost-user:/run/blk.sock
//! ```
//!
//! Writes to the first blocks of the device.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use cofferdam_bus_vhost_user::VhostUser;
use cofferdam_manager::{
    Buffer, Completion, Config, Handle, HandleSpec, IoFlags, IoOp, IoRequest, LoadSpec, Manager, UnloadOptions,
};

const BLOCKS: u64 = 32;
const BLOCK_BYTES: u32 = 4096;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(driver), Some(device)) = (args.next(), args.next()) else {
        bail!("usage: cofferdam-example-embed DRIVER.wasm vhost-user:/path.sock");
    };

    let manager = Manager::new(Config::default())?;
    let component = std::fs::read(&driver).with_context(|| driver.clone())?;
    let binding = manager.load(LoadSpec::new(driver, component, Box::new(VhostUser::connect(&device)?)))?;
    let handle = binding.open(HandleSpec { label: "in-process".into(), ..HandleSpec::default() })?;

    // Write a pattern, make it durable, read it back: a batch at a time.
    for completion in
        transfer(&handle, IoOp::Write, |block, buffer| buffer.write_at(0, &pattern(block)).map_err(Into::into))?
    {
        completion.result?;
    }
    if handle.geometry().can_flush {
        let flush =
            IoRequest { user: 0, op: IoOp::Flush, offset: 0, length: 0, flags: IoFlags::default(), buffer: None };
        answer(&handle, vec![flush])?.remove(0).result?;
    }
    for completion in transfer(&handle, IoOp::Read, |_, _| Ok(()))? {
        completion.result?;
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        completion.buffer.context("a read has a buffer")?.read_at(0, &mut bytes)?;
        ensure!(bytes == pattern(completion.user), "block {} reads back differently", completion.user);
    }
    println!("{BLOCKS} blocks written, flushed and read back");

    // The handle is still open: unloading does not wait for a client to close.
    let certificate = manager.unload(binding.name(), &UnloadOptions::default())?;
    println!("{}", serde_json::to_string_pretty(&certificate)?);
    ensure!(certificate.residual.is_zero(), "something is left");
    Ok(())
}

/// One request per block, all in flight at once.
fn transfer(
    handle: &Handle,
    op: IoOp,
    fill: impl Fn(u64, &Buffer) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Completion>> {
    let mut requests = Vec::new();
    for block in 0..BLOCKS {
        let buffer = handle.lease(BLOCK_BYTES)?;
        fill(block, &buffer)?;
        let offset = block * u64::from(BLOCK_BYTES);
        requests.push(IoRequest {
            user: block,
            op,
            offset,
            length: BLOCK_BYTES,
            flags: IoFlags::default(),
            buffer: Some(buffer),
        });
    }
    answer(handle, requests)
}

/// Submits everything and waits until everything is answered.
fn answer(handle: &Handle, mut requests: Vec<IoRequest>) -> anyhow::Result<Vec<Completion>> {
    let (wanted, mut done) = (requests.len(), Vec::new());
    handle.submit(&mut requests)?;
    while done.len() < wanted {
        ensure!(handle.wait(Duration::from_secs(5), &mut done) > 0, "the device does not answer");
    }
    Ok(done)
}

fn pattern(block: u64) -> Vec<u8> {
    (0..u64::from(BLOCK_BYTES)).map(|i| (block * 31 + i) as u8).collect()
}
