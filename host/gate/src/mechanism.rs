//! How admissions are counted on this machine: chosen once, at the first use, and the barrier
//! that goes with it.

use std::fmt;
use std::sync::OnceLock;

use rustix::io::Errno;
use rustix::thread::{MembarrierCommand, membarrier};

use crate::rseq;

/// How a gate counts, and who pays for the order between counting and closing (G4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    /// Restartable sections on per-core counters: no lock and no fence in the caller;
    /// `membarrier(2)` in its RSEQ flavour in the closer.
    Rseq,
    /// Sequentially consistent atomic adds on per-core counters: works everywhere, asks nothing
    /// of the kernel, costs about one uncontended atomic operation per count.
    Xadd,
}

impl Mechanism {
    /// The stable name: `rseq+membarrier` or `xadd`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Mechanism::Rseq => "rseq+membarrier",
            Mechanism::Xadd => "xadd",
        }
    }
}

impl fmt::Display for Mechanism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The environment variable that chooses: `xadd` forces the portable mechanism. Anything else
/// means what its absence means: the best that works.
pub const MECHANISM_VARIABLE: &str = "COFFERDAM_GATE";

/// The choice and why it was made.
#[cfg_attr(loom, allow(dead_code, reason = "the model chooses for itself"))]
struct Choice {
    mechanism: Mechanism,
    reason: &'static str,
}

fn choice() -> &'static Choice {
    static CHOSEN: OnceLock<Choice> = OnceLock::new();
    CHOSEN.get_or_init(|| match probe() {
        Ok(()) => Choice { mechanism: Mechanism::Rseq, reason: "rseq and membarrier are there" },
        Err(reason) => Choice { mechanism: Mechanism::Xadd, reason },
    })
}

fn probe() -> Result<(), &'static str> {
    if std::env::var_os(MECHANISM_VARIABLE).is_some_and(|value| value == "xadd") {
        return Err("forced by COFFERDAM_GATE=xadd");
    }
    if cfg!(miri) {
        return Err("running under Miri");
    }
    // The barrier first: once `rseq::prepare` succeeded, nothing can fail any more.
    membarrier(MembarrierCommand::RegisterPrivateExpeditedRseq)
        .and_then(|()| membarrier(MembarrierCommand::PrivateExpeditedRseq))
        .map_err(|_| "the kernel refused membarrier's RSEQ flavour")?;
    rseq::prepare()
}

/// The mechanism that every gate of this process uses. Chosen once; a program that wants a
/// seccomp filter which refuses `membarrier(2)` must install it before the first gate is made.
#[must_use]
pub fn mechanism() -> Mechanism {
    #[cfg(loom)]
    return crate::model::mechanism();
    #[cfg(not(loom))]
    choice().mechanism
}

/// Why [`mechanism`] is what it is, in a few words for a log line.
#[must_use]
pub fn mechanism_reason() -> &'static str {
    choice().reason
}

/// The closer's side of [`Mechanism::Rseq`]: when it returns, every section that was running on
/// any core has committed, visibly to this thread, or will look again and see what this thread
/// wrote before. About 1 us alone and 10 us while other cores run the process.
///
/// # Panics
/// When the kernel refuses what it granted at the start (a seccomp filter that came too late).
/// There is no safe way to go on: the caller would free what somebody may still use.
#[cfg_attr(loom, allow(dead_code, reason = "the model has its own barrier"))]
pub(crate) fn restart_sections() {
    // Out of memory for the mask of cores passes; try again a bounded number of times.
    for _ in 0..1000 {
        match membarrier(MembarrierCommand::PrivateExpeditedRseq) {
            Ok(()) => return,
            Err(Errno::NOMEM | Errno::INTR | Errno::AGAIN) => std::thread::yield_now(),
            Err(errno) => panic!("membarrier(2) was granted at the start and is refused now: {errno}"),
        }
    }
    panic!("membarrier(2) keeps running out of memory");
}
