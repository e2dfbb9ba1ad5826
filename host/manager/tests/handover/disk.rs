//! Disks: rings with requests alone.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_bus_vhost_user::VhostUser;
use cofferdam_manager::{
    Binding, Buffer, Completion, EventKind, ExportedBinding, HandOverError, Handle, HandleSpec, IoError, IoFlags, IoOp,
    IoRequest, LoadError, LoadSpec, Manager, Outcome, Phase, Reconnect, SubmitError, UnloadOptions, UpgradeSpec,
};
use cofferdam_sim::{Drive, OnDeath, Options, Profile, Server, Sim, Storage};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{DEADLINE, PATIENCE, adopt, component, hand_over, manager, reopen, take_over};

const BLOCK: u32 = 4096;
struct Bed {
    sim: Sim,
    server: Option<Server>,
    _folder: TempDir,
    address: String,
}

impl Bed {
    fn new(lanes: u16) -> Bed {
        let folder = tempfile::tempdir().unwrap();
        let profile = Profile { queues: lanes, ..Profile::default() };
        let sim = Sim::new(Options { profile, storage: Storage::Memory(16 << 20), ..Options::default() }).unwrap();
        let path = folder.path().join("blk.sock");
        let address = format!("vhost-user:{}", path.display());
        let mut bed = Bed { sim, server: None, _folder: folder, address };
        bed.server = Some(bed.serve());
        bed
    }

    fn serve(&self) -> Server {
        self.sim.serve(Path::new(self.address.trim_start_matches("vhost-user:")), OnDeath::End).unwrap()
    }

    fn load(&self, manager: &Manager, lanes: u16) -> Arc<Binding> {
        self.load_as(manager, lanes, "virtio-blk", |_| {})
    }

    fn load_as(&self, manager: &Manager, lanes: u16, driver: &str, change: impl FnOnce(&mut LoadSpec)) -> Arc<Binding> {
        let device = VhostUser::connect(&self.address).unwrap();
        let mut spec = LoadSpec::new(driver, component(driver), Box::new(device));
        (spec.name, spec.queues) = (Some("disk".into()), Some(lanes));
        change(&mut spec);
        manager.load(spec).unwrap()
    }

