//! The device and the binding of one cell, and how each entry is made to happen.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use cofferdam_bus_vhost_user::VhostUser;
use cofferdam_manager::{
    Binding, Certificate, Config, Grants, GuestLimits, IoOp, LoadSpec, Manager, Transport, UnloadError, UnloadOptions,
};
use cofferdam_process_tests::backend::Backend;
use guest_hostile::{COMMANDS, COMMANDS_OFFSET};

use crate::client::Client;
use crate::plan::{CALL, Entry, POLITE, SHUTDOWN, Situation};
use crate::sleeper;

/// The name of the binding under test.
pub const NAME: &str = "disk";
/// The lane that the situation is about; entries come by the other one, which is free whatever the situation does.
pub const SITUATION_LANE: usize = 0;
const ENTRY_LANE: usize = 1;
/// A call deadline beyond every bound of this test.
const NO_DEADLINE: Duration = Duration::from_secs(60);

/// A driver in `target/drivers`.
pub fn driver(name: &str) -> anyhow::Result<Vec<u8>> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/drivers").join(name);
    std::fs::read(&path).with_context(|| format!("{}: run 'cargo xtask test' first", path.display()))
}

/// A manager with the cache that all cells share: each driver is compiled once.
pub fn manager() -> anyhow::Result<Manager> {
    let cache = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/test-cache");
    Ok(Manager::new(Config { cache_dir: Some(cache) })?)
}

/// The way to a device. A backend that has just been given up may still be letting go.
pub fn connect(device: &Backend) -> anyhow::Result<VhostUser> {
    VhostUser::connect(&device.address()).with_context(|| device.address())
}

/// Where a command of the guest is on the disk.
pub fn command_offset(name: &str) -> anyhow::Result<u64> {
    let number = match name {
        "sleep" => sleeper::SLEEP,
        _ => COMMANDS.iter().position(|known| *known == name).with_context(|| format!("no command {name}"))? as u64,
    };
    Ok(COMMANDS_OFFSET + number * 4096)
}

/// A device, a binding on it, and what the entry needs.
pub struct Stage {
    /// The host.
    pub manager: Manager,
    /// The binding under test.
    pub binding: Arc<Binding>,
    /// The backend's process.
    pub device: Backend,
    /// The client through which entries come that are a request.
    pub entry: Client,
    /// A second descriptor of the connection to the backend, to hang it up. It stays open until the certificate is there, which has to count it.
    connection: Option<OwnedFd>,
}

impl Stage {
    /// Makes everything but the situation.
    pub fn set(manager: &Manager, entry: Entry, situation: Situation) -> anyhow::Result<Stage> {
        let mut arguments = vec!["--memory", "16M", "--queues", "2"];
        if matches!(situation, Situation::Depth32 | Situation::Mapped) {
            // So that all of the depth is with the device when the entry comes.
            arguments.extend(["--fault", "slow:1..4,queue=0"]);
        }
        if situation == Situation::Lying {
            for fault in [
                "lie:answer-forgotten@nth=40,op=write,queue=0",
                "lie:answer-forgotten@nth=80,op=write,queue=0",
                "lie:status-unknown@every=7,op=read,queue=0",
                "lie:notification-spurious@every=5,queue=0",
            ] {
                arguments.extend(["--fault", fault]);
            }
        }
        if entry == Entry::DeviceLies {
            arguments.extend(["--fault", "lie:used-id-unknown,op=flush"]);
        }
        if entry == Entry::TrapInComplete {
            // The host asks the guest about what is out of the ordinary.
            arguments.extend(["--fault", "fail:io,op=flush"]);
        }
        let device = Backend::sim(&arguments);
        let transport = connect(&device)?;
        let mut connection = None;
        if entry == Entry::Disconnects {
            let descriptors = transport.descriptors();
            let socket = descriptors.iter().find(|fd| rustix::net::getpeername(fd).is_ok());
            connection = Some(socket.context("the transport has a socket")?.try_clone_to_owned()?);
        }
        let (component, grants) = match situation {
            Situation::Asleep => (sleeper::component(false), Grants::parse(sleeper::GRANT)?),
            _ => (driver("test/on-command.wasm")?, Grants::default()),
        };
        let call = match (entry, situation.holds_the_guest()) {
            // The call that holds the guest ends at this deadline, which is the entry. Time for the situation to be seen first.
            (Entry::Overrun, true) => 5 * CALL,
            (_, true) => NO_DEADLINE,
            // Guests that are to fail by something else have time for it on a busy machine.
            (Entry::Violation, _) => NO_DEADLINE,
            (Entry::Overrun, _) => CALL,
            _ => 20 * CALL,
        };
        let limits = GuestLimits { call_deadline_ms: call.as_millis() as u64, ..GuestLimits::default() };
        let binding = manager.load(LoadSpec {
            name: Some(NAME.into()),
            queues: Some(2),
            grants,
            limits,
            restarts: None,
            ..LoadSpec::new("guest.wasm", component, Box::new(transport))
        })?;
        ensure!(binding.lanes() == 2, "{} lanes", binding.lanes());
        let entry = Client::open(&binding, ENTRY_LANE, "entry")?;
        Ok(Stage { manager: manager.clone(), binding, device, entry, connection })
    }

