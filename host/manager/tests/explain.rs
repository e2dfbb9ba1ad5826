//! `why` answers at once and says who it is, whatever is stuck.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cofferdam_manager::{
    Binding, Completion, Config, Explanation, GuestLimits, Handle, HandleSpec, IoOp, IoRequest, LoadSpec, Manager,
    UnloadOptions,
};
use cofferdam_sim::{Drive, Effect, Options, Rule, Sim, Storage};

/// Longer than any of these tests: nobody is seen because a deadline let him go.
const CALL_DEADLINE_MS: u64 = 60_000;
/// What an explanation may take: its own bound of 30 ms for backtraces, and what a machine that does other things needs.
const AT_ONCE: Duration = Duration::from_millis(500);

fn driver(name: &str) -> Vec<u8> {
    let path = format!("{}/../../target/drivers/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}; run 'cargo xtask build' first"))
}

fn manager() -> Manager {
    let cache = format!("{}/../../target/test-cache", env!("CARGO_MANIFEST_DIR"));
    Manager::new(Config { cache_dir: Some(cache.into()) }).unwrap()
}

fn sim(rules: Vec<Rule>) -> Sim {
    Sim::new(Options { storage: Storage::Memory(16 << 20), rules, ..Options::default() }).unwrap()
}

fn gated() -> Sim {
    sim(vec![Rule::always(Effect::Gate)])
}

fn spec(sim: &Sim, name: &str, component: &str) -> LoadSpec {
    let transport = Box::new(sim.transport(Drive::Threads).unwrap());
    let limits = GuestLimits { call_deadline_ms: CALL_DEADLINE_MS, ..GuestLimits::default() };
    LoadSpec { name: Some(name.into()), limits, ..LoadSpec::new(component, driver(component), transport) }
}

fn client(label: &str, peer: &str) -> HandleSpec {
    HandleSpec { label: label.into(), peer: peer.into(), ..HandleSpec::default() }
}

fn write(handle: &Handle, block: u64) {
    let buffer = handle.lease(4096).unwrap();
    let request = IoRequest {
        user: block,
        op: IoOp::Write,
        offset: block * 4096,
        length: 4096,
        flags: Default::default(),
        buffer: Some(buffer),
    };
    let _ = handle.submit(&mut vec![request]);
}

fn answers(handle: &Handle, count: usize) -> Vec<Completion> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut out = Vec::new();
    while out.len() < count {
        assert!(Instant::now() < deadline, "{} of {count} answers after 10 s", out.len());
        handle.wait(Duration::from_millis(100), &mut out);
    }
    out
}

/// Explains until it says what is wanted; every explanation must come at once.
fn until(binding: &Binding, what: &str, wanted: impl Fn(&Explanation) -> bool) -> Explanation {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let begun = Instant::now();
        let explanation = binding.explain();
        let took = begun.elapsed();
        assert!(took < AT_ONCE, "the explanation took {took:?}");
        if wanted(&explanation) {
            return explanation;
        }
        assert!(Instant::now() < deadline, "{what}: not within 20 s: {explanation:#?}");
        std::thread::yield_now();
    }
}

fn force() -> UnloadOptions {
    UnloadOptions { force: true, deadline: Duration::from_secs(2), ..UnloadOptions::default() }
}

#[test]
fn a_binding_that_does_nothing_waits_for_nothing() {
    let (sim, manager) = (sim(Vec::new()), manager());
    let binding = manager.load(spec(&sim, "idle", "virtio-blk.wasm")).unwrap();
    let explanation = binding.explain();
    assert_eq!((explanation.phase.as_str(), explanation.state.as_str()), ("serving", "serving"));
    assert_eq!(explanation.waits_for, Vec::<String>::new());
    assert!(explanation.requests.is_empty() && explanation.calls.is_empty() && explanation.handles.is_empty());
    assert!(explanation.fault.is_none() && explanation.certificate.is_none() && explanation.cause.is_none());
}

