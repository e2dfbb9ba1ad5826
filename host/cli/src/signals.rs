//! SIGINT and SIGTERM as something to wait for.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::control::ErrorBody;

/// Both ways of being told to stop.
pub(crate) struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
}

impl StopSignals {
    /// From here on the signals no longer end the process by themselves. Needs a tokio runtime.
    pub(crate) fn catch() -> Result<StopSignals, ErrorBody> {
        let interrupt = signal(SignalKind::interrupt()).map_err(ErrorBody::failed)?;
        let terminate = signal(SignalKind::terminate()).map_err(ErrorBody::failed)?;
        Ok(StopSignals { interrupt, terminate })
    }

    /// Waits for the next of either.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// The small runtime that daemon, client and run need for sockets and signals; the data path never sees it.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, ErrorBody> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().map_err(ErrorBody::failed)
}
