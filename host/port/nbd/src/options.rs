//! What an operator may set, with its bounds.

use std::time::Duration;

use crate::session::Limits;

/// Most connections that one port may be told to take.
pub const MAX_CONNECTIONS: usize = 4096;
/// How long a client may take from connecting to the transmission phase.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long answers may take to go out after a revocation before the socket is shut down (DESIGN section 5).
pub const LINGER: Duration = Duration::from_millis(100);
/// How long a client may keep buffers waiting (half a payload sent, or answers not read) while another connection
/// starves for them.
pub const STALL: Duration = Duration::from_secs(2);
/// How often a starved or turned-away connection looks again, in case that nothing of its own worker wakes it.
pub(crate) const RETRY: Duration = Duration::from_millis(2);
/// Longest busy wait for the device before the worker sleeps.
pub const DEFAULT_SPIN: Duration = cofferdam_manager::Patience::DEFAULT;

/// Settings of one port.
#[derive(Clone, Debug)]
pub struct NbdOptions {
    /// Connections at a time, at most [`MAX_CONNECTIONS`]; one more is closed at once.
    pub max_connections: usize,
    /// Requests of one connection that are not answered yet, 1 to 65,536. More are left in the socket.
    pub max_requests_per_connection: usize,
    /// Buffer memory that one connection may hold, at least 128 KiB. It bounds what a client that never reads can keep.
    pub max_bytes_per_connection: u64,
    /// Busy wait for the device before sleeping, at most a millisecond; zero turns it off. The worker shortens it by
    /// itself where it does not pay.
    pub spin: Duration,
    /// See [`HANDSHAKE_TIMEOUT`].
    pub handshake_timeout: Duration,
    /// See [`STALL`].
    pub stall: Duration,
}

impl Default for NbdOptions {
    fn default() -> Self {
        NbdOptions {
            max_connections: 64,
            max_requests_per_connection: 256,
            max_bytes_per_connection: 8 << 20,
            spin: DEFAULT_SPIN,
            handshake_timeout: HANDSHAKE_TIMEOUT,
            stall: STALL,
        }
    }
}

impl NbdOptions {
    /// The same with every value inside its bounds.
    pub(crate) fn bounded(mut self) -> NbdOptions {
        self.max_connections = self.max_connections.clamp(1, MAX_CONNECTIONS);
        self.max_requests_per_connection = self.max_requests_per_connection.clamp(1, 1 << 16);
        self.max_bytes_per_connection = self.max_bytes_per_connection.clamp(128 << 10, 1 << 30);
        self.spin = self.spin.min(Duration::from_millis(1));
        self
    }

    pub(crate) fn limits(&self) -> Limits {
        Limits { requests: self.max_requests_per_connection, bytes: self.max_bytes_per_connection }
    }
}
