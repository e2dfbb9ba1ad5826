//! `cofferdam run`: load, serve, unload on Ctrl-C, in one process without a daemon.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cofferdam_manager::{Binding, Cancel, Cause, Certificate, Manager, Phase, UnloadOptions};
use tokio::runtime::Runtime;
use tokio::sync::Notify;

use crate::args::RunArgs;
use crate::control::{ErrorBody, LoadBody};
use crate::signals::StopSignals;
use crate::{host, show, signals};

/// How long the first Ctrl-C waits for what is in flight, and for a load that it has called off.
const DEADLINE: Duration = Duration::from_secs(5);
/// How often a binding that leaves by itself is noticed.
const LOOK: Duration = Duration::from_millis(200);
/// How often a load that is called off is looked at.
const CALL_OFF: Duration = Duration::from_millis(20);

pub(crate) fn run(args: RunArgs) -> Result<(), ErrorBody> {
    let runtime = signals::runtime()?;
    let result = load_serve_unload(&runtime, &args);
    // A load that could not be called off in time may be left: the process ends without it.
    runtime.shutdown_background();
    result
}

fn load_serve_unload(runtime: &Runtime, args: &RunArgs) -> Result<(), ErrorBody> {
    let mut stop = {
        let _inside = runtime.enter();
        StopSignals::catch()?
    };
    let manager = host::manager()?;
    let body = host::load_body(&args.bind, false)?;
    let is_terminal = host::has_stdio(&body.ports);
    if is_terminal {
        // Standard output is the device's, and Ctrl-C too where it is a terminal.
        show::leave_stdout();
    }
    let ended = Arc::new(Notify::new());
    let (binding, stopped) = runtime.block_on(load(&manager, body, &mut stop, Arc::clone(&ended)))?;
    let left_by_itself = if stopped {
        false
    } else {
        let binding_status = binding.status();
        if args.json {
            show::json(&serde_json::json!({ "event": "serving", "binding": binding_status }));
        } else {
            show::serving(&binding_status);
            show::line(if is_terminal { "Ctrl-] unloads." } else { "Ctrl-C unloads, a second one forces." });
        }
        runtime.block_on(leaves_by_itself(&binding, &mut stop, &ended))
    };
    if !left_by_itself && !args.json {
        show::line("unloading");
    }
    let certificate = unload(runtime, &manager, &binding, stop)?;
    if args.json {
        show::json(&serde_json::json!({ "event": "unloaded", "certificate": certificate }));
    } else {
        show::certificate(&certificate);
    }
    if left_by_itself {
        let why = binding.status().fault.unwrap_or_else(|| format!("{} went away", binding.device()));
        return Err(ErrorBody::failed(why));
    }
    Ok(())
}

/// Loads on a thread of its own, so that a signal is heard meanwhile. A signal calls the load off; should it be too late for that, the binding is on its way out, and
/// the second part of the answer says so.
async fn load(
    manager: &Manager,
    body: LoadBody,
    stop: &mut StopSignals,
    ended: Arc<Notify>,
) -> Result<(Arc<Binding>, bool), ErrorBody> {
    let loader = manager.clone();
    let terminal: host::Over = Arc::new(move || ended.notify_one());
    let mut loading = tokio::task::spawn_blocking(move || host::load(&loader, &body, Some(terminal)));
    tokio::select! {
        result = &mut loading => return result.map_err(ErrorBody::failed)?.map(|binding| (binding, false)),
        () = stop.next() => {}
    }
    let patience = tokio::time::sleep(DEADLINE);
    tokio::pin!(patience);
    let mut called_off = false;
    loop {
        tokio::select! {
            result = &mut loading => {
                let interrupted = |error: ErrorBody| ErrorBody::failed(format!("interrupted while it was loading: {error}"));
                return result.map_err(ErrorBody::failed)?.map(|binding| (binding, true)).map_err(interrupted);
            }
            () = stop.next() => break,
            () = &mut patience => break,
            () = tokio::time::sleep(CALL_OFF) => {}
        }
        // There is none as long as the driver is read and the device is looked for.
        if !called_off && let Some(binding) = manager.bindings().pop() {
            called_off = true;
            let manager = manager.clone();
            // What becomes of it is the load's answer.
            drop(tokio::task::spawn_blocking(move || manager.unload_binding(&binding, &options(true, None))));
        }
    }
    Err(ErrorBody::failed(
        "interrupted while it was loading; the load did not end in time, the process ends without it",
    ))
}

/// Whether it was the binding that ended it, and not a signal or the user of the terminal.
async fn leaves_by_itself(binding: &Binding, stop: &mut StopSignals, ended: &Notify) -> bool {
    loop {
        tokio::select! {
            () = stop.next() => return false,
            () = ended.notified() => return false,
            () = tokio::time::sleep(LOOK) => {
                if !matches!(binding.phase(), Phase::Serving | Phase::Recovering) {
                    return true;
                }
            }
        }
    }
}

/// Politely, and by force when the deadline is over or a second signal comes.
fn unload(
    runtime: &Runtime,
    manager: &Manager,
    binding: &Arc<Binding>,
    mut stop: StopSignals,
) -> Result<Certificate, ErrorBody> {
    let force = Arc::new(AtomicBool::new(false));
    let cancel = Cancel::new();
    let (second, again) = (Arc::clone(&force), cancel.clone());
    runtime.spawn(async move {
        stop.next().await;
        second.store(true, Ordering::Release);
        again.cancel();
    });
    manager.unload_binding(binding, &options(false, Some(cancel))).or_else(|error| {
        tracing::warn!(%error, forced = force.load(Ordering::Acquire), "cutting the drain short");
        let explain = || Some(Box::new(binding.explain()));
        manager
            .unload_binding(binding, &options(true, None))
            .map_err(|error| host::unload_error(binding.name(), error, explain))
    })
}

fn options(force: bool, cancel: Option<Cancel>) -> UnloadOptions {
    UnloadOptions { deadline: DEADLINE, force, cancel, cause: Cause::Unload }
}
