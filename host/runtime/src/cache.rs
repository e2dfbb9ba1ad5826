//! Machine code of components, kept between runs.
//!
//! Entries are named by the component's SHA-256 and by a hash of everything that decides whether the code fits this engine (wasmtime's version,
//! its settings, the processor's features). Each begins with a SHA-256 over both and over the code, so that a truncated or damaged entry is noticed; such an
//! entry is compiled again and replaced, never fatal.
//!
//! The checksum is no defence against someone who can write the file: machine code is trusted because of where it lies, see [`Cache::get`].
#![allow(unsafe_code)]

use std::fmt;
use std::hash::{Hash, Hasher};
use std::path::Path;

use sha2::{Digest as _, Sha256};
use wasmtime::Engine;
use wasmtime::component::Component;

use crate::cache_dir::CacheDir;

/// Begins every entry; the number is the layout's.
const MAGIC: &[u8; 16] = b"cofferdam-cwasm1";
const HEADER_BYTES: usize = MAGIC.len() + 32;

/// The SHA-256 of a component, or of anything else.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Digest([u8; 32]);

impl Digest {
    pub(crate) fn of(bytes: &[u8]) -> Digest {
        Digest(Sha256::digest(bytes).into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Feeds a `Hash` into SHA-256: the standard library's hasher may change between its versions, a file name should not.
struct Sha256Hasher(Sha256);

impl Hasher for Sha256Hasher {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        // Not used: the whole digest is taken below.
        0
    }
}

/// A directory of machine code that only this user can write.
#[derive(Debug)]
pub(crate) struct Cache {
    dir: CacheDir,
    compatibility: [u8; 32],
    entries: usize,
}

impl Cache {
    /// Opens or makes the directory. `None` if it cannot be trusted; the reason is logged.
    pub(crate) fn open(path: &Path, engine: &Engine, entries: usize) -> Option<Cache> {
        match CacheDir::open(path) {
            Ok(dir) => {
                let mut hasher = Sha256Hasher(Sha256::new());
                engine.precompile_compatibility_hash().hash(&mut hasher);
                Some(Cache { dir, compatibility: hasher.0.finalize().into(), entries })
            }
            Err(reason) => {
                tracing::warn!(dir = %path.display(), %reason, "compiled-code cache not used");
                None
            }
        }
    }

    fn name(&self, digest: &Digest) -> String {
        let compatibility = Digest(self.compatibility).to_string();
        format!("{digest}-{}.cwasm", &compatibility[..16])
    }

    fn checksum(&self, digest: &Digest, code: &[u8]) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(MAGIC);
        hash.update(digest.0);
        hash.update(self.compatibility);
        hash.update(code);
        hash.finalize().into()
    }

    /// The component whose digest this is, if its machine code is here and can be trusted.
    pub(crate) fn get(&self, engine: &Engine, digest: &Digest) -> Option<Component> {
        let name = self.name(digest);
        let entry = match self.dir.read(&name) {
            Ok(entry) => entry?,
            Err(reason) => {
                tracing::warn!(entry = name, %reason, "compiled-code cache entry not trusted");
                return None;
            }
        };
        let code = entry.strip_prefix(MAGIC).and_then(|rest| {
            let (checksum, code) = rest.split_at_checked(HEADER_BYTES - MAGIC.len())?;
            (checksum == self.checksum(digest, code)).then_some(code)
        });
        let Some(code) = code else {
            tracing::warn!(entry = name, "compiled-code cache entry is damaged, compiling again");
            return None;
        };
        // SAFETY: `deserialize` asks that the bytes are what `Component::serialize` once gave, unmodified, because it runs them. `CacheDir::read` gives only bytes of a regular
        // file that belongs to this process's effective user and that nobody else may write or read, opened (without following links) in a directory of the same user and
        // mode, both checked on the open descriptors and not on paths. So only this user's processes (which could as well attach a debugger to this one) or root can have written
        // them. The only writer in this program is `put`, which writes what `serialize` gave; the checksum over component, engine and code shows truncation and
        // damage. The bytes are a private copy: nobody changes them under `deserialize`. A wrong wasmtime version or setting is refused by `deserialize` itself.
        let component = unsafe { Component::deserialize(engine, code) };
        component.inspect_err(|error| tracing::warn!(entry = name, %error, "compiled-code cache entry not used")).ok()
    }

    /// Keeps the machine code of `component`. Failure is logged and nothing else.
    pub(crate) fn put(&self, digest: &Digest, component: &Component) {
        let code = match component.serialize() {
            Ok(code) => code,
            Err(error) => {
                tracing::warn!(%error, "a component cannot be cached");
                return;
            }
        };
        let checksum = self.checksum(digest, &code);
        let name = self.name(digest);
        if let Err(reason) = self.dir.write(&name, &[MAGIC, &checksum, &code]) {
            tracing::warn!(entry = name, %reason, "compiled-code cache entry not written");
            return;
        }
        self.dir.prune(self.entries);
    }
}
