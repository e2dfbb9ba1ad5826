//! One binding per function, over the whole host.
//!
//! Two programs that drive one function undo each other's settings and use each other's addresses; neither uio nor sysfs keeps them apart. The claim is a held name
//! ([`HeldName`]) made of the address, so that the kernel takes it back however its holder ends; beside it a small file says who holds it, for whoever is refused. The file
//! is only believed while the name is held, and a claim is good without it.

use std::os::fd::{BorrowedFd, OwnedFd};

use cofferdam_device::HeldName;
use serde::{Deserialize, Serialize};

use crate::handover::ProcessId;
use crate::handover::store::Store;
use crate::{Address, PciError, Sysfs};

/// The right to hand a function over and to drive it. Dropping it gives the right back.
#[derive(Debug)]
pub struct Claim {
    address: Address,
    store: Option<Store>,
    name: HeldName,
}

/// Who holds a claim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claimant {
    /// The process, if it has said so.
    #[serde(flatten)]
    pub process: ProcessId,
    /// What it claimed the function for: `load`, `bind`, ...
    pub purpose: String,
}

/// The name that is held. Other roots than the host's are other machines.
fn name(sysfs: &Sysfs, address: Address) -> String {
    match sysfs.scope.as_str() {
        "" => format!("cofferdam/pci/{address}"),
        scope => {
            // A path may be longer than a socket's name.
            let mark = scope
                .bytes()
                .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
            format!("cofferdam/pci@{mark:016x}/{address}")
        }
    }
}

impl Claim {
    /// Claims a function for this process; `purpose` is a word for whoever finds it claimed. The function need not exist.
    ///
    /// # Errors
    /// `AlreadyClaimed` or `ClaimedBy`, `Io`.
    pub fn take(sysfs: &Sysfs, address: Address, purpose: &str) -> Result<Claim, PciError> {
        let held = HeldName::take(&name(sysfs, address));
        let held = held.map_err(|source| PciError::Io { what: format!("claim {address}"), source })?;
        let Some(name) = held else {
            return Err(match Claim::holder(sysfs, address) {
                Some(Claimant { process, purpose }) => PciError::ClaimedBy { address, pid: process.pid, purpose },
                None => PciError::AlreadyClaimed(address),
            });
        };
        let mut claim = Claim { address, store: None, name };
        claim.sign(sysfs, purpose);
        Ok(claim)
    }

    /// The claim that another process has, and has handed over with `name`. That one gives it back until [`Claim::sign`].
    pub(crate) fn adopt(address: Address, name: OwnedFd) -> Claim {
        Claim { address, store: None, name: HeldName::adopt(name) }
    }

    /// Says that it is this process's. Without the directory (not root) the claim holds all the same; it only cannot say whose it is.
    pub(crate) fn sign(&mut self, sysfs: &Sysfs, purpose: &str) {
        let address = self.address;
        self.store = Store::make(sysfs).ok();
        if let Some(store) = &self.store {
            let claimant = Claimant { process: ProcessId::own(sysfs), purpose: purpose.chars().take(64).collect() };
            if let Err(error) = store.put_claimant(address, &claimant) {
                tracing::debug!(%address, %error, "the claim says not whose it is");
            }
        }
    }

    /// Leaves it to another process that has the name too: dropped, it takes nothing from that one.
    pub(crate) fn leave(&mut self) {
        self.store = None;
    }

    /// Whether some process has the function claimed at this moment.
    ///
    /// # Errors
    /// `Io`.
    pub fn is_held(sysfs: &Sysfs, address: Address) -> Result<bool, PciError> {
        let failed = |source| PciError::Io { what: format!("look for the claim on {address}"), source };
        HeldName::is_held(&name(sysfs, address)).map_err(failed)
    }

