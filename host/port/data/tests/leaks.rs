//! What a port holds, counted by the kernel. A test of its own, so that nothing else of its process is counted.

use std::os::fd::AsFd;
use std::time::Duration;

use cofferdam_client::wire::TAG_WAKE;
use cofferdam_port_data::DataOptions;

use crate::mock::{Served, eventually};
use crate::raw::{Guest, Raw, hello};

#[allow(dead_code)]
#[path = "port/mock.rs"]
mod mock;
#[allow(dead_code)]
#[path = "port/raw.rs"]
mod raw;

fn held() -> (usize, usize, usize) {
    let count = |directory: &str| std::fs::read_dir(directory).expect("proc").count();
    let maps = std::fs::read_to_string("/proc/self/maps").expect("proc");
    (count("/proc/self/fd"), count("/proc/self/task"), maps.lines().filter(|line| line.contains("/memfd:")).count())
}

/// CPU time of this process so far, in ticks of 10 ms.
fn cpu_ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("proc");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("a name in parentheses").split_whitespace().collect();
    fields[11].parse::<u64>().expect("utime") + fields[12].parse::<u64>().expect("stime")
}

#[test]
fn descriptors_that_clients_send_get_no_number_and_clients_leave_nothing() {
    let served = Served::new(DataOptions { max_clients: 64, ..DataOptions::default() });
    served.assert_serves();
    eventually("only the port is left", || served.clients() == 0);
    let null = std::fs::File::open("/dev/null").expect("a file");
    served.mock.prune();
    let before = held();
    let many = [null.as_fd(); 60];
    for _ in 0..50 {
        // With a hello, with garbage, with wakes; read and unread.
        let refused = Raw::new(&served);
        assert!(refused.send(b"garbage", &many));
        let guest = {
            let raw = Raw::new(&served);
            assert!(raw.send(&hello(8).encode(), &many));
            raw
        };
        guest.receive();
        for _ in 0..20 {
            guest.send(&[TAG_WAKE], &many);
        }
        guest.send(&[7; 1000], &many);
    }
    eventually("all are gone", || served.clients() == 0);
    // A thread's entry goes a moment after its last word.
    eventually("what it holds is what it held", || {
        served.mock.prune();
        held() == before
    });

    // Clients that are idle cost no time, whatever they have asked to be woken for.
    let idle: Vec<_> = (0..16).map(|_| Guest::new(&served, 64)).collect();
    eventually("all are in", || served.clients() == 16);
    let full = Guest::new(&served, 1);
    full.put(&[cofferdam_client::wire::Submit {
        user: 1,
        offset: 0,
        memory_offset: 0,
        length: 0,
        op: cofferdam_client::Op::Flush as u16,
        flags: 0,
    }]);
    full.take();
    let ticks = cpu_ticks();
    std::thread::sleep(Duration::from_millis(500));
    assert!(cpu_ticks() - ticks <= 5, "{} ticks of 10 ms in 500 ms of idleness", cpu_ticks() - ticks);
    drop((idle, full));
    served.finish();
}
