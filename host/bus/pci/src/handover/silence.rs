//! A function that a killed host left behind may still be writing to memory. It is made silent before it goes back, and before that memory is anybody else's (DESIGN L1 and
//! section 8): bus mastering off, seen to be off by reading the command register, then a reset.

use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;

use super::Sysfs;
use crate::hugepages::Hugepages;
use crate::{Address, PciError};

/// Command register (PCI Local Bus 3.0, section 6.2.2) and its bus master bit.
const COMMAND: u64 = 0x04;
const BUS_MASTER: u16 = 1 << 2;
/// Revision and class code.
const CLASS: u64 = 0x08;

/// The function was seen not to master the bus, or is out of the machine. Made by looking, and in no other way.
#[derive(Debug)]
pub struct Silenced {
    address: Address,
}

impl Silenced {
    /// Which function.
    #[must_use]
    pub fn address(&self) -> Address {
        self.address
    }
}

/// Memory that a killed host had shared with the function may be freed now: nothing writes to it any more. Called before the function goes back to its driver, with the proof.
/// The answer is how many bytes were freed.
///
/// What there is to free are named files of hugetlbfs (`hugepages`). A machine without hugetlbfs has none.
pub(super) fn after_reset(sysfs: &Sysfs, silenced: &Silenced) -> Result<u64, PciError> {
    // Another root than the host's has no huge pages.
    if !sysfs.scope.is_empty() {
        return Ok(0);
    }
    let Ok(pages) = Hugepages::find() else { return Ok(0) };
    let address = silenced.address();
    pages.take_back(address).map_err(|source| PciError::Io { what: format!("free the memory of {address}"), source })
}

/// Takes the bus away from the function and looks; `None` where it could not be seen to be gone.
pub(super) fn silence(sysfs: &Sysfs, address: Address) -> Option<Silenced> {
    let path = config(address);
    match command(sysfs, address) {
        Ok(Some(command)) if command & BUS_MASTER != 0 => {
            let off = (command & !BUS_MASTER).to_le_bytes();
            if let Err(error) = sysfs.effects.write_at(&sysfs.sys, &path, COMMAND, &off) {
                tracing::warn!(%address, %error, "bus mastering not switched off");
            }
        }
        Ok(_) => {}
        Err(error) => tracing::warn!(%address, %error, "configuration space not read"),
    }
    confirm(sysfs, address)
}

/// Looks. A read also pushes what the function had already posted ahead of its answer (PCI Local Bus 3.0, section 3.2.5, ordering).
pub(super) fn confirm(sysfs: &Sysfs, address: Address) -> Option<Silenced> {
    match command(sysfs, address) {
        Ok(None) => Some(Silenced { address }),
        Ok(Some(command)) if command & BUS_MASTER == 0 => Some(Silenced { address }),
        Ok(Some(_)) | Err(_) => None,
    }
}

/// Whether the function is out of the machine although the kernel still lists it: the dword of revision and class code reads all ones, as that of no function that is there does
/// (the vendor of a virtual function reads so too: SR-IOV 1.1, section 3.4.1.1).
pub(super) fn is_absent(sysfs: &Sysfs, address: Address) -> bool {
    let mut class = [0; 4];
    let read = sysfs.sys.open(config(address)).and_then(|file| file.into_std().read_exact_at(&mut class, CLASS));
    match read {
        Ok(()) => class == [0xff; 4],
        Err(error) => is_gone(&error),
    }
}

/// The command register; `None` when the function is gone: no such file, or all ones where the vendor id should be (section 6.2.1), which no function has.
fn command(sysfs: &Sysfs, address: Address) -> io::Result<Option<u16>> {
    let file = match sysfs.sys.open(config(address)) {
        Ok(file) => file.into_std(),
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut head = [0; 6];
    match file.read_exact_at(&mut head, 0) {
        Ok(()) => {}
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(error),
    }
    let word = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    Ok((word(0) != u16::MAX).then(|| word(4)))
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

fn config(address: Address) -> String {
    format!("bus/pci/devices/{address}/config")
}