    /// The back end goes away and is there again.
    fn restart(&mut self, binding: &Binding) {
        self.server.take().unwrap().stop().unwrap();
        // Requests that such a back end is given before its loss is noticed are never shown to be at rest: it ends, and its process does not.
        let deadline = Instant::now() + PATIENCE;
        while binding.phase() != Phase::Recovering {
            assert!(Instant::now() < deadline, "the loss was not noticed");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.server = Some(self.serve());
    }

    /// The binding leaves and nothing of it is left; the device has seen nothing that it should not have.
    fn ends_clean(mut self, manager: &Manager, binding: &Arc<Binding>) {
        let certificate = manager.unload_binding(binding, &UnloadOptions::default()).unwrap();
        assert_eq!(certificate.outcome, Outcome::Unloaded, "{certificate:?}");
        // The device is a part of this process, and may still have its own mapping of the memory.
        let left = &certificate.residual;
        assert_eq!((left.calls, left.handles, left.requests, left.buffers), (0, 0, 0, 0), "{certificate:?}");
        assert_eq!(certificate.leaked.bytes, 0, "{certificate:?}");
        assert_eq!(self.sim.violations(), []);
        self.server.take().unwrap().stop().unwrap();
    }
}

/// One request and its answer. Waits as long as clients are held.
fn ask(handle: &Handle, op: IoOp, offset: u64, buffer: Option<Buffer>) -> Completion {
    let length = buffer.as_ref().map_or(0, Buffer::len);
    let mut requests = vec![IoRequest { user: 1, op, offset, length, flags: IoFlags::default(), buffer }];
    let (deadline, mut out) = (Instant::now() + PATIENCE, Vec::new());
    while out.is_empty() {
        assert!(Instant::now() < deadline, "not answered");
        match handle.submit(&mut requests) {
            Ok(()) | Err(SubmitError::Held | SubmitError::Full) => {}
            Err(error) => panic!("{error}"),
        }
        handle.poll(false, &mut out);
    }
    out.remove(0)
}

/// Writes or reads a block.
fn call(handle: &Handle, op: IoOp, block: u64, fill: u8) -> Vec<u8> {
    let buffer = handle.lease(BLOCK).unwrap();
    buffer.fill(0, BLOCK, fill).unwrap();
    let answer = ask(handle, op, block * u64::from(BLOCK), Some(buffer));
    assert_eq!(answer.result, Ok(()));
    let mut bytes = vec![0; BLOCK as usize];
    answer.buffer.unwrap().read_at(0, &mut bytes).unwrap();
    bytes
}

fn flush(handle: &Handle) -> Result<(), IoError> {
    ask(handle, IoOp::Flush, 0, None).result
}

fn open(binding: &Arc<Binding>, lane: usize) -> Handle {
    binding.open(HandleSpec { lane, ..HandleSpec::default() }).unwrap()
}

/// Writes and reads some blocks of every lane.
fn exercise(binding: &Arc<Binding>, rounds: u64, seed: u8) {
    for lane in 0..binding.lanes() {
        let handle = open(binding, lane);
        for round in 0..rounds {
            let (block, fill) = (lane as u64 * 1024 + round % 512, seed ^ round as u8);
            call(&handle, IoOp::Write, block, fill);
            assert_eq!(call(&handle, IoOp::Read, block, !fill), [fill; BLOCK as usize], "block {block}");
        }
    }
}

#[test]
fn another_manager_goes_on_with_the_device_as_it_runs() {
    let (bed, one, two) = (Bed::new(2), manager(), manager());
    let first = bed.load(&one, 2);
    exercise(&first, 100, 0x11);
    drop(first);
    let second = take_over(&one, &two);
    drop(one);
    let handle = open(&second, 1);
    assert_eq!(call(&handle, IoOp::Read, 1024 + 7, 0), [0x11 ^ 7; BLOCK as usize], "what was written before");
    drop(handle);
    exercise(&second, 100, 0x22);
    let spec = UpgradeSpec {
        driver: "well-behaved".into(),
        component: component("test/well-behaved"),
        deadline: DEADLINE,
        probation: Duration::ZERO,
    };
    assert_eq!(two.upgrade("disk", spec).unwrap().generation, 2, "it can be exchanged there");
    exercise(&second, 10, 0x33);
    let mut events = two.events(None);
    let events: Vec<_> = std::iter::from_fn(|| events.next(Duration::ZERO)).map(|event| event.what).collect();
    assert!(events.iter().any(|what| matches!(what, EventKind::TakenOver { connections: 0, .. })), "{events:?}");
    bed.ends_clean(&two, &second);
}

#[test]
fn a_device_that_is_brought_back_when_it_is_lost_still_is_and_unflushed_writes_are_remembered() {
    let (mut bed, one, two) = (Bed::new(1), manager(), manager());
    let address = bed.address.clone();
    let first = bed.load_as(&one, 1, "virtio-blk", |spec| {
        spec.reconnect = Some(Reconnect { wait: PATIENCE, open: reopen(&address) });
    });
    exercise(&first, 3, 5);
    drop(first);
    let second = take_over(&one, &two);
    let handle = open(&second, 0);
    // The back end goes away and is there again: a client notices nothing but that its flush fails, once.
    bed.restart(&second);
    assert_eq!(call(&handle, IoOp::Read, 2, 0), [5 ^ 2; BLOCK as usize]);
    assert_eq!([flush(&handle), flush(&handle)], [Err(IoError::Io), Ok(())]);
    let third = take_over(&two, &one);
    drop(second);
    // Nothing was written since.
    bed.restart(&third);
    let handle = open(&third, 0);
    assert_eq!([flush(&handle), flush(&handle)], [Ok(()), Ok(())]);
    drop(handle);
    exercise(&third, 3, 6);
    bed.ends_clean(&one, &third);
}

#[test]
fn a_change_of_the_configuration_that_nobody_was_told_of_is_found_by_whoever_takes_over() {
    let (bed, one, two) = (Bed::new(1), manager(), manager());
    let first = bed.load(&one, 1);
    let mut over = hand_over(&one).unwrap();
    let mut adopted = adopt(&two, &mut over).unwrap();
    // Its driver has looked by now. Behind a socket this device has no message for it, as one that told the process before.
    bed.sim.resize(32 << 20).unwrap();
    assert_eq!(over.0.commit(), 1);
    drop(first);
    let second = adopted.remove(0).serve(Duration::ZERO).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while second.geometry().unwrap().capacity_bytes != 32 << 20 {
        assert!(Instant::now() < deadline, "its driver was not told");
        std::thread::sleep(Duration::from_millis(1));
    }
    bed.ends_clean(&two, &second);
}

#[test]
fn it_goes_on_and_on_also_when_the_ring_wraps() {
    let (bed, mut manager_now) = (Bed::new(1), manager());
    let mut binding = bed.load_as(&manager_now, 1, "virtio-blk", |spec| spec.ring_entries = 16);
    for turn in 0..12_u8 {
        exercise(&binding, 37, turn);
        let next = manager();
        drop(binding);
        binding = take_over(&manager_now, &next);
        manager_now = next;
    }
    exercise(&binding, 37, 0xee);
    bed.ends_clean(&manager_now, &binding);
}

#[test]
fn whoever_gives_up_before_the_commit_leaves_no_trace_and_the_first_serves_on() {
    let (bed, one) = (Bed::new(2), manager());
    let binding = bed.load(&one, 2);
    for turn in 0..3_u8 {
        exercise(&binding, 20, turn);
        let mut over = hand_over(&one).unwrap();
        let two = manager();
        let adopted = if turn == 0 { Vec::new() } else { adopt(&two, &mut over).unwrap() };
        if turn == 2 {
            drop(over);
            exercise(&binding, 20, 0x70);
            drop(adopted);
        } else {
            drop(adopted);
            drop(two);
            drop(over);
        }
    }
    exercise(&binding, 20, 0x80);
    bed.ends_clean(&one, &binding);
}

#[test]
fn clients_wait_while_it_is_held_and_go_on_when_nothing_came_of_it() {
    let (bed, one) = (Bed::new(1), manager());
    let binding = bed.load(&one, 1);
    let handle = open(&binding, 0);
    let over = hand_over(&one).unwrap().0;
    let mut requests =
        vec![IoRequest { user: 1, op: IoOp::Flush, offset: 0, length: 0, flags: IoFlags::default(), buffer: None }];
    assert_eq!(handle.submit(&mut requests), Err(SubmitError::Held));
    assert!(matches!(one.hand_over(DEADLINE), Err(HandOverError::Obstacles(_))), "one at a time");
    drop(over);
    assert_eq!(handle.submit(&mut requests), Ok(()));
    let (deadline, mut out) = (Instant::now() + PATIENCE, Vec::new());
    while out.is_empty() {
        assert!(Instant::now() < deadline);
        handle.poll(false, &mut out);
    }
    drop(handle);
    bed.ends_clean(&one, &binding);
}

#[test]
fn what_cannot_be_handed_over_is_said_before_anybody_is_held() {
    let (bed, one) = (Bed::new(1), manager());
    let binding = bed.load_as(&one, 1, "virtio-blk", |spec| spec.pinned = true);
    let sim = Sim::new(Options { storage: Storage::Memory(1 << 20), ..Options::default() }).unwrap();
    let mut spec = LoadSpec::new("b", component("virtio-blk"), Box::new(sim.transport(Drive::Threads).unwrap()));
    spec.name = Some("other".into());
    one.load(spec).unwrap();
    let found = one.obstacles();
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[0].starts_with("'disk': it is pinned"), "{found:?}");
    assert!(found[1].starts_with("'other': devices of this kind"), "{found:?}");
    assert_eq!(one.manifests().unwrap_err(), HandOverError::Obstacles(found.clone()));
    assert_eq!(one.hand_over(DEADLINE).unwrap_err(), HandOverError::Obstacles(found));
    assert_eq!(binding.phase(), Phase::Serving);
}

