//! `Port::shutdown` ends within its grace and a little, whatever stalls: each stall alone.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cofferdam_port_nbd::NbdOptions;
use cofferdam_port_nbd::service::{Port, PortReport};

use crate::client::*;
use crate::mock::{Mock, PATIENCE, Served, eventually, geometry};

const GRACE: Duration = Duration::from_millis(100);
/// What a busy machine may add.
const SLACK: Duration = Duration::from_millis(300);
/// What the port adds for a thread that is held up in the binding.
const OVERRUN: Duration = Duration::from_millis(400);

/// Shuts down, and checks the bound and that nothing is left.
fn shut_down(served: &mut Served, stall: &str) -> PortReport {
    let start = Instant::now();
    let report = served.shutdown(GRACE);
    assert!(start.elapsed() < GRACE + SLACK, "{stall}: {:?}", start.elapsed());
    assert_eq!(served.mock.0.handles.load(Ordering::SeqCst), 0, "{stall}: a handle is open");
    assert!(!served.path.exists(), "{stall}: the socket file is there");
    served.mock.assert_all_returned();
    report
}

fn tiny() -> Served {
    Served::new(Mock::new(geometry(4 << 20), 1, 64 << 10), NbdOptions::default())
}

#[test]
fn a_write_that_stopped_half_way() {
    let mut served = Served::ordinary();
    let mut client = Client::new(&served, true);
    let (_, mut bytes) = client.header(WRITE, 0, 0, 64 << 10);
    bytes.resize(1000, 1);
    client.stream.write_all(&bytes).expect("sent");
    eventually("it holds a lease", || served.mock.0.arena.leased_buffers() == 1);
    assert_eq!(shut_down(&mut served, "write"), PortReport { connections: 1, severed: 1 });
    client.assert_closed();
}

#[test]
fn a_client_that_never_reads() {
    let mut served = Served::ordinary();
    let mut client = Client::new(&served, true);
    for _ in 0..16 {
        client.send(READ, 0, 0, 256 << 10);
    }
    eventually("its answers fill the socket", || served.mock.0.arena.leased_bytes() > 1 << 20);
    assert_eq!(shut_down(&mut served, "read"), PortReport { connections: 1, severed: 1 });
}

#[test]
fn a_device_that_does_not_answer() {
    let mut served = Served::ordinary();
    let mut client = Client::new(&served, true);
    served.mock.set(|s| &s.slow, true);
    client.send_write(FUA, 0, &[1; 4096]);
    eventually("the device has it", || served.mock.in_flight() == 1);
    assert_eq!(shut_down(&mut served, "device"), PortReport { connections: 1, severed: 1 });
    client.assert_closed();
}

#[test]
fn a_hold_that_does_not_end() {
    let mut served = Served::ordinary();
    let mut client = Client::new(&served, true);
    served.mock.set(|s| &s.held, true);
    client.send_write(0, 0, &[1; 4096]);
    eventually("its payload has come", || served.mock.0.arena.leased_buffers() == 1);
    let report = shut_down(&mut served, "hold");
    assert_eq!(report, PortReport { connections: 1, severed: 0 });
    assert_eq!(client.reply(0, 0).expect("an answer").error, ESHUTDOWN);
    client.assert_closed();
}

#[test]
fn clients_that_wait_for_leases_that_do_not_come() {
    let mut served = tiny();
    let mut holder = Client::new(&served, true);
    served.mock.set(|s| &s.slow, true);
    holder.send(READ, 0, 0, 64 << 10);
    eventually("the whole arena is lent", || served.mock.in_flight() == 1);
    let mut waiting = Client::new(&served, true);
    waiting.send_write(0, 0, &[1; 4096]);
    waiting.send(READ, 0, 0, 4096);
    let report = shut_down(&mut served, "leases");
    assert_eq!(report, PortReport { connections: 2, severed: 1 });
    assert_eq!(waiting.reply(0, 0).expect("the write's answer").error, ESHUTDOWN);
    assert_eq!(waiting.reply(0, 4096).expect("the read's answer").error, ESHUTDOWN);
}

#[test]
fn a_handshake_that_stopped_half_way() {
    let mut served = Served::ordinary();
    let mut stream = Client::raw(&served);
    stream.write_all(&[0, 0]).expect("sent");
    stream.read_exact(&mut [0; 18]).expect("the greeting");
    assert_eq!(shut_down(&mut served, "handshake"), PortReport { connections: 1, severed: 0 });
    assert_closed(&mut stream);
}

