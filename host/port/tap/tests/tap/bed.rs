//! A binding of a simulated device, in a network namespace of the test's own thread.

use std::net::UdpSocket;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_manager::{Binding, Certificate, Config, LoadSpec, Manager, UnloadOptions};
use cofferdam_port_tap::{TapError, TapPort};
use cofferdam_sim::{Behaviour, Drive, Frame, NetProfile, SimNet};

use crate::peer::{self, FAR, UDP};

/// Only a failing test waits so long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Bed {
    pub(crate) sim: SimNet,
    pub(crate) manager: Manager,
    pub(crate) binding: Arc<Binding>,
}

pub(crate) fn component(name: &str) -> Vec<u8> {
    let path = format!("{}/../../../target/drivers/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}; run 'cargo xtask build' first"))
}

pub(crate) fn manager() -> Manager {
    let cache = format!("{}/../../../target/test-cache", env!("CARGO_MANIFEST_DIR"));
    Manager::new(Config { cache_dir: Some(cache.into()) }).unwrap()
}

pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The calling thread, and what it starts, see a network of their own from here on.
#[expect(deprecated, reason = "unsafe for descriptor tables alone, which are not unshared here")]
pub(crate) fn own_network() {
    rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).expect("these tests run as root");
}

/// An `ip` command, which has to succeed.
pub(crate) fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("iproute2");
    assert!(output.status.success(), "ip {arguments}: {output:?}");
}

/// What `ip` says of an interface; nothing when there is none.
pub(crate) fn link(name: &str) -> String {
    let output = Command::new("ip").args(["-o", "link", "show", name]).output().expect("iproute2");
    String::from_utf8(output.stdout).unwrap()
}

/// There is no such interface, or at once no more: a test beside this one that starts a program lends it every descriptor until exec.
pub(crate) fn is_gone(name: &str) {
    let deadline = Instant::now() + Duration::from_secs(1);
    while !link(name).is_empty() {
        assert!(Instant::now() < deadline, "it stays: {}", link(name));
    }
}

impl Bed {
    pub(crate) fn new(profile: NetProfile) -> Bed {
        own_network();
        let lanes = profile.pairs;
        Bed::load(SimNet::new(profile, Behaviour::default()).unwrap(), lanes)
    }

    /// A new binding of the same device.
    pub(crate) fn again(&self) -> Bed {
        Bed::load(self.sim.clone(), 1)
    }

    fn load(sim: SimNet, lanes: u16) -> Bed {
        let manager = manager();
        let mut spec = LoadSpec::new(
            "virtio-net.wasm",
            component("virtio-net.wasm"),
            Box::new(sim.transport(Drive::Threads).unwrap()),
        );
        spec.queues = Some(lanes);
        let binding = manager.load(spec).unwrap();
        Bed { sim, manager, binding }
    }

    pub(crate) fn start(&self, address: &str) -> Result<TapPort, TapError> {
        TapPort::start(Arc::clone(&self.binding), &address.parse().unwrap())
    }

    /// With a port that the binding takes down, and an address on it.
    pub(crate) fn serve(&self, name: &str) {
        let port = self.start(&format!("tap:{name}")).unwrap();
        self.binding.attach_port(Box::new(port)).unwrap_or_else(|_| panic!("it is leaving"));
        ip(&format!("addr add 10.9.0.1/24 dev {name}"));
    }

    /// A socket that has said something to the peer, and heard it.
    pub(crate) fn socket(&self) -> UdpSocket {
        let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        self.sends(&socket, b"first words");
        self.hears(&socket, b"first answer");
        socket
    }

    /// A datagram reaches the peer whole.
    pub(crate) fn sends(&self, socket: &UdpSocket, payload: &[u8]) {
        let before = socket.local_addr().unwrap().port().to_be_bytes();
        socket.send_to(payload, (std::net::Ipv4Addr::from(FAR), 7)).unwrap();
        until("the datagram at the peer", || {
            peer::attend(&self.sim, UDP)
                .iter()
                .any(|frame| frame.bytes[34..36] == before && &frame.bytes[42..] == payload)
        });
    }

    /// A datagram of the peer reaches the socket; sent again until it does, since what came before may have taken it along.
    pub(crate) fn hears(&self, socket: &UdpSocket, payload: &[u8]) {
        let mut bytes = vec![0; 65_536];
        until("the datagram at the socket", || {
            let frame = peer::datagram(socket.local_addr().unwrap().port(), payload);
            self.sim.inject(Frame::plain(&frame));
            matches!(socket.recv(&mut bytes), Ok(length) if &bytes[..length] == payload)
        });
    }

    pub(crate) fn unload(&self) -> Certificate {
        let certificate = self.manager.unload(self.binding.name(), &UnloadOptions::default()).unwrap();
        assert!(certificate.residual.is_zero() && certificate.leaked.bytes == 0, "{certificate:?}");
        certificate
    }
}
