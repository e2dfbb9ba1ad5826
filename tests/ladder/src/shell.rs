//! The matrix from outside: the binary, its exit codes, its messages and its documents.
//!
//! ```text
//! plan   entries, situations, and what each combination has to do
//! scene  clients of a binding that is another process's
//! data   one that shares memory with the device
//! cell   one cell: in a daemon beside a healthy binding, or with `run`
//! ```

pub mod cell;
pub mod data;
pub mod plan;
pub mod scene;
