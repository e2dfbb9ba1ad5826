//! The ports of a binding: attached and detached on their own (L6), or taken down by the ladder.
//!
//! A port's shutdown is code of a port, so it runs on a thread of its own with a bound: a port that joins a thread which itself waits for this binding's unload
//! would otherwise wait for ever. One that does not come back is left behind, and the certificate says so.

use std::cell::Cell;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use cofferdam_device::{Exported, NotExportable};
use parking_lot::{Condvar, Mutex};

use crate::error::PortError;

/// How long a port may take to send what was answered (DESIGN section 5).
const GRACE: Duration = Duration::from_millis(100);
/// How long it may take for everything; beyond it, it is left behind.
const BOUND: Duration = Duration::from_millis(1000);

/// Makes a binding's service reachable from outside.
pub trait Port: Send {
    /// The address as an operator writes it, `nbd:/run/disk.sock`.
    fn address(&self) -> String;

    /// Stops accepting, lets what was answered go out for at most `grace`, then severs its clients. When this returns, every thread of the port has ended, every
    /// handle is closed and every buffer is given back. Bounded by `grace` and a little; a second later the ladder goes on without it.
    fn shutdown(self: Box<Self>, grace: Duration) -> PortReport;

    /// Whether this port could be handed to another process.
    ///
    /// # Errors
    /// [`NotExportable`]: what is in the way.
    fn exportable(&self) -> Result<(), NotExportable> {
        Err(NotExportable::because("ports of this kind are not handed over"))
    }

    /// Takes nothing more from any client, waits until `until` for what was taken to be answered, and tells everything that another process needs to go on with the clients.
    /// Until [`Port::resume`] nothing is read from them or said to them, and they are connected still.
    ///
    /// # Errors
    /// [`NotExportable`]: what was waited for in vain; then it is resumed as after an export.
    fn export(&mut self, until: Instant) -> Result<Exported, NotExportable> {
        let _ = until;
        self.exportable()?;
        Err(NotExportable::because("ports of this kind are not handed over"))
    }

    /// What makes an export that is under way, on another thread, fail soon; until [`Port::resume`]. `None` where none takes long.
    fn canceller(&self) -> Option<Box<dyn Fn() + Send>> {
        None
    }

    /// The handover is over, one way or the other, and this is the side that has the clients. Also after an export that failed.
    fn resume(&mut self) {}

    /// The handover is over and the other process has the clients: goes, and leaves their connections and the port's address alone.
    fn forget(self: Box<Self>) {}
}

/// What a port says when it has gone.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PortReport {
    /// Connections that were open when it was told to go.
    pub connections: u64,
    /// Of those, how many had to be severed with answers unsent.
    pub severed: u64,
}

/// A port that was told to go: `report` is `None` if it did not come back within its bound.
#[derive(Clone, Debug)]
pub(crate) struct Gone {
    pub(crate) address: String,
    pub(crate) report: Option<PortReport>,
}

#[derive(Default)]
struct Inside {
    attached: Vec<Box<dyn Port>>,
    /// Ports that are being detached by somebody now, or that are away.
    leaving: usize,
    /// Addresses of those that are on their way to another process.
    away: Vec<String>,
    closed: bool,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Ports {
    inside: Mutex<Inside>,
    changed: Condvar,
}

impl Ports {
    /// `told` is called before anybody can detach it again.
    pub(crate) fn attach(&self, port: Box<dyn Port>, told: impl FnOnce()) -> Result<(), Box<dyn Port>> {
        let mut inside = self.inside.lock();
        if inside.closed {
            return Err(port);
        }
        inside.attached.push(port);
        told();
        Ok(())
    }

    pub(crate) fn addresses(&self) -> Vec<String> {
        let inside = self.inside.lock();
        inside.attached.iter().map(|port| port.address()).chain(inside.away.iter().cloned()).collect()
    }

    /// What keeps ports from being handed over, each in a sentence.
    pub(crate) fn obstacles(&self) -> Vec<String> {
        let inside = self.inside.lock();
        let reason = |port: &dyn Port| port.exportable().err().map(|why| format!("{}: {why}", port.address()));
        let found = inside.attached.iter().filter_map(|port| reason(port.as_ref()));
        let leaving = (inside.leaving > 0).then(|| "a port is being detached".to_owned());
        found.chain(leaving).collect()
    }

    /// All of them, for somebody who gives them back or forgets them. Whoever takes the ports down meanwhile waits for that, as long as for one that is being detached.
    pub(crate) fn take_away(&self) -> Vec<Box<dyn Port>> {
        let mut inside = self.inside.lock();
        let ports = std::mem::take(&mut inside.attached);
        inside.leaving += ports.len();
        inside.away = ports.iter().map(|port| port.address()).collect();
        ports
    }

