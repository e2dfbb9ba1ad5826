//! NBD clients that break the protocol, ask for what is not there, die, or never read.

use std::io::Write;
use std::path::Path;

use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::host::Daemon;
use cofferdam_process_tests::nbd::{Client, Command, EINVAL, ENOSPC, assert_closed, connect};
use cofferdam_process_tests::wait::PATIENCE;

const SIZE: u64 = 16 << 20;

#[track_caller]
fn serves(socket: &Path) {
    let mut client = Client::new(socket);
    assert_eq!(client.write(SIZE - 4096, &[3; 4096]), 0);
    assert_eq!(client.read(SIZE - 4096, 4096), [3; 4096]);
}

#[test]
fn garbage_ends_its_own_connection_only() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let socket = daemon.serve(&sim.address(), "disk", &[]);
    serves(&socket);
    daemon.wait_idle("disk");
    let mut neighbour = Client::new(&socket);
    assert_eq!(neighbour.write(0, &[1; 512]), 0);
    let before = daemon.census();
    let long_option = [&[0, 0, 0, 3][..], b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff"].concat();
    let greetings: [&[u8]; 5] = [
        b"GET / HTTP/1.1\r\n\r\n",
        &[0xff; 4096],
        &[0, 0, 0, 3, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 7, 0, 0, 0, 0],
        &long_option,
        b"",
    ];
    for greeting in greetings {
        let mut stream = connect(&socket);
        // The server may have hung up before the last byte.
        let _ = stream.write_all(greeting);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        assert_closed(&mut stream);
    }
    let mut client = Client::new(&socket);
    client.stream.write_all(&[0x5a; 28]).expect("sent");
    client.assert_closed();
    assert_eq!(neighbour.write(0, &[1; 512]), 0);
    daemon.wait_census(&before);
    daemon.unload("disk", &[]).assert_clean();
    daemon.stop(PATIENCE);
}

#[test]
fn what_is_out_of_range_is_answered_and_reaches_no_device() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let socket = daemon.serve(&sim.address(), "disk", &[]);
    let mut client = Client::new(&socket);
    for (command, offset, length, error) in [
        (Command::Read, SIZE, 512, EINVAL),
        (Command::Read, SIZE - 512, 1024, EINVAL),
        (Command::Read, u64::MAX - 511, 512, EINVAL),
        (Command::Read, 1, 512, EINVAL),
        (Command::Read, 0, 511, EINVAL),
        (Command::Read, 0, u32::MAX, EINVAL),
        (Command::Read, 0, 64 << 20, EINVAL),
        (Command::Trim, SIZE, 512, EINVAL),
        (Command::WriteZeroes, SIZE, 512, ENOSPC),
        (Command::WriteZeroes, 0, u32::MAX - 511, ENOSPC),
        (Command::Flush, 512, 512, EINVAL),
    ] {
        assert_eq!(
            client.call(command, offset, length).expect("an answer"),
            Err(error),
            "{command:?} {offset} {length}"
        );
    }
    assert_eq!(client.write(SIZE, &[1; 512]), ENOSPC);
    assert_eq!(client.write(u64::MAX - 511, &[1; 512]), ENOSPC);
    let binding = daemon.binding("disk").expect("it serves");
    assert_eq!(binding["handles"][0]["requests"], 0, "{binding}");
    assert_eq!(client.write(0, &[1; 512]), 0, "the connection goes on");
    daemon.unload("disk", &[]).assert_clean();
}

#[test]
fn an_oversized_write_is_refused_and_takes_no_memory() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "128M"]);
    let socket = daemon.serve(&sim.address(), "disk", &[]);
    serves(&socket);
    for length in [33 << 20, u32::MAX - 511] {
        let mut client = Client::new(&socket);
        let header = client.header(Command::Write, 0, length);
        client.stream.write_all(&header).expect("sent");
        // Swallowed or hung up on, but neither served nor kept.
        let piece = vec![7; 1 << 20];
        let sent = (0..length.min(40 << 20) >> 20).take_while(|_| client.stream.write_all(&piece).is_ok()).count();
        let leased = daemon.binding("disk").expect("it serves")["leased_bytes"].as_u64().expect("a number");
        assert!(leased <= 8 << 20, "{leased} bytes are lent after {sent} MiB");
    }
    serves(&socket);
    let mut client = Client::new(&socket);
    assert_eq!(client.read(0, 4096), [0; 4096], "nothing of it was written");
    daemon.unload("disk", &[]).assert_clean();
    daemon.stop(PATIENCE);
}

#[test]
fn a_client_that_dies_in_the_middle_of_a_request_leaves_nothing() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M", "--fault", "slow:1..4"]);
    let socket = daemon.serve(&sim.address(), "disk", &[]);
    serves(&socket);
    daemon.wait_idle("disk");
    let before = daemon.census();
    for _ in 0..8 {
        let mut half_header = Client::new(&socket);
        let bytes = half_header.header(Command::Write, 0, 4096);
        half_header.stream.write_all(&bytes[..13]).expect("sent");
        let mut half_payload = Client::new(&socket);
        let bytes = half_payload.header(Command::Write, 0, 1 << 20);
        half_payload.stream.write_all(&bytes).expect("sent");
        half_payload.stream.write_all(&[7; 100_000]).expect("sent");
        let mut in_flight = Client::new(&socket);
        for number in 0..64 {
            in_flight.send(Command::Read, number * 65536, 65536).expect("sent");
        }
    }
    daemon.wait_idle("disk");
    daemon.wait_census(&before);
    serves(&socket);
    daemon.unload("disk", &[]).assert_clean();
    daemon.stop(PATIENCE);
}

#[test]
fn a_client_that_never_reads_starves_nobody() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "64M"]);
    let socket = daemon.serve(&sim.address(), "disk", &[]);
    // More than all of the buffer memory, if each of them got what it asks for.
    let deaf: Vec<_> = (0..12)
        .map(|_| {
            let mut client = Client::new(&socket);
            for _ in 0..64 {
                client.send(Command::Read, 0, 1 << 20).expect("sent");
            }
            client
        })
        .collect();
    for _ in 0..16 {
        serves(&socket);
    }
    let certificate = daemon.unload("disk", &[]);
    certificate.assert_clean();
    drop(deaf);
    daemon.stop(PATIENCE);
}
