//! The port as the manager knows it: started, asked for its address, shut down.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::Builder;
use std::time::{Duration, Instant};

use cofferdam_manager::{
    Binding, Exported, Handle, HandleSpec, NotExportable, Notify, Offer, Parking, Phase, Port, PortReport, PortThreads,
    StreamPort,
};

use crate::address::CharacterAddress;
use crate::entropy::{Entropy, Sink};
use crate::error::CharacterError;
use crate::fifo::Fifo;
use crate::handover::{Bytes, Received, Said, StreamState, because};
use crate::place::Place;
use crate::pool::Pool;
use crate::pty::Pty;
use crate::stdio::{Raw, Stdio};
use crate::stream::{Line, Stream};

/// How long the start waits for the device to name the port: with control queues it does so after it runs.
const PLUG: Duration = Duration::from_secs(2);
/// How much longer than its grace a shutdown may take. A thread that is in a call into a driver comes back inside the call's deadline of 100 ms (DESIGN section 9).
const OVERRUN: Duration = Duration::from_millis(400);
/// The thread needs little: no recursion, small buffers.
const STACK_BYTES: usize = 256 * 1024;

/// What the thread and the port share.
#[derive(Clone)]
pub(crate) struct Shared(Arc<Inside>);

struct Inside {
    address: String,
    stop: Arc<Notify>,
    stop_at: OnceLock<Instant>,
    running: AtomicBool,
    severed: AtomicBool,
    parking: Parking<std::io::Result<Said>>,
}

impl Shared {
    fn new(address: &CharacterAddress, adopted: bool) -> Result<Shared, CharacterError> {
        Ok(Shared(Arc::new(Inside {
            address: address.to_string(),
            stop: Notify::new().map_err(CharacterError::io("eventfd"))?,
            stop_at: OnceLock::new(),
            running: AtomicBool::new(true),
            severed: AtomicBool::new(false),
            parking: Parking::new(adopted),
        })))
    }

    /// Where the thread stands while another process is to take over.
    pub(crate) fn parking(&self) -> &Parking<std::io::Result<Said>> {
        &self.0.parking
    }

    /// What was told by [`Shared::stop_fd`] is looked for afterwards.
    pub(crate) fn clear_stop(&self) {
        self.0.stop.clear();
    }

    pub(crate) fn address(&self) -> &str {
        &self.0.address
    }

    /// Readable when the port is to stop, or its thread to stand.
    pub(crate) fn stop_fd(&self) -> BorrowedFd<'_> {
        self.0.stop.fd()
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.0.stop_at.get().is_some()
    }

    /// When the grace is over, once that is known.
    pub(crate) fn stop_at(&self) -> Option<Instant> {
        self.0.stop_at.get().copied()
    }

    pub(crate) fn severed(&self, severed: bool) {
        self.0.severed.store(severed, Ordering::Relaxed);
    }
}

/// Down when the thread has ended, however.
struct Running(Shared);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.0.running.store(false, Ordering::Release);
    }
}

/// One of this crate's ports: a thread, and what it serves.
///
/// Dropping it without [`Port::shutdown`] shuts it down with no grace.
pub struct CharacterPort {
    shared: Shared,
    threads: PortThreads,
    place: Option<Place>,
    raw: Option<Raw>,
    /// What it may be told of by export: standard input and output are this process's.
    address: CharacterAddress,
    /// Another process has it.
    forgotten: bool,
}

impl std::fmt::Debug for CharacterPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CharacterPort").field("address", &self.shared.address()).finish_non_exhaustive()
    }
}

impl CharacterPort {
    /// Serves `binding` at `address` until [`Port::shutdown`]. `over` is called when nobody serves it any more, for `stdio` alone: it also ends by itself.
    ///
    /// # Errors
    /// [`CharacterError`]; nothing is left behind.
    pub fn start(
        binding: &Arc<Binding>,
        address: &CharacterAddress,
        over: impl FnOnce() + Send + 'static,
    ) -> Result<CharacterPort, CharacterError> {
        let given = binding.offer().ok_or(CharacterError::NotServing)?.service();
        let needed = address.service();
        if given != needed {
            return Err(CharacterError::Service { address: address.to_string(), needed, given });
        }
        let mut port = CharacterPort::new(address, false)?;
        match address {
            CharacterAddress::Fifo(path) => {
                let (fifo, place) = Fifo::make(path)?;
                port.place = Some(place);
                port.serve_entropy(binding, fifo, "whoever reads it")?;
            }
            CharacterAddress::EntropyPool { rate } => port.serve_entropy(binding, Pool::open(*rate)?, "the kernel")?,
            CharacterAddress::Pty { link, port: number } => {
                let there = find(binding, *number)?;
                let (pty, place) = Pty::make(link)?;
                port.place = Some(place);
                port.serve_stream(binding, pty, (there.set.into(), there.index), None)?;
            }
            CharacterAddress::Stdio { port: number } => {
                let there = find(binding, *number)?;
                let (stdio, raw) = Stdio::open(Box::new(over))?;
                port.raw = raw;
                port.serve_stream(binding, stdio, (there.set.into(), there.index), None)?;
            }
        }
        tracing::info!(port = port.shared.address(), binding = binding.name(), "serving");
        Ok(port)
    }

