//! The thread that notices lost devices and faulty drivers, and sends their bindings down the ladder; and changed configurations, which it has passed on (`config`).
//!
//! It only looks and starts: the ladder itself runs on a thread of its own, so that one binding that takes long to leave hides no other's loss. A second thread reaps for
//! handles that were closed with requests in flight, which may cross into a driver and take as long as a guest call may; and it has dead drivers be buried (`crash`).

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cofferdam_device::transport::Transport;
use cofferdam_gate::Notify;
use cofferdam_lifecycle::Phase;
use parking_lot::{Mutex, MutexGuard};
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};

use crate::binding::{Binding, Lowered};
use crate::device::SharedTransport;
use crate::ladder::{Cause, UnloadOptions};
use crate::manager::Shared;
use crate::ports::Within;
use crate::reconnect::Why;

/// How long a binding that leaves by itself waits for its device before the drain is cut short.
pub(crate) const SELF_DRAIN: Duration = Duration::from_secs(5);
/// How soon a device that somebody else speaks to is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// How often the devices of closed handles, and dead drivers, are looked at. Only while there are any.
const ORPHAN_LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
/// How long after a force the driver's code may go on by itself: what the ladder gives a drain, and a little.
const GUEST_PATIENCE: Duration = Duration::from_millis(150);
/// The epoll key of the waker; bindings count from 1.
const WAKER: u64 = 0;

/// One binding that is looked after.
struct Watched {
    binding: Weak<Binding>,
    /// Its device, asked without the binding's own lock, so that a load or a ladder that holds it hides nothing.
    transport: Weak<Mutex<Box<dyn Transport>>>,
    /// Our own duplicate of the device's event descriptor.
    fd: OwnedFd,
}

/// The part that bindings and lanes hold.
pub(crate) struct Watch {
    epoll: OwnedFd,
    wake: Arc<Notify>,
    reaper: Arc<Notify>,
    stop: AtomicBool,
    /// When the guests of which binding are to be ended, if it has not left by then.
    ends: Mutex<Vec<(Instant, Weak<Binding>)>>,
    next: AtomicU64,
    /// By epoll key.
    watched: Mutex<HashMap<u64, Watched>>,
    /// Keys that are to be looked at although nothing told of them.
    asked: Mutex<Vec<u64>>,
}

