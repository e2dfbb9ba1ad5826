//! Whether a component is a driver for this host, and what it asks for. Decided by names and versions before anything of it runs.

use wasmtime::Engine;
use wasmtime::component::Component;

use crate::error::LoadError;
use crate::grants::Grants;
use crate::text::clean;

/// The version of `package cofferdam:driver` that this host has. Versions 0.1.x are compatible with each other.
const VERSION: &str = "0.1.0";
const PACKAGE: &str = "cofferdam:driver/";

/// Interfaces that the host can give; `types` holds only types.
const CAPABILITIES: [&str; 6] = ["log", "virtio", "types", "mmio", "dma", "interrupt"];

/// Longest name that is kept of an import or export, in bytes.
const MAX_NAME_BYTES: usize = 128;
/// Exports that an error message names.
const MAX_NAMED_EXPORTS: usize = 16;

/// The service that a driver gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Service {
    /// `cofferdam:driver/block`.
    Block,
    /// `cofferdam:driver/entropy`.
    Entropy,
    /// `cofferdam:driver/stream`.
    Stream,
    /// `cofferdam:driver/net`.
    Net,
    /// None: `cofferdam:driver/function`, a driver that programs its device itself.
    Function,
}

impl Service {
    /// The service's interface name, `block`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Service::Block => "block",
            Service::Entropy => "entropy",
            Service::Stream => "stream",
            Service::Net => "net",
            Service::Function => "function",
        }
    }

    /// Interfaces that such a driver exports.
    fn exports(self) -> &'static [&'static str] {
        match self {
            Service::Block => &["driver", "block"],
            Service::Entropy => &["driver", "entropy"],
            Service::Stream => &["driver", "control", "stream", "stream-control"],
            Service::Net => &["driver", "control", "net"],
            Service::Function => &["function"],
        }
    }

    /// Interfaces of the host that such a driver can have.
    fn capabilities(self) -> &'static [&'static str] {
        match self {
            Service::Function => &["log", "types", "mmio", "dma", "interrupt"],
            _ => &["log", "virtio", "types"],
        }
    }

    /// The service of what exports `exports`; block where nothing says otherwise.
    fn of(exports: &[String]) -> Service {
        const OTHERS: [Service; 4] = [Service::Entropy, Service::Stream, Service::Net, Service::Function];
        let exports_it =
            |service: &Service| exports.iter().any(|export| version_of(export, service.as_str()).is_some());
        OTHERS.into_iter().find(exports_it).unwrap_or(Service::Block)
    }
}

/// Who can give an import.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImportKind {
    /// A capability of this project; given to every driver of a binding.
    Capability,
    /// A WASI interface; given only when granted.
    Wasi,
    /// Nobody.
    Unknown,
}

/// One import of a component.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportInfo {
    /// Interface with version, `cofferdam:driver/log@0.1.0`.
    pub name: String,
    /// Who can give it.
    pub kind: ImportKind,
}

/// Names and versions of a component, checked.
#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) imports: Vec<ImportInfo>,
    pub(crate) exports: Vec<String>,
    pub(crate) service: Service,
}

/// What the first eight bytes say (component model binary format, "preamble"; core specification section 5.5.16).
pub(crate) fn check_preamble(bytes: &[u8]) -> Result<(), LoadError> {
    if !bytes.starts_with(b"\0asm") {
        return Err(LoadError::NotWasm);
    }
    match bytes.get(4..8) {
        Some([_, _, 1, 0]) => Ok(()),
        Some([1, 0, 0, 0]) => Err(LoadError::CoreModule),
        Some(other) => Err(LoadError::Compile(format!("unknown WebAssembly version {other:?}"))),
        None => Err(LoadError::Compile("the file ends in its first eight bytes".into())),
    }
}

impl World {
    /// Reads names from a compiled component and checks that it is a driver of this version.
    pub(crate) fn check(engine: &Engine, component: &Component) -> Result<World, LoadError> {
        let ty = component.component_type();
        let name = |name: &str| clean(name, MAX_NAME_BYTES);
        let exports: Vec<String> = ty.exports(engine).map(|(n, _)| name(n)).collect();
        let mut imports: Vec<ImportInfo> =
            ty.imports(engine).map(|(n, _)| ImportInfo { name: name(n), kind: kind(n) }).collect();
        let service = Service::of(&exports);
        for interface in service.exports() {
            match exports.iter().find_map(|export| version_of(export, interface).map(|v| (export, v))) {
                Some((_, version)) if is_compatible(version) => {}
                Some((export, _)) => return Err(wrong_version(export, interface)),
                None => {
                    let mut exports = exports.clone();
                    exports.truncate(MAX_NAMED_EXPORTS);
                    return Err(LoadError::NotADriver { missing: format!("{PACKAGE}{interface}@{VERSION}"), exports });
                }
            }
        }
        for import in &mut imports {
            for interface in CAPABILITIES {
                if version_of(&import.name, interface).is_some_and(|version| !is_compatible(version)) {
                    return Err(wrong_version(&import.name, interface));
                }
            }
            let can_have = |interface: &&str| version_of(&import.name, interface).is_some();
            if import.kind == ImportKind::Capability && !service.capabilities().iter().any(can_have) {
                import.kind = ImportKind::Unknown;
            }
        }
        Ok(World { imports, exports, service })
    }

