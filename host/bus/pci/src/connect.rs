//! From an address to a device.

use cofferdam_device::Transport;

use crate::claimed::Claimed;
use crate::lease::{Lease, Leased};
use crate::raw::Raw;
use crate::sysfs::Readiness;
use crate::uio::UioFunction;
use crate::vfio::VfioFunction;
use crate::virtio::VirtioPci;
use crate::{Address, By, Claim, HandoverOptions, PciError, Sysfs, Via, hand_over};

/// Vendor of virtio devices (virtio 1.2, section 4.1.2).
const VIRTIO: u16 = 0x1af4;

/// Claims the function at `address` (`pci:0000:00:04.0`), hands it over to uio or vfio if that is not done, and opens it: a virtio device, or a function that its driver programs
/// itself. With `via` of `None` it stays with what has it, or goes to vfio where there is an IOMMU and to uio elsewhere. When the device is released it goes back to where it came
/// from, unless an operator had bound it. Takes seconds at most.
///
/// # Errors
/// [`PciError`]; nothing is left changed then, or the record of it stays for `give_back`.
pub fn connect(address: &str, via: Option<Via>) -> Result<Box<dyn Transport>, PciError> {
    let place: Address = address.parse()?;
    let sysfs = Sysfs::open()?;
    let info = sysfs.function(place)?;
    let via = match via.or_else(|| Via::of_driver(info.driver.as_deref())).or_else(|| info.preferred()) {
        Some(via) => via,
        None => {
            let why =
                [("vfio", &info.usable.vfio), ("uio", &info.usable.uio)].map(|(via, readiness)| match readiness {
                    Readiness::No { why } => format!("{via}: {why}"),
                    Readiness::Ready | Readiness::Module(_) => format!("{via}: possible"),
                });
            let why = why.join("; ");
            return Err(PciError::Unusable { address: place, why });
        }
    };
    let claim = Claim::take(&sysfs, place, "load")?;
    let options = HandoverOptions { force: false, by: By::load(&sysfs) };
    hand_over(&sysfs, &claim, via, &options)?;
    // From here on it goes back, whatever fails. Whether it could be made silent (`Handover::is_silent`) is looked at again by opening it: bus mastering off, read back.
    let lease = Lease::new(sysfs, claim);
    let folder = lease.folder()?;
    let function: Box<dyn Claimed> = match via {
        Via::Uio => Box::new(UioFunction::open(place, folder)?),
        Via::Vfio => Box::new(VfioFunction::open(place, folder)?),
    };
    let function = Box::new(Leased::new(function, lease));
    let address = format!("pci:{place}");
    if info.ids.vendor == VIRTIO {
        return Ok(Box::new(VirtioPci::open(function, address)?));
    }
    let failed =
        |error: cofferdam_device::TransportError| PciError::Unusable { address: place, why: error.to_string() };
    Ok(Box::new(Raw::open(function, address).map_err(failed)?))
}
