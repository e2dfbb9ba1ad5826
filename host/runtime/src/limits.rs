//! What one instance may use.

use wasmtime::ResourceLimiter;

/// Bounds of one instance. `Default` is what DESIGN section 9 states.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestLimits {
    /// Linear memory in bytes, all memories of the instance together. 64 MiB.
    pub memory_bytes: usize,
    /// Table elements, all tables of the instance together. 100,000.
    pub table_elements: usize,
    /// Core instances inside the component. 32.
    pub core_instances: usize,
    /// Guest code in one call, in milliseconds; measured from the first epoch tick in the call, so it may run two ticks (20 ms) longer. 100.
    pub call_deadline_ms: u64,
    /// Host calls made for the guest during one call, in milliseconds, all together. Each is bounded by its capability too. 10,000.
    pub host_budget_ms: u64,
    /// Log lines per second and driver; the rest is counted and told once per second. 1,000.
    pub log_lines_per_s: u32,
}

impl Default for GuestLimits {
    fn default() -> GuestLimits {
        GuestLimits {
            memory_bytes: 64 << 20,
            table_elements: 100_000,
            core_instances: 32,
            call_deadline_ms: 100,
            host_budget_ms: 10_000,
            log_lines_per_s: 1_000,
        }
    }
}

/// Linear memories and tables of one instance, each; a component made of one module and its adapters has one to three.
const MAX_MEMORIES: usize = 8;
const MAX_TABLES: usize = 32;

/// Counts what an instance has, and refuses what goes over.
///
/// A refused growth is not yet a fault: `memory.grow` answers -1 and a guest may live with that. If the call then ends in a trap, the
/// trap is told as [`FaultKind::OutOfMemory`](crate::FaultKind::OutOfMemory).
#[derive(Debug)]
pub(crate) struct Meter {
    memory_limit_bytes: usize,
    table_limit: usize,
    instance_limit: usize,
    memory_bytes: usize,
    table_elements: usize,
    /// Bytes of the growth that was allowed last, to be taken back when the system then refuses it.
    last_growth_bytes: usize,
    denied: Option<String>,
}

impl Meter {
    pub(crate) fn new(limits: &GuestLimits) -> Meter {
        Meter {
            memory_limit_bytes: limits.memory_bytes,
            table_limit: limits.table_elements,
            instance_limit: limits.core_instances,
            memory_bytes: 0,
            table_elements: 0,
            last_growth_bytes: 0,
            denied: None,
        }
    }

    /// Linear memory in use, in bytes.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.memory_bytes
    }

    /// The bound that was hit since the last call of this, if any.
    pub(crate) fn take_denied(&mut self) -> Option<String> {
        self.denied.take()
    }

    /// Forgets a refusal that the guest lived with.
    pub(crate) fn forget_denied(&mut self) {
        if self.denied.is_some() {
            self.denied = None;
        }
    }
}

impl ResourceLimiter for Meter {
    fn memory_growing(&mut self, current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        let growth = desired.saturating_sub(current);
        let total = self.memory_bytes.saturating_add(growth);
        if total > self.memory_limit_bytes {
            self.denied =
                Some(format!("{total} bytes of memory were asked for, {} are allowed", self.memory_limit_bytes));
            return Ok(false);
        }
        self.memory_bytes = total;
        self.last_growth_bytes = growth;
        Ok(true)
    }

    fn memory_grow_failed(&mut self, error: wasmtime::Error) -> wasmtime::Result<()> {
        // Also called for a growth that `memory_growing` refused; then there is nothing to take back.
        if self.denied.is_none() {
            self.memory_bytes = self.memory_bytes.saturating_sub(self.last_growth_bytes);
            self.denied = Some(format!("memory could not grow: {error}"));
        }
        self.last_growth_bytes = 0;
        Ok(())
    }

    fn table_growing(&mut self, current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        let total = self.table_elements.saturating_add(desired.saturating_sub(current));
        if total > self.table_limit {
            self.denied = Some(format!("{total} table elements were asked for, {} are allowed", self.table_limit));
            return Ok(false);
        }
        self.table_elements = total;
        Ok(true)
    }

    fn instances(&self) -> usize {
        self.instance_limit
    }

    fn tables(&self) -> usize {
        MAX_TABLES
    }

    fn memories(&self) -> usize {
        MAX_MEMORIES
    }
}
