//! A compiled, checked driver, from which instances are made.

use std::fmt;
use std::sync::Arc;

use wasmtime::component::{Component, InstancePre, Linker};

use crate::capability::{device, function, log, wasi};
use crate::devices::DeviceId;
use crate::error::{InstantiateError, LoadError};
use crate::grants::Grants;
use crate::guest;
use crate::instance::{Instance, InstanceSpec};
use crate::runtime::Runtime;
use crate::state::LaneState;
use crate::text::{MAX_MESSAGE_BYTES, clean};
use crate::world::{ImportInfo, Service, World};

/// What is known about a module without running it; what `inspect` shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleInfo {
    /// SHA-256 of the component, 64 hexadecimal digits.
    pub digest: String,
    /// Size of the component in bytes.
    pub bytes: usize,
    /// What it asks for.
    pub imports: Vec<ImportInfo>,
    /// What it exports, by interface name with version.
    pub exports: Vec<String>,
    /// The service it gives.
    pub service: Service,
    /// The devices that it says it is for. Metadata: another one may be tried, and `attach` decides.
    pub devices: Vec<DeviceId>,
    /// Time spent on compiling it, or on reading it from the cache, in microseconds.
    pub compile_micros: u64,
    /// Whether the machine code came from the cache.
    pub from_cache: bool,
}

/// A driver that was compiled and whose world was checked. Cheap to clone. Keeps its [`Runtime`] alive.
#[derive(Clone)]
pub struct Module {
    inner: Arc<Inner>,
}

struct Inner {
    component: Component,
    /// What it was compiled from, for a process that takes over from this one.
    bytes: Arc<[u8]>,
    world: World,
    info: ModuleInfo,
    runtime: Runtime,
}

impl fmt::Debug for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Module").field("info", &self.inner.info).finish_non_exhaustive()
    }
}

impl Module {
    pub(crate) fn new(
        runtime: Runtime,
        component: Component,
        bytes: Arc<[u8]>,
        world: World,
        info: ModuleInfo,
    ) -> Module {
        Module { inner: Arc::new(Inner { component, bytes, world, info, runtime }) }
    }

    /// The component that it was compiled from.
    #[must_use]
    pub fn bytes(&self) -> &Arc<[u8]> {
        &self.inner.bytes
    }

    /// What is known about it.
    #[must_use]
    pub fn info(&self) -> &ModuleInfo {
        &self.inner.info
    }

    /// Whether `grants` cover every import.
    ///
    /// # Errors
    /// [`LoadError::ImportNotGranted`] names the import and the option that grants it; [`LoadError::UnknownImport`] an import that nobody can give.
    pub fn check_grants(&self, grants: &Grants) -> Result<(), LoadError> {
        self.inner.world.check_grants(grants)
    }

    /// Makes an instance. Runs the guest's start functions, under the same bounds as any call.
    ///
    /// # Errors
    /// [`InstantiateError::Load`] when the grants do not cover the imports or the types do not match, [`InstantiateError::Fault`] when the guest goes over a
    /// bound or traps.
    pub fn instantiate(&self, spec: InstanceSpec) -> Result<Instance, InstantiateError> {
        self.link(&spec.grants)?.instantiate(spec)
    }

    /// Whether the driver hands addresses to its device: it imports `dma`.
    #[must_use]
    pub fn wants_dma(&self) -> bool {
        self.inner.world.has_import("dma")
    }

    pub(crate) fn runtime(&self) -> &Runtime {
        &self.inner.runtime
    }

    /// Joins everything that `grants` and the device give to what the component asks for. Done once, it makes further instances quick.
    ///
    /// # Errors
    /// When the grants do not cover the imports, or types do not match.
    pub fn link(&self, grants: &Grants) -> Result<Linked, LoadError> {
        self.check_grants(grants)?;
        let pre = self.join(grants)?;
        Ok(Linked { module: self.clone(), grants: grants.clone(), pre })
    }

    fn join(&self, grants: &Grants) -> Result<InstancePre<LaneState>, LoadError> {
        let link = || {
            let mut linker = Linker::new(self.inner.runtime.engine());
            log::link(&mut linker)?;
            match self.inner.info.service {
                Service::Function => function::link(&mut linker)?,
                _ => device::link(&mut linker)?,
            }
            wasi::link(&mut linker, grants)?;
            let pre = linker.instantiate_pre(&self.inner.component)?;
            // The exports have the right names (`world`); now their types are compared.
            guest::compare(self.inner.info.service, &pre)?;
            Ok(pre)
        };
        link().map_err(|error: wasmtime::Error| mismatch(&error))
    }
}

/// A module whose imports are joined to what one binding gives it.
#[derive(Clone)]
pub struct Linked {
    module: Module,
    grants: Grants,
    pre: InstancePre<LaneState>,
}

impl fmt::Debug for Linked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Linked").field("module", &self.module).finish_non_exhaustive()
    }
}

impl Linked {
    /// What it was made of.
    #[must_use]
    pub fn module(&self) -> &Module {
        &self.module
    }

    /// As [`Module::instantiate`], with the grants that it was linked with.
    ///
    /// # Errors
    /// [`InstantiateError::Fault`] when the guest goes over a bound or traps.
    pub fn instantiate(&self, spec: InstanceSpec) -> Result<Instance, InstantiateError> {
        Instance::new(self, InstanceSpec { grants: self.grants.clone(), ..spec })
    }

    /// What it was linked with.
    #[must_use]
    pub fn grants(&self) -> &Grants {
        &self.grants
    }

    pub(crate) fn pre(&self) -> &InstancePre<LaneState> {
        &self.pre
    }
}

/// The error of a linker or a type check.
pub(crate) fn mismatch(error: &wasmtime::Error) -> LoadError {
    LoadError::Mismatch(clean(&format!("{error:#}"), MAX_MESSAGE_BYTES))
}
