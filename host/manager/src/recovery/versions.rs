//! What there is to make drivers of: the component that is in place, and the one before it.

use std::sync::Arc;
use std::time::Instant;

use super::Recovery;
use crate::maker::Maker;

/// One of a binding's drivers: its code, and what its control lane tells its data lanes.
#[derive(Clone)]
pub(crate) struct Version {
    pub(crate) maker: Maker,
    pub(crate) driver: Arc<str>,
    pub(crate) state: Vec<u8>,
    /// Counts them.
    pub(crate) number: u64,
}

/// The driver before an upgrade.
#[derive(Clone)]
pub(crate) struct Previous {
    pub(crate) version: Version,
    /// Until then it comes back by itself.
    pub(crate) until: Option<Instant>,
}

/// What instances are not made of any more.
pub(crate) struct Outdated(
    #[expect(dead_code, reason = "only dropped")] Option<Version>,
    #[expect(dead_code, reason = "only dropped")] Option<Previous>,
);

/// What there is to make drivers of.
#[derive(Default)]
pub(super) struct Versions {
    /// `None` once the code is dropped.
    pub(super) current: Option<Version>,
    pub(super) previous: Option<Previous>,
    pub(super) count: u64,
}

impl Recovery {
    /// What instances are made of now.
    pub(crate) fn version(&self) -> Option<Version> {
        self.versions.lock().current.clone()
    }

    /// From now on they are made of this, and `previous` is what was before; its number. Also what is not needed any more, to be dropped when nobody waits: it may be the last that holds machine code.
    pub(crate) fn adopt_version(&self, version: Version, previous: Option<Previous>) -> (u64, Outdated) {
        let mut versions = self.versions.lock();
        versions.count += 1;
        let number = versions.count;
        let current = versions.current.replace(Version { number, ..version });
        (number, Outdated(current, std::mem::replace(&mut versions.previous, previous)))
    }

    /// What they were made of before.
    pub(crate) fn previous(&self) -> Option<Version> {
        self.versions.lock().previous.as_ref().map(|previous| previous.version.clone())
    }

    /// Whether the driver before would come back by itself.
    pub(crate) fn is_on_probation(&self) -> bool {
        let until = self.versions.lock().previous.as_ref().and_then(|previous| previous.until);
        until.is_some_and(|until| Instant::now() < until)
    }

    /// The driver of this number has stood its probation, if it is the one that is there; whether it is.
    pub(crate) fn end_probation(&self, number: u64) -> bool {
        let mut versions = self.versions.lock();
        let is_current = versions.current.as_ref().is_some_and(|version| version.number == number);
        if let Some(previous) = versions.previous.as_mut().filter(|_| is_current) {
            previous.until = None;
        }
        is_current
    }

    /// A driver on probation has broken down: instances are made of the one before it again. Names of both, if that is so.
    pub(super) fn fall_back(&self) -> Option<(Arc<str>, Arc<str>)> {
        let mut versions = self.versions.lock();
        let until = versions.previous.as_ref()?.until?;
        let from = Arc::clone(&versions.current.as_ref()?.driver);
        if Instant::now() >= until {
            return None;
        }
        let version = versions.previous.take()?.version;
        let to = Arc::clone(&version.driver);
        versions.count += 1;
        versions.current = Some(Version { number: versions.count, ..version });
        Some((from, to))
    }

    /// The control lane of another instance told its data lanes this.
    pub(crate) fn set_state(&self, state: &[u8]) {
        if let Some(version) = &mut self.versions.lock().current {
            version.state = state.to_vec();
        }
    }
}