#[test]
fn requests_at_the_device_are_told_with_token_age_stage_and_owner() {
    let (sim, manager) = (gated(), manager());
    let binding = manager.load(spec(&sim, "waiting", "virtio-blk.wasm")).unwrap();
    let first = binding.open(client("nbd:/run/d.sock", "pid 812")).unwrap();
    let second = binding.open(client("in-process", "a\u{1b}[2Jtest")).unwrap();
    write(&first, 0);
    let one = until(&binding, "on the ring for 100 ms", |now| now.requests.iter().any(|oldest| oldest.age_ms >= 100));
    (1..20).for_each(|block| write(&second, block));
    let all =
        until(&binding, "all on the ring", |now| now.waits_for.iter().any(|text| text.starts_with("20 requests")));

    let oldest = &all.requests[0];
    assert_eq!((oldest.lane, oldest.handle, oldest.operation.as_str()), (0, first.id(), "write"));
    assert_eq!((oldest.stage.as_str(), oldest.token.as_str()), ("published", "0x0"));
    assert!(oldest.age_ms >= one.requests[0].age_ms && oldest.age_ms < 20_000, "{oldest:?}");
    assert_eq!(all.requests.len(), 16, "the oldest of 20");
    assert!(all.requests[1..].iter().all(|request| request.handle == second.id() && request.age_ms <= oldest.age_ms));
    let wanted = format!(
        "20 requests on the ring of {}; the oldest (write, token 0x0, of handle 1 nbd:/run/d.sock pid 812) has waited",
        binding.device()
    );
    assert!(all.waits_for[0].starts_with(&wanted), "{:?}", all.waits_for);
    assert_eq!((all.handles[0].in_flight, all.handles[1].in_flight), (1, 19));
    assert_eq!(all.handles[1].peer, "a\\u{1b}[2Jtest");

    // What is answered is off the board, and its slot's next request has another token.
    sim.open_gate(20);
    answers(&first, 1);
    answers(&second, 19);
    let none = until(&binding, "empty", |now| now.requests.is_empty());
    assert_eq!(none.waits_for, Vec::<String>::new());
    (0..20).for_each(|block| write(&first, block));
    let again = until(&binding, "on the ring again", |now| now.requests.len() == 16);
    assert!(again.requests.iter().all(|request| request.token.starts_with("0x1")), "{:?}", again.requests);

    // Of a handle that was closed with requests in flight nobody knows the peer any more.
    drop(first);
    let closed = until(&binding, "closed", |now| now.waits_for.iter().any(|text| text.contains("which is closed")));
    assert_eq!(closed.handles.len(), 1);
    manager.unload_binding(&binding, &force()).unwrap();
}

#[test]
fn an_unload_that_gave_up_is_explained() {
    let (sim, manager) = (gated(), manager());
    let binding = manager.load(spec(&sim, "gave-up", "virtio-blk.wasm")).unwrap();
    let handle = binding.open(client("in-process", "test")).unwrap();
    write(&handle, 0);
    let short = UnloadOptions { deadline: Duration::from_millis(50), ..UnloadOptions::default() };
    manager.unload_binding(&binding, &short).unwrap_err();
    let now = binding.explain();
    assert_eq!((now.phase.as_str(), now.state.as_str(), now.cause.as_deref()), ("draining", "waiting", Some("unload")));
    assert!(now.draining_ms.is_some_and(|ms| ms >= 50) && !now.forced);
    assert!(now.waits_for[0].starts_with("1 request on the ring"), "{:?}", now.waits_for);
    assert!(now.waits_for.last().unwrap().contains("--force"), "{:?}", now.waits_for);
    let certificate = manager.unload_binding(&binding, &force()).unwrap();
    let gone = binding.explain();
    assert_eq!((gone.phase.as_str(), gone.state.as_str()), ("detached", "detached"));
    assert_eq!(gone.waits_for, Vec::<String>::new());
    assert_eq!(gone.certificate, Some(certificate));
}

#[test]
fn a_driver_that_loops_is_named_with_thread_age_and_place_and_stays_explained_when_it_was_stopped() {
    let (sim, manager) = (sim(Vec::new()), manager());
    let binding = manager.load(spec(&sim, "loops", "test/loop-submit.wasm")).unwrap();
    let handle = binding.open(client("nbd:/run/d.sock", "pid 812")).unwrap();
    let client = std::thread::Builder::new().name("stuck-client".into());
    let client = client.spawn(move || write(&handle, 3)).unwrap();

    let stuck = until(&binding, "stuck for 100 ms", |now| {
        now.calls.first().is_some_and(|call| call.age_ms >= 100 && !call.backtrace.is_empty())
    });
    let call = &stuck.calls[0];
    assert_eq!((call.lane.as_str(), call.export.as_str(), &call.import), ("0", "submit", &None));
    assert_eq!((call.thread.as_str(), call.interrupted), ("stuck-client", false));
    assert!(call.core.is_some() && call.backtrace.iter().any(|frame| frame.contains("submit")), "{call:?}");
    let request = &stuck.requests[0];
    assert_eq!((request.stage.as_str(), request.token.as_str(), request.handle), ("given", "0x0", 1));
    assert!(stuck.waits_for[0].starts_with("the driver has been in `submit` on lane 0 for "), "{:?}", stuck.waits_for);
    assert!(stuck.waits_for[0].contains("(thread stuck-client, core "), "{:?}", stuck.waits_for);
    assert!(
        stuck.waits_for[1].starts_with(
            "1 request with the driver (write, token 0x0, of handle 1 nbd:/run/d.sock pid 812) has waited"
        ),
        "{:?}",
        stuck.waits_for
    );
    assert!(stuck.fault.is_none());

    // Nothing changes while the ladder is at work on it, but for its being at work.
    let short = UnloadOptions { deadline: Duration::from_millis(50), ..UnloadOptions::default() };
    manager.unload_binding(&binding, &short).unwrap_err();
    let draining = until(&binding, "draining", |now| now.phase == "draining");
    assert_eq!(draining.calls[0].export, "submit");

    manager.unload_binding(&binding, &force()).unwrap();
    client.join().unwrap();
    let gone = binding.explain();
    let fault = gone.fault.unwrap();
    assert_eq!(fault.kind, "killed");
    assert!(fault.backtrace.iter().any(|frame| frame.contains("submit")), "{fault:?}");
    assert!(gone.calls.is_empty() && gone.waits_for.is_empty(), "{:?}", gone.waits_for);
}

