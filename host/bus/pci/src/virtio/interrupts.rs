//! Used buffer notifications and configuration changes, to eventfds (virtio 1.2, sections 4.1.5.1.2, 4.1.5.3 and 4.1.5.4).
//!
//! | plan | MSI-X vectors | configuration changes |
//! | --- | --- | --- |
//! | a vector per queue | 1 and one for each queue | vector 0 |
//! | one for all queues | 2 | vector 0 |
//! | INTx | none | bit 1 of the ISR status |
//!
//! They are tried in this order; a device without room for a vector says so when it is given one, and then the next is tried. Each queue keeps a call eventfd of its own: who
//! empties one takes nothing from another, so a shared vector is passed on by a thread.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use cofferdam_device::{TransportError, Width};
use rustix::event::{EventfdFlags, PollFd, PollFlags, epoll, eventfd, poll};
use serde::{Deserialize, Serialize};

use super::common::{Common, NO_VECTOR};
use super::part::Part;
use crate::claimed::{Claimed, Interrupts};

/// Bits of the ISR status (section 4.1.4.5).
const ISR_QUEUE: u64 = 1;
const ISR_CONFIG: u64 = 2;

/// The vector of configuration changes; those of queues come behind it.
const CONFIG_VECTOR: u16 = 0;

/// A non-blocking eventfd.
pub(super) fn event(what: &str) -> Result<OwnedFd, TransportError> {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map_err(|errno| failed(what, errno))
}

fn failed(what: &str, errno: rustix::io::Errno) -> TransportError {
    TransportError::Io { what: what.to_owned(), source: errno.into() }
}

pub(super) fn duplicate(fd: &OwnedFd) -> Result<OwnedFd, TransportError> {
    rustix::io::fcntl_dupfd_cloexec(fd, 0).map_err(|errno| failed("fcntl(F_DUPFD_CLOEXEC)", errno))
}

fn signal(fd: &OwnedFd) {
    // Full is readable, which is all that is wanted.
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

fn clear(fd: &OwnedFd) -> bool {
    rustix::io::read(fd, &mut [0; 8]).is_ok()
}

/// What the device has to say beside its queues: one descriptor for everything.
pub(super) struct Notices {
    /// Readable when `change` is, or when the function may be on its way out.
    set: OwnedFd,
    /// The device's configuration changed, or it met an error.
    change: OwnedFd,
}

impl Notices {
    /// `function` is the function's own descriptor.
    pub(super) fn new(function: Option<BorrowedFd<'_>>) -> Result<Self, TransportError> {
        Self::on(event("configuration eventfd")?, function)
    }

    /// The same with an event that may be told of already.
    pub(super) fn on(change: OwnedFd, function: Option<BorrowedFd<'_>>) -> Result<Self, TransportError> {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|errno| failed("epoll_create", errno))?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
        for (number, fd) in [Some(change.as_fd()), function].into_iter().flatten().enumerate() {
            epoll::add(&set, fd, epoll::EventData::new_u64(number as u64), flags)
                .map_err(|errno| failed("epoll_ctl", errno))?;
        }
        Ok(Self { set, change })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.set.as_fd()
    }

    pub(super) fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.set.as_fd(), self.change.as_fd()]
    }

    /// What is told of a change by.
    pub(super) fn change(&self) -> BorrowedFd<'_> {
        self.change.as_fd()
    }

    /// Has somebody look whether the device is there.
    pub(super) fn wake(&self) {
        signal(&self.change);
    }

    /// Whether a change was told since this was last asked.
    pub(super) fn take_change(&self) -> bool {
        clear(&self.change)
    }
}

/// What has to live for as long as the interrupts shall come.
#[derive(Debug)]
pub(super) enum Wired {
    /// A vector per queue.
    Vectors,
    /// One for all queues: its event, and who passes it on, unless another process does.
    Shared(OwnedFd, Option<Relay>),
    /// INTx.
    Line,
}

impl Wired {
    /// For the log.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Wired::Vectors => "a vector per queue",
            Wired::Shared(..) => "one vector for all queues",
            Wired::Line => "INTx",
        }
    }

    pub(super) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Wired::Shared(event, relay) => {
                [event.as_fd()].into_iter().chain(relay.iter().map(|relay| relay.stop.as_fd())).collect()
            }
            Wired::Vectors | Wired::Line => Vec::new(),
        }
    }

    /// What another process has to know.
    pub(super) fn wiring(&self) -> Wiring {
        match self {
            Wired::Vectors => Wiring::Vectors,
            Wired::Shared(..) => Wiring::Shared,
            Wired::Line => Wiring::Line,
        }
    }

    /// Nothing is passed on any more by this process.
    pub(super) fn pause(&mut self) {
        if let Wired::Shared(_, relay) = self {
            *relay = None;
        }
    }

    /// This process passes on again; with INTx, what its function has to be told.
    ///
    /// # Errors
    /// `Io` when the system has no thread or descriptor left.
    pub(super) fn resume(
        &mut self,
        isr: &Part,
        notices: &Notices,
        calls: &[&OwnedFd],
    ) -> Result<Option<Interrupts>, TransportError> {
        let copies = || calls.iter().map(|call| duplicate(call)).collect::<Result<Vec<_>, _>>();
        match self {
            Wired::Vectors => Ok(None),
            Wired::Shared(event, relay) => {
                *relay = Some(Relay::start(duplicate(event)?, copies()?)?);
                Ok(None)
            }
            Wired::Line => line(isr, notices, copies()?).map(Some),
        }
    }
}

