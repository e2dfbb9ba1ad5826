//! The device under test.

use std::fmt;
use std::path::PathBuf;

use anyhow::bail;
use cofferdam_manager::Transport;

/// What kind of device, and so which driver and which service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// virtio-blk (virtio 1.2, section 5.2).
    Block,
    /// virtio-net (section 5.1).
    Net,
    /// virtio-console (section 5.3).
    Stream,
    /// virtio-rng (section 5.4).
    Entropy,
}

impl Class {
    /// Every class.
    pub const ALL: [Class; 4] = [Class::Block, Class::Net, Class::Stream, Class::Entropy];

    /// The name of its service, which `ls` shows.
    #[must_use]
    pub fn service(self) -> &'static str {
        match self {
            Class::Block => "block",
            Class::Net => "net",
            Class::Stream => "stream",
            Class::Entropy => "entropy",
        }
    }

    /// The file name of its driver.
    #[must_use]
    pub fn driver(self) -> &'static str {
        match self {
            Class::Block => "virtio-blk.wasm",
            Class::Net => "virtio-net.wasm",
            Class::Stream => "virtio-console.wasm",
            Class::Entropy => "virtio-rng.wasm",
        }
    }

    /// Whether something arrives by itself.
    #[must_use]
    pub fn receives(self) -> bool {
        matches!(self, Class::Net | Class::Stream)
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.service())
    }
}

impl std::str::FromStr for Class {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> anyhow::Result<Class> {
        match Class::ALL.into_iter().find(|class| class.service() == name) {
            Some(class) => Ok(class),
            None => bail!("{name}: no class; block, net, stream and entropy are"),
        }
    }
}

/// What a case needs of its device. A bed may give more than was wished for, never less.
#[derive(Clone, Debug)]
pub struct Wish {
    /// The class.
    pub class: Class,
    /// Queues for requests: of a network device, pairs.
    pub queues: u16,
    /// Entries of a ring, if it matters; asked for at load.
    pub ring_entries: Option<u16>,
    /// Whether indirect descriptors and event indices may be offered; without them the plain ring is shown.
    pub plain_ring: bool,
    /// Whether the other side can be told what to do.
    pub levers: bool,
    /// Block: size of the medium; reads as zeroes at first.
    pub capacity_bytes: u64,
    /// Block: whether writes are refused.
    pub read_only: bool,
    /// Block: whether discard and write-zeroes are served.
    pub ranges: bool,
    /// Net: the largest packet without its link header, in bytes.
    pub mtu: u16,
    /// Net: whether checksums and segments of TCP over IPv4 are left to the other side, both ways. `Some(false)`: not even offered.
    pub offloads: Option<bool>,
    /// Net: each packet has to lie in one buffer (no VIRTIO_NET_F_MRG_RXBUF).
    pub single_buffers: bool,
    /// Stream: ports that are open on the other side and give back what they are sent.
    pub ports: usize,
}

impl Wish {
    /// An ordinary device of the class.
    #[must_use]
    pub fn of(class: Class) -> Wish {
        Wish {
            class,
            queues: 1,
            ring_entries: None,
            plain_ring: false,
            levers: false,
            capacity_bytes: 16 << 20,
            read_only: false,
            ranges: false,
            mtu: 1500,
            offloads: None,
            single_buffers: false,
            ports: 1,
        }
    }

    /// One whose rings have neither indirect descriptors nor event indices.
    #[must_use]
    pub fn plain_ring(class: Class) -> Wish {
        Wish { plain_ring: true, ..Wish::of(class) }
    }

    /// One with rings of 16 entries.
    #[must_use]
    pub fn small_ring(class: Class) -> Wish {
        Wish { ring_entries: Some(16), ..Wish::of(class) }
    }

    /// One with two queues, or pairs of them.
    #[must_use]
    pub fn two_queues(class: Class) -> Wish {
        Wish { queues: 2, ..Wish::of(class) }
    }

    /// One whose other side can be told what to do.
    #[must_use]
    pub fn with_levers(class: Class) -> Wish {
        Wish { levers: true, ..Wish::of(class) }
    }
}

/// What a case has the other side do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lever {
    /// Net: the link goes up or down.
    Link(bool),
    /// Stream: the other side opens or closes port 0.
    Open(bool),
    /// Stream: the terminal of port 0 has so many columns and rows.
    Size(u16, u16),
    /// Stream: port 1 comes, or goes.
    Plug(bool),
}

/// Has the other side do it.
pub type Pull = Box<dyn Fn(Lever) + Send + Sync>;

/// Claims a device for a driver.
pub type Connect = Box<dyn Fn() -> anyhow::Result<Box<dyn Transport>> + Send + Sync>;

/// A device that a bed made.
pub struct Device {
    /// A way to it, for one driver after another.
    pub connect: Connect,
    /// Block: the size of its medium, which it has to show.
    pub capacity_bytes: u64,
    /// Net: the largest packet, which it has to show.
    pub mtu: u16,
    /// Stream: the numbers of the ports that give back what they are sent.
    pub ports: Vec<u32>,
    /// What an earlier driver was sent may still be on its way: it is taken off before the case begins.
    pub has_past: bool,
    /// Where the wish has levers.
    pub pull: Option<Pull>,
    /// Called when the case is over: what the device has to say against its driver. Holds what has to live as long as the device, a process or a directory.
    pub verdict: Box<dyn FnOnce() -> anyhow::Result<()>>,
}

impl Device {
    /// One that is as it was wished for.
    pub fn new(
        wish: &Wish,
        connect: impl Fn() -> anyhow::Result<Box<dyn Transport>> + Send + Sync + 'static,
        verdict: impl FnOnce() -> anyhow::Result<()> + 'static,
    ) -> Device {
        Device {
            connect: Box::new(connect),
            capacity_bytes: wish.capacity_bytes,
            mtu: wish.mtu,
            ports: (0..wish.ports as u32).collect(),
            has_past: false,
            pull: None,
            verdict: Box::new(verdict),
        }
    }
}

/// Makes devices for one transport.
pub trait Bed: Sync {
    /// For the report.
    fn name(&self) -> &'static str;

    /// A fresh device; `None` if this bed cannot make one to that wish.
    ///
    /// # Errors
    /// When it should have been able to.
    fn device(&self, wish: &Wish) -> anyhow::Result<Option<Device>>;

    /// The component of the class's driver.
    fn driver(&self, class: Class) -> PathBuf {
        driver_path(class.driver())
    }

    /// Where compiled code is kept.
    fn cache_dir(&self) -> PathBuf {
        driver_path("../test-cache")
    }

    /// Buffer memory of a load, in bytes.
    fn arena_bytes(&self) -> u64 {
        64 << 20
    }

    /// How many times as long things may take as where the processor is a real one.
    fn slowness(&self) -> u32 {
        1
    }
}

/// Where `cargo xtask build` puts a driver.
#[must_use]
pub fn driver_path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/drivers").join(name)
}