    /// Whether the component imports this project's `interface`.
    pub(crate) fn has_import(&self, interface: &str) -> bool {
        self.imports.iter().any(|import| version_of(&import.name, interface).is_some())
    }

    /// Whether `grants` cover every import.
    pub(crate) fn check_grants(&self, grants: &Grants) -> Result<(), LoadError> {
        for import in &self.imports {
            let not_granted = |option: &str| {
                Err(LoadError::ImportNotGranted { import: import.name.clone(), hint: format!("--allow {option}") })
            };
            match import.kind {
                ImportKind::Capability => {}
                ImportKind::Unknown => return Err(LoadError::UnknownImport { import: import.name.clone() }),
                ImportKind::Wasi => match import.name.split('/').next().unwrap_or_default() {
                    "wasi:clocks" if grants.wasi_clocks => {}
                    "wasi:clocks" => return not_granted("wasi:clocks"),
                    "wasi:random" if grants.wasi_random => {}
                    "wasi:random" => return not_granted("wasi:random"),
                    "wasi:cli" if grants.wasi_cli => {}
                    "wasi:cli" => return not_granted("wasi:cli"),
                    "wasi:filesystem" if grants.has_filesystem() => {}
                    "wasi:filesystem" => return not_granted("wasi:filesystem=DIR"),
                    "wasi:io" if grants.has_io() => {}
                    "wasi:io" => return not_granted("wasi:cli (or wasi:clocks, or wasi:filesystem=DIR)"),
                    _ => return Err(LoadError::UnknownImport { import: import.name.clone() }),
                },
            }
        }
        Ok(())
    }
}

fn wrong_version(found: &str, interface: &str) -> LoadError {
    LoadError::WrongVersion { found: found.to_owned(), wanted: format!("{PACKAGE}{interface}@{VERSION}") }
}

/// The version of `name` if it is this project's `interface`; empty if it has none.
fn version_of<'a>(name: &'a str, interface: &str) -> Option<&'a str> {
    let rest = name.strip_prefix(PACKAGE)?.strip_prefix(interface)?;
    if rest.is_empty() { Some("") } else { rest.strip_prefix('@') }
}

/// Semantic versions with major 0 are compatible when the minor number is the same; pre-releases are with nothing.
fn is_compatible(version: &str) -> bool {
    version
        .strip_prefix("0.1.")
        .is_some_and(|patch| !patch.is_empty() && patch.bytes().all(|byte| byte.is_ascii_digit()))
}

/// WASI packages that some `--allow` grants, with `wasi:io`, which comes with them.
const GRANTABLE: [&str; 5] = ["wasi:clocks/", "wasi:random/", "wasi:cli/", "wasi:filesystem/", "wasi:io/"];

fn kind(name: &str) -> ImportKind {
    if CAPABILITIES.iter().any(|interface| version_of(name, interface).is_some()) {
        ImportKind::Capability
    } else if GRANTABLE.iter().any(|package| name.starts_with(package)) {
        ImportKind::Wasi
    } else {
        ImportKind::Unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_preamble_tells_modules_components_and_garbage_apart() {
        assert_eq!(check_preamble(b"\0asm\x0d\0\x01\0"), Ok(()));
        assert_eq!(check_preamble(b"\0asm\x01\0\0\0"), Err(LoadError::CoreModule));
        assert_eq!(check_preamble(b""), Err(LoadError::NotWasm));
        assert_eq!(check_preamble(b"\x7fELF\x02\x01\x01\0"), Err(LoadError::NotWasm));
        assert!(matches!(check_preamble(b"\0asm"), Err(LoadError::Compile(_))));
        assert!(matches!(check_preamble(b"\0asm\x01\0\x02\0"), Err(LoadError::Compile(_))));
    }

    #[test]
    fn versions_are_compatible_within_one_minor_number() {
        assert!(is_compatible("0.1.0") && is_compatible("0.1.17"));
        for other in ["", "0.1", "0.1.", "0.1.0-rc1", "0.2.0", "1.1.0", "0.10.0"] {
            assert!(!is_compatible(other), "{other}");
        }
    }

    #[test]
    fn an_interface_is_not_taken_for_another_that_begins_with_its_name() {
        assert_eq!(version_of("cofferdam:driver/block@0.1.0", "block"), Some("0.1.0"));
        assert_eq!(version_of("cofferdam:driver/blocks@0.1.0", "block"), None);
        assert_eq!(kind("cofferdam:driver/mmio@0.1.0"), ImportKind::Capability);
        assert_eq!(kind("cofferdam:driver/ports@0.1.0"), ImportKind::Unknown);
        assert_eq!(kind("wasi:sockets/tcp@0.2.0"), ImportKind::Unknown);
    }
}
