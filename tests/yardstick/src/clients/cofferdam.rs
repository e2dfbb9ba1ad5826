//! Cofferdam itself: in process through a handle, and through its NBD port.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cofferdam_bus_vhost_user::{ConnectError, VhostUser};
use cofferdam_manager::{
    Binding, Buffer, Completion, Config, Handle, HandleSpec, IoFlags, IoOp, IoRequest, LoadSpec, Manager, UnloadOptions,
};
use cofferdam_port_nbd::{NbdAddress, NbdOptions, NbdPort};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::nbd::NbdClient;
use crate::backend::Backend;
use crate::engine::{Engine, Io, Job, Mode, PATIENCE};

/// One host for all measurements: the driver is compiled once.
pub struct Host {
    /// The library.
    pub manager: Manager,
    /// The driver's component.
    pub component: Vec<u8>,
}

/// Where `cargo xtask build` puts the driver of this name.
#[must_use]
pub fn driver_path(driver: &str) -> PathBuf {
    let default = || Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/drivers")).join(driver);
    std::env::var_os("COFFERDAM_BENCH_DRIVER").map_or_else(default, PathBuf::from)
}

impl Host {
    /// Starts it for block devices, with compiled code kept in `cache` if that is given.
    ///
    /// # Errors
    /// When the driver was not built.
    pub fn start(cache: Option<&Path>) -> Result<Host> {
        Host::of("virtio-blk.wasm", cache)
    }

    /// Starts it for the devices of another driver.
    ///
    /// # Errors
    /// When the driver was not built.
    pub fn of(driver: &str, cache: Option<&Path>) -> Result<Host> {
        let path = driver_path(driver);
        let component = std::fs::read(&path).with_context(|| format!("{}: run 'cargo xtask build'", path.display()))?;
        Ok(Host { manager: Manager::new(Config { cache_dir: cache.map(Path::to_owned) })?, component })
    }

    /// Joins the driver and a device.
    ///
    /// # Errors
    /// When the load fails.
    pub fn load(&self, device: &Backend, queues: u16) -> Result<Arc<Binding>> {
        let transport = connect(&device.socket())?;
        let mut spec = LoadSpec::new("virtio-blk.wasm", self.component.clone(), Box::new(transport));
        spec.queues = Some(queues);
        // The same ring as blkio's and the bare one's: three descriptors for each of 128 requests.
        spec.ring_entries = super::bare::RING_ENTRIES;
        Ok(self.manager.load(spec)?)
    }

    /// Takes a binding down.
    ///
    /// # Errors
    /// When something of it is left.
    pub fn unload(&self, binding: &Binding) -> Result<()> {
        let certificate = self.manager.unload(binding.name(), &UnloadOptions::default())?;
        ensure!(certificate.residual.is_zero(), "something is left of {}", binding.name());
        Ok(())
    }
}

/// Connects to a device, which may be busy for a moment with the end of its last client.
///
/// # Errors
/// As [`VhostUser::connect`].
pub fn connect(socket: &Path) -> Result<VhostUser> {
    let address = format!("vhost-user:{}", socket.display());
    let deadline = Instant::now() + PATIENCE;
    loop {
        match VhostUser::connect(&address) {
            Err(ConnectError::NobodyListens(_) | ConnectError::NotFound(_)) if Instant::now() < deadline => {
                std::thread::park_timeout(Duration::from_millis(1));
            }
            result => return Ok(result?),
        }
    }
}

/// A loaded binding that leaves when this is dropped.
pub struct Loaded {
    pub(crate) manager: Manager,
    pub(crate) binding: Arc<Binding>,
}

impl Loaded {
    /// The binding's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.binding.name()
    }

    pub(crate) fn crossings(&self) -> u64 {
        self.binding.status().calls.iter().map(|core| core.crossings).sum()
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        if let Err(error) = self.manager.unload(self.binding.name(), &UnloadOptions::default()) {
            eprintln!("{}: {error}", self.binding.name());
        }
    }
}

/// The embedding API, as a program would use it: one handle per lane, buffers leased once and used again.
pub struct InProcess {
    handles: Vec<Handle>,
    mode: Mode,
    op: IoOp,
    bytes: u32,
    /// By tag, while no request has it.
    buffers: Vec<Option<Buffer>>,
    requests: Vec<Vec<IoRequest>>,
    completions: Vec<Completion>,
    capacity: u64,
    /// Last: it takes the device away.
    loaded: Loaded,
}

impl InProcess {
    /// Loads the driver and opens a handle per queue.
    ///
    /// # Errors
    /// When the load fails.
    pub fn connect(host: &Host, device: &Backend, mode: Mode, queues: u16) -> Result<InProcess> {
        InProcess::of(host, host.load(device, queues)?, mode)
    }

