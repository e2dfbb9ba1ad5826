//! The device behind a vhost-user socket, on rust-vmm's `vhost-user-backend`.
//!
//! The library speaks the protocol and wakes a worker per queue; rings and requests are the engine's own, because the
//! library's ring cannot lie. One front end is served after another: while one is connected, the next waits in the
//! listener's queue, and hears nothing, as with qemu-storage-daemon.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use crate::device::{SimDevice, SimError};
use crate::memory::{Memory, of_guest_memory};
use crate::ring::RingSetup;
use crate::session::{Event, Session};

type GuestMemory = GuestMemoryAtomic<GuestMemoryMmap>;

/// What a server does when its device dies. The front end sees its socket hang up in either case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDeath {
    /// It serves the next front end with the same medium: a backend that was restarted at once.
    ServeAgain,
    /// It ends, and [`Server::wait`] returns: a backend that stays away.
    End,
}

/// Why a server cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Another process listens there.
    #[error("{0} is in use")]
    InUse(PathBuf),
    /// There is something that is no socket.
    #[error("{0} exists and is no socket")]
    NotASocket(PathBuf),
    /// The socket cannot be made.
    #[error("cannot listen on {path}: {source}")]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The library refused.
    #[error("vhost-user-backend: {0}")]
    Library(String),
    /// The device has a driver in this process.
    #[error(transparent)]
    Sim(#[from] SimError),
}

/// A listening vhost-user backend. Dropped, it stops.
pub struct Server {
    path: PathBuf,
    stop: Arc<Stop>,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

/// Stops a [`Server`] that another thread waits for.
#[derive(Clone)]
pub struct Stopper(Arc<Stop>);

impl Stopper {
    /// Asks it to hang up on its front end and to end. Does not wait for it.
    pub fn stop(&self) {
        self.0.ask();
    }
}

/// How to stop the server's thread from another one.
struct Stop {
    asked: AtomicBool,
    event: Event,
    connection: Mutex<Option<Connection>>,
}

#[derive(Clone)]
struct Connection {
    session: Arc<Session>,
    socket: ShutdownHandle,
}

impl Stop {
    fn is_asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }

    fn ask(&self) {
        self.asked.store(true, Ordering::SeqCst);
        self.event.signal();
        self.hang_up();
    }

    fn hang_up(&self) {
        let connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(Connection { session, socket }) = connection {
            session.end();
            socket.shutdown();
        }
    }
}

impl SimDevice {
    /// Listens on `path` and serves one front end after another on a thread of its own. The socket exists, and connections
    /// queue up, when this returns. A socket file that nobody listens on is taken over.
    pub fn serve(&self, path: &Path, on_death: OnDeath) -> Result<Server, ServeError> {
        let listen = |source| ServeError::Listen { path: path.to_owned(), source };
        match std::fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => return Err(ServeError::NotASocket(path.to_owned())),
            Ok(_) if UnixStream::connect(path).is_ok() => return Err(ServeError::InUse(path.to_owned())),
            _ => {}
        }
        // Removes the file when it is dropped.
        let listener = Listener::new(path, true).map_err(|error| listen(io::Error::other(error.to_string())))?;
        let stop = Arc::new(Stop {
            asked: AtomicBool::new(false),
            event: Event::new().map_err(listen)?,
            connection: Mutex::default(),
        });
        let (sim, inner) = (self.clone(), Arc::clone(&stop));
        let thread = std::thread::Builder::new()
            .name("sim-vhost-user".to_owned())
            .spawn(move || serve(&sim, listener, on_death, &inner))
            .map_err(listen)?;
        Ok(Server { path: path.to_owned(), stop, thread: Some(thread) })
    }
}

impl Server {
    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether its thread has ended, by [`OnDeath::End`] or an error.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// A lever that stops it from another thread.
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.stop))
    }

    /// Waits until the server ends, by a [`Stopper`], [`OnDeath::End`] or an error.
    pub fn wait(mut self) -> Result<(), ServeError> {
        self.join()
    }

    /// Hangs up on the front end, stops listening and removes the socket file.
    pub fn stop(mut self) -> Result<(), ServeError> {
        self.stop.ask();
        self.join()
    }

    fn join(&mut self) -> Result<(), ServeError> {
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(outcome)) => outcome,
            Some(Err(_)) => Err(ServeError::Library("a server thread panicked".to_owned())),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.ask();
        let _ = self.join();
    }
}

