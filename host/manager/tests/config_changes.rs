//! A device that announces another configuration: what the driver is told, who sees it, and what a storm of it costs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cofferdam_manager::{
    Binding, Config, EventKind, Handle, HandleSpec, IoError, IoFlags, IoOp, IoRequest, LoadSpec, Manager, Transport,
    UnloadOptions,
};
use cofferdam_sim::{ConfigLie, Drive, Effect, Options, Profile, Rule, Sim, Storage};

/// Only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(20);
const MIB: u64 = 1 << 20;
const BYTES: u32 = 4096;

fn sim() -> Sim {
    let profile = Profile { queues: 2, ..Profile::default() };
    Sim::new(Options { profile, storage: Storage::Memory(16 * MIB), ..Options::default() }).unwrap()
}

fn manager() -> Manager {
    let cache = format!("{}/../../target/test-cache", env!("CARGO_MANIFEST_DIR"));
    Manager::new(Config { cache_dir: Some(cache.into()) }).unwrap()
}

fn load_on(manager: &Manager, component: &str, transport: Box<dyn Transport>) -> Arc<Binding> {
    let path = format!("{}/../../target/drivers/{component}", env!("CARGO_MANIFEST_DIR"));
    let driver = std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}; run 'cargo xtask build' first"));
    let mut spec = LoadSpec::new(component, driver, transport);
    spec.queues = Some(2);
    // What becomes of a driver that is replaced is in `recovery.rs`.
    spec.restarts = None;
    manager.load(spec).unwrap()
}

fn load(manager: &Manager, component: &str, sim: &Sim) -> Arc<Binding> {
    load_on(manager, component, Box::new(sim.transport(Drive::Threads).unwrap()))
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn capacity(binding: &Binding) -> u64 {
    binding.geometry().unwrap().capacity_bytes
}

/// How a write of a block at `offset` ends.
fn write(handle: &Handle, offset: u64) -> Result<(), IoError> {
    let buffer = Some(handle.lease(BYTES).unwrap());
    let flags = IoFlags::default();
    let mut requests = vec![IoRequest { user: offset, op: IoOp::Write, offset, length: BYTES, flags, buffer }];
    handle.submit(&mut requests).unwrap();
    let (deadline, mut out) = (Instant::now() + PATIENCE, Vec::new());
    while out.is_empty() {
        assert!(Instant::now() < deadline, "no answer");
        handle.wait(Duration::from_millis(100), &mut out);
    }
    out.remove(0).result
}

/// The changes so far, and the refusals.
fn changes(manager: &Manager) -> (Vec<Vec<String>>, Vec<String>) {
    let (mut taken, mut refusals, mut reader) = (Vec::new(), Vec::new(), manager.events(Some(1)));
    while let Some(record) = reader.next(Duration::ZERO) {
        match record.what {
            EventKind::ConfigChanged { refused: Some(why), .. } => refusals.push(why),
            EventKind::ConfigChanged { changes, refused: None } => taken.push(changes),
            _ => {}
        }
    }
    (taken, refusals)
}

fn unload(manager: &Manager, binding: &Binding) {
    let certificate = manager.unload(binding.name(), &UnloadOptions::default()).unwrap();
    assert!(certificate.residual.is_zero() && certificate.leaked.bytes == 0, "{certificate:?}");
}

#[test]
fn a_disk_that_grows_is_larger_for_everybody_and_a_new_handle_says_so() {
    let (sim, manager) = (sim(), manager());
    let binding = load(&manager, "virtio-blk.wasm", &sim);
    let old = binding.open(HandleSpec::default()).unwrap();
    assert_eq!(write(&old, 16 * MIB), Err(IoError::Invalid));
    sim.resize(32 * MIB).unwrap();
    until("the new capacity", || capacity(&binding) == 32 * MIB);
    until("the event", || changes(&manager).0.len() == 1);
    assert_eq!(changes(&manager).0, [["capacity-bytes 16777216 -> 33554432"]]);
    let new = binding.open(HandleSpec { lane: 1, ..HandleSpec::default() }).unwrap();
    assert_eq!((old.geometry().capacity_bytes, new.geometry().capacity_bytes), (16 * MIB, 32 * MIB));
    for handle in [&old, &new] {
        assert_eq!(write(handle, 32 * MIB - u64::from(BYTES)), Ok(()));
        assert_eq!(write(handle, 32 * MIB), Err(IoError::Invalid));
    }
    drop((old, new));
    unload(&manager, &binding);
}

#[test]
fn what_lies_beyond_the_end_of_a_disk_that_shrank_is_refused_by_the_host_on_every_lane() {
    let (sim, manager) = (sim(), manager());
    let binding = load(&manager, "virtio-blk.wasm", &sim);
    let handles = [0, 1].map(|lane| binding.open(HandleSpec { lane, ..HandleSpec::default() }).unwrap());
    handles.iter().for_each(|handle| assert_eq!(write(handle, 8 * MIB), Ok(())));
    sim.resize(8 * MIB).unwrap();
    until("the event", || changes(&manager).0.len() == 1);
    let taken = sim.stats().taken;
    for handle in &handles {
        assert_eq!(write(handle, 8 * MIB), Err(IoError::Invalid));
        assert_eq!(sim.stats().taken, taken, "the device was asked");
    }
    assert_eq!(write(&handles[0], 0), Ok(()));
    drop(handles);
    unload(&manager, &binding);
}

#[test]
fn a_storm_of_changes_costs_a_bounded_number_of_calls_and_the_last_one_counts() {
    let (sim, manager) = (sim(), manager());
    let binding = load(&manager, "virtio-blk.wasm", &sim);
    let loaded = sim.stats().config_reads;
    sim.resize(32 * MIB).unwrap();
    until("a calm change", || capacity(&binding) == 32 * MIB);
    let (storm, calm) = (Instant::now(), sim.stats().config_reads);
    let reads_of_a_call = calm - loaded;
    assert!(reads_of_a_call > 0);
    let mut announced = 0u64;
    while storm.elapsed() < Duration::from_secs(1) {
        sim.resize((17 + announced % 2) * MIB).unwrap();
        announced += 1;
    }
    let last = 64 * MIB;
    sim.resize(last).unwrap();
    until("the last size", || capacity(&binding) == last);
    let calls = u128::from((sim.stats().config_reads - calm).div_ceil(reads_of_a_call));
    let took = storm.elapsed();
    assert!(announced > 1000, "{announced} are no storm");
    assert!(calls >= 2 && calls <= took.as_millis() / 100 + 1, "{calls} calls in {took:?} for {announced} changes");
    let handle = binding.open(HandleSpec::default()).unwrap();
    assert_eq!(write(&handle, last - u64::from(BYTES)), Ok(()));
    drop(handle);
    unload(&manager, &binding);
}

#[test]
fn an_unload_in_a_storm_of_changes_leaves_nothing() {
    let (sim, manager) = (sim(), manager());
    for _ in 0..10 {
        let binding = load(&manager, "virtio-blk.wasm", &sim);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for turn in 0.. {
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                    sim.resize((16 + turn % 2) * MIB).unwrap();
                }
            });
            let started = changes(&manager).0.len();
            until("a change", || changes(&manager).0.len() > started);
            unload(&manager, &binding);
            over.store(true, Ordering::Relaxed);
        });
    }
}

