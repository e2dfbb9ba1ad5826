//! One cycle: connect, load, use, leave in the planned way; and what has to hold then.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use cofferdam_manager::{
    Binding, Certificate, Handle, HandleSpec, IoOp, Manager, Mapped, Outcome, UnloadError, UnloadOptions,
};
use cofferdam_port_nbd::{NbdAddress, NbdOptions, NbdPort};

use crate::client::{self, Client};
use crate::plan::{BAD_DRIVERS, Plan, TRAP_COMPLETE, Way};
use crate::world::{self, World};

/// Longest that a binding may take to leave in a soak, where no device hangs for ever. Also the deadline of its unloads.
const LEAVE_BOUND: Duration = Duration::from_secs(10);
/// Where the commands of the driver that fails on command begin, and how far they are apart (`tests/guests/hostile`, `COMMANDS_OFFSET`).
const COMMANDS: (u64, u64) = (15 << 20, 4096);
/// Bytes of a region that is mapped.
const MAPPED_BYTES: u64 = 64 << 10;
/// Answers that a client has had before its binding leaves.
const WARM: u64 = 40;

/// How long the parts of a cycle took, in microseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// From a device's address to a claimed device; with the start of its process if it did not run.
    pub connect: u64,
    /// `Manager::load`.
    pub load: u64,
    /// A block written and read back, each on its own, by a client that has just opened its handle.
    pub first_io: u64,
    /// Port, clients, and their traffic until it flows.
    pub traffic: u64,
    /// From the way out to the certificate.
    pub leave: u64,
}

/// Carries out `plan`.
///
/// # Errors
/// Whatever did not hold.
pub fn run(world: &mut World, plan: &Plan, number: u64) -> anyhow::Result<Times> {
    let mut times = Times::default();
    let manager = if plan.way.has_own_manager() { world::manager()? } else { world.manager.clone() };
    let name = format!("cycle-{number}");
    let driver = match plan.way {
        Way::FailedLoad(which) => BAD_DRIVERS[which],
        Way::Trap(_) => world::ON_COMMAND,
        _ => world::GOOD,
    };
    let device = timed(&mut times.connect, || world.backend(plan.backend)?.connect())?;
    let spec = world.spec(driver, &name, device)?;
    let loaded = timed(&mut times.load, || Ok(manager.load(spec)))?;
    if let Way::FailedLoad(_) = plan.way {
        ensure!(loaded.is_err(), "a load of '{driver}' was to fail");
        ensure!(manager.get(&name).is_none(), "a load that failed is still registered");
        let end = manager.why(&name).and_then(|why| why.certificate).context("no certificate of a failed load")?;
        check(&end, &[Outcome::RolledBack])?;
        return Ok(times);
    }
    let mut in_use = Use::begin(world, plan, loaded?, number, &mut times)?;
    let begin = Instant::now();
    let certificates = leave(world, plan, manager, &mut in_use)?;
    times.leave = micros(begin);
    ensure!(begin.elapsed() < LEAVE_BOUND, "leaving took {:?}", begin.elapsed());
    ensure!(certificates.len() == 1, "{} certificates", certificates.len());
    check(&certificates[0], outcomes(plan.way))?;
    ensure!(certificates[0].name == name, "the certificate of {}", certificates[0].name);
    in_use.end()?;
    Ok(times)
}

/// A binding in use.
struct Use {
    binding: Arc<Binding>,
    port: Option<String>,
    in_process: Option<(Client, u64)>,
    nbd: Option<Client>,
    handle: Option<Handle>,
    mapped: Option<Mapped>,
}

