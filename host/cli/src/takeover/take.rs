//! The daemon that takes over.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_bus_pci::Via;
use cofferdam_bus_vhost_user::VhostUser;
use cofferdam_manager::{Adopted, Binding, Exported, Manager, Port, Prepared, Transport};
use cofferdam_port_character::CharacterPort;
use cofferdam_port_data::{DataOptions, DataPort};
use cofferdam_port_nbd::{NbdOptions, NbdPort};
use cofferdam_port_tap::TapPort;
use serde::Serialize;

use super::wire::{Broken, Wire};
use super::{Answer, Ask, PREPARE, PROMPT, VERSION, monotonic_now};
use crate::control::ErrorBody;
use crate::daemon::takeover_path;
use crate::show;

/// Longest component that is taken, in bytes.
const COMPONENT_BYTES: u64 = 256 << 20;

/// What the daemon goes on with.
pub(crate) struct Taken {
    /// The lock that makes it the only one on its socket.
    pub(crate) lock: File,
    /// The control socket.
    pub(crate) control: UnixListener,
    /// Where the next one asks, if there is such a place.
    pub(crate) door: Option<UnixListener>,
}

/// A takeover. Field by field what `cofferdam daemon --takeover --json` prints.
#[derive(Debug, Serialize)]
struct TakeoverReport {
    /// The daemon before, which ends.
    process: u32,
    /// What was taken over, by name.
    bindings: Vec<String>,
    /// Clients of their ports.
    connections: u64,
    /// How long clients were held, in microseconds.
    held_micros: u64,
}

/// Takes over from the daemon on `socket`: its bindings, and what it has itself. Clients are held for `deadline` at most. What was done is told in lines, or with `json` in one document at the end. `almost` is called before the last word of this side: from
/// then on this process may have to take everything down that it gets.
///
/// # Errors
/// That daemon serves on, and this process has touched nothing. It is to end.
pub(crate) fn take(
    socket: &Path,
    manager: &Manager,
    deadline: Duration,
    json: bool,
    almost: impl FnOnce() -> Result<(), ErrorBody>,
) -> Result<Taken, ErrorBody> {
    let say = |line: String| {
        if !json {
            show::line(&line);
        }
    };
    let path = takeover_path(socket);
    let unreachable = |error: &dyn std::fmt::Display| {
        ErrorBody::failed(format!(
            "{}: no daemon to take over from ({error}); start one without --takeover",
            path.display()
        ))
    };
    let wire = UnixStream::connect(&path).map_err(|error| unreachable(&error))?;
    let wire = Wire::new(wire).map_err(|error| unreachable(&error))?;
    let lost = |error: Broken| ErrorBody::failed(format!("the daemon on {} serves on: {error}", socket.display()));
    let refused = |reason: String| ErrorBody::failed(format!("the daemon on {} serves on: {reason}", socket.display()));
    let never = || false;

    let hello = Ask::Hello { version: VERSION, deadline_ms: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX) };
    wire.send(&hello, &[], Instant::now() + PROMPT).map_err(lost)?;
    let (process, bindings, files) = match wire.receive(Instant::now() + PREPARE, &never).map_err(lost)? {
        (Answer::Manifest { process, bindings }, files) => (process, bindings, files),
        (Answer::Refused { reason }, _) => return Err(refused(reason)),
        _ => return Err(lost(Broken::Garbage("no manifest".to_owned()))),
    };
    say(format!("asked the daemon on {} (process {process})", socket.display()));
    if bindings.len() != files.len() {
        return Err(lost(Broken::Garbage("not a component for each binding".to_owned())));
    }
    // Whatever fails here is told, so that the log of the other one says why.
    let failed = |error: ErrorBody| {
        let reason = error.message.clone();
        let _ = wire.send(&Ask::Failed { reason }, &[], Instant::now() + PROMPT);
        refused(error.message)
    };
    let count = bindings.len();
    let prepared: Result<Vec<_>, _> = bindings
        .into_iter()
        .zip(files)
        .map(|(manifest, file)| {
            let name = manifest.name.clone();
            let component = read(file).map_err(ErrorBody::failed)?;
            let prepared = manager.prepare(manifest, &component).map_err(|error| ErrorBody::caused(&error))?;
            Ok((name, prepared))
        })
        .collect();
    let mut prepared: Vec<(String, Prepared)> = prepared.map_err(&failed)?;
    say(format!("prepared {}", show::count(count as u64, "binding")));
    wire.send(&Ask::Prepared, &[], Instant::now() + PROMPT).map_err(lost)?;

    let patience = deadline * 2 + PROMPT;
    let (held_since, parcels, descriptors) = match wire.receive(Instant::now() + patience, &never).map_err(lost)? {
        (Answer::State { held_since, bindings }, descriptors) => (held_since, bindings, descriptors),
        (Answer::Refused { reason }, _) => return Err(refused(reason)),
        _ => return Err(lost(Broken::Garbage("no state".to_owned()))),
    };
    let mut descriptors = descriptors.into_iter();
    let own = super::some(&mut descriptors, 3).map_err(lost)?;
    let mut adopted = Vec::with_capacity(count);
    for parcel in parcels {
        let exported = parcel.unpack(&mut descriptors).map_err(lost)?;
        let place = prepared.iter().position(|(name, _)| *name == exported.name);
        let place = place.ok_or_else(|| failed(ErrorBody::failed("a binding that was not announced")))?;
        let (_, ready) = prepared.swap_remove(place);
        let (transport, via) = device(exported.transport).map_err(&failed)?;
        let address = transport.address().to_owned();
        let ready = ready.reopens(Box::new(move || crate::host::reopen(&address, via)));
        let one = manager.adopt(ready, &exported.state, exported.descriptors, transport);
        let mut one = one.map_err(|error| failed(ErrorBody::caused(&error)))?;
        for exported in exported.ports {
            port(&mut one, exported).map_err(&failed)?;
        }
        adopted.push(one);
    }
    if !prepared.is_empty() || descriptors.next().is_some() {
        return Err(failed(ErrorBody::failed("something is left over of what was received")));
    }
    let taken = Taken::of(own).map_err(&failed)?;
    almost().map_err(&failed)?;
    wire.send(&Ask::Ready, &[], Instant::now() + PROMPT).map_err(lost)?;
    if !is_committed(&wire, deadline + PROMPT) {
        return Err(refused("it did not commit".to_owned()));
    }
    let report = serve(adopted, held_since, process);
    if json {
        show::json(&report);
    } else {
        let TakeoverReport { bindings, connections, held_micros, .. } = &report;
        show::line(&format!(
            "took over {} and {}: clients were held for {}.{:03} ms",
            show::count(bindings.len() as u64, "binding"),
            show::count(*connections, "connection"),
            held_micros / 1000,
            held_micros % 1000
        ));
    }
    Ok(taken)
}

