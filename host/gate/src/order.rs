//! The order between the counting side (`light`) and the closing side (`heavy`).

/// After an atomic add, before the look. Nothing to do: both are sequentially consistent.
#[cfg(not(loom))]
#[inline(always)]
pub(crate) fn light() {}

/// After the state was changed (sequentially consistent), before a counter is read: `open` says
/// which mechanism the gate uses.
#[cfg(not(loom))]
pub(crate) fn heavy(open: u64) {
    use crate::slot::{PINNED, XADD};
    // Pinned gates count nothing, so there is nothing to order: an admission that is under way
    // is one that came before.
    if open & (XADD | PINNED) == 0 {
        crate::mechanism::restart_sections();
    }
}

#[cfg(loom)]
pub(crate) use crate::model::{heavy, light};