    /// The same on a binding that was loaded in whatever way.
    ///
    /// # Errors
    /// When no handle can be had.
    pub fn of(host: &Host, binding: Arc<Binding>, mode: Mode) -> Result<InProcess> {
        let loaded = Loaded { manager: host.manager.clone(), binding };
        let mut handles = Vec::new();
        for lane in 0..loaded.binding.lanes() {
            let spec = HandleSpec { label: "in-process".into(), lane, ..HandleSpec::default() };
            handles.push(loaded.binding.open(spec)?);
        }
        ensure!(mode == Mode::Poll || handles.len() == 1, "several queues are measured polling only");
        let capacity = handles[0].geometry().capacity_bytes;
        let requests = handles.iter().map(|_| Vec::with_capacity(1024)).collect();
        let (buffers, completions) = (Vec::new(), Vec::with_capacity(1024));
        Ok(InProcess { handles, mode, op: IoOp::Read, bytes: 0, buffers, requests, completions, capacity, loaded })
    }

    /// Waits in the default mode, for at most so long.
    pub fn wait(&mut self, limit: Duration) {
        self.handles[0].wait(limit, &mut self.completions);
    }

    /// Looks once.
    fn look(&mut self, arm: bool) {
        for handle in &self.handles {
            handle.poll(arm, &mut self.completions);
        }
    }

    /// Sleeps as soon as there is nothing.
    fn sleep(&mut self) -> Result<()> {
        self.look(true);
        if !self.completions.is_empty() {
            return Ok(());
        }
        let handle = &self.handles[0];
        let mut fds = [
            PollFd::from_borrowed_fd(handle.device_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(handle.notify().fd(), PollFlags::IN),
        ];
        let limit = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
        poll(&mut fds, Some(&limit))?;
        if !fds[1].revents().is_empty() {
            handle.notify().clear();
        }
        self.look(false);
        Ok(())
    }
}

impl Engine for InProcess {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn prepare(&mut self, job: Job) -> Result<()> {
        self.op = if job.op.reads() { IoOp::Read } else { IoOp::Write };
        self.bytes = job.op.bytes();
        self.buffers.clear();
        for tag in 0..job.depth as usize {
            let buffer = self.handles[tag % self.handles.len()].lease(self.bytes)?;
            buffer.fill(0, self.bytes, 0x5a)?;
            self.buffers.push(Some(buffer));
        }
        Ok(())
    }

    fn submit(&mut self, requests: &[Io]) -> Result<()> {
        let InProcess { buffers, op, bytes, .. } = self;
        let mut request = |io: &Io| IoRequest {
            user: u64::from(io.tag),
            op: *op,
            offset: io.offset,
            length: *bytes,
            flags: IoFlags::default(),
            buffer: buffers[io.tag as usize].take(),
        };
        match &mut self.requests[..] {
            [only] => only.extend(requests.iter().map(request)),
            lanes => {
                let count = lanes.len();
                requests.iter().for_each(|io| lanes[io.tag as usize % count].push(request(io)));
            }
        }
        for (handle, requests) in self.handles.iter().zip(&mut self.requests) {
            if !requests.is_empty() {
                handle.submit(requests)?;
            }
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<u32>) -> Result<()> {
        match self.mode {
            Mode::Poll => self.look(false),
            Mode::Event => self.sleep()?,
            Mode::Adaptive => {
                self.handles[0].wait(PATIENCE, &mut self.completions);
            }
        }
        for completion in self.completions.drain(..) {
            completion.result?;
            self.buffers[completion.user as usize] = completion.buffer;
            done.push(completion.user as u32);
        }
        Ok(())
    }

    fn crossings(&self) -> Option<u64> {
        Some(self.loaded.crossings())
    }
}

/// A pipelined NBD client in front of our own NBD port, in this process.
pub struct OverNbd {
    client: NbdClient,
    loaded: Loaded,
}

impl OverNbd {
    /// Loads the driver, attaches a port on a Unix socket, connects to it.
    ///
    /// # Errors
    /// When any of it fails.
    pub fn connect(host: &Host, device: &Backend) -> Result<OverNbd> {
        let binding = host.load(device, 1)?;
        let loaded = Loaded { manager: host.manager.clone(), binding };
        let socket = device.path("cofferdam-nbd.sock");
        attach(&loaded.binding, &socket)?;
        let client = NbdClient::connect(&socket, "")?;
        Ok(OverNbd { client, loaded })
    }
}

/// Serves a binding over NBD on a Unix socket.
///
/// # Errors
/// When the port cannot be made.
pub fn attach(binding: &Arc<Binding>, socket: &Path) -> Result<()> {
    let address: NbdAddress = format!("nbd:{}", socket.display()).parse()?;
    let port = NbdPort::start(Arc::clone(binding), &address, NbdOptions::default())?;
    ensure!(binding.attach_port(Box::new(port)).is_ok(), "the binding takes no port");
    Ok(())
}

impl Engine for OverNbd {
    fn capacity(&self) -> u64 {
        self.client.capacity()
    }

    fn prepare(&mut self, job: Job) -> Result<()> {
        self.client.prepare(job)
    }

    fn submit(&mut self, requests: &[Io]) -> Result<()> {
        self.client.submit(requests)
    }

    fn reap(&mut self, done: &mut Vec<u32>) -> Result<()> {
        self.client.reap(done)
    }

    fn crossings(&self) -> Option<u64> {
        Some(self.loaded.crossings())
    }
}