    fn polite() -> UnloadOptions {
        UnloadOptions { deadline: POLITE, ..UnloadOptions::default() }
    }

    fn forced() -> UnloadOptions {
        UnloadOptions { deadline: Duration::from_secs(10), force: true, ..UnloadOptions::default() }
    }

    /// Tells the guest by a request of its own.
    fn command(&mut self, name: &str) -> anyhow::Result<()> {
        ensure!(self.entry.start(IoOp::Write, command_offset(name)?, 4096, 0)?, "the command was not admitted");
        Ok(())
    }

    /// A request that nobody else makes: the device was told what to do with it.
    fn flush(&mut self) -> anyhow::Result<()> {
        ensure!(self.entry.start(IoOp::Flush, 0, 0, 0)?, "the flush was not admitted");
        Ok(())
    }

    /// Makes `entry` happen and goes with it to its end, for at most `patience`. Whether the first attempt was answered "still draining", and how long it all took.
    pub fn enter(
        &mut self,
        entry: Entry,
        situation: Situation,
        patience: Duration,
    ) -> anyhow::Result<(bool, Duration)> {
        let begin = Instant::now();
        match entry {
            Entry::Unload => match self.manager.unload(NAME, &Self::polite()) {
                Ok(_) => return Ok((false, begin.elapsed())),
                Err(UnloadError::StillDraining { waiting_for, so_far, .. }) => {
                    ensure!(!waiting_for.is_empty(), "still draining, and for nothing");
                    ensure!(so_far.outcome == cofferdam_manager::Outcome::Draining, "{so_far:?}");
                    self.manager.unload(NAME, &Self::forced())?;
                    return Ok((true, begin.elapsed()));
                }
                Err(error) => return Err(error.into()),
            },
            Entry::Force => {
                self.manager.unload(NAME, &Self::forced())?;
                return Ok((false, begin.elapsed()));
            }
            Entry::Revoke => {
                let drained_late = self.revoke()?;
                let took = begin.elapsed();
                self.others_are_served(situation)?;
                self.manager.unload(NAME, &Self::forced())?;
                return Ok((drained_late, took));
            }
            Entry::Shutdown => {
                let certificates = self.manager.shutdown(SHUTDOWN);
                ensure!(certificates.len() == 1, "{certificates:?}");
                return Ok((false, begin.elapsed()));
            }
            Entry::Killed => self.device.kill(),
            Entry::Disconnects => {
                let socket = self.connection.as_ref().context("the connection was kept")?;
                rustix::net::shutdown(socket, rustix::net::Shutdown::Both)?;
            }
            Entry::Trap => self.command("trap")?,
            Entry::TrapInComplete => {
                self.command("trap-complete")?;
                self.flush()?;
            }
            // In the situation a guest is in a call that lasts too long already.
            Entry::Overrun if situation.holds_the_guest() => {}
            Entry::Overrun => self.command("loop")?,
            Entry::Violation => self.command("eat")?,
            Entry::Layout => self.command("no-words")?,
            Entry::DeviceLies => self.flush()?,
        }
        while self.binding.certificate().is_none() {
            ensure!(begin.elapsed() < patience, "after {patience:?} still there: {:?}", self.binding.status());
            // What the device or the guest does wrong is found when somebody looks.
            self.entry.collect(Duration::from_millis(1));
        }
        let took = begin.elapsed();
        self.told()?;
        Ok((false, took))
    }

    /// Of a binding that left by itself, whoever asks first gets the certificate, and then nobody.
    fn told(&self) -> anyhow::Result<()> {
        let own = self.binding.certificate().context("it has ended")?;
        let told = self.manager.unload(NAME, &Self::polite())?;
        ensure!(told == *own, "{told:?} instead of {own:?}");
        let again = self.manager.unload(NAME, &Self::polite());
        ensure!(matches!(again, Err(UnloadError::NoSuchBinding(_))), "told twice: {again:?}");
        Ok(())
    }

    fn revoke(&self) -> anyhow::Result<bool> {
        let status = self.binding.status();
        let handle = status.handles.iter().find(|handle| handle.peer != "entry").context("a handle to revoke")?;
        match self.manager.revoke(NAME, handle.id, POLITE) {
            Ok(report) => {
                ensure!(report.requests_left == 0, "{report:?}");
                Ok(false)
            }
            Err(cofferdam_manager::RevokeError::StillDraining(report)) => {
                ensure!(report.requests_left > 0, "{report:?}");
                Ok(true)
            }
            Err(error) => bail!(error),
        }
    }

    /// After one handle was revoked.
    fn others_are_served(&mut self, situation: Situation) -> anyhow::Result<()> {
        ensure!(self.binding.certificate().is_none(), "the binding has left");
        if situation != Situation::Hung {
            self.entry.one(IoOp::Write, 8 << 20, 4096, 9, Duration::from_secs(3)).context("another handle")?;
        }
        Ok(())
    }

    /// The certificate; it has to be there by now, and the name free.
    pub fn certificate(&self) -> anyhow::Result<Certificate> {
        ensure!(self.manager.get(NAME).is_none(), "still registered");
        self.binding.certificate().cloned().context("no certificate")
    }

    /// Descriptors of the binding that the test itself has open.
    pub fn own_descriptors(&self) -> u64 {
        u64::from(self.connection.is_some())
    }
}
