//! Errors of this crate that are not a guest's answer or fault (those are in `fault`).

use crate::fault::GuestFault;

/// The sandbox itself could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// This build or machine does not do what the configuration asks.
    #[error("the WebAssembly engine cannot be set up: {0}")]
    Engine(String),
    /// The thread that keeps guests to their deadlines could not be started.
    #[error("cannot start the ticker thread: {0}")]
    Ticker(#[source] std::io::Error),
}

/// Why bytes are not a driver that can be used. The author of the component or the operator is to blame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// No WebAssembly at all.
    #[error("not a WebAssembly file (it does not begin with \\0asm)")]
    NotWasm,
    /// A core module.
    #[error(
        "this is a core WebAssembly module, not a component; make it one with `wasm-tools component new` or with wit-component, as the driver SDK does"
    )]
    CoreModule,
    /// Over [`RuntimeConfig::component_bytes`](crate::RuntimeConfig::component_bytes).
    #[error("the component has {bytes} bytes, {limit_bytes} are allowed")]
    TooLarge {
        /// Size of the file.
        bytes: usize,
        /// What is allowed.
        limit_bytes: usize,
    },
    /// Damaged, or using WebAssembly features that the engine does not take.
    #[error("the component cannot be compiled: {0}")]
    Compile(String),
    /// A component of another world.
    #[error("this component is not a block driver: it does not export {missing}{}", exported(exports))]
    NotADriver {
        /// The interface that is missing.
        missing: String,
        /// What it exports instead; at most 16 names.
        exports: Vec<String>,
    },
    /// A driver for another version of the contract.
    #[error(
        "this driver was built for {found}, this host has {wanted}; rebuild the driver with the matching SDK or use another host"
    )]
    WrongVersion {
        /// The interface and version in the component.
        found: String,
        /// What this host has.
        wanted: String,
    },
    /// The names are right, the types are not.
    #[error("this driver does not match the interfaces of this host: {0}")]
    Mismatch(String),
    /// The device table is garbage.
    #[error("the driver's device table (custom section cofferdam:devices) cannot be read: {0}")]
    Devices(String),
    /// An import that nobody can give.
    #[error("the driver imports {import}, which this host does not have")]
    UnknownImport {
        /// The import's name.
        import: String,
    },
    /// An import that exists and was not granted.
    #[error("the driver imports {import}, which was not granted; {hint} would grant it")]
    ImportNotGranted {
        /// The import's name.
        import: String,
        /// The option that grants it, `--allow wasi:clocks`.
        hint: String,
    },
}

fn exported(exports: &[String]) -> String {
    if exports.is_empty() { String::new() } else { format!(" (it exports {})", exports.join(", ")) }
}

/// A checked module could not be made into an instance.
#[derive(Debug, thiserror::Error)]
pub enum InstantiateError {
    /// Imports that were not granted, or types that do not match.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The guest faulted while it was set up: over a limit, or in its start function.
    #[error(transparent)]
    Fault(#[from] GuestFault),
    /// A granted directory cannot be used any more.
    #[error("the granted directory {path} cannot be opened: {reason}")]
    Directory {
        /// The directory, as granted.
        path: String,
        /// What the system said.
        reason: String,
    },
}