/// [`Wired`], in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Wiring {
    Vectors,
    Shared,
    Line,
}

fn line(isr: &Part, notices: &Notices, signal: Vec<OwnedFd>) -> Result<Interrupts, TransportError> {
    Ok(Interrupts::Line { acknowledge: acknowledge(isr.clone(), duplicate(&notices.change)?), signal })
}

/// Wires `queues`, each with its call eventfd, and tells the device which vectors they have. The function's interrupts are on before the device hears of a vector.
///
/// # Errors
/// `Refused` when the function has no way to interrupt.
pub(super) fn wire(
    claimed: &mut dyn Claimed,
    common: &Common,
    isr: &Part,
    notices: &Notices,
    queues: &[(u16, &OwnedFd)],
    vectors: u16,
) -> Result<Wired, TransportError> {
    let vectors = usize::from(vectors.min(claimed.msix_vectors()));
    if vectors > queues.len() {
        let mut events = vec![duplicate(&notices.change)?];
        for (_, call) in queues {
            events.push(duplicate(call)?);
        }
        let places: Vec<_> = queues.iter().zip(1..).map(|((queue, _), vector)| (*queue, vector)).collect();
        if offer(claimed, common, events, &places)? {
            return Ok(Wired::Vectors);
        }
    }
    if vectors >= 2 {
        let shared = event("shared eventfd")?;
        let calls: Result<_, _> = queues.iter().map(|(_, call)| duplicate(call)).collect();
        let relay = Relay::start(duplicate(&shared)?, calls?)?;
        let places: Vec<_> = queues.iter().map(|(queue, _)| (*queue, 1)).collect();
        let events = vec![duplicate(&notices.change)?, duplicate(&shared)?];
        if offer(claimed, common, events, &places)? {
            return Ok(Wired::Shared(shared, Some(relay)));
        }
    }
    if !claimed.has_line() {
        let why = format!("no way to interrupt: {vectors} MSI-X vectors can be had, and there is no INTx pin");
        return Err(TransportError::Refused(why));
    }
    let calls: Result<_, _> = queues.iter().map(|(_, call)| duplicate(call)).collect();
    claimed.wire(line(isr, notices, calls?)?)?;
    Ok(Wired::Line)
}

/// Whether function and device take the vectors. If not, the device has none.
fn offer(
    claimed: &mut dyn Claimed,
    common: &Common,
    events: Vec<OwnedFd>,
    places: &[(u16, u16)],
) -> Result<bool, TransportError> {
    match claimed.wire(Interrupts::Vectors(events)) {
        Ok(()) => {}
        Err(error @ (TransportError::Lost | TransportError::Timeout)) => return Err(error),
        Err(error) => {
            tracing::info!(%error, vectors = places.len() + 1, "MSI-X vectors refused");
            return Ok(false);
        }
    }
    let mut taken = common.set_config_vector(CONFIG_VECTOR)?;
    for (queue, vector) in places {
        common.select(*queue)?;
        taken = taken && common.set_queue_vector(*vector)?;
    }
    if !taken {
        common.set_config_vector(NO_VECTOR)?;
        for (queue, _) in places {
            common.select(*queue)?;
            common.set_queue_vector(NO_VECTOR)?;
        }
    }
    Ok(taken)
}

/// Reads the ISR status, which takes the line back (section 4.1.4.5). All ones is nobody's answer: the function is gone, and its line is not asserted by it.
fn acknowledge(isr: Part, change: OwnedFd) -> Box<dyn FnMut() -> bool + Send> {
    let gone = AtomicBool::new(false);
    Box::new(move || {
        let reasons = isr.read(0, Width::U8).unwrap_or(0xff);
        if reasons == 0xff {
            // Once is enough for somebody to look whether it is lost.
            if !gone.swap(true, Ordering::Relaxed) {
                signal(&change);
            }
            return false;
        }
        if reasons & ISR_CONFIG != 0 {
            signal(&change);
        }
        reasons & (ISR_QUEUE | ISR_CONFIG) != 0
    })
}

/// A thread that passes one vector on to all queues. It ends with the value.
#[derive(Debug)]
pub(super) struct Relay {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    fn start(shared: OwnedFd, calls: Vec<OwnedFd>) -> Result<Self, TransportError> {
        let stop = Arc::new(event("eventfd of the relay")?);
        let stopped = Arc::clone(&stop);
        let body = move || {
            loop {
                let mut fds = [PollFd::new(&shared, PollFlags::IN), PollFd::new(&*stopped, PollFlags::IN)];
                // Without a bound on purpose: `stop` ends it.
                match poll(&mut fds, None) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(_) => return,
                }
                if !fds[1].revents().is_empty() {
                    return;
                }
                if clear(&shared) {
                    calls.iter().for_each(signal);
                }
            }
        };
        let thread = std::thread::Builder::new().name("pci-relay".to_owned()).spawn(body);
        let thread = thread.map_err(|source| TransportError::Io { what: "starting a thread".to_owned(), source })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        signal(&self.stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
