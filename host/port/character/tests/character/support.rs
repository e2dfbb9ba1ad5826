//! What these tests have in common.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_manager::{Binding, Certificate, Config, LoadSpec, Manager, UnloadOptions};
use cofferdam_port_character::{CharacterAddress, CharacterError, CharacterPort};
use cofferdam_sim::{Behaviour, Drive, SimDevice};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Longest wait for anything that has to come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn driver(name: &str) -> Vec<u8> {
    let path = format!("{}/../../../target/drivers/{name}.wasm", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}; run 'cargo xtask build' first"))
}

pub(crate) fn behaviour(rules: &[&str]) -> Behaviour {
    let rules = rules.iter().map(|rule| rule.parse().unwrap()).collect();
    Behaviour { seed: 42, rules, ..Behaviour::default() }
}

/// A binding of a shipped driver to a device of the sim.
pub(crate) struct Bed {
    pub(crate) manager: Manager,
    pub(crate) binding: Arc<Binding>,
    pub(crate) folder: tempfile::TempDir,
}

impl Bed {
    pub(crate) fn new(driver_name: &str, device: &SimDevice, queues: u16) -> Bed {
        let cache = format!("{}/../../../target/test-cache", env!("CARGO_MANIFEST_DIR"));
        let manager = Manager::new(Config { cache_dir: Some(cache.into()) }).unwrap();
        let transport = Box::new(device.transport(Drive::Threads).unwrap());
        let mut spec = LoadSpec::new(driver_name, driver(driver_name), transport);
        spec.queues = Some(queues);
        let binding = manager.load(spec).unwrap();
        Bed { manager, binding, folder: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn start(&self, address: &str) -> Result<CharacterPort, CharacterError> {
        let address: CharacterAddress = address.parse()?;
        CharacterPort::start(&self.binding, &address, || {})
    }

    /// Starts a port and gives it to the binding.
    #[track_caller]
    pub(crate) fn attach(&self, address: &str) {
        let port = self.start(address).unwrap();
        assert!(self.binding.attach_port(Box::new(port)).is_ok());
    }

    /// Unloads; everything has to be gone.
    #[track_caller]
    pub(crate) fn unload(&self) -> Certificate {
        let certificate = self.manager.unload_binding(&self.binding, &UnloadOptions::default()).unwrap();
        assert!(certificate.residual.is_zero(), "{certificate:?}");
        assert_eq!(certificate.leaked.bytes, 0, "{certificate:?}");
        certificate
    }
}

#[track_caller]
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain for: {what}");
        std::thread::park_timeout(Duration::from_millis(1));
    }
}

/// A file that is opened without waiting and never becomes the test's terminal.
pub(crate) fn open(path: impl AsRef<Path>, write: bool) -> File {
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
    File::options().read(true).write(write).custom_flags(flags.bits() as i32).open(path).unwrap()
}

fn wait(file: &File, flags: PollFlags) {
    let mut fds = [PollFd::new(file, flags)];
    let patience = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    assert!(poll(&mut fds, Some(&patience)).unwrap() > 0, "nothing for {PATIENCE:?}");
}

/// Exactly `bytes` bytes.
#[track_caller]
pub(crate) fn read(mut file: &File, bytes: usize) -> Vec<u8> {
    let (mut got, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
    while got.len() < bytes {
        let most = buffer.len().min(bytes - got.len());
        match file.read(&mut buffer[..most]) {
            Ok(0) => panic!("the end after {} of {bytes} bytes", got.len()),
            Ok(count) => got.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => wait(file, PollFlags::IN),
            Err(error) => panic!("{error} after {} of {bytes} bytes", got.len()),
        }
    }
    got
}

/// All of `bytes`.
#[track_caller]
pub(crate) fn write(mut file: &File, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => wait(file, PollFlags::OUT),
            Err(error) => panic!("{error} with {} bytes left", bytes.len()),
        }
    }
}

/// Bytes that are different everywhere.
pub(crate) fn noise(bytes: usize) -> Vec<u8> {
    (0..bytes as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}