    /// The port that another process exported. Until [`Port::resume`] nothing is read from it and nothing written, and nobody hears of it if this is dropped before that.
    ///
    /// # Errors
    /// [`CharacterError`]: the other process can go on.
    pub fn adopt(binding: &Arc<Binding>, exported: Exported) -> Result<CharacterPort, CharacterError> {
        let Received { address, file, descriptors, stream } = Received::sort(exported)?;
        let address: CharacterAddress = address.parse()?;
        let given = binding.offer().ok_or(CharacterError::NotServing)?.service();
        if given != address.service() {
            return Err(CharacterError::Service { address: address.to_string(), needed: address.service(), given });
        }
        let mut port = CharacterPort::new(&address, true)?;
        let missing = || CharacterError::wrong("a descriptor or a part of the state is missing, or too many are there");
        let count = descriptors.len();
        let mut descriptors = descriptors.into_iter();
        match (&address, count, stream) {
            (CharacterAddress::Fifo(path), 1, None) => {
                let (fifo, place) = Fifo::adopt(path, descriptors.next().ok_or_else(missing)?)?;
                if Some(place.file()) != file {
                    return Err(CharacterError::wrong("the pipe is another one"));
                }
                port.place = Some(place);
                port.serve_entropy(binding, fifo, "whoever reads it")?;
            }
            (CharacterAddress::EntropyPool { rate }, 0, None) => {
                port.serve_entropy(binding, Pool::adopt(*rate)?, "the kernel")?;
            }
            (CharacterAddress::Pty { link, port: number }, 2, Some((state, bytes))) => {
                let (master, opens) = descriptors.next().zip(descriptors.next()).ok_or_else(missing)?;
                let pty = Pty::adopt(master, opens, state.terminal.clone())?;
                port.place = Some(Place::adopt(link, file.ok_or_else(missing)?));
                port.serve_stream(binding, pty, (state.lane, *number), Some((state, bytes)))?;
            }
            _ => return Err(missing()),
        }
        Ok(port)
    }

    fn new(address: &CharacterAddress, adopted: bool) -> Result<CharacterPort, CharacterError> {
        Ok(CharacterPort {
            shared: Shared::new(address, adopted)?,
            threads: PortThreads::default(),
            place: None,
            raw: None,
            address: address.clone(),
            forgotten: adopted,
        })
    }

    fn set_forgotten(&mut self, forgotten: bool) {
        self.forgotten = forgotten;
        self.place.iter_mut().for_each(|place| place.set_forgotten(forgotten));
    }

    fn serve_entropy(&mut self, binding: &Arc<Binding>, sink: impl Sink, peer: &str) -> Result<(), CharacterError> {
        let handle = self.open(binding, 0, false, peer.to_owned())?;
        let worker = Entropy::new(handle, sink, self.shared.clone())?;
        self.spawn("entropy", move || worker.run())
    }

    fn serve_stream(
        &mut self,
        binding: &Arc<Binding>,
        line: impl Line,
        (lane, number): (usize, u32),
        adopted: Option<(StreamState, Bytes)>,
    ) -> Result<(), CharacterError> {
        let handle = self.open(binding, lane, true, line.peer())?;
        let worker = Stream::new(Arc::clone(binding), handle, line, (lane, number), self.shared.clone(), adopted)?;
        self.spawn("stream", move || worker.run())
    }

    fn open(
        &self,
        binding: &Arc<Binding>,
        lane: usize,
        receives: bool,
        peer: String,
    ) -> Result<Handle, CharacterError> {
        // A notify that revocation does not hang up: the thread sleeps on it until it is told what next.
        let notify = Some(Notify::new().map_err(CharacterError::io("eventfd"))?);
        let label = self.shared.address().to_owned();
        Ok(binding.open(HandleSpec { label, peer, lane, receives, notify })?)
    }

