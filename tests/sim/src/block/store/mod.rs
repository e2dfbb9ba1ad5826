//! The medium and, in front of it, a volatile write cache that a power cut can empty.
//!
//! Both the memory and the file storage are a file (the former a memfd), so there is one way to move payload: the kernel
//! moves it between the file and the driver's memory, without a lock and without a copy in between.

mod cache;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use cache::Cache;
pub use cache::PowerCut;
use rustix::fs::{FallocateFlags, MemfdFlags};

use crate::memory::{Memory, Segment};
use crate::rng::Rng;

/// Where the bytes are.
#[derive(Clone, Debug)]
pub enum Storage {
    /// In memory, sparse, this many bytes long.
    Memory(u64),
    /// In an existing file, as long as the file is now, rounded down to whole sectors.
    File(PathBuf),
    /// Nowhere: this many bytes long, every request is answered well at once and no payload is touched.
    Null(u64),
}

/// An open medium. All methods may be called from several threads at once.
pub(crate) struct Store {
    /// `None`: null.
    file: Option<File>,
    /// Whether a flush has to reach a disk of the host.
    durable: bool,
    capacity_bytes: AtomicU64,
    cache: Mutex<Cache>,
}

impl Store {
    pub(crate) fn open(storage: &Storage, read_only: bool, block_bytes: u64) -> io::Result<Self> {
        let (file, durable, bytes) = match storage {
            Storage::Memory(bytes) => {
                let file = File::from(rustix::fs::memfd_create("cofferdam-sim-medium", MemfdFlags::CLOEXEC)?);
                file.set_len(*bytes)?;
                (Some(file), false, *bytes)
            }
            Storage::File(path) => {
                let file = File::options().read(true).write(!read_only).open(path)?;
                let bytes = file.metadata()?.len();
                (Some(file), true, bytes)
            }
            Storage::Null(bytes) => (None, false, *bytes),
        };
        let capacity = bytes / block_bytes * block_bytes;
        if capacity == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{bytes} bytes are not even one block of {block_bytes}"),
            ));
        }
        Ok(Self { file, durable, capacity_bytes: AtomicU64::new(capacity), cache: Mutex::new(Cache::new(block_bytes)) })
    }

    pub(crate) fn is_null(&self) -> bool {
        self.file.is_none()
    }

    pub(crate) fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes.load(Ordering::Relaxed)
    }

    /// Grows or shrinks the medium. A file is never shortened: what lies beyond cannot be reached any more, and is there
    /// again when the medium grows back.
    pub(crate) fn resize(&self, bytes: u64) -> io::Result<()> {
        if let Some(file) = &self.file
            && file.metadata()?.len() < bytes
        {
            file.set_len(bytes)?;
        }
        self.capacity_bytes.store(bytes, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn read(&self, memory: &Memory, segments: &[Segment], offset: u64) -> io::Result<()> {
        match &self.file {
            Some(file) => memory.transfer(segments, file.as_fd(), offset, true),
            None => Ok(()),
        }
    }

    /// Writes; with `cached`, a power cut before the next flush may undo it.
    pub(crate) fn write(
        &self,
        memory: &Memory,
        segments: &[Segment],
        offset: u64,
        bytes: u64,
        cached: bool,
    ) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        self.change(file, offset, bytes, cached, || memory.transfer(segments, file.as_fd(), offset, false))
    }

    /// Makes a range read as zeroes, giving its space back where the file system can.
    pub(crate) fn zero(&self, offset: u64, bytes: u64, cached: bool) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        self.change(file, offset, bytes, cached, || {
            match rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, bytes) {
                Err(rustix::io::Errno::OPNOTSUPP) => {
                    let zeroes = vec![0; bytes.min(1 << 20) as usize];
                    let mut done = 0;
                    while done < bytes {
                        let step = (bytes - done).min(zeroes.len() as u64);
                        file.write_all_at(&zeroes[..step as usize], offset + done)?;
                        done += step;
                    }
                    Ok(())
                }
                other => Ok(other?),
            }
        })
    }

    fn change(
        &self,
        file: &File,
        offset: u64,
        bytes: u64,
        cached: bool,
        act: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        if !cached {
            return act();
        }
        // Held over the whole write, so that the cache's order of writes is the medium's.
        let mut cache = self.cache.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        cache.before(file, offset, bytes)?;
        act()?;
        cache.after(file, offset, bytes)
    }

    /// Makes everything written so far survive a power cut.
    pub(crate) fn flush(&self) -> io::Result<()> {
        if let Some(file) = &self.file
            && self.durable
        {
            file.sync_data()?;
        }
        self.cache.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clear();
        Ok(())
    }

    /// Loses what was not flushed, but for a part drawn from `rng`.
    pub(crate) fn power_cut(&self, rng: &mut Rng) -> io::Result<PowerCut> {
        let mut cache = self.cache.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match &self.file {
            Some(file) => cache.power_cut(file, rng),
            None => Ok(PowerCut::default()),
        }
    }

    /// Bytes as a read would find them now, for a test's oracle.
    pub(crate) fn contents(&self, offset: u64, bytes: usize) -> io::Result<Vec<u8>> {
        let mut into = vec![0; bytes];
        if let Some(file) = &self.file {
            file.read_exact_at(&mut into, offset)?;
        }
        Ok(into)
    }
}