impl Use {
    fn begin(world: &World, plan: &Plan, binding: Arc<Binding>, number: u64, times: &mut Times) -> anyhow::Result<Use> {
        let handle = timed(&mut times.first_io, || {
            let handle = binding.open(HandleSpec { label: "first".into(), ..HandleSpec::default() })?;
            client::write_and_read(&handle, number).context("first I/O")?;
            Ok(handle)
        })?;
        let mapped = if plan.mapped { Some(handle.map(MAPPED_BYTES)?) } else { None };
        if let Some(mapped) = &mapped {
            mapped.fill(0, MAPPED_BYTES, 7)?;
        }
        let mut in_use = Use { binding, port: None, in_process: None, nbd: None, handle: Some(handle), mapped };
        timed(&mut times.traffic, || in_use.traffic(world, plan))?;
        if plan.close_first && !matches!(plan.way, Way::Trap(_)) {
            in_use.handle = None;
        }
        Ok(in_use)
    }

    fn traffic(&mut self, world: &World, plan: &Plan) -> anyhow::Result<()> {
        if plan.nbd > 0 {
            let path = world.port_path();
            let port =
                NbdPort::start(Arc::clone(&self.binding), &NbdAddress::Unix(path.clone()), NbdOptions::default())?;
            self.port = Some(port.listens_on().to_string());
            if self.binding.attach_port(Box::new(port)).is_err() {
                bail!("a binding that serves refuses a port");
            }
            self.nbd = Some(Client::nbd(&path, plan.nbd, plan.seed)?);
        }
        if plan.in_process > 0 {
            self.in_process = Some(Client::in_process(&self.binding, plan.in_process, !plan.seed)?);
        }
        for client in self.nbd.iter_mut().chain(self.in_process.iter_mut().map(|(client, _)| client)) {
            client.wait_busy(WARM)?;
        }
        Ok(())
    }

    /// Everybody who may hear of it is told that the driver is about to fail.
    fn expect_failures(&self) {
        self.nbd.iter().chain(self.in_process.iter().map(|(client, _)| client)).for_each(Client::expect_failures);
    }

    /// The clients end by themselves once the binding has gone; memory that was mapped reaches nothing any more.
    fn end(mut self) -> anyhow::Result<()> {
        if let Some((client, _)) = self.in_process.take() {
            client.end()?;
        }
        if let Some(client) = self.nbd.take() {
            client.end()?;
        }
        if let Some(mapped) = self.mapped.take() {
            ensure!(mapped.is_gone(), "mapped memory is still there after the binding's end");
            ensure!(mapped.read_at(0, &mut [0]).is_err(), "revoked memory can be read");
        }
        Ok(())
    }
}

