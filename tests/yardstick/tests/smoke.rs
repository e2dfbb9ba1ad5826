//! Every client moves requests on every device that it is measured on, for a few milliseconds: so that the bench still runs when it is wanted.

use std::path::Path;
use std::time::{Duration, Instant};

use cofferdam_yardstick::backend::{Backend, Kind};
use cofferdam_yardstick::budget;
use cofferdam_yardstick::clients::Client;
use cofferdam_yardstick::clients::cofferdam::{Host, InProcess};
use cofferdam_yardstick::counting::{self, Counting};
use cofferdam_yardstick::engine::{Engine, Job, Loop, Mode, Op, Times};
use cofferdam_yardstick::machine::Cores;
use cofferdam_yardstick::null::Pace;
use cofferdam_yardstick::plan::{Group, Plan};
use cofferdam_yardstick::{aims, plot, report, run, solo};

#[global_allocator]
static COUNTING: Counting = Counting;

fn null_program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_cofferdam-null-blk"))
}

fn tiny(groups: Vec<Group>) -> Plan {
    Plan { groups, rounds: 2, warm_up: Duration::from_millis(1), slice: Duration::from_millis(4) }
}

fn jobs() -> Vec<Job> {
    [(Op::RandRead, 1), (Op::RandWrite, 32), (Op::SeqRead, 4)].map(|(op, depth)| Job { op, depth }).to_vec()
}

#[test]
fn every_client_answers_what_it_submits_and_the_report_names_it() -> anyhow::Result<()> {
    let all = [Client::Cofferdam, Client::Blkio, Client::Bare];
    let mut groups = Vec::new();
    for backend in [Kind::Null, Kind::Qsd] {
        for mode in [Mode::Poll, Mode::Event, Mode::Adaptive] {
            let clients = all.into_iter().filter(|client| client.has(mode)).collect();
            groups.push(Group { backend, mode, queues: 1, clients, jobs: jobs() });
        }
        groups.push(Group { backend, mode: Mode::Poll, queues: 2, clients: all.to_vec(), jobs: jobs() });
    }
    let clients = vec![Client::CofferdamNbd, Client::QsdNbd];
    groups.push(Group { backend: Kind::Qsd, mode: Mode::Event, queues: 1, clients, jobs: jobs() });
    let host = Host::start(None)?;
    let results = run::measure(&tiny(groups), &host, null_program(), Cores::of_this_process()?)?;
    let mut device = Duration::ZERO;
    for (cell, slices) in &results.cells {
        for slice in slices {
            let slice = slice.as_ref().expect("measured in every round");
            assert!(slice.requests > 0 && slice.times.client > Duration::ZERO, "{cell:?}: {slice:?}");
            // Another process's time moves in ticks: in one short slice it may stand still.
            device += slice.times.device;
        }
    }
    assert!(device > Duration::ZERO, "no device has used any time");
    let rows = report::rows(&results);
    // Null and qsd with three modes (blkio has two) and two queues, and two over NBD.
    assert_eq!(rows.len(), 3 * (2 * (3 + 2 + 3 + 3) + 2));
    let table = report::table(&rows);
    for client in [Client::Cofferdam, Client::Blkio, Client::Bare, Client::CofferdamNbd, Client::QsdNbd] {
        assert!(table.contains(client.name()), "{table}");
    }
    let crossings = rows.iter().find(|row| row.client == "cofferdam" && row.depth == 32 && row.mode == "poll");
    let crossings = crossings.and_then(|row| row.crossings_per_request).expect("counted");
    assert!(crossings > 0.0 && crossings <= 1.0, "{crossings} crossings per request");

    let folder = tempfile::tempdir()?;
    let json = folder.path().join("block.json");
    let aims = aims::aims(&results, None);
    assert!(aims.len() >= 10, "{aims:?}");
    report::write(&json, &rows, &results, &solo::all(&host, &[1, 128], Duration::from_millis(2))?, None, &aims)?;
    plot::draw(&json.with_extension("svg"), &rows)?;
    let read: Vec<serde_json::Value> = serde_json::from_str(&std::fs::read_to_string(&json)?)?;
    for key in ["client", "backend", "mode", "op", "depth", "queues", "kiops", "cpu_client_us", "cpu_backend_us"] {
        assert!(read.iter().all(|row| row.get(key).is_some_and(|value| !value.is_null())), "{key}");
    }
    // Of a handful of requests the one whose latency was to be sampled may not be among those that were counted.
    for key in ["p50_us", "p99_us", "p999_us"] {
        assert!(read.iter().all(|row| row.get(key).is_some()), "{key}");
        assert!(read.iter().any(|row| row[key].as_f64().is_some_and(|us| us > 0.0)), "{key}");
    }
    Ok(())
}

#[test]
fn system_calls_and_allocations_are_counted_one_by_one() -> anyhow::Result<()> {
    let counted = counting::count_system_calls(|begin| {
        begin()?;
        let (calls, allocations) = (counting::system_calls(), counting::allocations());
        for _ in 0..7 {
            rustix::thread::sched_yield();
        }
        drop((Box::new(1), vec![1_u8; 3]));
        Ok((counting::system_calls().zip(calls), counting::allocations() - allocations))
    })?;
    let (after, before) = counted.0.expect("counted");
    assert_eq!((after - before, counted.1), (7, 2));
    assert_eq!(counting::system_calls(), None, "of another thread");
    Ok(())
}

#[test]
fn a_device_that_sleeps_is_kicked_and_calls_back() -> anyhow::Result<()> {
    // With one request at a time every one of them needs a kick and a call: a lost one ends in an error.
    let host = Host::start(None)?;
    let device = Backend::start(Kind::Null, Pace::Event, 1, null_program())?;
    let mut engine = InProcess::connect(&host, &device, Mode::Event, 1)?;
    let mut work = Loop::new(&mut engine, Job { op: Op::RandRead, depth: 1 })?;
    let slice = work.run(&mut engine, Duration::ZERO, Duration::from_millis(20), &|| Ok(Times::default()))?;
    assert!(slice.requests > 10, "{}", slice.requests);
    assert!(engine.crossings() >= Some(slice.requests));
    Ok(())
}

#[test]
fn the_hot_path_allocates_nothing_and_asks_nothing_of_the_kernel() -> anyhow::Result<()> {
    let host = Host::start(None)?;
    for depth in [32, 128] {
        let (mut requests, mut allocations, mut calls, begun) = (0, 0.0, 0.0, Instant::now());
        // A machine whose cores have other work gets few requests done in one slice.
        while requests < 2000 {
            let path = budget::count(&host, null_program(), Mode::Poll, depth)?;
            assert!(begun.elapsed() < Duration::from_secs(60), "{path:?}");
            assert!(path.crossings_per_request > 0.0 && path.crossings_per_request <= 0.5, "{path:?}");
            requests += path.requests;
            allocations += path.allocations_per_request * path.requests as f64;
            calls += path.system_calls_per_request * path.requests as f64;
        }
        // One in a hundred would be a slice that began before the warm-up was over.
        let most = requests as f64 / 100.0;
        assert!(
            allocations < most && calls < most,
            "{allocations} allocations, {calls} system calls, {requests} requests"
        );
    }
    Ok(())
}
