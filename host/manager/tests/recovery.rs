//! A driver that breaks down under its clients: another one takes its place, and nobody but the log notices.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_manager::{
    Binding, Completion, Config, CrashReport, EventKind, Handle, HandleSpec, IoError, IoFlags, IoOp, IoRequest,
    LoadSpec, Manager, Outcome, Phase, RestartError, RestartPolicy, SubmitError, UnloadOptions,
};
use cofferdam_sim::{Drive, Effect, Options, Profile, Rule, Sim, Storage, When};

const BLOCK: u32 = 4096;
/// Only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(20);
/// As `tests/guests/hostile/src/lane.rs` has them: a write here tells `on-command` to fail.
const COMMANDS: u64 = 15 << 20;
const TRAP: u64 = COMMANDS;
const LOOP: u64 = COMMANDS + 4096;
const NO_WORDS: u64 = COMMANDS + 3 * 4096;
const TRAP_COMPLETE: u64 = COMMANDS + 4 * 4096;

/// As often as it likes, and without a wait.
const ALWAYS: RestartPolicy =
    RestartPolicy { limit: 10_000, within: Duration::from_secs(1), backoff: Duration::ZERO, longest: Duration::ZERO };

struct Bed {
    manager: Manager,
    binding: Arc<Binding>,
    sim: Sim,
    spool: tempfile::TempDir,
}

fn bed(driver: &str, restarts: RestartPolicy, lanes: u16) -> Bed {
    let cache = format!("{}/../../target/test-cache", env!("CARGO_MANIFEST_DIR"));
    let manager = Manager::new(Config { cache_dir: Some(cache.into()) }).unwrap();
    let profile = Profile { queues: lanes, ..Profile::default() };
    let sim = Sim::new(Options { profile, storage: Storage::Memory(16 << 20), ..Options::default() }).unwrap();
    let path = format!("{}/../../target/drivers/test/{driver}.wasm", env!("CARGO_MANIFEST_DIR"));
    let component = std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let mut spec = LoadSpec::new(driver, component, Box::new(sim.transport(Drive::Threads).unwrap()));
    let spool = tempfile::tempdir().unwrap();
    (spec.restarts, spec.queues) = (Some(restarts), Some(lanes));
    spec.crash_dir = Some(spool.path().join("crashes"));
    let binding = manager.load(spec).unwrap();
    Bed { manager, binding, sim, spool }
}

impl Bed {
    fn open(&self, lane: usize) -> Handle {
        self.binding.open(HandleSpec { lane, ..HandleSpec::default() }).unwrap()
    }

    fn is_clean(&self) {
        let certificate = self.manager.unload_binding(&self.binding, &UnloadOptions::default()).unwrap();
        assert_eq!(certificate.outcome, Outcome::Unloaded, "{certificate:?}");
        assert!(certificate.residual.is_zero(), "{certificate:?}");
        assert_eq!(certificate.leaked.bytes, 0, "{certificate:?}");
        assert_eq!(self.sim.violations(), []);
    }

    fn until(&self, phase: Phase) {
        until(phase.as_str(), || self.binding.phase() == phase);
    }