#[test]
fn a_driver_on_probation_stays_where_the_one_before_it_is_at_hand() {
    let (bed, one) = (Bed::new(1), manager());
    let binding = bed.load(&one, 1);
    let (driver, component) = ("well-behaved".into(), component("test/well-behaved"));
    one.upgrade("disk", UpgradeSpec { driver, component, deadline: DEADLINE, probation: PATIENCE }).unwrap();
    let found = one.obstacles();
    assert!(found.len() == 1 && found[0].contains("on probation"), "{found:?}");
    binding.roll_back(DEADLINE).unwrap();
    assert_eq!(one.obstacles(), Vec::<String>::new());
    bed.ends_clean(&one, &binding);
}

/// Another value at a place of a document, which has to be there.
fn set(document: &mut String, at: &str, value: Value) {
    let mut all: Value = serde_json::from_str(document).unwrap();
    *all.pointer_mut(at).unwrap_or_else(|| panic!("no {at} in {document}")) = value;
    *document = all.to_string();
}

#[test]
fn what_was_received_is_checked_and_a_mistake_in_it_is_an_error() {
    let (bed, one, two) = (Bed::new(1), manager(), manager());
    let binding = bed.load(&one, 1);
    exercise(&binding, 5, 1);
    type Change = fn(&mut ExportedBinding);
    let changes: [(&str, Change); 18] = [
        ("no state", |exported| exported.state.clear()),
        ("a ring somewhere else", |exported| {
            exported.state = exported.state.replace("\"position\":", "\"position\":1")
        }),
        ("a ring of another size", |exported| exported.state = exported.state.replace("\"size\":", "\"size\":1")),
        ("other features", |exported| exported.state = exported.state.replace("\"features\":", "\"features\":1")),
        ("another driver", |exported| exported.state = exported.state.replace("\"digest\":\"", "\"digest\":\"0")),
        ("memory of another length", |exported| exported.state = exported.state.replace("\"bytes\":", "\"bytes\":1")),
        ("a descriptor less", |exported| drop(exported.descriptors.pop())),
        ("something else for memory", |exported| {
            exported.descriptors[0] = std::fs::File::open("/dev/null").unwrap().into();
        }),
        ("a hint that no driver may leave", |exported| set(&mut exported.state, "/hint", json!(vec![0; 4097]))),
        ("a generation before the first", |exported| set(&mut exported.state, "/generation", json!(0))),
        ("more generations than there can be", |exported| set(&mut exported.state, "/generation", json!(u64::MAX))),
        ("more crashes than there can be", |exported| set(&mut exported.state, "/crashes", json!(u64::MAX))),
        ("another binding's memory", |exported| set(&mut exported.state, "/memory", json!("cofferdam-1-other"))),
        ("memory of any binding", |exported| set(&mut exported.state, "/memory", json!(""))),
        ("the last memory that there can be", |exported| {
            set(&mut exported.state, "/memory", json!(format!("cofferdam-{}-disk", u64::MAX)));
        }),
        ("memory of the device that nobody has", |exported| {
            let mut state: Value = serde_json::from_str(&exported.transport.state).unwrap();
            state["memory"].as_array_mut().unwrap().push(json!([0x2000_0000, 4096]));
            exported.transport.state = state.to_string();
        }),
        ("a device of another kind", |exported| exported.transport.kind = "pci".into()),
        ("half a device", |exported| drop(exported.transport.descriptors.pop())),
    ];
    for (what, change) in changes {
        let (mut over, manifests) = hand_over(&one).unwrap();
        let mut exported = over.take_exported().remove(0);
        change(&mut exported);
        let (manifest, component) = &manifests[0];
        let prepared = two.prepare(manifest.clone(), component).unwrap();
        let device = VhostUser::adopt(exported.transport);
        let adopted =
            device.map(|device| two.adopt(prepared, &exported.state, exported.descriptors, Box::new(device)).is_ok());
        assert!(!adopted.is_ok_and(|adopted| adopted), "{what}");
        drop(over);
        exercise(&binding, 2, 9);
    }
    assert!(two.bindings().is_empty());
    bed.ends_clean(&one, &binding);
}

