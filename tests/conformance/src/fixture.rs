//! What a case works with: a driver that serves the device.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cofferdam_manager::{
    Arrival, Arrivals, Binding, Certificate, Config, IoOp, LoadSpec, Manager, NetProperties, Offer, StreamPort,
    StreamProperties, UnloadOptions,
};

use crate::bed::{Bed, Class, Connect, Device, Lever, Pull, Wish};
use crate::client::{Ask, Client, bytes};
use crate::{Case, net};

/// How long something may take that has to come, before [`Bed::slowness`].
const PATIENCE: Duration = Duration::from_secs(20);

/// How long the mark of [`Fixture::settle`] may take on a network before there is another.
const MARK_EVERY: Duration = Duration::from_secs(2);

/// A host with one binding on the device.
pub struct Fixture<'bed> {
    /// The host.
    pub manager: Manager,
    /// The binding under test.
    pub binding: Arc<Binding>,
    /// The wish that was granted.
    pub wish: Wish,
    /// The bed's [`Bed::slowness`].
    pub slowness: u32,
    /// Stream: the numbers of the ports that give back what they are sent.
    pub ports: Vec<u32>,
    /// Bytes of buffers that are leased when no client has any: what is posted.
    pub posted_bytes: u64,
    has_past: bool,
    bed: &'bed dyn Bed,
    connect: Connect,
    pull: Option<Pull>,
}