    /// Faults that the log has of this binding.
    fn faults(&self) -> usize {
        let mut events = self.manager.events(None);
        let mut faults = 0;
        while let Some(event) = events.next(Duration::ZERO) {
            faults += usize::from(matches!(event.what, EventKind::Fault { .. }));
        }
        faults
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn request(handle: &Handle, user: u64, op: IoOp, offset: u64, fill: u8) -> IoRequest {
    let buffer = handle.lease(BLOCK).unwrap();
    buffer.fill(0, BLOCK, fill).unwrap();
    IoRequest { user, op, offset, length: BLOCK, flags: IoFlags::default(), buffer: Some(buffer) }
}

/// Submits everything, waiting where it has to, and collects as many answers.
fn ask(handle: &Handle, mut requests: Vec<IoRequest>) -> Vec<Completion> {
    let wanted = requests.len();
    let mut out = Vec::new();
    until("the answers", || {
        match handle.submit(&mut requests) {
            Ok(()) | Err(SubmitError::Held | SubmitError::Full) => {}
            Err(error) => panic!("{error}"),
        }
        handle.poll(false, &mut out);
        out.len() >= wanted
    });
    let users: HashSet<_> = out.iter().map(|completion| completion.user).collect();
    assert_eq!((users.len(), out.len()), (wanted, wanted), "each is answered once");
    out.sort_by_key(|completion| completion.user);
    out
}

fn results(answers: &[Completion]) -> Vec<Result<(), IoError>> {
    answers.iter().map(|answer| answer.result).collect()
}

#[test]
fn a_driver_that_traps_again_and_again_is_not_noticed_by_its_clients() {
    let bed = bed("trap-at-100", ALWAYS, 1);
    let handle = bed.open(0);
    for round in 0..40_u64 {
        let at = |nth: u64| (round * 64 + nth) % 2048 * u64::from(BLOCK);
        let fill = |nth: u64| (round * 64 + nth) as u8 | 1;
        let writes = (0..64).map(|nth| request(&handle, nth, IoOp::Write, at(nth), fill(nth))).collect();
        assert_eq!(results(&ask(&handle, writes)), [Ok(()); 64], "round {round}");
        let reads = (0..64).map(|nth| request(&handle, nth, IoOp::Read, at(nth), 0)).collect();
        for answer in ask(&handle, reads) {
            let mut bytes = vec![0; BLOCK as usize];
            answer.result.unwrap();
            answer.buffer.unwrap().read_at(0, &mut bytes).unwrap();
            assert!(bytes.iter().all(|byte| *byte == fill(answer.user)), "round {round}, read {}", answer.user);
        }
    }
    // 5,120 requests and those that were given twice: a crash for every 100 at least.
    let crashes = bed.faults();
    assert!(crashes >= 51, "{crashes} crashes");
    assert_eq!(bed.binding.generation(), 1 + crashes as u64, "each had its successor");
    println!("pauses: {:?} us", bed.binding.crashes().iter().map(|crash| crash.pause_micros).collect::<Vec<_>>());
    assert_eq!(bed.binding.phase(), Phase::Serving);
    drop(handle);
    bed.is_clean();
}

#[test]
fn a_request_that_breaks_two_drivers_fails_alone() {
    for (poison, faults) in [(TRAP, 2), (NO_WORDS, 2), (LOOP, 2)] {
        let bed = bed("on-command", ALWAYS, 1);
        let handle = bed.open(0);
        let at = |nth: u64| if nth == 20 { poison } else { nth * u64::from(BLOCK) };
        let writes = (0..64).map(|nth| request(&handle, nth, IoOp::Write, at(nth), 7)).collect();
        let answers = ask(&handle, writes);
        for answer in &answers {
            let expected = if answer.user == 20 { Err(IoError::DeviceFault) } else { Ok(()) };
            assert_eq!(answer.result, expected, "request {}", answer.user);
        }
        drop(answers);
        assert_eq!((bed.faults(), bed.binding.phase()), (faults, Phase::Serving));
        drop(handle);
        bed.is_clean();
    }
}

#[test]
fn responses_that_were_being_judged_are_judged_by_the_next_driver() {
    let bed = bed("on-command", ALWAYS, 1);
    let handle = bed.open(0);
    let at = |nth: u64| if nth == 0 { TRAP_COMPLETE } else { nth * u64::from(BLOCK) };
    let requests = (0..30).map(|nth| request(&handle, nth, IoOp::Write, at(nth), 7)).collect();
    // A device's error has to be judged, and the device fails every tenth.
    bed.sim.add_rule(Rule { when: When::Every(10), ..Rule::always(Effect::Fail(1)) });
    let answers = ask(&handle, requests);
    let failed: Vec<_> = answers.iter().filter(|answer| answer.result == Err(IoError::Io)).collect();
    assert_eq!(failed.len(), 3, "what the device failed is failed, and nothing else: {:?}", results(&answers));
    assert!(bed.faults() >= 1 && bed.binding.phase() == Phase::Serving);
    drop(answers);
    drop(handle);
    bed.is_clean();
}

#[test]
fn past_the_limit_clients_get_errors_at_once_until_somebody_restarts_it() {
    let policy = RestartPolicy { limit: 1, ..RestartPolicy::default() };
    let bed = bed("on-command", policy, 2);
    let (handle, other) = (bed.open(0), bed.open(1));
    assert_eq!(bed.binding.restart(), Err(RestartError::NotFailed("on-command0".into())), "it serves");
    // The first crash is forgiven, the second of the same request is one too many.
    let answers = ask(&handle, vec![request(&handle, 1, IoOp::Write, TRAP, 7)]);
    assert_eq!(results(&answers), [Err(IoError::DeviceFault)]);
    bed.until(Phase::Failed);
    for handle in [&handle, &other] {
        until("errors on every lane", || {
            results(&ask(handle, vec![request(handle, 2, IoOp::Write, 0, 7)])) == [Err(IoError::DeviceFault)]
        });
    }
    bed.binding.restart().unwrap();
    assert_eq!(bed.binding.phase(), Phase::Serving);
    for handle in [&handle, &other] {
        assert_eq!(results(&ask(handle, vec![request(handle, 3, IoOp::Write, 0, 7)])), [Ok(())], "the same handles");
    }
    drop((handle, other));
    bed.is_clean();
}

#[test]
fn a_failed_binding_is_unloaded_like_any_other() {
    let bed = bed("on-command", RestartPolicy { limit: 0, ..RestartPolicy::default() }, 1);
    let handle = bed.open(0);
    ask(&handle, vec![request(&handle, 1, IoOp::Write, TRAP, 7)]);
    bed.until(Phase::Failed);
    bed.is_clean();
    assert_eq!(handle.submit(&mut vec![request_of_nobody()]), Err(SubmitError::Revoked));
}

fn request_of_nobody() -> IoRequest {
    IoRequest { user: 1, op: IoOp::Flush, offset: 0, length: 0, flags: IoFlags::default(), buffer: None }
}

/// A wait before the second restart that no test outlasts.
const LONG_WAIT: RestartPolicy = RestartPolicy {
    limit: 5,
    within: Duration::from_secs(1800),
    backoff: Duration::from_secs(600),
    longest: Duration::from_secs(600),
};

#[test]
fn clients_wait_for_a_restart_that_waits_and_get_their_answers() {
    let policy = RestartPolicy { backoff: Duration::from_millis(300), ..RestartPolicy::default() };
    let bed = bed("on-command", policy, 1);
    let handle = bed.open(0);
    // Two crashes in a row: the second is waited for.
    let mut writes = vec![request(&handle, 0, IoOp::Write, TRAP, 7)];
    writes.extend((1..10).map(|nth| request(&handle, nth, IoOp::Write, nth * u64::from(BLOCK), 7)));
    handle.submit(&mut writes).unwrap();
    assert_eq!(bed.binding.phase(), Phase::Recovering);
    let mut late = vec![request(&handle, 10, IoOp::Write, 0, 7)];
    assert_eq!(handle.submit(&mut late), Err(SubmitError::Held));
    let mut out = Vec::new();
    until("all answers", || {
        let _ = handle.submit(&mut late);
        handle.poll(false, &mut out);
        out.len() >= 11
    });
    out.sort_by_key(|answer| answer.user);
    assert_eq!(out.len(), 11);
    assert_eq!(out[0].result, Err(IoError::DeviceFault));
    assert_eq!(results(&out[1..]), [Ok(()); 10]);
    assert_eq!(bed.binding.phase(), Phase::Serving);
    drop((out, handle));
    bed.is_clean();
}

#[test]
fn an_unload_does_not_wait_for_a_restart() {
    let bed = bed("on-command", LONG_WAIT, 1);
    let handle = bed.open(0);
    let mut writes = vec![request(&handle, 0, IoOp::Write, TRAP, 7), request(&handle, 1, IoOp::Write, 0, 7)];
    handle.submit(&mut writes).unwrap();
    assert_eq!(bed.binding.phase(), Phase::Recovering);
    let begun = Instant::now();
    bed.is_clean();
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    let mut out = Vec::new();
    handle.poll(false, &mut out);
    assert_eq!(out.len(), 2, "and nothing is lost");
}

#[test]
fn unloads_in_the_middle_of_crashes_leave_nothing() {
    for round in 0..20 {
        let bed = bed("trap-at-100", ALWAYS, 2);
        let handles = [bed.open(0), bed.open(1)];
        std::thread::scope(|scope| {
            for handle in &handles {
                scope.spawn(move || {
                    let mut out = Vec::new();
                    for user in 0.. {
                        let Ok(buffer) = handle.lease(BLOCK) else { break };
                        let (op, flags) = (IoOp::Write, IoFlags::default());
                        let mut one =
                            vec![IoRequest { user, op, offset: 0, length: BLOCK, flags, buffer: Some(buffer) }];
                        match handle.submit(&mut one) {
                            Ok(()) | Err(SubmitError::Full | SubmitError::Held) => {}
                            Err(_) => break,
                        }
                        handle.poll(false, &mut out);
                        out.clear();
                    }
                });
            }
            until("crashes", || bed.binding.generation() > 5 + round % 5);
            // A crash that comes in the middle of the drain is one of a driver that leaves.
            let certificate = bed.manager.unload_binding(&bed.binding, &UnloadOptions::default()).unwrap();
            assert!(matches!(certificate.outcome, Outcome::Unloaded | Outcome::Failed), "{certificate:?}");
            assert!(certificate.residual.is_zero() && certificate.leaked.bytes == 0, "{certificate:?}");
            assert_eq!(bed.sim.violations(), []);
        });
    }
}

#[test]
fn a_control_lane_that_breaks_down_is_replaced_and_what_changed_is_known() {
    let bed = bed("trap-config-changed", ALWAYS, 1);
    let handle = bed.open(0);
    let bytes = 24 << 20;
    bed.sim.resize(bytes).unwrap();
    bed.sim.announce_config();
    until("the new capacity", || bed.binding.geometry().is_some_and(|disk| disk.capacity_bytes == bytes));
    bed.until(Phase::Serving);
    let far = bytes - u64::from(BLOCK);
    assert_eq!(results(&ask(&handle, vec![request(&handle, 1, IoOp::Write, far, 7)])), [Ok(())], "by an old handle");
    // It breaks down whenever it is told: told once more, it is replaced once more.
    until("two faults", || bed.faults() == 2);
    drop(handle);
    bed.is_clean();
}

#[test]
fn a_control_lane_that_breaks_down_too_often_fails_the_binding() {
    let bed = bed("trap-config-changed", RestartPolicy { limit: 0, ..RestartPolicy::default() }, 1);
    let handle = bed.open(0);
    bed.sim.announce_config();
    bed.until(Phase::Failed);
    until("errors", || {
        results(&ask(&handle, vec![request(&handle, 1, IoOp::Write, 0, 7)])) == [Err(IoError::DeviceFault)]
    });
    bed.binding.restart().unwrap();
    assert_eq!(results(&ask(&handle, vec![request(&handle, 2, IoOp::Write, 0, 7)])), [Ok(())]);
    drop(handle);
    bed.is_clean();
}

#[test]
fn what_an_instance_left_is_put_with_its_own_report_and_not_with_those_that_never_took_its_place() {
    // Long enough for the disk to be another one by the second attempt, or the third.
    let wait = Duration::from_millis(50);
    let policy = RestartPolicy { limit: 10_000, within: Duration::from_secs(1), backoff: wait, longest: wait };
    let bed = bed("trap-attach-24m", policy, 1);
    bed.sim.resize(24 << 20).unwrap();
    until("an instance that did not come to be", || bed.binding.crash_count() >= 2);
    bed.sim.resize(16 << 20).unwrap();
    bed.until(Phase::Serving);
    assert!(bed.binding.crash_count() < 16, "the first report is gone");
    bed.is_clean();
    let crashes = bed.binding.crashes();
    let exports: Vec<_> = crashes.iter().map(|crash| (crash.calls[0].export.as_str(), crash.core.is_some())).collect();
    let (first, others) = exports.split_first().unwrap();
    assert_eq!(*first, ("config-changed", true), "{exports:?}");
    assert!(others.iter().all(|other| *other == ("attach", false)), "{exports:?}");
    let reports = std::fs::read_dir(bed.spool.path().join("crashes")).unwrap();
    let reports = reports.filter(|file| file.as_ref().unwrap().path().extension().is_some_and(|kind| kind == "json"));
    assert_eq!(reports.count(), crashes.len(), "each is written down");
}

#[test]
fn a_crash_is_reported_with_its_cause_its_calls_and_a_core_dump() {
    let bed = bed("on-command", ALWAYS, 1);
    let handle = bed.open(0);
    assert_eq!(results(&ask(&handle, vec![request(&handle, 1, IoOp::Write, 0, 7)])), [Ok(())]);
    ask(&handle, vec![request(&handle, 2, IoOp::Write, TRAP, 7), request(&handle, 3, IoOp::Write, 0, 7)]);
    drop(handle);
    // The certificate waits for what is written down.
    bed.is_clean();
    let crashes = bed.binding.crashes();
    assert_eq!((crashes.len() as u64, bed.binding.crash_count()), (2, 2), "{crashes:#?}");
    let first = &crashes[0];
    assert_eq!((first.number, first.generation, first.kind.as_str(), first.lane.as_str()), (1, 1, "trap", "0"));
    assert!(first.backtrace.iter().any(|frame| frame.contains("#submit")), "{:?}", first.backtrace);
    let calls: Vec<_> = first.calls.iter().map(|call| call.export.as_str()).collect();
    assert_eq!(calls[..2], ["submit", "submit"], "the latest first: {calls:?}");
    assert_eq!(calls.last(), Some(&"instantiate"));
    let core = std::fs::read(first.core.as_ref().expect("a trap leaves a core dump")).unwrap();
    assert_eq!(&core[..8], b"\0asm\x01\0\0\0");
    let has = |bytes: &[u8]| core.windows(bytes.len()).any(|window| window == bytes);
    assert!(has(b"corestack") && has(b"behaves:on-command"), "stack and memory: {} bytes", core.len());
    // Written down as it is told.
    let folder = bed.spool.path().join("crashes");
    let mut written: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path()).collect();
    written.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    written.sort();
    let reports: Vec<CrashReport> =
        written.iter().map(|path| serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()).collect();
    let written: Vec<_> = reports.iter().map(|report| (report.number, &report.message, &report.core)).collect();
    let told: Vec<_> = crashes.iter().map(|report| (report.number, &report.message, &report.core)).collect();
    assert_eq!(written, told);
    assert!(crashes.iter().all(|crash| crash.pause_micros.is_some()), "{crashes:#?}");
    println!("pauses: {:?} us", crashes.iter().map(|crash| crash.pause_micros).collect::<Vec<_>>());
}

#[test]
fn what_a_predecessor_brought_to_a_device_that_understates_what_it_wrote_is_no_error_and_a_short_read_is_one() {
    // A device may report less than it wrote, and of a write nothing is to be written but a byte.
    let bed = bed("trap-at-100", ALWAYS, 1);
    bed.sim.add_rule("lie:length-zero@always,op=write".parse().unwrap());
    bed.sim.add_rule("slow:0..2@always".parse().unwrap());
    let handle = bed.open(0);
    for round in 0..20 {
        let at = |nth: u64| nth * u64::from(BLOCK);
        let write = |nth: u64| request(&handle, nth, IoOp::Write, at(nth), round);
        let (mut early, mut late): (Vec<_>, Vec<_>) = ((0..30).map(write).collect(), (30..150).map(write).collect());
        let mut answers = Vec::new();
        until("the answers", || {
            // The driver breaks down over the second part while the first is on the ring.
            for requests in [&mut early, &mut late] {
                match handle.submit(requests) {
                    Ok(()) | Err(SubmitError::Held | SubmitError::Full) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            handle.poll(false, &mut answers);
            answers.len() >= 150
        });
        assert!(answers.iter().all(|answer| answer.result == Ok(())), "round {round}: {:?}", results(&answers));
    }
    assert!(bed.faults() >= 20, "{}", bed.faults());
    bed.sim.add_rule("lie:length-one@always,op=read".parse().unwrap());
    let answers = ask(&handle, vec![request(&handle, 1, IoOp::Read, 0, 0)]);
    assert_eq!(results(&answers), [Err(IoError::DeviceFault)]);
    drop(answers);
    drop(handle);
    bed.is_clean();
}
