//! Configuration space of a function through a file: sysfs `config`, or vfio's configuration region. Little-endian, checked.
//!
//! The command register (PCI 3.0, section 6.2.2) is written byte by byte: bus mastering is in its low byte and the INTx-disable bit in its high one, so that the thread that
//! takes interrupts and the one that controls the function never undo each other's writes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use cofferdam_device::TransportError;
use rustix::io::Errno;

/// Offset of the command register.
const COMMAND: u16 = 4;
/// Offset of revision and class code.
const CLASS: u16 = 8;
/// Offset of the pointer to the first capability (PCI 3.0, section 6.7).
const CAPABILITIES: u16 = 0x34;
/// Offset of the interrupt pin (section 6.2.4).
const PIN: u16 = 0x3d;
/// Memory space, in the low byte.
const MEMORY: u8 = 1 << 1;
/// Bus master, in the low byte.
const MASTER: u8 = 1 << 2;
/// INTx disable (bit 10), in the high byte.
const NO_INTX: u8 = 1 << 2;
/// Capabilities that fit between the header and the end of the first 256 bytes: a longer list is a loop.
const MAX_CAPABILITIES: usize = 48;

/// Configuration space, 256 or 4,096 bytes of a file.
#[derive(Clone, Debug)]
pub(crate) struct ConfigSpace {
    /// `None` once the function was released.
    file: Option<Arc<OwnedFd>>,
    /// Where it begins in the file.
    at: u64,
    bytes: u64,
}

impl ConfigSpace {
    /// `bytes` bytes from `at` of `file`.
    pub(crate) fn new(file: Arc<OwnedFd>, at: u64, bytes: u64) -> Self {
        Self { file: Some(file), at, bytes: bytes.min(4096) }
    }

    /// Lets the file go: everything answers `Lost` from now on.
    pub(crate) fn close(&mut self) {
        self.file = None;
    }

    /// The file.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(|file| file.as_fd())
    }

    fn file(&self) -> Result<&OwnedFd, TransportError> {
        self.file.as_deref().ok_or(TransportError::Lost)
    }

    fn place(&self, offset: u16, bytes: usize) -> Result<u64, TransportError> {
        let end = u64::from(offset).saturating_add(bytes as u64);
        if end > self.bytes {
            let text = format!("{bytes} bytes at {offset:#x} of a configuration space of {} bytes", self.bytes);
            return Err(TransportError::Invalid(text));
        }
        Ok(self.at.saturating_add(u64::from(offset)))
    }

    /// Reads `into` at `offset`.
    ///
    /// # Errors
    /// `Invalid` outside, `Lost` when the kernel has no such function any more.
    pub(crate) fn read(&self, offset: u16, into: &mut [u8]) -> Result<(), TransportError> {
        let place = self.place(offset, into.len())?;
        let wanted = into.len();
        done("read configuration space", rustix::io::pread(self.file()?, into, place), wanted)
    }

    fn byte(&self, offset: u16) -> Result<u8, TransportError> {
        let mut byte = [0];
        self.read(offset, &mut byte)?;
        Ok(byte[0])
    }

    /// Sets or clears `bit` of the byte at `offset`, and reads it back.
    fn set(&self, offset: u16, bit: u8, on: bool) -> Result<(), TransportError> {
        let old = self.byte(offset)?;
        let new = if on { old | bit } else { old & !bit };
        if new != old {
            let place = self.place(offset, 1)?;
            done("write the command register", rustix::io::pwrite(self.file()?, &[new], place), 1)?;
        }
        if (self.byte(offset)? & bit != 0) == on {
            return Ok(());
        }
        if self.is_absent() {
            return Err(TransportError::Lost);
        }
        Err(TransportError::Protocol(format!("bit {bit:#x} of configuration byte {offset:#x} does not stay {on}")))
    }

    /// Bus mastering, read back.
    ///
    /// # Errors
    /// `Protocol` when the function does not keep it.
    pub(crate) fn set_master(&self, on: bool) -> Result<(), TransportError> {
        self.set(COMMAND, MASTER, on)
    }

    /// Whether bus mastering is on.
    ///
    /// # Errors
    /// As `read`.
    pub(crate) fn is_master(&self) -> Result<bool, TransportError> {
        Ok(self.byte(COMMAND)? & MASTER != 0)
    }

    /// Memory space, read back. Nothing here ever clears it: with vfio, an access to mapped registers would fault without it.
    ///
    /// # Errors
    /// As `set_master`.
    pub(crate) fn enable_memory(&self) -> Result<(), TransportError> {
        self.set(COMMAND, MEMORY, true)
    }

    /// Keeps the function from asserting INTx, read back; or lets it assert, which is not: the kernel may have masked it again by then, because it has asserted.
    ///
    /// # Errors
    /// As `set_master`.
    pub(crate) fn set_line(&self, on: bool) -> Result<(), TransportError> {
        const HIGH: u16 = COMMAND + 1;
        if !on {
            return self.set(HIGH, NO_INTX, true);
        }
        let high = self.byte(HIGH)? & !NO_INTX;
        let place = self.place(HIGH, 1)?;
        done("write the command register", rustix::io::pwrite(self.file()?, &[high], place), 1)
    }

    /// Whether it has an interrupt pin: INTA to INTD.
    pub(crate) fn has_pin(&self) -> bool {
        matches!(self.byte(PIN), Ok(1..=4))
    }

    /// Whether nobody answers. Revision and class code are looked at and not the vendor, which reads all ones on a virtual function (SR-IOV 1.1, section 3.4.1.1) that is
    /// there; no class is all ones.
    pub(crate) fn is_absent(&self) -> bool {
        let mut class = [0; 4];
        let Some(file) = self.file.as_deref() else { return false };
        match rustix::io::pread(file, &mut class, self.at.saturating_add(u64::from(CLASS))) {
            Ok(4) => class == [0xff; 4],
            Err(Errno::NODEV | Errno::NXIO) => true,
            _ => false,
        }
    }

    /// The offset of the first capability with this id.
    ///
    /// # Errors
    /// As `read`; `Protocol` for a list that leads outside or round in a circle.
    pub(crate) fn capability(&self, id: u8) -> Result<Option<u16>, TransportError> {
        let mut next = self.byte(CAPABILITIES)? & !3;
        for _ in 0..MAX_CAPABILITIES {
            if next == 0 {
                return Ok(None);
            }
            if next < 0x40 {
                return Err(TransportError::Protocol(format!("a capability in the header, at {next:#x}")));
            }
            let mut head = [0; 2];
            self.read(u16::from(next), &mut head)?;
            if head[0] == id {
                return Ok(Some(u16::from(next)));
            }
            next = head[1] & !3;
        }
        Err(TransportError::Protocol("a list of capabilities without an end".to_owned()))
    }
}

