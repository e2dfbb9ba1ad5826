//! A function through `uio_pci_generic`: configuration space and BARs by sysfs, INTx by `/dev/uioN`, memory in hugepages at physical addresses.
//!
//! Nothing keeps such a function to the memory that it was given (DESIGN section 8, D1), so bus mastering is off until somebody vouches for what it is told. There are no
//! message-signalled interrupts: the driver `uio_pci_generic` hands on INTx alone, masking it each time through the command register.
//!
//! How it goes: cooperative hot-unplug and unbinding make poll on `/dev/uioN` answer 0x19 (POLLIN, POLLERR, POLLHUP) and read EIO; a function that was pulled out reads all ones
//! in configuration space. Its mapped registers read ones on hardware and zero in QEMU, which is why neither is believed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use cap_std::fs::Dir;
use cofferdam_device::{DmaRegion, FunctionIds, RegionError, Silence, TransportError};
use rustix::io::Errno;

use crate::attributes::{self, Place, refused};
use crate::bounded::Bounded;
use crate::claimed::{self, Claimed, Interrupts, Reach};
use crate::config::ConfigSpace;
use crate::hugepages::{self, Hugepages};
use crate::mmio::{Mmio, page_bytes};
use crate::registers::{Bar, Registers, Window};
use crate::watch::{Source, Watch, event};
use crate::{Address, PciError};

mod adopt;

/// One function that `uio_pci_generic` is bound to.
pub(crate) struct UioFunction {
    address: Address,
    ids: FunctionIds,
    /// N of `/dev/uioN`.
    number: u32,
    /// Its folder in sysfs.
    device: Option<Dir>,
    config: ConfigSpace,
    /// `/dev/uioN`.
    node: Option<Arc<OwnedFd>>,
    has_line: bool,
    places: [Place; 6],
    bars: [Option<Arc<Bar>>; 6],
    watch: Option<Watch>,
    hugepages: Option<Hugepages>,
    /// What the function may reach.
    regions: Vec<Arc<DmaRegion>>,
    resets: Bounded,
    /// Another process has it, too, and is to go on with it or does already.
    dormant: bool,
}

/// N of `/dev/uioN`.
fn number(address: Address, device: &Dir) -> Result<u32, PciError> {
    let io = |what: &str| refused(address, what.to_owned());
    let unbound = || PciError::Unusable { address, why: "uio_pci_generic is not bound to it".to_owned() };
    let number = match attributes::numbered(device, "uio", "uio") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(unbound()),
        number => number.map_err(io("find its uio device"))?,
    };
    let name = attributes::text(device, format!("uio/uio{number}/name")).map_err(io("read uio/name"))?;
    if name == "uio_pci_generic" { Ok(number) } else { Err(unbound()) }
}

/// The attribute that says which character device it is, and the node's path.
fn node_of(number: u32) -> (String, String) {
    (format!("uio/uio{number}/dev"), format!("/dev/uio{number}"))
}

impl UioFunction {
    /// Opens the function at `address`, whose folder in sysfs is `device`, and keeps it from mastering the bus.
    ///
    /// # Errors
    /// [`PciError::Unusable`] when `uio_pci_generic` does not have it; [`PciError::Permission`]; [`PciError::Io`].
    pub(crate) fn open(address: Address, device: Dir) -> Result<Self, PciError> {
        let io = |what: &str| refused(address, what.to_owned());
        let number = number(address, &device)?;
        let (dev, path) = node_of(number);
        let node = attributes::open_node(&device, &dev, &path).map_err(io(&format!("open {path}")))?;
        let config = attributes::open(&device, "config").map_err(io("open config"))?;
        let mut new = Self::found(address, number, device, node, config, event().map_err(io("make an eventfd"))?)?;
        let silent = |error| PciError::Unusable { address, why: format!("it cannot be kept from the bus: {error}") };
        new.config.set_line(false).and_then(|()| new.config.set_master(false)).map_err(silent)?;
        new.watch().map_err(io("start a thread"))?;
        tracing::info!(%address, uio = number, has_line = new.has_line, "function opened through uio");
        Ok(new)
    }

