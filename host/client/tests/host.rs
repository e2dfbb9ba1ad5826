//! The library in front of hosts that are wrong, hostile or dead.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use cofferdam_client::ring::{REVOKED, Rings, RingsFile, Word};
use cofferdam_client::wire::{
    Complete, Geometry, HELLO_BYTES, Hello, Refusal, Refused, TAG_REVOKED, TAG_VIOLATION, TAG_WAKE, Welcome,
};
use cofferdam_client::{Client, Completion, Error, Op, Options, Request, Status};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};

const PATIENCE: Duration = Duration::from_secs(10);
const OPTIONS: Options = Options { region_bytes: 1 << 16, entries: 8, timeout: PATIENCE };

/// A socket that a test answers by hand.
struct Host {
    listener: OwnedFd,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

/// The host's side of a client that was let in.
struct Serving {
    socket: OwnedFd,
    rings: Rings,
    file: RingsFile,
}

impl Host {
    fn new() -> Host {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data");
        let listener =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 8).unwrap();
        Host { listener, path, _directory: directory }
    }

    /// Accepts, checks the hello, and answers with `packet` and `descriptors`.
    fn answer(&self, packet: &[u8], descriptors: &[BorrowedFd<'_>]) -> OwnedFd {
        let socket = rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC).unwrap();
        let mut hello = [0; HELLO_BYTES];
        let (_, length) = rustix::net::recv(&socket, &mut hello[..], RecvFlags::empty()).unwrap();
        let hello = Hello::decode(&hello[..length]).unwrap();
        assert_eq!((hello.region_bytes, hello.entries), (OPTIONS.region_bytes, OPTIONS.entries));
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(descriptors.is_empty() || control.push(SendAncillaryMessage::ScmRights(descriptors)));
        rustix::net::sendmsg(&socket, &[IoSlice::new(packet)], &mut control, SendFlags::empty()).unwrap();
        socket
    }

    fn refused_with(&self, packet: &[u8], descriptors: &[BorrowedFd<'_>]) -> Error {
        std::thread::scope(|scope| {
            let client = scope.spawn(|| Client::connect(&self.path, OPTIONS).map(|_| ()).unwrap_err());
            self.answer(packet, descriptors);
            client.join().unwrap()
        })
    }

    fn serve(&self) -> (Client, Serving) {
        let (rings, file) = Rings::create("host-test", OPTIONS.entries).unwrap();
        let region = region(OPTIONS.region_bytes, true);
        std::thread::scope(|scope| {
            let client = scope.spawn(|| Client::connect(&self.path, OPTIONS).unwrap());
            let socket = self.answer(&welcome().encode(), &[region.as_fd(), file.as_fd()]);
            (client.join().unwrap(), Serving { socket, rings, file })
        })
    }
}

impl Serving {
    fn send(&self, packet: &[u8]) {
        rustix::net::send(&self.socket, packet, SendFlags::empty()).unwrap();
    }