fn leave(world: &mut World, plan: &Plan, manager: Manager, in_use: &mut Use) -> anyhow::Result<Vec<Certificate>> {
    let binding = &in_use.binding;
    let polite = UnloadOptions { deadline: LEAVE_BOUND, ..UnloadOptions::default() };
    match plan.way {
        Way::Unload => {}
        Way::Force => return Ok(vec![manager.unload(binding.name(), &UnloadOptions { force: true, ..polite })?]),
        Way::Revoke => {
            let (_, id) = in_use.in_process.as_ref().context("there is a client")?;
            let report = manager.revoke(binding.name(), *id, LEAVE_BOUND)?;
            ensure!(report.requests_left == 0, "{report:?}");
            if let Some(nbd) = &mut in_use.nbd {
                // The others are served on.
                nbd.wait_busy(WARM + 1)?;
            }
        }
        Way::Killed => {
            // Whoever sends while it is found out may be told that the device failed.
            in_use.expect_failures();
            world.backend(plan.backend)?.kill()?;
            world.bury(plan.backend);
            return Ok(vec![wait_for_end(&manager, binding)?]);
        }
        Way::Trap(command) => {
            let handle = in_use.handle.as_ref().context("the handle is open")?;
            in_use.expect_failures();
            client::send(handle, IoOp::Write, COMMANDS.0 + COMMANDS.1 * command as u64)?;
            if command == TRAP_COMPLETE {
                // The driver is asked only about what is out of the ordinary: this device fails every flush.
                client::send_flush(handle)?;
            }
            // Somebody has to look at the device for a driver that fails in `complete`.
            wait("the driver to fail", || {
                handle.wait(Duration::from_millis(1), &mut Vec::new());
                binding.certificate().is_some()
            })?;
            return Ok(vec![wait_for_end(&manager, binding)?]);
        }
        Way::Shutdown => return Ok(manager.shutdown(LEAVE_BOUND)),
        Way::LastUser => {
            drop(manager);
            return Ok(vec![binding.certificate().context("the last user's end took nothing down")?.clone()]);
        }
        Way::GaveUp => {
            world.backend(plan.backend)?.freeze()?;
            // What the clients have in flight may be on the ring as answered already; this one cannot be.
            let late = binding.open(HandleSpec { label: "late".into(), ..HandleSpec::default() })?;
            client::send(&late, IoOp::Read, 0)?;
            let quick = UnloadOptions { deadline: Duration::from_millis(5), ..polite.clone() };
            let gave_up = manager.unload(binding.name(), &quick);
            world.backend(plan.backend)?.thaw()?;
            match gave_up {
                Err(UnloadError::StillDraining { .. }) => {}
                other => bail!("an unload with a hung device ended with {other:?}"),
            }
        }
        Way::PortFirst => {
            let report = binding.detach_port(in_use.port.as_ref().context("there is a port")?)?;
            ensure!(report.connections == 1, "{report:?}");
        }
        Way::TwoUnloaders => {
            let (one, two) = std::thread::scope(|scope| {
                let other = scope.spawn(|| manager.unload_binding(binding, &polite));
                (manager.unload_binding(binding, &polite), other.join())
            });
            let two = two.map_err(|_| anyhow::anyhow!("an unloader panicked"))??;
            let one = one?;
            ensure!(one == two, "two unloaders got {one:?} and {two:?}");
            return Ok(vec![one]);
        }
        Way::FailedLoad(_) => bail!("nothing was loaded"),
    }
    Ok(vec![manager.unload(binding.name(), &polite)?])
}

/// A binding that leaves by itself; the first to ask is given its certificate.
fn wait_for_end(manager: &Manager, binding: &Arc<Binding>) -> anyhow::Result<Certificate> {
    wait("the binding to leave by itself", || binding.certificate().is_some())?;
    let certificate = binding.certificate().context("it was there")?.clone();
    // Whether it is listed still or only remembered: at no moment is it unknown.
    let told = manager.unload(binding.name(), &UnloadOptions::default())?;
    ensure!(told == certificate, "the first to ask was given {told:?} instead of {certificate:?}");
    ensure!(manager.get(binding.name()).is_none(), "it is listed after its certificate was given out");
    Ok(told)
}

fn wait(what: &str, done: impl Fn() -> bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + LEAVE_BOUND;
    while !done() {
        ensure!(Instant::now() < deadline, "waited {LEAVE_BOUND:?} for {what}");
        std::thread::park_timeout(Duration::from_micros(200));
    }
    Ok(())
}

fn outcomes(way: Way) -> &'static [Outcome] {
    match way {
        Way::Force => &[Outcome::Forced],
        Way::Killed => &[Outcome::Removed],
        Way::Trap(_) => &[Outcome::Failed],
        Way::Shutdown | Way::LastUser => &[Outcome::Shutdown],
        _ => &[Outcome::Unloaded],
    }
}

/// Clean means: nothing left, nothing retired, and every request accounted for.
fn check(certificate: &Certificate, outcomes: &[Outcome]) -> anyhow::Result<()> {
    ensure!(outcomes.contains(&certificate.outcome), "{outcomes:?} was expected: {certificate:?}");
    ensure!(certificate.residual.is_zero(), "left behind: {certificate:?}");
    ensure!(certificate.leaked.bytes == 0 && certificate.leaked.reason.is_empty(), "retired: {certificate:?}");
    let answered = certificate.requests_completed + certificate.requests_failed;
    ensure!(certificate.requests_at_close == answered, "requests that do not add up: {certificate:?}");
    Ok(())
}

fn timed<T>(into: &mut u64, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let begin = Instant::now();
    let result = work();
    *into = micros(begin);
    result
}

fn micros(begin: Instant) -> u64 {
    u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX)
}
