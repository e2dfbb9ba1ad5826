//! Addresses, socket files, peers.

use std::net::TcpStream;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use cofferdam_port_nbd::service::Port;
use cofferdam_port_nbd::{NbdAddress, NbdError, NbdOptions, NbdPort};

use crate::client::*;
use crate::mock::{Mock, Served, eventually};

fn start(path: &std::path::Path) -> Result<NbdPort<Mock>, NbdError> {
    NbdPort::start(Mock::ordinary(), &NbdAddress::Unix(path.to_owned()), NbdOptions::default())
}

#[test]
fn the_socket_file_is_private_and_goes_with_the_port() {
    let mut served = Served::ordinary();
    let metadata = std::fs::metadata(&served.path).expect("the file");
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    served.shutdown(Duration::ZERO);
    assert!(!served.path.exists());
}

#[test]
fn a_live_socket_is_refused_and_a_stale_one_taken_over() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("a.sock");
    let live = UnixListener::bind(&path).expect("bound");
    assert!(matches!(start(&path), Err(NbdError::InUse(_))));
    assert!(path.exists(), "it is left alone");
    drop(live);
    let port = start(&path).expect("the owner is gone");
    assert!(matches!(start(&path), Err(NbdError::InUse(_))));
    drop(port);
    assert!(!path.exists());
}

#[test]
fn what_stands_in_the_way_is_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let error = start(&directory.path().join("no/such/a.sock")).expect_err("no directory");
    assert!(error.to_string().contains("no/such' does not exist"), "{error}");
    let file = directory.path().join("file");
    std::fs::write(&file, "precious").expect("written");
    assert!(matches!(start(&file), Err(NbdError::NotASocket(_))));
    assert!(matches!(start(&file.join("a.sock")), Err(NbdError::NoDirectory(_))));
    assert_eq!(std::fs::read_to_string(&file).expect("read"), "precious");
}

#[test]
fn somebody_elses_socket_at_the_same_path_survives_the_port() {
    let mut served = Served::ordinary();
    std::fs::remove_file(&served.path).expect("removed");
    let _other = UnixListener::bind(&served.path).expect("bound");
    served.shutdown(Duration::ZERO);
    assert!(served.path.exists());
}

#[test]
fn loopback_tcp_is_served_and_says_which_port() {
    let mock = Mock::ordinary();
    for (address, begins) in [("nbd:127.0.0.1:0", "127.0.0.1:"), ("nbd:[::1]:0", "[::1]:")] {
        let port = NbdPort::start(mock.clone(), &address.parse().expect("an address"), NbdOptions::default())
            .expect("started");
        let NbdAddress::Tcp(socket) = *port.listens_on() else { panic!("not TCP") };
        assert_ne!(socket.port(), 0);
        assert!(matches!(
            NbdPort::start(mock.clone(), port.listens_on(), NbdOptions::default()),
            Err(NbdError::InUse(_))
        ));
        let mut stream = TcpStream::connect(socket).expect("connected");
        let mut hello = 3u32.to_be_bytes().to_vec();
        hello.extend(option(1, b""));
        std::io::Write::write_all(&mut stream, &hello).expect("sent");
        let mut answer = [0; 28];
        std::io::Read::read_exact(&mut stream, &mut answer).expect("greeting and export");
        assert_eq!(answer[18..26], (4u64 << 20).to_be_bytes());
        let peer = mock.0.peers.lock().expect("not poisoned").last().cloned().expect("a peer");
        assert!(peer.starts_with(begins), "{peer}");
        Box::new(port).shutdown(Duration::ZERO);
        mock.assert_all_returned();
    }
}

#[test]
fn a_unix_peer_is_known_by_user_and_process() {
    let served = Served::ordinary();
    let _client = Client::new(&served, true);
    let me = format!("uid={} pid={}", rustix::process::geteuid().as_raw(), std::process::id());
    assert_eq!(*served.mock.0.peers.lock().expect("not poisoned"), [me]);
    served.finish();
}

#[test]
fn connections_are_spread_over_the_lanes() {
    let served = Served::new(Mock::new(crate::mock::geometry(1 << 20), 2, 1 << 20), NbdOptions::default());
    let mut clients: Vec<_> = (0..4).map(|_| Client::new(&served, true)).collect();
    for client in &mut clients {
        assert_eq!(client.call(READ, 0, 0, 512).error, 0);
    }
    assert_eq!(served.mock.opened_per_lane(), [2, 2]);
    drop(clients);
    eventually("all gone", || served.connections() == 0);
    served.finish();
}