impl Fixture<'_> {
    /// A client of its own on `lane`.
    ///
    /// # Errors
    /// When the handle is refused.
    pub fn client(&self, lane: usize) -> anyhow::Result<Client> {
        Client::open(&self.binding, lane, false)
    }

    /// One that takes what arrives there, too.
    ///
    /// # Errors
    /// When the handle is refused.
    pub fn receiver(&self, lane: usize) -> anyhow::Result<Client> {
        Client::open(&self.binding, lane, true)
    }

    /// The lane that ordinary requests go to.
    ///
    /// # Errors
    /// When a console does not have the port.
    pub fn lane(&self) -> anyhow::Result<usize> {
        if self.wish.class != Class::Stream {
            return Ok(0);
        }
        Ok(usize::from(self.port(self.ports[0])?.set))
    }

    /// A request that every device of the class serves, and that does not depend on the others. What arrives of it tells its number.
    #[must_use]
    pub fn ordinary(&self, number: u64) -> Ask {
        match self.wish.class {
            Class::Block => Ask::new(IoOp::Write, number % 256 * 4096, 4096).with(&[number as u8; 4096]),
            Class::Net => Ask::payload(IoOp::Transmit, 0, &net::numbered(number, 64)),
            Class::Stream => Ask::payload(IoOp::Send, self.ports[0].into(), &[number as u8]),
            Class::Entropy => Ask::new(IoOp::Fill, 0, 64),
        }
    }

    /// The numbers of the ordinary requests that came back with this; of a stream, what a byte holds of each.
    ///
    /// # Errors
    /// When the device is silent already.
    pub fn numbers(&self, arrival: Arrival<'_>) -> anyhow::Result<Vec<u64>> {
        let bytes = bytes(arrival)?;
        Ok(match self.wish.class {
            Class::Net => net::number(&bytes).into_iter().collect(),
            _ => bytes.into_iter().map(u64::from).collect(),
        })
    }

    /// What the network device can do.
    ///
    /// # Errors
    /// When it is none.
    pub fn net(&self) -> anyhow::Result<NetProperties> {
        match self.binding.offer().as_deref() {
            Some(Offer::Net(net)) => Ok(net.clone()),
            other => anyhow::bail!("no network: {other:?}"),
        }
    }

    /// What the console has.
    ///
    /// # Errors
    /// When it is none.
    pub fn streams(&self) -> anyhow::Result<StreamProperties> {
        match self.binding.offer().as_deref() {
            Some(Offer::Stream(streams)) => Ok(streams.clone()),
            other => anyhow::bail!("no streams: {other:?}"),
        }
    }

    /// A port of the console.
    ///
    /// # Errors
    /// When there is none.
    pub fn port(&self, number: u32) -> anyhow::Result<StreamPort> {
        let ports = self.streams()?.ports;
        ports.into_iter().find(|port| port.index == number).with_context(|| format!("there is no port {number}"))
    }

    /// Waits until it holds.
    ///
    /// # Errors
    /// When it never does.
    pub fn until(&self, what: &str, mut holds: impl FnMut() -> bool) -> anyhow::Result<()> {
        let deadline = Instant::now() + self.patience();
        while !holds() {
            ensure!(Instant::now() < deadline, "never: {what}; {:?}", self.binding.status());
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// How long something may take that has to come.
    #[must_use]
    pub fn patience(&self) -> Duration {
        PATIENCE * self.slowness
    }

    /// Has the other side do something.
    pub fn pull(&self, lever: Lever) {
        if let Some(pull) = &self.pull {
            pull(lever);
        }
    }

    /// Unloads the binding, with the time that this bed needs for it.
    ///
    /// # Errors
    /// What the unload says.
    pub fn unload(&self) -> anyhow::Result<Certificate> {
        let usual = UnloadOptions::default();
        let deadline = usual.deadline * self.slowness;
        Ok(self.manager.unload_binding(&self.binding, &UnloadOptions { deadline, ..usual })?)
    }

    /// Loads the driver once more, after an unload.
    ///
    /// # Errors
    /// What the load says.
    pub fn load(&mut self) -> anyhow::Result<()> {
        self.binding = load(&self.manager, self.bed, &self.connect, &self.wish)?;
        self.settle()
    }

    /// Waits for the ports of a console, which its device adds by messages (virtio 1.2, section 5.3.6.2), and opens them.
    fn settle(&mut self) -> anyhow::Result<()> {
        if self.wish.class == Class::Stream {
            self.until("the ports", || self.ports.iter().all(|port| self.port(*port).is_ok_and(|port| port.open)))?;
            for port in &self.ports {
                self.binding.set_open(*port, true)?;
            }
        }
        if self.has_past {
            self.forget_the_past()?;
        }
        self.posted_bytes = self.binding.status().leased_bytes;
        Ok(())
    }

    /// Takes off what arrives until a mark does that is sent now: what came before it was for an earlier driver. A network that is full of that may lose a mark, so there are more.
    fn forget_the_past(&self) -> anyhow::Result<()> {
        const MARK_BYTES: usize = 64;
        let mut client = self.receiver(self.lane()?)?;
        let (mut came, mut last, mut sent_at, mut marks) = (Vec::new(), Vec::new(), None, 0);
        self.until("the mark", || {
            let is_due = sent_at.is_none_or(|at: Instant| self.wish.class == Class::Net && at.elapsed() > MARK_EVERY);
            if is_due {
                // Of a number that no case uses.
                last = net::numbered(fastrand::u64(1 << 63..), MARK_BYTES);
                let ask = Ask { data: last.clone(), length: MARK_BYTES as u32, ..self.ordinary(0) };
                let _ = client.ask(&ask);
                (sent_at, marks) = (Some(Instant::now()), marks + 1);
            }
            let mut arrivals = Arrivals::new();
            client.receive(Duration::from_millis(5), &mut arrivals);
            arrivals.iter().for_each(|arrival| drop(arrival.read(&mut came)));
            let _ = client.answers();
            came.ends_with(&last)
        })?;
        if marks > 1 {
            println!("  {}, {}: it took {marks} marks", self.bed.name(), self.wish.class);
        }
        Ok(())
    }

    /// Unloads the binding if the case has not, and looks at what is left.
    fn leave(&self) -> anyhow::Result<()> {
        if self.binding.certificate().is_none() {
            clean(&self.unload()?).context("after the case")?;
        }
        Ok(())
    }
}

/// Nothing is left of the binding.
pub(crate) fn clean(certificate: &Certificate) -> anyhow::Result<()> {
    ensure!(certificate.residual.is_zero(), "left: {:?}", certificate.residual);
    ensure!(certificate.leaked.bytes == 0, "retired: {:?}", certificate.leaked);
    Ok(())
}

fn load(manager: &Manager, bed: &dyn Bed, connect: &Connect, wish: &Wish) -> anyhow::Result<Arc<Binding>> {
    let path = bed.driver(wish.class);
    let component =
        std::fs::read(&path).with_context(|| format!("{}: run 'cargo xtask build' first", path.display()))?;
    let mut spec = LoadSpec::new(wish.class.driver(), component, connect()?);
    // Each port of a console has a lane.
    spec.queues = (wish.class != Class::Stream).then_some(wish.queues);
    spec.arena_bytes = bed.arena_bytes();
    // Emulated processors also stand still, for a second where they are many: no case is about how long a call may take.
    let slowness = u64::from(bed.slowness()).pow(2);
    spec.limits.call_deadline_ms *= slowness;
    spec.limits.host_budget_ms *= slowness;
    if let Some(entries) = wish.ring_entries {
        spec.ring_entries = entries;
    }
    Ok(manager.load(spec)?)
}

/// Runs one case; false if the bed cannot make its device. Afterwards the binding is gone without a rest, whatever the case did.
pub(crate) fn with(bed: &dyn Bed, class: Class, case: &Case) -> anyhow::Result<bool> {
    let wish = (case.wish)(class);
    let Some(device) = bed.device(&wish)? else { return Ok(false) };
    let Device { connect, capacity_bytes, mtu, ports, has_past, pull, verdict } = device;
    let wish = Wish { capacity_bytes, mtu, ..wish };
    let manager = Manager::new(Config { cache_dir: Some(bed.cache_dir()) })?;
    let binding = load(&manager, bed, &connect, &wish)?;
    let slowness = bed.slowness();
    let mut fixture =
        Fixture { manager, binding, wish, slowness, ports, posted_bytes: 0, has_past, bed, connect, pull };
    let result = fixture.settle().and_then(|()| (case.check)(&mut fixture));
    let left = fixture.leave();
    drop(fixture);
    result.and(left).and_then(|()| verdict()).map(|()| true)
}
