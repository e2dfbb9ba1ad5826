//! Ctrl-C as an ordinary error.
//!
//! Child processes are put into process groups of their own, so that a Ctrl-C in the terminal reaches this program alone and the children are stopped in
//! order by the destructors that run while the error travels up.

use anyhow::{Result, bail};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From now on SIGINT, SIGTERM and SIGHUP set a flag instead of ending the process.
pub(crate) fn watch() -> Result<()> {
    let flag = FLAG.get_or_init(Default::default);
    for signal in [rustix::process::Signal::INT, rustix::process::Signal::TERM, rustix::process::Signal::HUP] {
        signal_hook::flag::register(signal.as_raw(), Arc::clone(flag))?;
    }
    Ok(())
}

/// Whether one of them came.
pub(crate) fn requested() -> bool {
    FLAG.get().is_some_and(|flag| flag.load(Ordering::Relaxed))
}

/// An error if one of them came; called wherever the program waits.
pub(crate) fn check() -> Result<()> {
    if requested() {
        bail!("interrupted");
    }
    Ok(())
}
