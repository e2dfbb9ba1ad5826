//! `cofferdam daemon`: the control API's server.
//!
//! One daemon per socket: an advisory lock on `SOCKET.lock` decides, so a socket file that a dead daemon left is taken over and a living one is never
//! displaced, but for one that asks for it and is given everything ([`crate::takeover`]). The socket has mode 0600; who may speak on it, and what of the daemon a client can have, is in [`crate::serve`].

use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_manager::Manager;
use rustix::fs::FlockOperation;
use rustix::process::Signal;

use crate::args::DaemonArgs;
use crate::control::ErrorBody;
use crate::follow::Followers;
use crate::serve::serve;
use crate::takeover::{self, Given, Giver, Taken, Turns};
use crate::{api, descriptors, host, log, signals};

/// The whole of a stop, whatever happens.
const STOP: Duration = Duration::from_millis(4500);
/// When the process ends whatever is left.
const LAST_RESORT: Duration = Duration::from_millis(4900);
/// How long those who follow the events may take to hear of the last ones, and when they have to have.
const LAST_EVENTS: Duration = Duration::from_secs(1);
const NO_MORE_EVENTS: Duration = Duration::from_millis(4700);
/// How long the last resort takes to say so, and to end the process in the ordinary way.
const LAST_RESORT_WORDS: Duration = Duration::from_millis(40);

/// Where the socket is when nobody says.
pub(crate) fn socket_path(given: Option<&Path>) -> PathBuf {
    if let Some(path) = given {
        return path.to_owned();
    }
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute()) {
        Some(directory) => directory.join("cofferdam.sock"),
        None if rustix::process::geteuid().is_root() => "/run/cofferdam.sock".into(),
        None => std::env::temp_dir()
            .join(format!("cofferdam-{}", rustix::process::geteuid().as_raw()))
            .join("cofferdam.sock"),
    }
}

/// Where a daemon that is to take over asks the one on `socket`.
pub(crate) fn takeover_path(socket: &Path) -> PathBuf {
    let mut name = socket.as_os_str().to_owned();
    name.push(".takeover");
    name.into()
}

/// What makes this daemon the one on its socket: found free, or taken over with everything that another one serves.
///
/// `catch` is called before there is anything that a signal would have to take down: at once, but for a daemon that takes over, which until then ends as the signal has it.
fn place(
    path: &Path,
    manager: &Manager,
    args: &DaemonArgs,
    catch: impl FnOnce() -> Result<(), ErrorBody>,
) -> Result<Taken, ErrorBody> {
    if args.takeover {
        return takeover::take(path, manager, args.deadline, args.json, catch);
    }
    catch()?;
    let lock = lock(path)?;
    let control = listen(path)?;
    let door = listen(&takeover_path(path));
    // Without that it serves as well.
    let door = door.inspect_err(|error| tracing::error!(error = error.message, "no other daemon can take over")).ok();
    Ok(Taken { lock, control, door })
}

/// Has a newer daemon ask at `door`. Without that this one serves as well, and says so.
fn offer_takeover(
    manager: &Manager,
    turns: &Arc<Turns>,
    lock: &std::fs::File,
    control: &UnixListener,
    door: Option<UnixListener>,
) {
    let Some(door) = door else { return };
    let offer = || {
        let own = Given { lock: lock.try_clone()?.into(), control: control.try_clone()?.into() };
        Giver { manager: manager.clone(), turns: Arc::clone(turns), own, listener: door }.start()
    };
    if let Err(error) = offer() {
        tracing::error!(%error, "no other daemon can take over from this one");
    }
}