/// As fast as it can, all through the grace.
#[test]
fn a_client_that_floods() {
    let mut served = Served::ordinary();
    let mut client = Client::new(&served, true);
    let flood: Vec<u8> = (0..256).flat_map(|_| client.header(FLUSH, 0, 0, 0).1).collect();
    let mut reader = client.stream.try_clone().expect("cloned");
    let reading = std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
    let writing = std::thread::spawn(move || while client.stream.write_all(&flood).is_ok() {});
    eventually("the flood is on", || served.mock.asked().len() > 1000);
    shut_down(&mut served, "flood");
    writing.join().expect("it ended");
    let _ = reading.join().expect("it ended");
}

/// Clients that come and go all the time.
#[test]
fn a_crowd_at_the_door() {
    let mut served = Served::ordinary();
    let path = served.path.clone();
    let stop = Arc::new(AtomicBool::new(false));
    let crowd: Vec<_> = (0..2)
        .map(|_| {
            let (path, stop) = (path.clone(), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut came = 0;
                while !stop.load(Ordering::SeqCst) {
                    came += u32::from(std::os::unix::net::UnixStream::connect(&path).is_ok());
                }
                came
            })
        })
        .collect();
    eventually("some came", || served.connections() > 0);
    shut_down(&mut served, "crowd");
    stop.store(true, Ordering::SeqCst);
    assert!(crowd.into_iter().map(|thread| thread.join().expect("it ended")).sum::<u32>() > 0);
}

/// A worker that is inside a call into the binding and does not come back: its thread is left behind, inside the bound,
/// the other one's clients are let go in order, and it ends by itself when it does come back.
#[test]
fn a_worker_that_is_held_up_in_the_binding() {
    let mut served = Served::new(Mock::new(geometry(4 << 20), 2, 1 << 20), NbdOptions::default());
    let (entered, is_in) = channel();
    let (go, gone) = channel::<()>();
    let mut first = Some(gone);
    served.mock.in_submit(move || {
        if let Some(gone) = first.take() {
            entered.send(()).expect("the test waits");
            let _ = gone.recv_timeout(PATIENCE);
        }
    });
    let mut held_up = Client::new(&served, true);
    let mut other = Client::new(&served, true);
    assert_eq!(served.mock.opened_per_lane(), [1, 1], "a worker each");
    held_up.send(FLUSH, 0, 0, 0);
    is_in.recv().expect("it is in");
    let start = Instant::now();
    let report = served.shutdown(GRACE);
    let took = start.elapsed();
    assert!(took >= GRACE + OVERRUN && took < GRACE + OVERRUN + SLACK, "{took:?}");
    assert_eq!(report, PortReport { connections: 2, severed: 1 });
    assert!(!served.path.exists(), "nobody new comes");
    other.assert_closed();
    go.send(()).expect("it is still in");
    held_up.assert_closed();
    served.mock.assert_all_returned();
}

/// What is served shuts its port down from inside a call of the port's own worker: a join of itself would never end.
#[test]
fn a_shutdown_by_the_port_s_own_worker() {
    let mut served = Served::ordinary();
    let mut client = Client::new(&served, true);
    let port = Mutex::new(Some(Box::new(served.take_port())));
    let (done, is_done) = channel();
    served.mock.in_submit(move || {
        if let Some(port) = port.lock().expect("not poisoned").take() {
            let start = Instant::now();
            let report = port.shutdown(GRACE);
            done.send((start.elapsed(), report)).expect("the test waits");
        }
    });
    client.send(FLUSH, 0, 0, 0);
    let (took, report) = is_done.recv_timeout(PATIENCE).expect("it comes back");
    assert!(took < GRACE + SLACK, "{took:?}");
    assert_eq!(report.connections, 1);
    // The call it was made from is answered, then the worker ends.
    assert_eq!(client.reply(0, 0).expect("a reply").error, 0);
    client.assert_closed();
    served.mock.assert_all_returned();
}

/// All of it at once, with no grace at all: a port that is dropped.
#[test]
fn no_grace_is_no_grace() {
    let mut served = Served::ordinary();
    let mut client = Client::new(&served, true);
    served.mock.set(|s| &s.slow, true);
    client.send(READ, 0, 0, 4096);
    eventually("the device has it", || served.mock.in_flight() == 1);
    let start = Instant::now();
    drop(served.take_port());
    assert!(start.elapsed() < SLACK, "{:?}", start.elapsed());
    client.assert_closed();
    served.mock.assert_all_returned();
}
