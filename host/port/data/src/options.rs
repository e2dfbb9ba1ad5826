//! What an operator may set, with its bounds.

use std::time::Duration;

/// Most clients that one port may be told to take. Each has a thread.
pub const MAX_CLIENTS: usize = 256;
/// How long a client may take from connecting to its hello.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a client may take to fetch its last answers after a revocation (DESIGN section 5).
pub const LINGER: Duration = Duration::from_millis(100);
/// How often a client's thread looks again while the lane is full.
pub(crate) const RETRY: Duration = Duration::from_millis(2);
/// Longest busy wait before a client's thread sleeps.
pub const DEFAULT_SPIN: Duration = cofferdam_manager::Patience::DEFAULT;

/// Settings of one port.
#[derive(Clone, Debug)]
pub struct DataOptions {
    /// Clients at a time, at most [`MAX_CLIENTS`]; one more is told `busy`. The binding has its own bound of mapped handles.
    pub max_clients: usize,
    /// See [`HELLO_TIMEOUT`].
    pub hello_timeout: Duration,
    /// Busy wait for client and device before sleeping, at most a millisecond; zero turns it off. A thread shortens it by itself where it does not pay.
    pub spin: Duration,
}

impl Default for DataOptions {
    fn default() -> Self {
        DataOptions { max_clients: 16, hello_timeout: HELLO_TIMEOUT, spin: DEFAULT_SPIN }
    }
}

impl DataOptions {
    /// The same with every value inside its bounds.
    pub(crate) fn bounded(mut self) -> DataOptions {
        self.max_clients = self.max_clients.clamp(1, MAX_CLIENTS);
        self.hello_timeout = self.hello_timeout.min(Duration::from_secs(60));
        self.spin = self.spin.min(Duration::from_millis(1));
        self
    }
}
