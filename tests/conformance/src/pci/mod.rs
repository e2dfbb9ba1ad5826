//! Virtio functions on the PCI bus.

mod disk;
mod echo;
mod function;

use std::path::PathBuf;

use anyhow::Context;
use cofferdam_bus_pci::Via;
use cofferdam_conformance::{Bed, Class, Device, Wish};

use disk::Disk;
use echo::Echo;
use function::Function;

/// What the program was told.
pub(crate) struct Orders {
    /// Which kernel driver hands them over.
    pub(crate) via: Via,
    /// What they are.
    pub(crate) class: Class,
    /// The driver under test.
    pub(crate) driver: PathBuf,
    /// Where compiled code is kept.
    pub(crate) cache_dir: PathBuf,
    /// Stream: the kernel's end of port 1.
    pub(crate) peer: Option<String>,
    /// `pci:0000:01:00.0`.
    pub(crate) addresses: Vec<String>,
}

/// Functions that the cases share.
pub(crate) struct Functions {
    orders: Orders,
    disks: Vec<Disk>,
    others: Vec<Function>,
}

impl Functions {
    /// Looks at each.
    ///
    /// # Errors
    /// If the kernel does not serve one of them as what it is to be.
    pub(crate) fn find(orders: Orders) -> anyhow::Result<Functions> {
        let (mut disks, mut others) = (Vec::new(), Vec::new());
        for address in &orders.addresses {
            match orders.class {
                Class::Block => disks.push(Disk::find(address)?),
                class => others.push(Function::find(class, address)?),
            }
        }
        disks.iter().for_each(|disk| println!("  {disk:?}"));
        others.iter().for_each(|function| println!("  {function:?}"));
        Ok(Functions { orders, disks, others })
    }

    fn disk(&self, wish: &Wish) -> anyhow::Result<Option<Device>> {
        let Some(disk) = self.disks.iter().find(|disk| disk.suits(wish)) else { return Ok(None) };
        disk.clear().with_context(|| format!("cannot clear {}", disk.address))?;
        let device = self.device_at(wish, &disk.address, None);
        Ok(Some(Device { capacity_bytes: disk.capacity_bytes, ..device }))
    }

    fn other(&self, wish: &Wish) -> anyhow::Result<Option<Device>> {
        let Some(function) = self.others.iter().find(|function| function.suits(wish)) else { return Ok(None) };
        let echo = match wish.class {
            Class::Net => Some(Echo::of_frames()?),
            Class::Stream => Some(Echo::of_bytes(self.orders.peer.as_deref().context("--peer PORT?")?)?),
            _ => None,
        };
        let device = self.device_at(wish, &function.address, echo);
        // Port 0 is a console, which drops what nobody reads.
        Ok(Some(Device { mtu: function.mtu, ports: vec![1], has_past: wish.class.receives(), ..device }))
    }

    fn device_at(&self, wish: &Wish, address: &str, echo: Option<Echo>) -> Device {
        let (address, via) = (address.to_owned(), self.orders.via);
        let connect = move || Ok(cofferdam_bus_pci::connect(&address, Some(via))?);
        Device::new(wish, connect, move || echo.map_or(Ok(()), Echo::end))
    }
}

impl Bed for Functions {
    fn name(&self) -> &'static str {
        match self.orders.via {
            Via::Uio => "PCI by uio",
            Via::Vfio => "PCI by vfio",
        }
    }

    fn device(&self, wish: &Wish) -> anyhow::Result<Option<Device>> {
        if wish.class == Class::Block { self.disk(wish) } else { self.other(wish) }
    }

    fn driver(&self, _: Class) -> PathBuf {
        self.orders.driver.clone()
    }

    fn cache_dir(&self) -> PathBuf {
        self.orders.cache_dir.clone()
    }

    /// Pinned and mapped page by page for every case, and the machine has little.
    fn arena_bytes(&self) -> u64 {
        16 << 20
    }

    /// The machine is emulated.
    fn slowness(&self) -> u32 {
        10
    }
}
