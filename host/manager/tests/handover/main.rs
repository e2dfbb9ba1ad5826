//! A binding in the hands of another manager: the rings, the memory and the device are the same, and who is given nothing leaves no trace.

mod disk;
mod posted;

use std::sync::Arc;
use std::time::Duration;

use cofferdam_bus_vhost_user::VhostUser;
use cofferdam_manager::{Adopted, Binding, Config, HandOver, HandOverError, LoadError, Manager, Manifests, Open};

/// Only a failing test waits so long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

pub(crate) fn component(name: &str) -> Vec<u8> {
    let path = format!("{}/../../target/drivers/{name}.wasm", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

pub(crate) fn manager() -> Manager {
    let cache = format!("{}/../../target/test-cache", env!("CARGO_MANIFEST_DIR"));
    Manager::new(Config { cache_dir: Some(cache.into()) }).unwrap()
}

pub(crate) fn hand_over(from: &Manager) -> Result<(HandOver, Manifests), HandOverError> {
    let manifests = from.manifests()?;
    Ok((from.hand_over(DEADLINE)?, manifests))
}

/// What the other process does with what it was sent.
pub(crate) fn adopt(to: &Manager, (over, manifests): &mut (HandOver, Manifests)) -> Result<Vec<Adopted>, LoadError> {
    let both = over.take_exported().into_iter().zip(manifests.drain(..));
    both.map(|(exported, (manifest, component))| {
        assert_eq!(exported.name, manifest.name);
        let reopen = reopen(&manifest.device);
        let prepared = to.prepare(manifest, &component)?.reopens(reopen);
        let device = VhostUser::adopt(exported.transport).map_err(|error| LoadError::Host(error.to_string()))?;
        to.adopt(prepared, &exported.state, exported.descriptors, Box::new(device))
    })
    .collect()
}

/// How a device is brought back.
pub(crate) fn reopen(address: &str) -> Open {
    let address = address.to_owned();
    Box::new(move || match VhostUser::connect(&address) {
        Ok(device) => Ok(Box::new(device)),
        Err(error) => Err(error.to_string()),
    })
}

pub(crate) fn take_over(from: &Manager, to: &Manager) -> Arc<Binding> {
    let mut handed = hand_over(from).unwrap();
    let mut adopted = adopt(to, &mut handed).unwrap();
    let (over, _) = handed;
    let since = over.since();
    assert!(over.is_whole());
    assert_eq!(over.commit(), 1);
    let binding = adopted.remove(0).serve(since.elapsed()).unwrap();
    assert!(from.bindings().is_empty(), "the other one has nothing left");
    binding
}