    /// The function with what is open, of which nothing is changed; nobody watches it yet.
    fn found(
        address: Address,
        number: u32,
        device: Dir,
        node: OwnedFd,
        config: OwnedFd,
        lost: OwnedFd,
    ) -> Result<Self, PciError> {
        let io = |what: &str| refused(address, what.to_owned());
        let ids = attributes::ids(&device).map_err(io("read its ids"))?;
        let places = attributes::places(&device).map_err(io("read resource"))?;
        let stat = rustix::fs::fstat(&config).map_err(|errno| io("fstat config")(errno.into()))?;
        let config = ConfigSpace::new(Arc::new(config), 0, u64::try_from(stat.st_size).unwrap_or(0));
        let interrupt = attributes::number(&device, "irq").map_err(io("read irq"))?;
        let has_line = interrupt != 0 && config.has_pin();
        let watch = Watch::asleep(Arc::new(lost)).map_err(io("make an eventfd"))?;
        Ok(Self {
            address,
            ids,
            number,
            device: Some(device),
            config,
            node: Some(Arc::new(node)),
            has_line,
            places,
            bars: Default::default(),
            watch: Some(watch),
            hugepages: None,
            regions: Vec::new(),
            resets: Bounded::default(),
            dormant: false,
        })
    }

    /// Starts the thread.
    fn watch(&mut self) -> io::Result<()> {
        let node = self.node.as_ref().filter(|_| self.has_line).map(Arc::clone);
        let source = UioSource { node, config: self.config.clone() };
        match &mut self.watch {
            Some(watch) => watch.run(&format!("uio{}", self.number), source),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Nobody takes interrupts from now on, and the function does not assert its line.
    fn unwire(&mut self) -> Result<(), TransportError> {
        if let Some(watch) = &self.watch {
            watch.line().take();
        }
        self.config.set_line(false)
    }

    /// Registers of a function that is gone are taken away at once: what comes to be at their place is somebody else's.
    fn forget_registers(&self) {
        self.bars.iter().flatten().for_each(|bar| bar.revoke());
    }
}

impl Claimed for UioFunction {
    fn address(&self) -> Address {
        self.address
    }

    fn by(&self) -> &'static str {
        "uio"
    }

    fn ids(&self) -> FunctionIds {
        self.ids
    }

    fn read_config(&self, offset: u16, into: &mut [u8]) -> Result<(), TransportError> {
        self.config.read(offset, into)
    }

    fn bar(&mut self, index: u8) -> Result<Arc<dyn Registers>, TransportError> {
        let at = usize::from(index);
        let absent = || TransportError::Refused(format!("{}: it has no memory BAR {index}", self.address));
        if let Some(Some(bar)) = self.bars.get(at) {
            return Ok(Arc::clone(bar) as Arc<dyn Registers>);
        }
        let place = self.places.get(at).copied().filter(|place| place.bytes > 0).ok_or_else(absent)?;
        let device = self.device.as_ref().ok_or(TransportError::Lost)?;
        let what = format!("{}: map resource{index}", self.address);
        let io = |source: io::Error| TransportError::Io { what: what.clone(), source };
        let file = attributes::open(device, &format!("resource{index}")).map_err(io)?;
        // The kernel maps the page that the BAR begins in.
        let lead = place.start % page_bytes();
        let registers = Mmio::map(file.as_fd(), 0, lead, place.bytes).map_err(io)?;
        let bar = Arc::new(Bar::new(place.bytes, vec![Window { offset: 0, registers }], None));
        self.bars[at] = Some(Arc::clone(&bar));
        Ok(bar)
    }

    fn bar_bytes(&self) -> [u64; 6] {
        self.places.map(|place| place.bytes)
    }

    fn set_bus_master(&mut self, on: bool) -> Result<(), TransportError> {
        self.config.set_master(on)
    }

    fn msix_vectors(&self) -> u16 {
        0
    }

    fn has_line(&self) -> bool {
        self.has_line
    }

    fn wire(&mut self, interrupts: Interrupts) -> Result<(), TransportError> {
        if matches!(&interrupts, Interrupts::Vectors(vectors) if vectors.is_empty()) {
            return self.unwire();
        }
        let Some(line) = interrupts.into_line() else {
            return Err(TransportError::Refused("uio hands on INTx and no messages".to_owned()));
        };
        if !self.has_line {
            return Err(TransportError::Refused(format!("{}: it has no interrupt line", self.address)));
        }
        let watch = self.watch.as_ref().ok_or(TransportError::Lost)?;
        *watch.line() = Some(line);
        self.config.set_line(true)
    }

    fn unmask(&mut self) -> Result<(), TransportError> {
        let watch = self.watch.as_ref().ok_or(TransportError::Lost)?;
        let line = watch.line();
        if line.is_some() { self.config.set_line(true) } else { Ok(()) }
    }

    fn is_isolated(&self) -> bool {
        false
    }

    fn memory(&mut self, name: &str, bytes: u64, _: u64, reach: Reach) -> Result<Arc<DmaRegion>, RegionError> {
        let io = |source| RegionError::Io { what: "making memory that a function can reach through uio", source };
        if reach == Reach::Iommu {
            return Err(io(io::Error::new(io::ErrorKind::Unsupported, "there is no IOMMU behind uio")));
        }
        let address = self.address;
        hugepages::found(&mut self.hugepages).map_err(io)?.memory(address, name, bytes).map(Arc::new)
    }

    fn map(&mut self, region: Arc<DmaRegion>) -> Result<(), TransportError> {
        self.regions.push(region);
        Ok(())
    }

    fn unmap(&mut self, iova: u64) -> Silence {
        Silence::Unconfirmed {
            reason: format!("{}: nothing keeps a function on uio from memory at {iova:#x} while it runs", self.address),
        }
    }

    fn take_back(&mut self) -> Result<u64, TransportError> {
        let io = |source| TransportError::Io { what: "taking back memory of an earlier process".to_owned(), source };
        if !self.is_absent() && self.config.is_master()? {
            return Err(TransportError::Invalid("the function may still write to that memory".to_owned()));
        }
        let address = self.address;
        hugepages::found(&mut self.hugepages).and_then(|pages| pages.take_back(address)).map_err(io)
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.watch.as_ref().map(Watch::event)
    }

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let mut held: Vec<_> = self.node.iter().map(|node| node.as_fd()).collect();
        held.extend(self.device.as_ref().map(Dir::as_fd));
        held.extend(self.config.fd());
        held.extend(self.watch.iter().flat_map(Watch::descriptors));
        held
    }