/// What a transfer of `wanted` bytes on a function's file has come to. A function that the kernel does not know any more is lost.
pub(crate) fn done(what: &str, answer: rustix::io::Result<usize>, wanted: usize) -> Result<(), TransportError> {
    let source = match answer {
        Ok(count) if count == wanted => return Ok(()),
        Ok(_) => io::ErrorKind::UnexpectedEof.into(),
        Err(Errno::NODEV | Errno::NXIO) => return Err(TransportError::Lost),
        Err(errno) => errno.into(),
    };
    Err(TransportError::Io { what: what.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that holds `before` bytes of something else and then a configuration space.
    fn space(before: u64, content: &[(usize, u8)]) -> ConfigSpace {
        let file = rustix::fs::memfd_create("config", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut bytes = [0; 256];
        bytes[8..12].copy_from_slice(&[1, 0, 0, 1]);
        for (at, byte) in content {
            bytes[*at] = *byte;
        }
        rustix::io::pwrite(&file, &bytes, before).unwrap();
        ConfigSpace::new(Arc::new(file), before, 256)
    }

    #[test]
    fn an_access_outside_is_the_callers_mistake() {
        let config = space(64, &[(255, 7)]);
        for (offset, bytes) in [(256, 1), (255, 2), (0xffff, 1), (0, 257)] {
            assert!(matches!(config.read(offset, &mut vec![0; bytes]), Err(TransportError::Invalid(_))), "{offset}");
        }
        assert_eq!(config.byte(255).unwrap(), 7);
    }

    #[test]
    fn the_bits_of_the_command_register_are_changed_one_by_one() {
        let config = space(0, &[(4, 0b11), (5, 0b1)]);
        config.set_master(true).unwrap();
        config.set_line(false).unwrap();
        assert_eq!((config.byte(4).unwrap(), config.byte(5).unwrap()), (0b111, 0b101));
        assert!(config.is_master().unwrap());
        config.set_master(false).unwrap();
        config.set_line(true).unwrap();
        assert_eq!((config.byte(4).unwrap(), config.byte(5).unwrap()), (0b11, 0b1));
    }

    #[test]
    fn a_function_that_answers_all_ones_is_absent_and_a_virtual_one_is_not() {
        assert!(!space(0, &[(0, 0xff), (1, 0xff), (2, 0xff), (3, 0xff)]).is_absent(), "a virtual function");
        let gone = space(0, &[(4, 0xff), (5, 0xff), (8, 0xff), (9, 0xff), (10, 0xff), (11, 0xff)]);
        assert!(gone.is_absent());
    }

    #[test]
    fn capabilities_are_found_and_lists_that_lead_nowhere_end() {
        assert_eq!(space(0, &[]).capability(0x11).unwrap(), None);
        let config = space(0, &[(0x34, 0x41), (0x40, 9), (0x41, 0x80), (0x80, 0x11)]);
        assert_eq!(config.capability(0x11).unwrap(), Some(0x80));
        assert_eq!(config.capability(5).unwrap(), None);
        for content in [vec![(0x34, 0x40), (0x40, 9), (0x41, 0x40)], vec![(0x34, 0x10)], vec![(0x34, 0x40), (0x41, 4)]]
        {
            assert!(matches!(space(0, &content).capability(0x11), Err(TransportError::Protocol(_))), "{content:?}");
        }
    }
}