    /// Who has it, as far as that is known: the process has to have been able to say so and to be alive.
    #[must_use]
    pub fn holder(sysfs: &Sysfs, address: Address) -> Option<Claimant> {
        if !Claim::is_held(sysfs, address).ok()? {
            return None;
        }
        let claimant = Store::open(sysfs).ok()??.claimant(address)?;
        claimant.process.is_alive(sysfs).then_some(claimant)
    }

    /// What is claimed.
    #[must_use]
    pub fn address(&self) -> Address {
        self.address
    }

    /// The socket that holds the name.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.name.descriptor()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Before the name goes: afterwards the file would be the next holder's.
        if let Some(store) = &self.store {
            store.remove_claimant(self.address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::tests::tree::Tree;

    #[test]
    fn a_function_has_one_claim_and_the_refusal_names_the_process() {
        let tree = Tree::new();
        let sysfs = tree.sysfs();
        let (one, other) = ("0000:00:04.0".parse().unwrap(), "0000:00:05.0".parse().unwrap());
        let claim = Claim::take(&sysfs, one, "load").unwrap();
        let _other = Claim::take(&sysfs, other, "load").unwrap();
        let refused = Claim::take(&sysfs, one, "bind").unwrap_err();
        let PciError::ClaimedBy { pid, purpose, .. } = &refused else { panic!("{refused}") };
        assert_eq!((*pid, purpose.as_str()), (std::process::id(), "load"));
        let note = tree.run().join("cofferdam/pci/0000:00:04.0.claim");
        assert!(note.exists());
        drop(claim);
        assert!(!note.exists(), "nothing is left of a claim that was given back");
        assert!(!Claim::is_held(&sysfs, one).unwrap());
        assert_eq!(Claim::holder(&sysfs, one), None);
        Claim::take(&sysfs, one, "bind").unwrap();
    }

    #[test]
    fn a_claim_that_two_processes_have_goes_with_the_one_that_has_signed_it() {
        let tree = Tree::new();
        let sysfs = tree.sysfs();
        let address = "0000:00:04.0".parse().unwrap();
        let note = tree.run().join("cofferdam/pci/0000:00:04.0.claim");
        let mut first = Claim::take(&sysfs, address, "load").unwrap();
        let copy = || first.descriptor().try_clone_to_owned().unwrap();
        let (fails, mut second) = (Claim::adopt(address, copy()), Claim::adopt(address, copy()));
        let says = std::fs::read(&note).unwrap();
        drop(fails);
        assert_eq!(std::fs::read(&note).unwrap(), says, "one that came to nothing takes nothing away");
        assert!(matches!(Claim::take(&sysfs, address, "bind"), Err(PciError::ClaimedBy { .. })));
        first.leave();
        drop(first);
        assert!(note.exists() && Claim::is_held(&sysfs, address).unwrap());
        std::fs::remove_file(&note).unwrap();
        second.sign(&sysfs, "load");
        assert_eq!(Claim::holder(&sysfs, address).unwrap().purpose, "load");
        drop(second);
        assert!(!note.exists() && !Claim::is_held(&sysfs, address).unwrap());
    }

    #[test]
    fn a_claim_whose_file_is_damaged_or_missing_is_still_a_claim() {
        let tree = Tree::new();
        let sysfs = tree.sysfs();
        let address = "0000:00:04.0".parse().unwrap();
        let _claim = Claim::take(&sysfs, address, "load").unwrap();
        for damage in [&b"\xff\xff{"[..], b"", b"{\"pid\":99999999999}"] {
            std::fs::write(tree.run().join("cofferdam/pci/0000:00:04.0.claim"), damage).unwrap();
            assert!(matches!(Claim::take(&sysfs, address, "bind"), Err(PciError::AlreadyClaimed(_))), "{damage:?}");
        }
        std::fs::remove_file(tree.run().join("cofferdam/pci/0000:00:04.0.claim")).unwrap();
        assert!(matches!(Claim::take(&sysfs, address, "bind"), Err(PciError::AlreadyClaimed(_))));
    }
}