pub(crate) fn run(args: DaemonArgs) -> Result<(), ErrorBody> {
    let path = socket_path(args.socket.socket.as_deref());
    descriptors::raise_limit();
    // Everything that can fail comes before a takeover, which cannot be undone.
    let manager = host::manager()?;
    let runtime = signals::runtime()?;
    let followers = Followers::new();
    let turns = Arc::new(Turns::default());
    let router = api::router(manager.clone(), Arc::clone(&followers), Arc::clone(&turns));
    let mut held = None;
    runtime.block_on(async {
        let mut caught = None;
        let catch = || {
            caught = Some(signals::StopSignals::catch()?);
            Ok(())
        };
        let Taken { lock, control, door } = place(&path, &manager, &args, catch)?;
        let mut stop = caught.map_or_else(signals::StopSignals::catch, Ok)?;
        offer_takeover(&manager, &turns, &lock, &control, door);
        held = Some(lock);
        control.set_nonblocking(true).map_err(ErrorBody::failed)?;
        let listener = tokio::net::UnixListener::from_std(control).map_err(ErrorBody::failed)?;
        tracing::info!(socket = %path.display(), "daemon ready");
        if !args.json {
            crate::show::line(&format!("cofferdam daemon on {}", path.display()));
        }
        tokio::select! {
            () = stop.next() => Ok(()),
            result = serve(listener, router) => result,
        }
    })?;
    // Before anything else, so that nothing that is said or done from here on can hold it up.
    end_in_any_case();
    // If a new daemon is just about to have everything, either it gets it and this process ends in here, or it does not.
    let begun = Instant::now();
    turns.stop(begun + STOP / 2);
    tracing::info!("daemon stopping");
    let _ = std::fs::remove_file(&path);
    let _ = std::fs::remove_file(takeover_path(&path));
    for certificate in manager.shutdown(STOP.saturating_sub(begun.elapsed())) {
        let clean = certificate.residual.is_zero();
        tracing::info!(binding = certificate.name, outcome = ?certificate.outcome, clean, leaked_bytes = certificate.leaked.bytes, "unloaded");
    }
    followers.finish(LAST_EVENTS.min(NO_MORE_EVENTS.saturating_sub(begun.elapsed())));
    // A control call that still waits is told by the closing of its connection; it may not keep the process.
    runtime.shutdown_timeout(Duration::from_millis(100));
    drop(held);
    Ok(())
}

/// Everything on the ladder has a bound; should the sum of them be too long for once, the process still ends in time. Its memory outlives it where a device may reach it:
/// a vhost-user backend has its own mappings.
///
/// The thread that waits does nothing that could block; what could (a lock of the log, another thread that is ending the process and is stuck) is left to a second one.
fn end_in_any_case() {
    let last_resort = std::thread::Builder::new().name("cofferdam-last-resort".into());
    let ended = last_resort.spawn(|| {
        std::thread::sleep(LAST_RESORT);
        let _ = std::thread::Builder::new().spawn(|| {
            tracing::error!("bindings could not leave in time, ending without them");
            log::finish(LAST_RESORT_WORDS, LAST_RESORT_WORDS);
            std::process::exit(1);
        });
        std::thread::sleep(2 * LAST_RESORT_WORDS);
        let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
    });
    if let Err(error) = ended {
        tracing::warn!(%error, "no thread for the last resort");
    }
}

/// The lock that makes this daemon the only one on its socket; the kernel lets go of it when the process ends, however that happens.
fn lock(socket: &Path) -> Result<std::fs::File, ErrorBody> {
    let fail = |error: std::io::Error| ErrorBody::failed(format!("{}: {error}", socket.display()));
    if let Some(directory) = socket
        .parent()
        .filter(|directory| *directory == socket_path(None).parent().unwrap_or(directory) && !directory.exists())
    {
        std::fs::DirBuilder::new().mode(0o700).create(directory).map_err(fail)?;
    }
    let mut name = socket.as_os_str().to_owned();
    name.push(".lock");
    let file =
        std::fs::OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&name).map_err(fail)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            Err(ErrorBody::failed(format!("{}: another daemon serves this socket", socket.display())))
        }
        Err(error) => Err(fail(error.into())),
    }
}

fn listen(path: &Path) -> Result<UnixListener, ErrorBody> {
    let fail = |error: std::io::Error| ErrorBody::failed(format!("{}: {error}", path.display()));
    match std::fs::symlink_metadata(path) {
        Ok(found) if std::os::unix::fs::FileTypeExt::is_socket(&found.file_type()) => {
            // The lock is ours, so whoever made this is gone, or is not a daemon of ours: then somebody answers.
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                return Err(ErrorBody::failed(format!("{}: something else listens there", path.display())));
            }
            std::fs::remove_file(path).map_err(fail)?;
            tracing::info!(socket = %path.display(), "stale socket taken over");
        }
        Ok(_) => return Err(ErrorBody::failed(format!("{}: exists and is not a socket", path.display()))),
        Err(_) => {}
    }
    // Made under a name of its own and moved once its mode is right: at no moment can anyone else connect.
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(format!(".{}", std::process::id()));
    let fresh = PathBuf::from(fresh);
    let _ = std::fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh).map_err(fail)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
    std::fs::rename(&fresh, path).map_err(fail)?;
    Ok(listener)
}
