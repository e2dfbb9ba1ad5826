//! A granted `wasi:cli` writes its standard output and error here: into the driver's log, line by line.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::io::AsyncWrite;
use wasmtime_wasi::async_trait;
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamResult};

use crate::bindings::cofferdam::driver::log::Level;
use crate::capability::log::{LogSink, MAX_LINE_BYTES};

/// Bytes that a guest may write at once.
const PERMIT_BYTES: usize = 4096;

/// One of the two output streams.
#[derive(Clone)]
pub(crate) struct LogOutput {
    level: Level,
    log: LogSink,
    /// The line that has no end yet, at most [`MAX_LINE_BYTES`]; shared, because a guest may open the stream more than once.
    pending: Arc<Mutex<Vec<u8>>>,
}

impl LogOutput {
    pub(crate) fn new(level: Level, log: LogSink) -> LogOutput {
        LogOutput { level, log, pending: Arc::default() }
    }

    fn push(&self, bytes: &[u8]) {
        let mut pending = self.pending.lock();
        for &byte in bytes {
            if byte != b'\n' {
                pending.push(byte);
            }
            if byte == b'\n' || pending.len() >= MAX_LINE_BYTES {
                self.emit(&mut pending);
            }
        }
    }

    fn emit(&self, pending: &mut Vec<u8>) {
        let Ok(()) = self
            .log
            .write(self.level, || Ok::<_, std::convert::Infallible>(String::from_utf8_lossy(pending).into_owned()));
        pending.clear();
    }
}

impl Drop for LogOutput {
    /// What the guest wrote last may lack its line end.
    fn drop(&mut self) {
        if Arc::strong_count(&self.pending) == 1 {
            let mut pending = std::mem::take(&mut *self.pending.lock());
            if !pending.is_empty() {
                self.emit(&mut pending);
            }
        }
    }
}

impl IsTerminal for LogOutput {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for LogOutput {
    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }

    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(self.clone())
    }
}

#[async_trait]
impl Pollable for LogOutput {
    async fn ready(&mut self) {}
}

impl OutputStream for LogOutput {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.push(&bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(PERMIT_BYTES)
    }
}

/// Required by [`StdoutStream`]; WASI 0.2 does not use it.
impl AsyncWrite for LogOutput {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.push(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
