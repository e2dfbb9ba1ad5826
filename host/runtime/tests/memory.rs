//! A guest that eats memory: its fault, and the host's memory stays bounded. A test binary of its own, because it looks at the whole process.

mod support;

use cofferdam_runtime::{CallError, FaultKind, LaneDriver};
use support::{Guest, instance, requests, runtime};

/// Resident memory of this process in bytes.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split_whitespace().nth(1).unwrap().parse().unwrap();
    pages * rustix::param::page_size() as u64
}

#[test]
fn a_memory_eater_is_out_of_memory_and_the_host_stays_within_its_bound() {
    // Grows by a page and touches it until it is refused, then gives up as an allocator does.
    let eat = "(loop $more
            (memory.fill (i32.mul (memory.size) (i32.const 65536)) (i32.const 1) (i32.const 0))
            (if (i32.eq (memory.grow (i32.const 1)) (i32.const -1)) (then unreachable))
            (memory.fill (i32.mul (i32.sub (memory.size) (i32.const 1)) (i32.const 65536)) (i32.const 1) (i32.const 65536))
            (br $more)) (unreachable)";
    let runtime = runtime();
    let before = resident_bytes();
    for round in 0..4 {
        let mut lane = instance(&runtime, &Guest::submit(eat));
        let Err(CallError::Fault(fault)) = lane.submit(&requests(1), &mut Vec::new()) else { panic!() };
        assert_eq!(fault.kind, FaultKind::OutOfMemory, "{fault}");
        assert!(fault.message.contains("67108864 are allowed"), "{fault}");
        assert_eq!(lane.memory_bytes(), 64 << 20);
        let grown = resident_bytes().saturating_sub(before);
        assert!(grown < 96 << 20, "round {round}: {grown} bytes more are resident");
    }
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 32 << 20, "{grown} bytes stay resident after the instances are gone");
}

#[test]
fn a_refused_growth_that_the_guest_lives_with_is_no_fault() {
    let submit = "(drop (memory.grow (i32.const 5000))) (i64.store (i32.const 256) (i64.const 0)) (i32.const 256)";
    let mut lane = instance(&runtime(), &Guest::submit(submit));
    lane.submit(&requests(1), &mut Vec::new()).unwrap();
    lane.submit(&requests(1), &mut Vec::new()).unwrap();
}