/// Waits for a connection. False: stop.
fn wait_for_connection(listener: &Listener, stop: &Stop) -> bool {
    let listening = crate::memory::borrow_fd(listener);
    loop {
        if stop.is_asked() {
            return false;
        }
        let mut fds = [PollFd::new(&listening, PollFlags::IN), PollFd::new(&stop.event, PollFlags::IN)];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) if !fds[0].revents().is_empty() => return true,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

fn serve(sim: &SimDevice, mut listener: Listener, on_death: OnDeath, stop: &Arc<Stop>) -> Result<(), ServeError> {
    let library = |error: vhost_user_backend::Error| ServeError::Library(error.to_string());
    while wait_for_connection(&listener, stop) {
        let session = sim.claim(false)?;
        let backend = Arc::new(Backend {
            session: Arc::clone(&session),
            stop: Arc::clone(stop),
            memory: Mutex::default(),
            vrings: Mutex::new(vec![None; usize::from(sim.machine().queues)]),
            exits: Mutex::default(),
        });
        let atomic = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let mut daemon =
            VhostUserDaemon::new("sim-control".to_owned(), Arc::clone(&backend), atomic).map_err(library)?;
        for (index, handler) in (0..).zip(daemon.get_epoll_handlers()) {
            let wake = session.wake_event(index).as_fd().as_raw_fd();
            handler
                .register_listener(wake, EventSet::IN, wake_id(sim))
                .map_err(|error| ServeError::Library(error.to_string()))?;
        }
        daemon.start(&mut listener).map_err(library)?;
        if let Some(socket) = daemon.shutdown_handle() {
            *stop.connection.lock().unwrap_or_else(PoisonError::into_inner) =
                Some(Connection { session: Arc::clone(&session), socket });
        }
        if stop.is_asked() || session.is_over() {
            stop.hang_up();
        }
        // How a connection ended is the front end's business; the next one is served in any case.
        let _ = daemon.wait();
        *stop.connection.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let died = session.is_lost();
        session.end();
        // Joins the workers, by their exit events.
        drop(daemon);
        backend.close_exits();
        if died && on_death == OnDeath::End {
            break;
        }
    }
    Ok(())
}

/// The library's number for a worker's wake event: 0 to `queues` are taken.
fn wake_id(sim: &SimDevice) -> u64 {
    u64::from(sim.machine().queues) + 1
}

/// One connection, as the library calls it.
struct Backend {
    session: Arc<Session>,
    stop: Arc<Stop>,
    memory: Mutex<Arc<Memory>>,
    /// The library's rings, by queue, kept because GET_VRING_BASE is answered from there.
    vrings: Mutex<Vec<Option<VringRwLock>>>,
    /// The descriptors that the library waits on for exit and never closes.
    exits: Mutex<Vec<RawFd>>,
}

impl Backend {
    fn close_exits(&self) {
        for fd in self.exits.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            crate::memory::close_leaked_fd(fd);
        }
    }

    /// A frozen device does not answer control messages, until it is released or the connection ends.
    fn thaw(&self) {
        let machine = self.session.machine();
        while machine.is_frozen() && !self.session.is_over() && !self.stop.is_asked() {
            machine.wait_for(Instant::now() + Duration::from_secs(1), || {
                !machine.is_frozen() || self.session.is_over() || self.stop.is_asked()
            });
        }
    }

    /// Starts the engine's queue `index` where the front end put its ring.
    fn start(&self, index: u16, vring: &VringRwLock) {
        let setup = {
            let vring = vring.get_ref();
            let queue = vring.get_queue();
            let has = |bit: u32| self.session.features() & 1 << bit != 0;
            if !virtio_queue::QueueT::ready(queue) {
                return;
            }
            RingSetup {
                size: virtio_queue::QueueT::size(queue),
                descriptors: virtio_queue::QueueT::desc_table(queue),
                available: virtio_queue::QueueT::avail_ring(queue),
                used: virtio_queue::QueueT::used_ring(queue),
                event_idx: has(VIRTIO_RING_F_EVENT_IDX),
                indirect: has(VIRTIO_RING_F_INDIRECT_DESC),
                next_available: virtio_queue::QueueT::next_avail(queue),
                next_used: virtio_queue::QueueT::next_used(queue),
            }
        };
        // Held until the ring has it: memory that is removed meanwhile must not be in a ring that starts.
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        // A refusal is on the sim's record of violations; the queue then stands still.
        if self.session.start(index, &memory, setup).is_ok() {
            self.vrings.lock().unwrap_or_else(PoisonError::into_inner)[usize::from(index)] = Some(vring.clone());
        }
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        usize::from(self.session.machine().queues)
    }

    fn max_queue_size(&self) -> usize {
        usize::from(self.session.machine().model.queue_size())
    }

    fn features(&self) -> u64 {
        self.session.machine().offered_features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        self.session.set_features(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The engine reads it from the features when a ring starts.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.thaw();
        // The library turns another length than what was asked for into an error answer.
        let mut bytes = vec![0; (size as usize).min(4096)];
        match self.session.machine().read_config(offset, &mut bytes) {
            Some(()) => bytes,
            None => Vec::new(),
        }
    }

    fn update_memory(&self, memory: GuestMemory) -> io::Result<()> {
        self.thaw();
        let memory = Arc::new(GuestMemoryMmap::clone(&memory.memory()));
        let memory = Arc::new(of_guest_memory(&memory));
        let mut known = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        *known = Arc::clone(&memory);
        self.session.set_memory(&memory);
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.num_queues()).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        let (consumer, notifier) = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()?;
        // The library takes the descriptor out of the consumer and forgets it, which would leak one per queue and connection.
        self.exits.lock().unwrap_or_else(PoisonError::into_inner).push(consumer.as_raw_fd());
        Some((consumer, notifier))
    }

    fn stop_vring(&self, index: u32) -> io::Result<()> {
        self.thaw();
        let Ok(index) = u16::try_from(index) else { return Ok(()) };
        if let Some(next) = self.session.stop(index)
            && let Some(vring) = &self.vrings.lock().unwrap_or_else(PoisonError::into_inner)[usize::from(index)]
        {
            vring.set_queue_next_avail(next);
        }
        Ok(())
    }

    fn handle_event(
        &self,
        device_event: u16,
        _events: EventSet,
        vrings: &[VringRwLock],
        thread_id: usize,
    ) -> io::Result<()> {
        // A worker has one queue, whose number is the worker's.
        let (Ok(index), Some(vring)) = (u16::try_from(thread_id), vrings.first()) else { return Ok(()) };
        if device_event != 0 {
            self.session.wake_event(index).clear();
        } else if !self.session.is_started(index) {
            self.start(index, vring);
        }
        self.session.run(index, || {
            // The front end may have taken its descriptor away already.
            let _ = vring.signal_used_queue();
        });
        if self.session.is_over() {
            self.stop.hang_up();
        }
        Ok(())
    }
}
