//! The engine, its ticker and its cache: what all modules of a host share.

use std::collections::HashMap;
use std::fmt;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::Mutex;
use wasmtime::component::Component;
use wasmtime::{Config, Engine, WasmBacktraceDetails};

use crate::cache::{Cache, Digest};
use crate::capability::rate::LogRate;
use crate::devices::device_table;
use crate::error::{LoadError, RuntimeError};
use crate::fault::MAX_BACKTRACE_FRAMES;
use crate::module::{Module, ModuleInfo};
use crate::pulse::Pulse;
use crate::text::{MAX_MESSAGE_BYTES, clean};
use crate::world::{World, check_preamble};

/// How a [`Runtime`] is set up.
#[derive(Clone, Debug)]
pub struct RuntimeConfig {
    /// Where machine code is kept between runs, in a directory of mode 0700 that belongs to this user; made if it is not there. `None`: nowhere.
    pub cache_dir: Option<PathBuf>,
    /// Files kept in the cache, the oldest go first. 64.
    pub cache_entries: usize,
    /// Largest component that is compiled, in bytes. 64 MiB.
    pub component_bytes: usize,
    /// Stack of guest code in bytes; an overrun is a trap. The thread that calls a guest needs this much stack beside its own. 256 KiB.
    pub stack_bytes: usize,
}

impl Default for RuntimeConfig {
    fn default() -> RuntimeConfig {
        RuntimeConfig { cache_dir: None, cache_entries: 64, component_bytes: 64 << 20, stack_bytes: 256 << 10 }
    }
}

/// The sandbox of a host process. Cheap to clone; its thread ends when the last clone, module and instance are gone.
#[derive(Clone)]
pub struct Runtime {
    inner: Arc<Inner>,
}

struct Inner {
    engine: Engine,
    pulse: Pulse,
    cache: Option<Cache>,
    component_limit_bytes: usize,
    /// One log rate per binding and generation, shared by its lanes.
    log_rates: Mutex<HashMap<String, Weak<LogRate>>>,
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime").field("cache", &self.inner.cache).finish_non_exhaustive()
    }
}

impl Runtime {
    /// Sets up engine, ticker and cache. A cache directory that cannot be trusted or made is told in the log and not used.
    ///
    /// # Errors
    /// [`RuntimeError`] when the engine refuses the configuration or the thread cannot be started.
    pub fn new(config: RuntimeConfig) -> Result<Runtime, RuntimeError> {
        let engine =
            Engine::new(&engine_config(&config)).map_err(|error| RuntimeError::Engine(format!("{error:#}")))?;
        let pulse = Pulse::start(engine.clone()).map_err(RuntimeError::Ticker)?;
        let cache = config.cache_dir.and_then(|dir| Cache::open(&dir, &engine, config.cache_entries));
        let inner =
            Inner { engine, pulse, cache, component_limit_bytes: config.component_bytes, log_rates: Mutex::default() };
        Ok(Runtime { inner: Arc::new(inner) })
    }

    /// Compiles a component, or takes its machine code from the cache, and checks that it is a driver for this host. Runs nothing of it.
    ///
    /// # Errors
    /// [`LoadError`] says what the bytes are instead.
    pub fn load(&self, bytes: &[u8]) -> Result<Module, LoadError> {
        check_preamble(bytes)?;
        let limit_bytes = self.inner.component_limit_bytes;
        if bytes.len() > limit_bytes {
            return Err(LoadError::TooLarge { bytes: bytes.len(), limit_bytes });
        }
        let digest = Digest::of(bytes);
        let begun = Instant::now();
        let cache = self.inner.cache.as_ref();
        let cached = cache.and_then(|cache| cache.get(&self.inner.engine, &digest));
        let from_cache = cached.is_some();
        let component = match cached {
            Some(component) => component,
            None => Component::from_binary(&self.inner.engine, bytes)
                .map_err(|error| LoadError::Compile(clean(&format!("{error:#}"), MAX_MESSAGE_BYTES)))?,
        };
        let world = World::check(&self.inner.engine, &component)?;
        let devices = device_table(bytes)?;
        if let (false, Some(cache)) = (from_cache, cache) {
            cache.put(&digest, &component);
        }
        let info = ModuleInfo {
            digest: digest.to_string(),
            bytes: bytes.len(),
            imports: world.imports.clone(),
            exports: world.exports.clone(),
            service: world.service,
            devices,
            compile_micros: u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX),
            from_cache,
        };
        tracing::debug!(
            digest = info.digest,
            bytes = info.bytes,
            micros = info.compile_micros,
            from_cache,
            "component loaded"
        );
        Ok(Module::new(self.clone(), component, bytes.into(), world, info))
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.inner.engine
    }

    pub(crate) fn pulse(&self) -> &Pulse {
        &self.inner.pulse
    }

    /// The log rate that all lanes of a binding share, also with those that take their place.
    pub(crate) fn log_rate(&self, binding: &str, lines_per_s: u32) -> Arc<LogRate> {
        let mut rates = self.inner.log_rates.lock();
        rates.retain(|_, rate| rate.strong_count() > 0);
        if let Some(rate) = rates.get(binding).and_then(Weak::upgrade) {
            return rate;
        }
        let rate = Arc::new(LogRate::new(lines_per_s, Instant::now()));
        rates.insert(binding.to_owned(), Arc::downgrade(&rate));
        rate
    }
}

fn engine_config(config: &RuntimeConfig) -> Config {
    let mut engine = Config::new();
    engine
        .epoch_interruption(true)
        // No guest call is asynchronous; the bookkeeping for it would cost every crossing.
        .concurrency_support(false)
        .max_wasm_stack(config.stack_bytes)
        // Atomic instructions are allowed (guests built with +atomics), memory that is shared between instances is not.
        .wasm_threads(true)
        .shared_memory(false)
        // Function names come from the name section. Source lines would make the host parse a guest's DWARF.
        .wasm_backtrace_details(WasmBacktraceDetails::Disable)
        .wasm_backtrace_max_frames(NonZeroUsize::new(MAX_BACKTRACE_FRAMES))
        // Noted at the trap, and written down only if somebody wants it.
        .coredump_on_trap(true);
    engine
}
