//! What a guest can call: one file per interface. Linked once per set of grants, never more than granted.

pub(crate) mod device;
pub(crate) mod function;
pub(crate) mod live;
pub(crate) mod log;
pub(crate) mod output;
pub(crate) mod poll;
pub(crate) mod rate;
pub(crate) mod wasi;