#[test]
fn a_load_whose_driver_loops_is_explained_and_so_is_its_end() {
    let (sim, manager) = (sim(Vec::new()), manager());
    // Nobody but its deadline ends a call of a load: this is how long the test takes.
    let limits = GuestLimits { call_deadline_ms: 3_000, ..GuestLimits::default() };
    let spec = LoadSpec { limits, ..spec(&sim, "loading", "test/loop-attach.wasm") };
    let loader = manager.clone();
    let loading = std::thread::Builder::new().name("loader".into()).spawn(move || loader.load(spec)).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let binding = loop {
        match manager.get("loading") {
            Some(binding) => break binding,
            None => assert!(Instant::now() < deadline, "not registered"),
        }
        std::thread::yield_now();
    };
    let stuck = until(&binding, "in attach", |now| now.calls.first().is_some_and(|call| call.age_ms >= 100));
    assert_eq!(stuck.phase, "loading");
    assert_eq!((stuck.calls[0].lane.as_str(), stuck.calls[0].export.as_str()), ("control", "attach"));
    let wanted = "a load of this binding is still running: the driver has been in `attach` on the control lane for ";
    assert!(stuck.waits_for[0].starts_with(wanted), "{:?}", stuck.waits_for);

    // An unload has to wait for the load, and says so too.
    let short = UnloadOptions { deadline: Duration::from_millis(50), ..UnloadOptions::default() };
    manager.unload_binding(&binding, &short).unwrap_err();
    let both = binding.explain();
    assert!(both.waits_for[0].starts_with(wanted), "{:?}", both.waits_for);
    let _ = loading.join().unwrap().unwrap_err();
    let gone = until(&binding, "rolled back", |now| now.phase == "detached");
    let fault = gone.fault.unwrap();
    assert!(fault.backtrace.iter().any(|frame| frame.contains("attach")), "{fault:?}");
}

#[test]
fn explanations_are_right_while_two_clients_submit() {
    let (sim, manager) = (sim(Vec::new()), manager());
    let binding = manager.load(spec(&sim, "busy", "virtio-blk.wasm")).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    // Writes of one client, flushes of the other: a mixture of two requests would show.
    let clients: Vec<_> = [IoOp::Write, IoOp::Flush]
        .into_iter()
        .map(|op| {
            let (handle, stop) = (binding.open(client("in-process", "")).unwrap(), Arc::clone(&stop));
            let id = handle.id();
            let run = move || {
                let mut out = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let write = op == IoOp::Write;
                    let buffer = write.then(|| handle.lease(4096).unwrap());
                    let length = if write { 4096 } else { 0 };
                    let request = IoRequest { user: 1, op, offset: 0, length, flags: Default::default(), buffer };
                    handle.submit(&mut vec![request]).unwrap();
                    out.clear();
                    while handle.wait(Duration::from_millis(100), &mut out) == 0 {}
                    out.iter().for_each(|answer| assert_eq!(answer.result, Ok(())));
                }
            };
            (id, if op == IoOp::Write { "write" } else { "flush" }, std::thread::spawn(run))
        })
        .collect();
    let (mut seen, begun) = ([0_u64; 2], Instant::now());
    while seen.iter().any(|count| *count < 200) {
        assert!(begun.elapsed() < Duration::from_secs(30), "seen {seen:?}");
        let now = binding.explain();
        assert!(now.requests.len() <= 2, "{:?}", now.requests);
        for request in &now.requests {
            let place = clients.iter().position(|(id, _, _)| *id == request.handle).unwrap();
            assert_eq!(clients[place].1, request.operation);
            assert!(request.age_ms < 10_000 && ["given", "parked", "published"].contains(&request.stage.as_str()));
            seen[place] += 1;
        }
        assert!(
            now.calls.iter().all(|call| ["submit", "complete"].contains(&call.export.as_str()) && call.lane == "0")
        );
    }
    stop.store(true, Ordering::Relaxed);
    clients.into_iter().for_each(|(_, _, client)| client.join().unwrap());
    let idle = until(&binding, "idle", |now| now.requests.is_empty());
    assert_eq!(idle.waits_for, Vec::<String>::new());
    let json = serde_json::to_string(&idle).unwrap();
    assert_eq!(serde_json::from_str::<Explanation>(&json).unwrap().name, "busy");
}