    fn spawn(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), CharacterError> {
        let running = Running(self.shared.clone());
        let builder = Builder::new().name(format!("cofferdam-{name}")).stack_size(STACK_BYTES);
        let body = move || {
            let _running = running;
            body();
        };
        self.threads.spawn(builder, body).map_err(CharacterError::io("starting a thread"))
    }

    /// Ends its thread, which stands, without a word to anybody.
    fn leave(&mut self) {
        self.set_forgotten(true);
        self.shared.0.parking.release(false);
        self.shared.0.stop.signal();
        if !self.threads.end(Instant::now() + OVERRUN).left_behind.is_empty() {
            tracing::error!(port = self.shared.address(), "the thread of a port that was handed over has not ended");
        }
    }

    fn stop(&mut self, grace: Duration) -> PortReport {
        let connections = u64::from(self.shared.0.running.load(Ordering::Acquire));
        // Nobody comes any more.
        self.place = None;
        let at = Instant::now() + grace;
        let _ = self.shared.0.stop_at.set(at);
        self.shared.0.parking.release(true);
        self.shared.0.stop.signal();
        let ended = self.threads.end(at + OVERRUN);
        if !ended.left_behind.is_empty() {
            tracing::error!(
                port = self.shared.address(),
                "the port's thread is held up in the binding; it is left behind"
            );
        }
        if ended.panicked > 0 {
            tracing::error!(port = self.shared.address(), "the port's thread had panicked");
        }
        self.raw = None;
        let severed = self.shared.0.severed.load(Ordering::Relaxed) || !ended.left_behind.is_empty();
        PortReport { connections, severed: u64::from(severed) }
    }
}

impl Port for CharacterPort {
    fn address(&self) -> String {
        self.shared.address().to_owned()
    }

    fn shutdown(mut self: Box<Self>, grace: Duration) -> PortReport {
        self.stop(grace)
    }

    fn exportable(&self) -> Result<(), NotExportable> {
        if matches!(self.address, CharacterAddress::Stdio { .. }) {
            return Err(NotExportable::because("standard input and output are this process's"));
        }
        if !self.shared.0.running.load(Ordering::Acquire) {
            return Err(NotExportable::because("it has ended"));
        }
        Ok(())
    }

    fn export(&mut self, until: Instant) -> Result<Exported, NotExportable> {
        let stands = self.shared.0.parking.gather(1, until, || self.shared.0.stop.signal());
        let said = stands.and_then(|mut said| said.pop());
        let said = said.ok_or_else(|| NotExportable::because("what it has read is still with the device"))?;
        said.map_err(because)?.export(self.address(), self.place.as_ref().map(Place::file))
    }

    fn canceller(&self) -> Option<Box<dyn Fn() + Send>> {
        let shared = self.shared.clone();
        Some(Box::new(move || shared.parking().cancel()))
    }

    fn resume(&mut self) {
        self.set_forgotten(false);
        self.shared.0.parking.release(true);
    }

    fn forget(mut self: Box<Self>) {
        self.set_forgotten(true);
    }
}

impl Drop for CharacterPort {
    fn drop(&mut self) {
        if self.forgotten {
            self.leave();
        } else if !self.threads.is_empty() {
            self.stop(Duration::ZERO);
        }
    }
}

/// The port of this number, as soon as the device has named it.
fn find(binding: &Arc<Binding>, number: u32) -> Result<StreamPort, CharacterError> {
    let deadline = Instant::now() + PLUG;
    let handle = binding.open(HandleSpec { label: "looking for a port".to_owned(), ..HandleSpec::default() })?;
    loop {
        handle.notify().clear();
        let offer = binding.offer().ok_or(CharacterError::NotServing)?;
        let Offer::Stream(stream) = &*offer else { return Err(CharacterError::NotServing) };
        if let Some(port) = stream.ports.iter().find(|port| port.index == number) {
            return Ok(port.clone());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || !matches!(binding.phase(), Phase::Serving | Phase::Recovering) {
            let there: Vec<_> = stream.ports.iter().map(|port| port.index.to_string()).collect();
            let there = if there.is_empty() { "none".to_owned() } else { there.join(", ") };
            return Err(CharacterError::NoSuchPort { port: number, there });
        }
        handle.notify().wait(Some(left));
    }
}