impl Watch {
    pub(crate) fn new() -> std::io::Result<Watch> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = Notify::new()?;
        epoll::add(&epoll, wake.fd(), epoll::EventData::new_u64(WAKER), epoll::EventFlags::IN)?;
        Ok(Watch {
            epoll,
            wake,
            reaper: Notify::new()?,
            stop: AtomicBool::new(false),
            ends: Mutex::new(Vec::new()),
            next: AtomicU64::new(WAKER + 1),
            watched: Mutex::new(HashMap::new()),
            asked: Mutex::new(Vec::new()),
        })
    }

    /// Signalled by whoever has put a fault into its binding.
    pub(crate) fn waker(&self) -> Arc<Notify> {
        Arc::clone(&self.wake)
    }

    /// Signalled by whoever leaves something to be reaped, or mapped memory to be taken away.
    pub(crate) fn reaper(&self) -> Arc<Notify> {
        Arc::clone(&self.reaper)
    }

    /// Somebody forces a binding out: should a driver's code still run in a while (in a load, or in the drain's own look at the device), it is ended. The ladder does so
    /// itself as soon as it can; this is for when it is the ladder's own thread, or a load's, that is in there.
    pub(crate) fn end_guests_of(&self, binding: &Arc<Binding>) {
        self.ends.lock().push((Instant::now() + GUEST_PATIENCE, Arc::downgrade(binding)));
        self.wake.signal();
    }

    /// Ends the guests whose time is over; how long until the next.
    fn end_guests(&self) -> Option<Duration> {
        let mut ends = self.ends.lock();
        let now = Instant::now();
        ends.retain(|(at, binding)| {
            let Some(binding) = binding.upgrade().filter(|binding| binding.phase() != Phase::Detached) else {
                return false;
            };
            if *at > now {
                return true;
            }
            binding.end_guests();
            false
        });
        ends.iter().map(|(at, _)| at.saturating_duration_since(now)).min()
    }

    /// Looks at the binding's transport whenever `fd` has something new. Edge-triggered: a descriptor that stays readable costs one look.
    pub(crate) fn add(
        &self,
        binding: &Arc<Binding>,
        transport: &SharedTransport,
        fd: BorrowedFd<'_>,
    ) -> std::io::Result<()> {
        let own = fd.try_clone_to_owned()?;
        let key = self.next.fetch_add(1, Ordering::Relaxed);
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::HUP | epoll::EventFlags::ET;
        let mut watched = self.watched.lock();
        epoll::add(&self.epoll, &own, epoll::EventData::new_u64(key), flags)?;
        let (binding, transport) = (Arc::downgrade(binding), Arc::downgrade(transport));
        watched.insert(key, Watched { binding, transport, fd: own });
        Ok(())
    }

    /// Forgets the binding and closes the duplicates made for it, before what is left of it is looked up.
    pub(crate) fn remove(&self, binding: &Arc<Binding>) {
        let target = Arc::downgrade(binding);
        self.watched.lock().retain(|_, watched| {
            let stays = !watched.binding.ptr_eq(&target);
            if !stays {
                let _ = epoll::delete(&self.epoll, &watched.fd);
            }
            stays
        });
    }

    /// Has the binding be looked at soon, until nothing that its device announced waits to be passed on. Also where none of its descriptors has anything new.
    pub(crate) fn look_again(&self, binding: &Arc<Binding>) {
        let target = Arc::downgrade(binding);
        let keys = |watched: &HashMap<u64, Watched>| -> Vec<u64> {
            watched.iter().filter(|(_, watched)| watched.binding.ptr_eq(&target)).map(|(key, _)| *key).collect()
        };
        let keys = keys(&self.watched.lock());
        self.asked.lock().extend(keys);
        self.wake.signal();
    }

    /// Ends the threads.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake.signal();
        self.reaper.signal();
    }

    fn of(&self, key: u64) -> Option<(Arc<Binding>, SharedTransport)> {
        let watched = self.watched.lock();
        let watched = watched.get(&key)?;
        Some((watched.binding.upgrade()?, watched.transport.upgrade()?))
    }
}

/// Starts both threads. They hold the manager weakly between two looks.
pub(crate) fn spawn(watch: &Arc<Watch>, manager: &Weak<Shared>) -> std::io::Result<Vec<JoinHandle<()>>> {
    let (for_watch, for_reaper) = ((Arc::clone(watch), manager.clone()), (Arc::clone(watch), manager.clone()));
    let watcher =
        std::thread::Builder::new().name("cofferdam-watch".into()).spawn(move || look(&for_watch.0, &for_watch.1))?;
    let reaper =
        std::thread::Builder::new().name("cofferdam-reap".into()).spawn(move || reap(&for_reaper.0, &for_reaper.1))?;
    Ok(vec![watcher, reaper])
}

fn look(watch: &Watch, manager: &Weak<Shared>) {
    // A device's code that unloads its binding from in here would wait for this thread to notice something.
    let _within = Within::enter();
    let mut events = Vec::with_capacity(32);
    // Devices whose lock somebody else had: looked at again soon.
    let mut again: Vec<u64> = Vec::new();
    let mut soon = None;
    while !watch.stop.load(Ordering::Acquire) {
        events.clear();
        // An error here is EINTR; the loop looks again.
        let _ = epoll::wait(&watch.epoll, rustix::buffer::spare_capacity(&mut events), soon.as_ref());
        let Some(manager) = manager.upgrade() else { return };
        for event in &events {
            match event.data.u64() {
                WAKER => {
                    watch.wake.clear();
                    let asked = std::mem::take(&mut *watch.asked.lock());
                    again.extend(asked);
                    again.sort_unstable();
                    again.dedup();
                    look_for_faults(&manager);
                }
                key if !again.contains(&key) => again.push(key),
                _ => {}
            }
        }
        again.retain(|key| {
            watch.of(*key).is_some_and(|(binding, transport)| !look_for_loss(&manager, &binding, &transport))
        });
        let retry = (!again.is_empty()).then_some(LOOK_AGAIN);
        soon = watch.end_guests().into_iter().chain(retry).min().and_then(|left| Timespec::try_from(left).ok());
    }
}