#[test]
fn what_is_announced_has_bounds_and_so_has_what_is_loaded() {
    let (bed, one, two) = (Bed::new(1), manager(), manager());
    let address = bed.address.clone();
    let binding = bed.load_as(&one, 1, "virtio-blk", |spec| {
        spec.reconnect = Some(Reconnect { wait: PATIENCE, open: reopen(&address) });
    });
    let (manifest, component) = one.manifests().unwrap().remove(0);
    let announced = serde_json::to_string(&manifest).unwrap();
    let no_clock = json!({"secs": u64::MAX, "nanos": 0});
    let day = json!({"secs": 86_400, "nanos": 0});
    let changes = [
        ("/name", json!("../disk")),
        ("/name", json!("d".repeat(1 << 20))),
        ("/digest", json!("0")),
        ("/recipe/reconnect", no_clock.clone()),
        ("/recipe/reconnect", json!({"secs": 86_400, "nanos": 1})),
        ("/recipe/restarts/1/0", no_clock.clone()),
        ("/recipe/restarts/1/1", no_clock.clone()),
        ("/recipe/restarts/1/2", no_clock.clone()),
        ("/recipe/call_deadline_ms", json!(u64::MAX)),
        ("/recipe/host_budget_ms", json!(3_600_001)),
        ("/recipe/memory_bytes", json!(u64::MAX)),
        ("/recipe/table_elements", json!(u64::MAX)),
        ("/recipe/grants", json!(["wasi:filesystem=/"])),
        ("/recipe/grants", json!(["everything"])),
    ];
    let prepare = |changes: &[(&str, Value)]| {
        let mut forged = announced.clone();
        changes.iter().for_each(|(at, value)| set(&mut forged, at, value.clone()));
        two.prepare(serde_json::from_str(&forged).unwrap(), &component).map(drop)
    };
    for change in changes {
        let prepared = prepare(std::slice::from_ref(&change));
        assert!(prepared.is_err(), "{change:?}");
    }
    let clamped =
        ["/recipe/requests_per_lane", "/recipe/handle_limit", "/recipe/mapped_handles", "/recipe/mapped_bytes"];
    let clamped: Vec<_> = clamped.into_iter().map(|at| (at, json!(u64::MAX))).collect();
    prepare(&clamped).unwrap();
    prepare(&[("/recipe/reconnect", day.clone()), ("/recipe/restarts/1/2", day)]).unwrap();
    // Whoever loads is not believed more.
    let wait = Duration::from_secs(86_401);
    let sim = Sim::new(Options { storage: Storage::Memory(1 << 20), ..Options::default() }).unwrap();
    let mut spec = LoadSpec::new("b", crate::component("virtio-blk"), Box::new(sim.transport(Drive::Threads).unwrap()));
    spec.reconnect = Some(Reconnect { wait, open: reopen(&address) });
    assert!(matches!(one.load(spec), Err(LoadError::Bounds(_))));
    bed.ends_clean(&one, &binding);
}

