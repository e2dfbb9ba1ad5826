//! What holds for the workspace as a whole, as tests: `cargo test -p xtask rules`.
//!
//! | module | rule |
//! | --- | --- |
//! | [`arrows`] | who may depend on whom, and who on wasmtime |
//! | [`invariants`] | the table in docs/ARCHITECTURE.md names what exists |
//! | [`sources`] | where `unsafe` may be, and how long a file may be |
//! | [`interfaces`] | every item in wit/ is documented |

mod arrows;
mod interfaces;
mod invariants;
mod sources;
