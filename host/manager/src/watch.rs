//! The thread that notices lost devices and faulty drivers, and sends their bindings down the ladder.
//!
//! It only looks and starts: the ladder itself runs on a thread of its own, so that one binding that takes long to leave hides no other's loss.

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use cofferdam_gate::Notify;
use parking_lot::Mutex;
use rustix::event::epoll;

use crate::binding::{Binding, BindingState};
use crate::ladder::{Cause, UnloadOptions};
use crate::manager::Shared;

/// How long a binding that leaves by itself waits for its device before the drain is cut short.
const SELF_DRAIN: Duration = Duration::from_secs(5);
/// How long a look for a lost device may wait for a load or a ladder of its binding.
const LOCK_BOUND: Duration = Duration::from_millis(20);
/// The epoll key of the waker; bindings count from 1.
const WAKER: u64 = 0;

/// The part that bindings and lanes hold.
pub(crate) struct Watch {
    epoll: OwnedFd,
    wake: Arc<Notify>,
    stop: AtomicBool,
    next: AtomicU64,
    /// By epoll key: the binding, and our own duplicate of its transport's event descriptor.
    watched: Mutex<HashMap<u64, (Weak<Binding>, OwnedFd)>>,
}

impl Watch {
    pub(crate) fn new() -> std::io::Result<Watch> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = Notify::new()?;
        epoll::add(&epoll, wake.fd(), epoll::EventData::new_u64(WAKER), epoll::EventFlags::IN)?;
        Ok(Watch {
            epoll,
            wake,
            stop: AtomicBool::new(false),
            next: AtomicU64::new(WAKER + 1),
            watched: Mutex::new(HashMap::new()),
        })
    }

    /// Signalled by whoever has put a fault into its binding.
    pub(crate) fn waker(&self) -> Arc<Notify> {
        Arc::clone(&self.wake)
    }

    /// Looks at the binding's transport whenever `fd` has something new. Edge-triggered: a descriptor that stays readable costs one look.
    pub(crate) fn add(&self, binding: &Arc<Binding>, fd: BorrowedFd<'_>) -> std::io::Result<()> {
        let own = fd.try_clone_to_owned()?;
        let key = self.next.fetch_add(1, Ordering::Relaxed);
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::HUP | epoll::EventFlags::ET;
        let mut watched = self.watched.lock();
        epoll::add(&self.epoll, &own, epoll::EventData::new_u64(key), flags)?;
        watched.insert(key, (Arc::downgrade(binding), own));
        Ok(())
    }

    /// Forgets the binding and closes the duplicates made for it, before what is left of it is looked up.
    pub(crate) fn remove(&self, binding: &Arc<Binding>) {
        let target = Arc::downgrade(binding);
        self.watched.lock().retain(|_, (watched, fd)| {
            let stays = !watched.ptr_eq(&target);
            if !stays {
                let _ = epoll::delete(&self.epoll, &*fd);
            }
            stays
        });
    }

    /// Ends the thread.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake.signal();
    }

    fn binding_of(&self, key: u64) -> Option<Arc<Binding>> {
        self.watched.lock().get(&key).and_then(|(binding, _)| binding.upgrade())
    }
}

/// Starts the thread. It holds the manager weakly between two looks.
pub(crate) fn spawn(watch: Arc<Watch>, manager: Weak<Shared>) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("cofferdam-watch".into()).spawn(move || {
        let mut events = Vec::with_capacity(32);
        while !watch.stop.load(Ordering::Acquire) {
            events.clear();
            // An error here is EINTR; the loop looks again.
            let _ = epoll::wait(&watch.epoll, rustix::buffer::spare_capacity(&mut events), None);
            let Some(manager) = manager.upgrade() else { return };
            for event in &events {
                match event.data.u64() {
                    WAKER => {
                        watch.wake.clear();
                        look_for_faults(&manager);
                    }
                    key => {
                        if let Some(binding) = watch.binding_of(key) {
                            look_for_loss(&manager, &binding);
                        }
                    }
                }
            }
        }
    })
}

fn look_for_faults(manager: &Arc<Shared>) {
    for binding in manager.registry.snapshot().values() {
        if binding.fault.get().is_some() && binding.state() == BindingState::Serving {
            tracing::warn!(binding = binding.name(), fault = %binding.fault.get().map(ToString::to_string).unwrap_or_default(), "binding failed");
            leave(manager, binding, Cause::Fault);
        }
    }
}

fn look_for_loss(manager: &Arc<Shared>, binding: &Arc<Binding>) {
    // A load that is about to end gives the lock up at once, and a look that it turned away would never come again; a ladder looks by itself.
    let Some(parts) = binding.parts.try_lock_for(LOCK_BOUND) else { return };
    let lost = parts.transport.as_ref().is_some_and(|transport| transport.lock().is_lost());
    drop(parts);
    if lost && binding.state() == BindingState::Serving {
        tracing::warn!(binding = binding.name(), device = binding.device(), "device lost");
        leave(manager, binding, Cause::Removed);
    }
}

/// Takes the binding down the ladder on a thread of its own.
fn leave(manager: &Arc<Shared>, binding: &Arc<Binding>, cause: Cause) {
    let (manager, binding) = (Arc::clone(manager), Arc::clone(binding));
    binding.set_state(BindingState::Draining);
    let name = binding.name().to_owned();
    let ladder = move || {
        let options = UnloadOptions { deadline: SELF_DRAIN, force: true, cancel: None, cause };
        if let Err(error) = manager.leave(&binding, &options) {
            tracing::error!(binding = binding.name(), error = %error, "binding could not leave");
        }
    };
    if let Err(error) = std::thread::Builder::new().name("cofferdam-ladder".into()).spawn(ladder) {
        tracing::error!(binding = name, error = %error, "no thread for the ladder; unload it by hand");
    }
}
