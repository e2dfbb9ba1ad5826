//! Frames through the driver to DPDK's testpmd and back, and every client of the net bench for a few milliseconds.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use cofferdam_manager::{Arrivals, IoFlags, IoOp, IoRequest};
use cofferdam_yardstick::clients::cofferdam::Host;
use cofferdam_yardstick::counting::Counting;
use cofferdam_yardstick::machine::Cores;
use cofferdam_yardstick::net::clients::Client;
use cofferdam_yardstick::net::job::{Direction, Job};
use cofferdam_yardstick::net::plan::Plan;
use cofferdam_yardstick::net::testpmd::{Forward, Testpmd};
use cofferdam_yardstick::net::{cofferdam, report, run, solo};

#[global_allocator]
static COUNTING: Counting = Counting;

/// Longest wait for anything here.
const LIMIT: Duration = Duration::from_secs(60);

/// A frame that no other is like: its number is in it, and its length and its filling come of that.
fn frame(number: u32) -> Vec<u8> {
    let mut frame = cofferdam_yardstick::net::bare::frame(60 + number * 7 % 1455);
    frame[14..18].copy_from_slice(&number.to_le_bytes());
    frame[18..].fill(number as u8);
    frame
}

#[test]
fn frames_come_back_from_testpmd_as_they_were_sent_and_testpmd_has_counted_them() -> Result<()> {
    const FRAMES: u32 = 2000;
    /// Fewer than there are buffers for what comes: testpmd drops what it finds no room for.
    const AT_ONCE: usize = 64;
    let device = Testpmd::device(Forward::Io, Cores::of_this_process()?)?;
    let host = Host::of("virtio-net.wasm", None)?;
    let (loaded, handle) = cofferdam::open(&host, &device.socket(), 256)?;
    let (mut sent, mut begun) = (0, false);
    let (mut missing, mut arrivals, mut completions) = (BTreeSet::new(), Arrivals::new(), Vec::new());
    let deadline = Instant::now() + LIMIT;
    while sent < FRAMES || !missing.is_empty() {
        ensure!(Instant::now() < deadline, "{} of {sent} did not come back: {:?}", missing.len(), missing.first());
        let mut requests = Vec::new();
        while sent < FRAMES && missing.len() < AT_ONCE && (begun || missing.is_empty()) {
            let frame = frame(sent);
            let buffer = handle.lease(frame.len() as u32)?;
            buffer.write_at(0, &frame)?;
            let (op, length, flags) = (IoOp::Transmit, frame.len() as u32, IoFlags::default());
            requests.push(IoRequest { user: sent.into(), op, offset: 0, length, flags, buffer: Some(buffer) });
            missing.insert(sent);
            sent += 1;
        }
        handle.submit(&mut requests)?;
        handle.poll(false, &mut completions);
        for completion in completions.drain(..) {
            completion.result?;
        }
        handle.receive(false, &mut arrivals);
        for arrival in arrivals.iter() {
            let mut bytes = Vec::new();
            arrival.read(&mut bytes)?;
            let number = bytes.get(14..18).and_then(|number| number.try_into().ok()).map(u32::from_le_bytes);
            let number = number.expect("a frame has a number");
            assert_eq!(bytes, frame(number), "frame {number}");
            assert!(missing.remove(&number), "frame {number} came twice, or was never sent");
            begun = true;
        }
        arrivals.clear();
    }
    let counters = device.counters()?;
    assert_eq!((counters.received, counters.sent), (FRAMES.into(), FRAMES.into()));
    drop((arrivals, handle));
    let name = loaded.name().to_owned();
    drop(loaded);
    assert!(host.manager.get(&name).is_none(), "unloaded");
    Ok(())
}

#[test]
fn every_client_moves_frames_both_ways_and_the_report_names_it() -> Result<()> {
    let mut jobs = Vec::new();
    for direction in [Direction::Send, Direction::Receive] {
        jobs.push(Job { direction, bytes: 64, depth: 64 });
        jobs.push(Job { direction, bytes: 1500, depth: 32 });
    }
    let clients = vec![Client::Cofferdam, Client::Dpdk, Client::Bare];
    let (warm_up, slice) = (Duration::from_millis(1), Duration::from_millis(8));
    let plan = Plan { jobs, clients, rounds: 1, warm_up, slice };
    let host = Host::of("virtio-net.wasm", None)?;
    let results = run::measure(&plan, &host, Cores::of_this_process()?)?;
    let rows = report::rows(&results);
    assert_eq!(rows.len(), 4 * 3);
    assert!(rows.iter().all(|row| row.kfps > 0.0 && row.rounds == 1 && row.of_dpdk.is_some()), "{rows:?}");
    let table = report::table(&rows);
    for client in plan.clients {
        assert!(table.contains(client.name()), "{table}");
    }
    let ours = |row: &&report::Row| row.client == "cofferdam";
    for row in rows.iter().filter(ours) {
        let crossings = row.crossings_per_frame.expect("counted");
        assert!(crossings > 0.0 && crossings <= 1.0, "{row:?}");
    }
    let aims = report::aims(&results);
    assert_eq!(aims.len(), 2, "of 64 bytes each way");
    let folder = tempfile::tempdir()?;
    let json = folder.path().join("net.json");
    report::write(&json, &rows, &results, &aims)?;
    let read: Vec<serde_json::Value> = serde_json::from_str(&std::fs::read_to_string(&json)?)?;
    for key in ["direction", "bytes", "depth", "client", "kfps", "cpu_client_us", "cpu_device_us"] {
        assert!(read.iter().all(|row| row.get(key).is_some_and(|value| !value.is_null())), "{key}");
    }
    assert!(folder.path().join("net-summary.json").exists());
    Ok(())
}

#[test]
fn a_frame_costs_no_allocation_either_way() -> Result<()> {
    let host = Host::of("virtio-net.wasm", None)?;
    for part in solo::all(&host, |_| true, &[64], Duration::from_millis(100))? {
        assert!(part.allocations_per_frame < 0.01, "{part:?}");
    }
    Ok(())
}
