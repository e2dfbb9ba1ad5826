//! What the tests share: devices, requests, and a look at what is mapped where.

#![allow(unreachable_pub)]

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_bus_vhost_user::VhostUser;
use cofferdam_manager::{
    Binding, Buffer, Completion, Config, Handle, HandleSpec, IoError, IoOp, IoRequest, LoadSpec, Manager, Mapped,
    MappedUse, Transport, UnloadOptions,
};
use cofferdam_sim::memory::{Memory, Region};
use cofferdam_sim::{Drive, Effect, Options, Rule, Sim, Storage};
use rustix::process::{Pid, Signal, kill_process};

pub const PAGE: u64 = 4096;
pub const MIB: u64 = 1 << 20;
/// Only a failing test waits so long.
pub const PATIENCE: Duration = Duration::from_secs(10);

pub fn driver(name: &str) -> Vec<u8> {
    let path = format!("{}/../../target/drivers/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}; run 'cargo xtask build' first"))
}

pub fn manager() -> Manager {
    let cache = format!("{}/../../target/test-cache", env!("CARGO_MANIFEST_DIR"));
    Manager::new(Config { cache_dir: Some(cache.into()) }).unwrap()
}

pub fn sim(rules: Vec<Rule>) -> Sim {
    Sim::new(Options { storage: Storage::Memory(16 << 20), rules, ..Options::default() }).unwrap()
}

pub fn gate() -> Vec<Rule> {
    vec![Rule::always(Effect::Gate)]
}

pub fn spec(name: &str, transport: Box<dyn Transport>) -> LoadSpec {
    LoadSpec { name: Some(name.into()), ..LoadSpec::new("virtio-blk.wasm", driver("virtio-blk.wasm"), transport) }
}

pub fn load(manager: &Manager, sim: &Sim, name: &str) -> Arc<Binding> {
    manager.load(spec(name, Box::new(sim.transport(Drive::Threads).unwrap()))).unwrap()
}

pub fn open(binding: &Arc<Binding>) -> Handle {
    binding.open(HandleSpec::default()).unwrap()
}

/// The sim in a process of its own.
pub struct Process {
    pub child: Child,
    folder: tempfile::TempDir,
}

impl Process {
    pub fn start() -> Process {
        let folder = tempfile::tempdir().unwrap();
        // Beside this test's folder, whichever target folder that is in.
        let tests = std::env::current_exe().unwrap();
        let binary: PathBuf = tests.parent().unwrap().parent().unwrap().join("cofferdam-sim-blk");
        let mut child = Command::new(&binary)
            .args(["--memory", "16M", "--socket"])
            .arg(folder.path().join("blk.sock"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}; run 'cargo xtask build' first", binary.display()));
        let mut ready = String::new();
        let mut output = std::io::BufReader::new(child.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut output, &mut ready).unwrap();
        assert!(ready.starts_with("ready"), "{ready}");
        Process { child, folder }
    }

    pub fn transport(&self) -> Box<dyn Transport> {
        let address = format!("vhost-user:{}", self.folder.path().join("blk.sock").display());
        Box::new(VhostUser::connect(&address).unwrap())
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// Neither runs nor answers until it is sent on.
    pub fn stop(&self) {
        kill_process(Pid::from_raw(self.pid()).unwrap(), Signal::STOP).unwrap();
        // The signal is only on its way so far: each thread stops by itself.
        until("the backend has stopped", || {
            let threads = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap().flatten();
            let states = threads.map(|thread| std::fs::read_to_string(thread.path().join("stat")).unwrap());
            states.into_iter().all(|stat| stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" T")))
        });
    }

    pub fn go_on(&self) {
        kill_process(Pid::from_raw(self.pid()).unwrap(), Signal::CONT).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn request(op: IoOp, offset: u64, buffer: Buffer) -> IoRequest {
    IoRequest { user: offset, op, offset, length: buffer.len(), flags: Default::default(), buffer: Some(buffer) }
}

pub fn submit(handle: &Handle, op: IoOp, offset: u64, buffer: Buffer) {
    let mut requests = vec![request(op, offset, buffer)];
    handle.submit(&mut requests).unwrap();
    assert!(requests.is_empty());
}

pub fn answer(handle: &Handle) -> Completion {
    let mut out = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while handle.wait(PATIENCE, &mut out) == 0 {
        assert!(Instant::now() < deadline, "no answer");
    }
    assert_eq!(out.len(), 1);
    out.remove(0)
}

pub fn carry_out(handle: &Handle, op: IoOp, offset: u64, buffer: Buffer) -> Result<(), IoError> {
    submit(handle, op, offset, buffer);
    answer(handle).result
}

pub fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::yield_now();
    }
}

/// What the descriptor's holder sees through a mapping of its own.
pub fn foreign(fd: &OwnedFd, bytes: u64) -> Memory {
    Memory::new(vec![Arc::new(Region::map(0, bytes, fd.as_fd()).unwrap())])
}

/// Another process that was given the descriptor and holds on to it. What is in the file then is looked at through a mapping that lasts for the look alone, so that
/// it is not this process in which the binding's memory is found.
pub struct Holder(Child);

impl Holder {
    pub fn new(mapped: &Mapped) -> Holder {
        let given = Stdio::from(mapped.descriptor().unwrap());
        Holder(Command::new("sleep").arg("600").stdin(given).spawn().unwrap())
    }

    pub fn descriptor(&self) -> OwnedFd {
        let path = format!("/proc/{}/fd/0", self.0.id());
        std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap().into()
    }

    pub fn read(&self, at: u64, bytes: usize) -> Vec<u8> {
        read(&foreign(&self.descriptor(), at + bytes as u64), at, bytes)
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        foreign(&self.descriptor(), at + bytes.len() as u64).write(at, bytes).unwrap();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn read(memory: &Memory, at: u64, bytes: usize) -> Vec<u8> {
    let mut into = vec![0; bytes];
    memory.read(at, &mut into).unwrap();
    into
}

pub fn seen(mapped: &Mapped, at: u64, bytes: usize) -> Vec<u8> {
    let mut into = vec![0; bytes];
    mapped.read_at(at, &mut into).unwrap();
    into
}

/// Lines of a process' maps that have to do with mapped regions of the binding called `name`.
pub fn mappings(process: &str, name: &str) -> usize {
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
    maps.lines().filter(|line| line.contains(&format!("-{name}-mapped-"))).count()
}

pub fn descriptors(process: &str) -> usize {
    std::fs::read_dir(format!("/proc/{process}/fd")).unwrap().count()
}

pub fn options(millis: u64, force: bool) -> UnloadOptions {
    UnloadOptions { deadline: Duration::from_millis(millis), force, ..UnloadOptions::default() }
}

pub fn unload_clean(manager: &Manager, binding: &Arc<Binding>) {
    let certificate = manager.unload_binding(binding, &options(5000, false)).unwrap();
    assert!(certificate.residual.is_zero(), "{certificate:?}");
    assert_eq!(certificate.leaked.bytes, 0, "{certificate:?}");
    assert_eq!(binding.mapped_use(), MappedUse::default());
}