    /// Those that were taken away, resumed.
    pub(crate) fn give_back(&self, mut ports: Vec<Box<dyn Port>>) {
        ports.iter_mut().for_each(|port| port.resume());
        let mut inside = self.inside.lock();
        inside.leaving -= ports.len();
        inside.away.clear();
        let late = if inside.closed { ports } else { inside.attached.splice(0..0, ports).collect() };
        drop(inside);
        self.changed.notify_all();
        if !late.is_empty() {
            shut_down(late);
        }
    }

    /// Has all of them go on, which were adopted.
    pub(crate) fn resume(&self) {
        self.inside.lock().attached.iter_mut().for_each(|port| port.resume());
    }

    /// Takes one port down; the binding serves on.
    pub(crate) fn detach(&self, address: &str) -> Result<Gone, PortError> {
        let port = {
            let mut inside = self.inside.lock();
            let place = inside.attached.iter().position(|port| port.address() == address);
            match place {
                Some(place) => {
                    inside.leaving += 1;
                    inside.attached.remove(place)
                }
                None if inside.closed => return Err(PortError::Leaving),
                None => return Err(PortError::NoSuchPort(address.to_owned())),
            }
        };
        let gone = shut_down(vec![port]).remove(0);
        self.inside.lock().leaving -= 1;
        self.changed.notify_all();
        Ok(gone)
    }

    /// Refuses new ports, takes all down at once and waits for those that somebody is detaching. Bounded; nothing to do the second time.
    pub(crate) fn take_down(&self) -> Vec<Gone> {
        let attached = {
            let mut inside = self.inside.lock();
            inside.closed = true;
            std::mem::take(&mut inside.attached)
        };
        let gone = shut_down(attached);
        let deadline = Instant::now() + BOUND;
        let mut inside = self.inside.lock();
        while inside.leaving > 0 && !self.changed.wait_until(&mut inside, deadline).timed_out() {}
        gone
    }
}

/// Shuts ports down, each on a thread of its own, all within [`BOUND`].
fn shut_down(ports: Vec<Box<dyn Port>>) -> Vec<Gone> {
    let deadline = Instant::now() + BOUND;
    let leaving: Vec<_> = ports.into_iter().map(start_shutdown).collect();
    let wait = |(address, report): (String, mpsc::Receiver<PortReport>)| {
        let report = report.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok();
        if report.is_none() {
            tracing::error!(port = address, "port did not end, it is left behind");
        }
        Gone { address, report }
    };
    leaving.into_iter().map(wait).collect()
}

fn start_shutdown(port: Box<dyn Port>) -> (String, mpsc::Receiver<PortReport>) {
    let address = port.address();
    let (answer, report) = mpsc::sync_channel(1);
    let (hand, given) = mpsc::sync_channel::<Box<dyn Port>>(1);
    let body = move || {
        if let Ok(port) = given.recv() {
            let _inside = Within::enter();
            // Nobody listens any more if the bound has passed.
            let _ = answer.send(port.shutdown(GRACE));
        }
    };
    match std::thread::Builder::new().name("cofferdam-port".into()).spawn(body) {
        Ok(_) => {
            let _ = hand.send(port);
            (address, report)
        }
        Err(error) => {
            // Without a thread there is no bound, but not to shut it down would be worse.
            tracing::error!(port = address, %error, "no thread to shut a port down on");
            let (answer, report) = mpsc::sync_channel(1);
            let _inside = Within::enter();
            let _ = answer.send(port.shutdown(GRACE));
            (address, report)
        }
    }
}

thread_local! {
    /// How many teardowns this thread does a part of; more than one when they nest.
    static WITHIN: Cell<u32> = const { Cell::new(0) };
}

/// While it lives, this thread does a part of a binding's teardown, or of its load: a wait here for a teardown could be a wait for itself, or for one that waits for this one.
pub(crate) struct Within(());

impl Within {
    pub(crate) fn enter() -> Within {
        WITHIN.set(WITHIN.get() + 1);
        Within(())
    }

    /// Does `work` on a thread of its own that is within.
    ///
    /// # Errors
    /// No thread is to be had.
    pub(crate) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        let within = move || {
            let _within = Within::enter();
            work();
        };
        std::thread::Builder::new().name(name.to_owned()).spawn(within).map(drop)
    }

    /// Whether this thread does a part of any teardown.
    pub(crate) fn is_any() -> bool {
        WITHIN.get() > 0
    }
}

impl Drop for Within {
    fn drop(&mut self) {
        WITHIN.set(WITHIN.get() - 1);
    }
}