fn reap(watch: &Watch, manager: &Weak<Shared>) {
    let _within = Within::enter();
    let mut soon = None;
    while !watch.stop.load(Ordering::Acquire) {
        let mut fds = [PollFd::from_borrowed_fd(watch.reaper.fd(), PollFlags::IN)];
        let _ = poll(&mut fds, soon);
        watch.reaper.clear();
        let Some(manager) = manager.upgrade() else { return };
        let bindings = manager.registry.snapshot();
        let look = |binding: &Arc<Binding>| binding.reap_orphans() | binding.revoke_regions() | binding.begin_burials();
        let waits = bindings.values().filter(|binding| look(binding)).count();
        soon = (waits > 0).then_some(&ORPHAN_LOOK);
    }
}

fn look_for_faults(manager: &Arc<Shared>) {
    for binding in manager.registry.snapshot().values() {
        if let Some(fault) = binding.fault().filter(|_| may_leave(binding)) {
            tracing::warn!(binding = binding.name(), %fault, "binding failed");
            leave(manager, binding, Cause::Fault);
        }
    }
}

/// Whether the device could be looked at, and nothing that it announced waits to be passed on. Its lock is held for long by a quiesce, which finds out by itself, and by a client that maps memory, which does not.
fn look_for_loss(manager: &Arc<Shared>, binding: &Arc<Binding>, transport: &SharedTransport) -> bool {
    let look = |mut device: MutexGuard<'_, Box<dyn Transport>>| {
        // Which one it is that was looked at: it may be replaced before that is told.
        (device.is_lost(), device.take_config_change(), binding.device_number())
    };
    let Some((lost, changed, device)) = transport.try_lock().map(look) else { return false };
    if lost && may_leave(binding) && !binding.device_away(device, Why::Lost) {
        tracing::warn!(binding = binding.name(), device = binding.device(), "device lost");
        leave(manager, binding, Cause::Removed);
    }
    lost || binding.pass_config_change(changed)
}

/// A load that fails rolls back by itself; of what is draining, somebody may have given up waiting (L4).
fn may_leave(binding: &Binding) -> bool {
    matches!(binding.phase(), Phase::Serving | Phase::Recovering | Phase::Failed | Phase::Draining)
        && !binding.life().state().is_settled()
}

/// Takes the binding down the ladder on a thread of its own, one at a time.
pub(crate) fn leave(manager: &Arc<Shared>, binding: &Arc<Binding>, cause: Cause) {
    {
        let mut put_off = binding.put_off.lock();
        if binding.leaving.swap(true, Ordering::AcqRel) {
            *put_off = Some(cause);
            return;
        }
    }
    let (manager, binding) = (Arc::clone(manager), Arc::clone(binding));
    let again = Arc::clone(&binding);
    let ladder = move || {
        let _leaving = Lowered(&binding.leaving);
        let options = UnloadOptions { deadline: SELF_DRAIN, force: true, cancel: None, cause };
        // Somebody else's run may have been in the way all that time, and may have given up since.
        while let Err(error) = manager.leave(&binding, &options) {
            tracing::error!(binding = binding.name(), error = %error, "binding could not leave yet");
            if manager.is_stopping() {
                break;
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("cofferdam-ladder".into()).spawn(ladder) {
        again.leaving.store(false, Ordering::Release);
        // No new operation at least; the rest is for whoever unloads it.
        again.gate().close();
        tracing::error!(binding = again.name(), error = %error, "no thread for the ladder; unload it by hand");
    }
}
