//! A port without traffic uses no CPU. In a process of its own, because what is counted are the threads by name.

use std::io::Read;
use std::time::Duration;

#[path = "port/client.rs"]
#[allow(dead_code)]
mod client;
#[path = "port/mock.rs"]
#[allow(dead_code)]
mod mock;

/// Times that the port's threads were given a CPU.
fn wake_ups() -> u64 {
    let mut threads = 0;
    let count = std::fs::read_dir("/proc/self/task")
        .expect("tasks")
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("status")).ok())
        .filter(|status| status.lines().next().is_some_and(|name| name.contains("nbd-")))
        .inspect(|_| threads += 1)
        .flat_map(|status| {
            status
                .lines()
                .filter_map(|line| line.split_once("ctxt_switches:")?.1.trim().parse::<u64>().ok())
                .collect::<Vec<_>>()
        })
        .sum();
    assert_eq!(threads, 3, "the acceptor and two lanes");
    count
}

#[test]
fn an_idle_port_sleeps_also_with_a_request_that_the_device_does_not_answer() {
    let served = mock::Served::new(
        mock::Mock::new(mock::geometry(1 << 20), 2, 1 << 20),
        cofferdam_port_nbd::NbdOptions::default(),
    );
    let mut client = client::Client::new(&served, true);
    assert_eq!(client.call(client::READ, 0, 0, 4096).error, 0);
    served.mock.set(|state| &state.slow, true);
    client.send(client::READ, 0, 0, 4096);
    mock::eventually("the device has it", || served.mock.in_flight() == 1);
    // The spin ends after 50 us and the worker settles; what follows is the measured time.
    let mut still = || {
        client.stream.set_read_timeout(Some(Duration::from_millis(200))).expect("a time-out");
        assert!(client.stream.read(&mut [0]).is_err());
    };
    still();
    let before = wake_ups();
    still();
    assert_eq!(wake_ups(), before);
    served.mock.release(1);
    assert_eq!(client.reply(0, 4096).expect("a reply").error, 0);
    served.finish();
}