/// Waits for the one message. When it does not come, it is first made sure that it cannot come any more.
fn is_committed(wire: &Wire, patience: Duration) -> bool {
    let commits = |until: Instant| matches!(wire.receive(until, &|| false), Ok((Answer::Commit, _)));
    if commits(Instant::now() + patience) {
        return true;
    }
    wire.shut();
    commits(Instant::now())
}

/// From here on this daemon serves.
fn serve(adopted: Vec<Adopted>, held_since: Duration, process: u32) -> TakeoverReport {
    let connections = adopted.iter().map(Adopted::connections).sum::<u64>();
    let bindings = adopted.iter().map(|one| one.binding().name().to_owned()).collect();
    let serve = |one: Adopted| {
        let name = one.binding().name().to_owned();
        let held = monotonic_now().saturating_sub(held_since);
        if let Err(error) = one.serve(held) {
            // It serves, and nobody else does: to end now would be worse.
            tracing::error!(binding = name, %error, "taken over, but not whole");
        }
    };
    // Those whose device has to answer something first hold up nobody else.
    std::thread::scope(|scope| {
        let serve = &serve;
        adopted.into_iter().for_each(|one| drop(scope.spawn(move || serve(one))));
    });
    let held = monotonic_now().saturating_sub(held_since);
    let held_micros = u64::try_from(held.as_micros()).unwrap_or(u64::MAX);
    TakeoverReport { process, bindings, connections, held_micros }
}

/// The device, by the bus that it is on, and what it is to be opened through again.
fn device(exported: Exported) -> Result<(Box<dyn Transport>, Option<Via>), ErrorBody> {
    match exported.kind.as_str() {
        cofferdam_bus_vhost_user::KIND => {
            Ok((Box::new(VhostUser::adopt(exported).map_err(|error| ErrorBody::caused(&error))?), None))
        }
        cofferdam_bus_pci::KIND => {
            let (device, via) = cofferdam_bus_pci::adopt(exported).map_err(|error| ErrorBody::caused(&error))?;
            Ok((device, Some(via)))
        }
        other => Err(ErrorBody::failed(format!("this daemon takes over no devices of kind '{other}'"))),
    }
}

/// A port, by its kind.
fn port(adopted: &mut Adopted, exported: Exported) -> Result<(), ErrorBody> {
    let binding: Arc<Binding> = Arc::clone(adopted.binding());
    let (port, connections): (Box<dyn Port>, usize) = match exported.kind.as_str() {
        cofferdam_port_nbd::KIND => {
            let port = NbdPort::adopt(binding, exported, NbdOptions::default());
            let port = port.map_err(|error| ErrorBody::caused(&error))?;
            let connections = port.connections();
            (Box::new(port), connections)
        }
        // A TAP interface, a pipe or a terminal has one client, whom this process need not know.
        cofferdam_port_tap::KIND => {
            (Box::new(TapPort::adopt(binding, exported).map_err(|error| ErrorBody::caused(&error))?), 1)
        }
        cofferdam_port_character::KIND => {
            (Box::new(CharacterPort::adopt(&binding, exported).map_err(|error| ErrorBody::caused(&error))?), 1)
        }
        cofferdam_port_data::KIND => {
            let port = DataPort::adopt(binding, exported, DataOptions::default());
            (Box::new(port.map_err(|error| ErrorBody::caused(&error))?), 0)
        }
        other => return Err(ErrorBody::failed(format!("this daemon takes over no ports of kind '{other}'"))),
    };
    adopted.attach_port(port, connections);
    Ok(())
}

fn read(file: OwnedFd) -> std::io::Result<Vec<u8>> {
    use std::io::{Read, Seek};
    let mut file = File::from(file);
    // The place in it is shared with whoever wrote it.
    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(COMPONENT_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl Taken {
    fn of(own: Vec<OwnedFd>) -> Result<Taken, ErrorBody> {
        let [lock, control, door] =
            <[OwnedFd; 3]>::try_from(own).map_err(|_| ErrorBody::failed("a descriptor is missing"))?;
        for listener in [&control, &door] {
            let listens = rustix::net::sockopt::socket_acceptconn(listener);
            if !listens.map_err(ErrorBody::failed)? {
                return Err(ErrorBody::failed("what should be a listening socket is none"));
            }
        }
        Ok(Taken { lock: lock.into(), control: control.into(), door: Some(door.into()) })
    }
}
