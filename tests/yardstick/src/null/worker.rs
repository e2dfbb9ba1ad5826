//! The thread that serves the rings.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::ring::DeviceRing;

/// How a device waits for requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Pace {
    /// It looks all the time, and wants no kicks.
    Poll,
    /// It sleeps when there is nothing, and wants a kick then only.
    Event,
}

/// A running worker, which owns its rings.
pub(super) struct Worker {
    stop: Arc<AtomicBool>,
    bell: OwnedFd,
    thread: JoinHandle<Vec<(usize, DeviceRing)>>,
}

impl Worker {
    pub(super) fn start(rings: Vec<(usize, DeviceRing)>, pace: Pace) -> std::io::Result<Worker> {
        let stop = Arc::new(AtomicBool::new(false));
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (seen, hears) = (Arc::clone(&stop), bell.try_clone()?);
        let thread = std::thread::Builder::new().name("null".into()).spawn(move || {
            let mut rings = rings;
            match pace {
                Pace::Poll => look(&mut rings, &seen),
                Pace::Event => sleep(&mut rings, &seen, &hears),
            }
            rings
        })?;
        Ok(Worker { stop, bell, thread })
    }

    /// Ends it and gives the rings back.
    pub(super) fn stop(self) -> Vec<(usize, DeviceRing)> {
        self.stop.store(true, Ordering::Relaxed);
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        self.thread.join().unwrap_or_else(|_| std::process::exit(70))
    }
}

/// Chains between two times that a polling device says again that it wants no kick: fewer than 2^16, after which the words would mean the opposite.
const REMINDER: u32 = 1 << 14;

fn look(rings: &mut [(usize, DeviceRing)], stop: &AtomicBool) {
    for (_, ring) in rings.iter() {
        ring.quiet();
    }
    let mut since = 0;
    // No pause in here: in a virtual machine it may leave the processor, and the loads hit the cache until the driver writes.
    while !stop.load(Ordering::Relaxed) {
        for (_, ring) in rings.iter_mut() {
            since += u32::from(ring.serve());
        }
        if since >= REMINDER {
            since = 0;
            rings.iter().for_each(|(_, ring)| ring.quiet());
        }
    }
}

fn sleep(rings: &mut [(usize, DeviceRing)], stop: &AtomicBool, bell: &OwnedFd) {
    while !stop.load(Ordering::Relaxed) {
        let served: u32 = rings.iter_mut().map(|(_, ring)| u32::from(ring.serve())).sum();
        if served > 0 {
            continue;
        }
        // Not `any`: every ring has to be armed.
        let waiting = rings.iter().filter(|(_, ring)| ring.arm()).count();
        if waiting > 0 {
            continue;
        }
        let mut fds = vec![PollFd::from_borrowed_fd(bell.as_fd(), PollFlags::IN)];
        fds.extend(rings.iter().map(|(_, ring)| PollFd::from_borrowed_fd(ring.kick.as_fd(), PollFlags::IN)));
        if poll(&mut fds, None).is_err() {
            continue;
        }
        let kicked: Vec<bool> = fds[1..].iter().map(|fd| fd.revents().contains(PollFlags::IN)).collect();
        for ((_, ring), kicked) in rings.iter().zip(kicked) {
            if kicked {
                let _ = (&ring.kick).read(&mut [0; 8]);
            }
        }
    }
}