    fn complete(&self, position: u32, user: u64, status: i32) {
        self.rings.put_complete(position, &Complete { user, status });
        self.rings.store(Word::CompleteTail, position.wrapping_add(1));
    }
}

fn welcome() -> Welcome {
    Welcome { region_bytes: OPTIONS.region_bytes, entries: OPTIONS.entries, handle: 7, geometry: Geometry::default() }
}

fn region(bytes: u64, sealed: bool) -> OwnedFd {
    let file = rustix::fs::memfd_create("host-test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&file, bytes).unwrap();
    if sealed {
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).unwrap();
    }
    file
}

fn submit(client: &mut Client, users: std::ops::Range<u64>) {
    let request = |user| Request { user, op: Op::Flush, offset: 0, length: 0, may_unmap: false, slot: None };
    client.submit(&mut users.map(request).collect()).unwrap();
}

fn results(done: &[Completion]) -> Vec<(u64, Result<(), Status>)> {
    let mut results: Vec<_> = done.iter().map(|answer| (answer.user, answer.result)).collect();
    results.sort_by_key(|(user, _)| *user);
    results
}

/// Everything is answered with `Shutdown`, then comes the end.
fn assert_ends(client: &mut Client, users: std::ops::Range<u64>) -> Error {
    let mut done = Vec::new();
    assert_eq!(client.wait(PATIENCE, &mut done).unwrap() as u64, users.end - users.start);
    assert_eq!(results(&done), users.map(|user| (user, Err(Status::Shutdown))).collect::<Vec<_>>());
    assert_eq!(client.outstanding(), 0);
    client.wait(PATIENCE, &mut done).unwrap_err()
}

#[test]
fn an_answer_to_the_hello_that_makes_no_sense_is_an_error_and_nothing_is_mapped() {
    let host = Host::new();
    let (good_region, short, unsealed) =
        (region(OPTIONS.region_bytes, true), region(4096, true), region(OPTIONS.region_bytes, false));
    let (_rings, file) = Rings::create("host-test", OPTIONS.entries).unwrap();
    let (_small, small_file) = Rings::create("host-test", 1).unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let good = welcome().encode();
    let other = Welcome { entries: 16, ..welcome() }.encode();
    for (packet, descriptors) in [
        (&good[..], &[][..]),
        (&good, &[good_region.as_fd()]),
        (&good[..87], &[good_region.as_fd(), file.as_fd()]),
        (&other, &[good_region.as_fd(), file.as_fd()]),
        (&[TAG_WAKE], &[]),
        (&[0xff; 256], &[]),
    ] {
        let error = host.refused_with(packet, descriptors);
        assert!(matches!(error, Error::Protocol(_)), "{error}");
    }
    for (region, rings) in [
        (short.as_fd(), file.as_fd()),
        (unsealed.as_fd(), file.as_fd()),
        (null.as_fd(), file.as_fd()),
        (good_region.as_fd(), null.as_fd()),
        (small_file.as_fd(), small_file.as_fd()),
    ] {
        let error = host.refused_with(&good, &[region, rings]);
        assert!(matches!(error, Error::Io { what: "mapping the host's memory", .. }), "{error}");
    }
    let cut = "é".repeat(300);
    let error = host.refused_with(&Refused { reason: Refusal::Busy, text: cut }.encode(), &[]);
    assert!(matches!(error, Error::Busy(text) if text.starts_with("éé") && text.len() < 256));
}

#[test]
fn a_host_that_says_nothing_is_given_up_on() {
    let host = Host::new();
    let options = Options { timeout: Duration::from_millis(30), ..OPTIONS };
    assert!(matches!(Client::connect(&host.path, options), Err(Error::TimedOut)));
}

#[test]
fn answers_that_cannot_be_end_the_client_and_everything_is_answered_once() {
    for (user, status, tail) in [(8, 1, 1), (u64::MAX, 1, 1), (3, 1, 1), (0, 0, 1), (0, 1, 9), (0, 1, u32::MAX)] {
        let host = Host::new();
        let (mut client, serving) = host.serve();
        submit(&mut client, 0..2);
        serving.complete(0, user, status);
        serving.rings.store(Word::CompleteTail, tail);
        let error = assert_ends(&mut client, 0..2);
        assert!(matches!(error, Error::Protocol(_)), "{user} {status} {tail}: {error}");
    }
    // The same place twice.
    let host = Host::new();
    let (mut client, serving) = host.serve();
    submit(&mut client, 0..2);
    let place = serving.rings.submit_at(0).user;
    serving.complete(0, place, 1);
    serving.complete(1, place, 1);
    let mut done = Vec::new();
    while client.poll(&mut done).is_ok() {}
    assert_eq!(results(&done), [(0, Ok(())), (1, Err(Status::Shutdown))]);
}

#[test]
fn an_unknown_status_is_an_error_not_a_success() {
    let host = Host::new();
    let (mut client, serving) = host.serve();
    submit(&mut client, 0..1);
    serving.complete(0, serving.rings.submit_at(0).user, 77);
    let mut done = Vec::new();
    assert_eq!(client.poll(&mut done).unwrap(), 1);
    assert_eq!(done[0].result, Err(Status::Io));
}

#[test]
fn a_dead_host_is_noticed_by_who_sleeps_and_by_who_only_polls() {
    for polls in [false, true] {
        let host = Host::new();
        let (mut client, serving) = host.serve();
        submit(&mut client, 0..3);
        // What it had answered counts.
        serving.complete(0, serving.rings.submit_at(1).user, -1);
        drop(serving.socket);
        let mut done = Vec::new();
        let end = loop {
            let looked = if polls { client.poll(&mut done) } else { client.wait(PATIENCE, &mut done) };
            if let Err(error) = looked {
                break error;
            }
        };
        assert!(matches!(end, Error::Revoked), "{end}");
        assert_eq!(results(&done), [(0, Err(Status::Shutdown)), (1, Err(Status::Io)), (2, Err(Status::Shutdown))]);
    }
}

#[test]
fn memory_that_was_taken_away_is_revocation_not_data_and_not_an_answer() {
    let host = Host::new();
    let (mut client, serving) = host.serve();
    submit(&mut client, 0..1);
    let place = serving.rings.submit_at(0).user;
    serving.complete(0, place, 1);
    let mut done = Vec::new();
    assert_eq!(client.poll(&mut done).unwrap(), 1);
    let slot = client.slot(4096).unwrap();
    slot.write_at(0, b"mine").unwrap();
    submit(&mut client, 0..4);
    drop((serving.rings, serving.file));
    assert!(client.is_revoked());
    assert!(matches!(slot.read_at(0, &mut [0; 4]), Err(Error::Revoked)));
    assert!(matches!(assert_ends(&mut client, 0..4), Error::Revoked));
}

#[test]
fn what_the_host_says_at_the_end_is_what_the_client_reports() {
    for (packet, revoked) in [(&[TAG_REVOKED][..], true), (&[TAG_VIOLATION], false), (&[9], false), (&[1, 1], false)] {
        let host = Host::new();
        let (mut client, serving) = host.serve();
        submit(&mut client, 0..2);
        if revoked {
            serving.rings.store(Word::State, REVOKED);
        }
        serving.send(&[TAG_WAKE]);
        serving.send(packet);
        let error = assert_ends(&mut client, 0..2);
        assert_eq!(matches!(error, Error::Revoked), revoked, "{packet:?}: {error}");
        assert!(revoked || matches!(error, Error::Protocol(_)));
        let mut byte = [0; 1];
        let received = loop {
            match rustix::net::recv(&serving.socket, &mut byte[..], RecvFlags::empty()) {
                Ok((_, 1)) => {}
                other => break other.map(|(_, length)| length),
            }
        };
        assert!(matches!(received, Ok(0) | Err(rustix::io::Errno::CONNRESET)), "it hangs up: {received:?}");
    }
}

#[test]
fn requests_beyond_the_ring_are_left_with_their_owner() {
    let host = Host::new();
    let (mut client, serving) = host.serve();
    submit(&mut client, 0..8);
    let slot = client.slot(512).unwrap();
    let request = Request { user: 9, op: Op::Write, offset: 0, length: 512, may_unmap: false, slot: Some(slot) };
    let mut requests = vec![request];
    assert!(matches!(client.submit(&mut requests), Err(Error::Full)));
    assert!(requests[0].slot.is_some());
    serving.complete(0, serving.rings.submit_at(4).user, 1);
    let mut done = Vec::new();
    client.poll(&mut done).unwrap();
    client.submit(&mut requests).unwrap();
    let entry = serving.rings.submit_at(8);
    assert_eq!((entry.length, entry.op, done[0].user), (512, Op::Write as u16, 4));
}