#[test]
fn a_driver_that_faults_over_a_change_takes_its_binding_down_with_the_reason() {
    let (sim, manager) = (sim(), manager());
    let binding = load(&manager, "test/trap-config-changed.wasm", &sim);
    sim.announce_config();
    until("gone", || binding.certificate().is_some());
    let certificate = binding.certificate().unwrap();
    assert!(certificate.residual.is_zero() && certificate.leaked.bytes == 0, "{certificate:?}");
    let mut reader = manager.events(Some(1));
    let mut faults = std::iter::from_fn(|| reader.next(Duration::ZERO)).filter_map(|record| match record.what {
        EventKind::Fault { kind, message, .. } => Some((kind, message)),
        _ => None,
    });
    let (kind, message) = faults.next().expect("no fault was recorded");
    assert_eq!(kind, "trap", "{message}");
}

#[test]
fn a_change_that_the_driver_refuses_leaves_everything_as_it_was() {
    let (sim, manager) = (sim(), manager());
    let binding = load(&manager, "virtio-blk.wasm", &sim);
    sim.add_rule(Rule::always(Effect::Config(ConfigLie::CapacityHuge)));
    sim.announce_config();
    until("the refusal", || changes(&manager).1.len() == 1);
    assert_eq!((capacity(&binding), changes(&manager).0.len()), (16 * MIB, 0));
    let handle = binding.open(HandleSpec::default()).unwrap();
    assert_eq!(write(&handle, 0), Ok(()));
    sim.clear_rules();
    sim.resize(20 * MIB).unwrap();
    until("the next change", || capacity(&binding) == 20 * MIB);
    drop(handle);
    unload(&manager, &binding);
}

/// The real thing: a daemon's disk over vhost-user, resized by its monitor.
#[test]
fn a_resize_of_a_storage_daemons_disk_reaches_the_driver() {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Command, Stdio};
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("disk.img"), folder.path().join("blk.sock"));
    std::fs::File::create(&image).unwrap().set_len(16 * MIB).unwrap();
    let export = "type=vhost-user-blk,id=e0,node-name=n0,writable=on,num-queues=2,addr.type=unix";
    let mut daemon = Command::new("qemu-storage-daemon")
        .args(["--blockdev", &format!("driver=file,node-name=n0,filename={}", image.display())])
        .args(["--export", &format!("{export},addr.path={}", socket.display())])
        .args(["--chardev", "stdio,id=m0", "--monitor", "chardev=m0"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("cannot start qemu-storage-daemon, which this test needs (Debian: apt-get install qemu-utils)");
    let mut monitor = daemon.stdin.take().unwrap();
    let mut lines = BufReader::new(daemon.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().contains("QMP"));
    let mut command = |text: &str| {
        writeln!(monitor, "{text}").unwrap();
        let answer = lines.by_ref().map(Result::unwrap).find(|line| line.contains("return") || line.contains("error"));
        assert!(answer.as_ref().is_some_and(|line| line.contains("return")), "{text}: {answer:?}");
    };
    command(r#"{"execute":"qmp_capabilities"}"#);

    let manager = manager();
    let address = format!("vhost-user:{}", socket.display());
    let transport = cofferdam_bus_vhost_user::VhostUser::connect(&address).unwrap();
    let binding = load_on(&manager, "virtio-blk.wasm", Box::new(transport));
    let old = binding.open(HandleSpec::default()).unwrap();
    command(r#"{"execute":"block_resize","arguments":{"node-name":"n0","size":33554432}}"#);
    until("the new capacity", || capacity(&binding) == 32 * MIB);
    until("the event", || changes(&manager).0.len() == 1);
    assert_eq!(write(&old, 32 * MIB - u64::from(BYTES)), Ok(()));
    drop(old);
    unload(&manager, &binding);
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}