    fn is_lost(&mut self) -> bool {
        let Some(watch) = &self.watch else { return true };
        watch.is_lost()
    }

    fn is_absent(&mut self) -> bool {
        let seen = self.watch.as_ref().is_some_and(Watch::is_absent);
        // While the kernel resets it, configuration space answers nobody in time.
        let absent = seen || (!self.resets.is_busy() && self.config.is_absent());
        if absent {
            self.forget_registers();
        }
        absent
    }

    fn reset(&mut self, deadline: Instant) -> Result<(), TransportError> {
        // The kernel would wait for it for over a minute.
        if self.is_absent() {
            return Err(TransportError::Lost);
        }
        let device = self.device.as_ref().ok_or(TransportError::Lost)?;
        let file = match rustix::fs::openat(
            device,
            "reset",
            rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        ) {
            Ok(file) => file,
            Err(Errno::NOENT) => {
                return Err(TransportError::Unsupported(format!("{}: the kernel has no reset for it", self.address)));
            }
            Err(errno) => {
                return Err(TransportError::Io { what: format!("{}: open reset", self.address), source: errno.into() });
            }
        };
        let written = self.resets.run("uio-reset", deadline, move || rustix::io::write(&file, b"1"));
        crate::config::done("reset", written.map_err(|_| TransportError::Timeout)?, 1)
    }

    fn quiet(&mut self, _: Instant) -> Silence {
        if self.dormant {
            return Silence::Unconfirmed { reason: format!("{}: another process has it", self.address) };
        }
        if self.device.is_none() {
            return Silence::Confirmed;
        }
        let is_resetting = self.resets.is_busy();
        claimed::quiet(self, is_resetting)
    }

    fn release(&mut self) {
        if self.device.is_none() {
            return;
        }
        // What is dormant masters the bus for another process.
        if !self.dormant
            && let Silence::Unconfirmed { reason } = self.quiet(Instant::now())
        {
            tracing::error!(reason, "a function is released that may still master the bus");
        }
        self.forget_registers();
        self.bars = Default::default();
        if let Some(watch) = self.watch.take() {
            drop(watch);
        }
        self.regions.clear();
        if let Some(pages) = self.hugepages.take() {
            pages.remove_folder(self.address);
        }
        self.node = None;
        self.config.close();
        self.device = None;
    }
}

impl Drop for UioFunction {
    fn drop(&mut self) {
        self.release();
    }
}

/// `/dev/uioN`.
struct UioSource {
    node: Option<Arc<OwnedFd>>,
    config: ConfigSpace,
}

impl Source for UioSource {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.node.as_ref().map(|node| node.as_fd())
    }

    fn take(&mut self) -> io::Result<bool> {
        let Some(node) = &self.node else { return Ok(false) };
        // The number of interrupts so far. Nothing is done with it: one acknowledgement takes them all.
        match rustix::io::read(&**node, &mut [0; 4]) {
            Ok(_) => Ok(true),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn rearm(&mut self) -> io::Result<()> {
        self.config.set_line(true).map_err(io::Error::other)
    }

    fn is_absent(&mut self) -> bool {
        self.config.is_absent()
    }
}
