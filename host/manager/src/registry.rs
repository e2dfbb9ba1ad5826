//! Names and bindings. Readers take a snapshot and no lock; writers are rare and take turns.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use crate::binding::Binding;

/// An immutable picture of all bindings, by name.
pub(crate) type Snapshot = Arc<BTreeMap<String, Arc<Binding>>>;

/// The table of bindings.
pub(crate) struct Registry {
    current: ArcSwap<BTreeMap<String, Arc<Binding>>>,
    /// Held while a new snapshot is made, so that two writers do not lose each other's change.
    writer: Mutex<()>,
}

impl Registry {
    pub(crate) fn new() -> Registry {
        Registry { current: ArcSwap::from_pointee(BTreeMap::new()), writer: Mutex::new(()) }
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        self.current.load_full()
    }

    pub(crate) fn get(&self, name: &str) -> Option<Arc<Binding>> {
        self.current.load().get(name).cloned()
    }

    /// Adds a binding unless its name is taken; gives the binding back in that case.
    pub(crate) fn insert(&self, binding: Arc<Binding>) -> Result<(), Arc<Binding>> {
        let _turn = self.writer.lock();
        let mut next = BTreeMap::clone(&self.current.load());
        if next.contains_key(binding.name()) {
            return Err(binding);
        }
        next.insert(binding.name().to_owned(), binding);
        self.current.store(Arc::new(next));
        Ok(())
    }

    /// Removes this very binding; another one of the same name stays.
    pub(crate) fn remove(&self, binding: &Arc<Binding>) {
        let _turn = self.writer.lock();
        let mut next = BTreeMap::clone(&self.current.load());
        if next.get(binding.name()).is_some_and(|found| Arc::ptr_eq(found, binding)) {
            next.remove(binding.name());
            self.current.store(Arc::new(next));
        }
    }
}
