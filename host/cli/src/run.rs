//! `cofferdam run`: load, serve, unload on Ctrl-C, in one process without a daemon.

use std::sync::Arc;
use std::time::Duration;

use cofferdam_manager::{Cause, Phase, UnloadOptions};

use crate::args::RunArgs;
use crate::control::ErrorBody;
use crate::{host, show, signals};

/// How long the first Ctrl-C waits for what is in flight.
const DEADLINE: Duration = Duration::from_secs(5);
/// How often a binding that leaves by itself is noticed.
const LOOK: Duration = Duration::from_millis(200);

pub(crate) fn run(args: RunArgs) -> Result<(), ErrorBody> {
    let runtime = signals::runtime()?;
    let mut stop = {
        let _inside = runtime.enter();
        signals::StopSignals::catch()?
    };
    let manager = host::manager()?;
    let body = host::load_body(&args.bind, false)?;
    let binding = host::load(&manager, &body)?;
    let binding_status = binding.status();
    if args.json {
        show::json(&serde_json::json!({ "event": "serving", "binding": binding_status }));
    } else {
        show::serving(&binding_status);
        show::line("Ctrl-C unloads, a second one forces.");
    }

    let left_by_itself = runtime.block_on(async {
        loop {
            tokio::select! {
                () = stop.next() => return false,
                () = tokio::time::sleep(LOOK) => {
                    if binding.phase() != Phase::Serving {
                        return true;
                    }
                }
            }
        }
    });
    if !left_by_itself && !args.json {
        show::line("unloading");
    }
    let force = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let cancel = cofferdam_manager::Cancel::new();
    let (second, again) = (Arc::clone(&force), cancel.clone());
    runtime.spawn(async move {
        stop.next().await;
        second.store(true, std::sync::atomic::Ordering::Release);
        again.cancel();
    });
    let polite = UnloadOptions { deadline: DEADLINE, force: false, cancel: Some(cancel), cause: Cause::Unload };
    let forced = UnloadOptions { deadline: DEADLINE, force: true, cancel: None, cause: Cause::Unload };
    let certificate = match manager.unload_binding(&binding, &polite) {
        Ok(certificate) => certificate,
        Err(error) => {
            tracing::warn!(%error, forced = force.load(std::sync::atomic::Ordering::Acquire), "cutting the drain short");
            manager.unload_binding(&binding, &forced).map_err(ErrorBody::failed)?
        }
    };
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
