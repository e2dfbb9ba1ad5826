//! Registers of a function: a mapped BAR.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cofferdam_device::{TransportError, Width};

use crate::config::done;
use crate::mmio::Mmio;

/// A range of registers. Little-endian, every access of its own width, checked.
pub(crate) trait Registers: Send + Sync {
    /// Length in bytes.
    fn bytes(&self) -> u64;

    /// Reads at `offset`, a multiple of `width`.
    ///
    /// # Errors
    /// `Invalid` when it is outside or misaligned, `Lost` when the function was released.
    fn read(&self, offset: u64, width: Width) -> Result<u64, TransportError>;

    /// Writes at `offset`, a multiple of `width`.
    ///
    /// # Errors
    /// As `read`.
    fn write(&self, offset: u64, width: Width, value: u64) -> Result<(), TransportError>;
}

/// A BAR: what of it is mapped, and how the rest is reached. Whoever still holds it after [`Bar::revoke`] reaches nothing.
#[derive(Debug)]
pub(crate) struct Bar {
    bytes: u64,
    /// In the order of their places, which do not overlap.
    windows: Vec<Window>,
    /// Where the kernel lets itself be asked for what cannot be mapped (vfio: what shares a page with the MSI-X table).
    rest: Mutex<Option<Rest>>,
    revoked: AtomicBool,
}

/// A part of a BAR that is mapped.
#[derive(Debug)]
pub(crate) struct Window {
    /// Offset in the BAR, in bytes; a multiple of 8.
    pub(crate) offset: u64,
    /// The registers there.
    pub(crate) registers: Mmio,
}

/// A BAR as a range of a file.
#[derive(Debug)]
pub(crate) struct Rest {
    /// vfio's descriptor of the function.
    pub(crate) file: Arc<OwnedFd>,
    /// Where the BAR begins in it, in bytes.
    pub(crate) offset: u64,
}

impl Bar {
    /// A BAR of `bytes` bytes.
    pub(crate) fn new(bytes: u64, mut windows: Vec<Window>, rest: Option<Rest>) -> Self {
        windows.sort_by_key(|window| window.offset);
        Self { bytes, windows, rest: Mutex::new(rest), revoked: AtomicBool::new(false) }
    }

    /// Takes the registers away from whoever still holds them. Idempotent.
    pub(crate) fn revoke(&self) {
        if self.revoked.swap(true, Ordering::SeqCst) {
            return;
        }
        self.rest.lock().unwrap_or_else(PoisonError::into_inner).take();
        for window in &self.windows {
            if let Err(error) = window.registers.revoke() {
                tracing::error!(%error, "registers could not be revoked");
            }
        }
    }

    /// The window that holds `offset`, and the offset in it.
    #[inline]
    fn window(&self, offset: u64) -> Option<(&Mmio, u64)> {
        let inside = |window: &Window| offset.checked_sub(window.offset).filter(|at| *at < window.registers.bytes());
        self.windows.iter().find_map(|window| inside(window).map(|at| (&window.registers, at)))
    }

    fn check(&self, offset: u64, width: Width) -> Result<(), TransportError> {
        let size = width.bytes();
        if !offset.is_multiple_of(size) || offset.checked_add(size).is_none_or(|end| end > self.bytes) {
            return Err(outside(offset, width, self.bytes));
        }
        if self.revoked.load(Ordering::Acquire) { Err(TransportError::Lost) } else { Ok(()) }
    }

    /// The file that reaches what is not mapped.
    fn rest(&self) -> Result<(Arc<OwnedFd>, u64), TransportError> {
        let rest = self.rest.lock().unwrap_or_else(PoisonError::into_inner);
        rest.as_ref().map(|rest| (Arc::clone(&rest.file), rest.offset)).ok_or(TransportError::Lost)
    }
}