#[test]
fn a_binding_whose_control_lane_broke_down_for_good_over_the_export_stays() {
    let (bed, one) = (Bed::new(1), manager());
    let binding = bed.load_as(&one, 1, "test/trap-suspend", |spec| spec.restarts = None);
    match one.hand_over(DEADLINE) {
        Err(HandOverError::NotDrained { reason, .. }) => assert!(reason.contains("broke down"), "{reason}"),
        other => panic!("{other:?}"),
    }
    let deadline = Instant::now() + PATIENCE;
    while binding.phase() != Phase::Detached {
        assert!(Instant::now() < deadline, "it leaves, as without this");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn nothing_is_committed_once_clients_wait_no_longer() {
    let (bed, one) = (Bed::new(1), manager());
    let binding = bed.load(&one, 1);
    let handle = open(&binding, 0);
    // They are held for a while longer than that.
    let over = one.hand_over(Duration::from_secs(1)).unwrap();
    assert!(over.is_whole());
    let deadline = Instant::now() + PATIENCE;
    while over.is_whole() {
        assert!(Instant::now() < deadline, "held for ever");
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(over);
    let mut requests =
        vec![IoRequest { user: 1, op: IoOp::Flush, offset: 0, length: 0, flags: IoFlags::default(), buffer: None }];
    assert_eq!(handle.submit(&mut requests), Ok(()));
    let mut out = Vec::new();
    while out.is_empty() {
        assert!(Instant::now() < deadline, "not answered");
        handle.poll(false, &mut out);
    }
    drop(handle);
    bed.ends_clean(&one, &binding);
}