fn outside(offset: u64, width: Width, bytes: u64) -> TransportError {
    TransportError::Invalid(format!(
        "a register of {} bytes at {offset:#x}: misaligned or outside of {bytes:#x} bytes",
        width.bytes()
    ))
}

impl Registers for Bar {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read(&self, offset: u64, width: Width) -> Result<u64, TransportError> {
        self.check(offset, width)?;
        if let Some((registers, at)) = self.window(offset) {
            return registers.read(at, width).ok_or_else(|| outside(offset, width, self.bytes));
        }
        let (file, start) = self.rest()?;
        let mut found = [0; 8];
        let bytes = width.bytes() as usize;
        let answer = rustix::io::pread(&*file, &mut found[..bytes], start.saturating_add(offset));
        done("read a register", answer, bytes)?;
        Ok(u64::from_le_bytes(found))
    }

    fn write(&self, offset: u64, width: Width, value: u64) -> Result<(), TransportError> {
        self.check(offset, width)?;
        if let Some((registers, at)) = self.window(offset) {
            return registers.write(at, width, value).ok_or_else(|| outside(offset, width, self.bytes));
        }
        let (file, start) = self.rest()?;
        let bytes = width.bytes() as usize;
        let answer = rustix::io::pwrite(&*file, &value.to_le_bytes()[..bytes], start.saturating_add(offset));
        done("write a register", answer, bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    /// A BAR of three pages at offset 0x10000 of a file; the one in the middle is not mapped.
    fn patched() -> (Arc<OwnedFd>, Bar) {
        let file = rustix::fs::memfd_create("bar", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 0x13000).unwrap();
        let window = |offset| Window { offset, registers: Mmio::map(file.as_fd(), 0x10000 + offset, 0, 4096).unwrap() };
        let windows = vec![window(0x2000), window(0)];
        let file = Arc::new(file);
        let bar = Bar::new(0x3000, windows, Some(Rest { file: Arc::clone(&file), offset: 0x10000 }));
        (file, bar)
    }

    #[test]
    fn what_is_mapped_and_what_is_not_are_one_range() {
        let (file, bar) = patched();
        for (offset, value) in [(0, 1), (0xffc, 2), (0x1000, 3), (0x1ffc, 4), (0x2000, 5), (0x2ffc, 6)] {
            bar.write(offset, Width::U32, value).unwrap();
            let mut found = [0; 4];
            rustix::io::pread(&*file, &mut found, 0x10000 + offset).unwrap();
            assert_eq!(u64::from(u32::from_le_bytes(found)), value, "{offset:#x}");
            assert_eq!(bar.read(offset, Width::U32).unwrap(), value, "{offset:#x}");
        }
        assert_eq!(bar.read(0x1000, Width::U64).unwrap(), 3);
    }

    #[test]
    fn neither_part_is_left_on_any_side() {
        let (_file, bar) = patched();
        let never = [
            (0x3000, Width::U8),
            (0x2ffc, Width::U64),
            (0x1002, Width::U32),
            (0xffe, Width::U32),
            (u64::MAX, Width::U8),
            (u64::MAX - 7, Width::U64),
        ];
        for (offset, width) in never {
            assert!(matches!(bar.read(offset, width), Err(TransportError::Invalid(_))), "{offset:#x} {width:?}");
            assert!(matches!(bar.write(offset, width, 0), Err(TransportError::Invalid(_))), "{offset:#x} {width:?}");
        }
    }

    #[test]
    fn a_bar_that_was_released_answers_lost_and_holds_no_descriptor() {
        let (file, bar) = patched();
        bar.write(0, Width::U32, 7).unwrap();
        bar.revoke();
        bar.revoke();
        for offset in [0, 0x1000] {
            assert!(matches!(bar.read(offset, Width::U32), Err(TransportError::Lost)));
            assert!(matches!(bar.write(offset, Width::U32, 1), Err(TransportError::Lost)));
        }
        assert_eq!(Arc::strong_count(&file), 1);
    }
}
