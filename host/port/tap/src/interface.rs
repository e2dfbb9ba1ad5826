//! The interface.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use cofferdam_manager::NetProperties;
use rustix::fs::{Mode, OFlags, fcntl_getfl, open};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::address::TapAddress;
use crate::error::TapError;
use crate::header::HEADER_BYTES;
use crate::ioctl;

/// A TAP interface and its queues. It is gone when this has been dropped.
pub(crate) struct Interface {
    queues: Vec<OwnedFd>,
    carrier: AtomicBool,
}

impl Interface {
    /// Makes it as `net` says, with `queues` queues, and brings it up.
    ///
    /// # Errors
    /// [`TapError`]; nothing is left behind.
    pub(crate) fn new(address: &TapAddress, net: &NetProperties, queues: usize) -> Result<Interface, TapError> {
        let name = address.name();
        let mut made = Interface { queues: Vec::with_capacity(queues), carrier: AtomicBool::new(true) };
        for number in 0..queues {
            made.queues.push(queue(name, number, queues)?);
        }
        let first = made.queue(0);
        ioctl::set_offloads(first, offloads(net)).map_err(TapError::io("TUNSETOFFLOAD"))?;
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)
            .or_else(|_| socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None))
            .map_err(TapError::io("socket"))?;
        if let Some(mac) = net.mac {
            ioctl::set_address(socket.as_fd(), name, mac).map_err(TapError::refused("the hardware address"))?;
        }
        ioctl::set_mtu(socket.as_fd(), name, net.mtu).map_err(TapError::refused("the MTU"))?;
        made.set_carrier(net.link_up).map_err(TapError::io("TUNSETCARRIER"))?;
        ioctl::set_up(socket.as_fd(), name).map_err(TapError::io("SIOCSIFFLAGS"))?;
        Ok(made)
    }

    /// The interface that another process has made, by its queues. Nothing of it changes.
    ///
    /// # Errors
    /// [`TapError::NotTakenOver`] for descriptors that are none.
    pub(crate) fn adopt(queues: Vec<OwnedFd>, carrier: bool) -> Result<Interface, TapError> {
        let wrong = |why: &str| TapError::NotTakenOver(why.to_owned());
        for queue in &queues {
            let flags = ioctl::interface_flags(queue.as_fd()).map_err(|_| wrong("a descriptor is no queue of one"))?;
            let blocks = !fcntl_getfl(queue).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK));
            if flags & ioctl::IFF_TAP == 0 || flags & ioctl::IFF_VNET_HDR == 0 || blocks {
                return Err(wrong("a queue is of another kind"));
            }
        }
        if queues.is_empty() {
            return Err(wrong("it has no queue"));
        }
        Ok(Interface { queues, carrier: AtomicBool::new(carrier) })
    }

    /// Duplicates of all queues, in order, and whether there is a carrier.
    pub(crate) fn export(&self) -> std::io::Result<(Vec<OwnedFd>, bool)> {
        let queues = self.queues.iter().map(OwnedFd::try_clone).collect::<Result<_, _>>()?;
        Ok((queues, self.carrier.load(Ordering::Acquire)))
    }

    /// Queue `number`, below what it was made with. It does not block.
    pub(crate) fn queue(&self, number: usize) -> BorrowedFd<'_> {
        self.queues[number].as_fd()
    }

    /// The carrier goes on or off, if it is not so already.
    pub(crate) fn set_carrier(&self, on: bool) -> Result<(), Errno> {
        if self.carrier.swap(on, Ordering::AcqRel) != on {
            ioctl::set_carrier(self.queue(0), on)?;
        }
        Ok(())
    }
}

/// One queue, of an interface that the first of them makes.
fn queue(name: &str, number: usize, queues: usize) -> Result<OwnedFd, TapError> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let tun = open("/dev/net/tun", flags, Mode::empty()).map_err(|error| match error {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => TapError::NoTun,
        Errno::ACCESS | Errno::PERM => TapError::NoPermission,
        error => TapError::io("opening /dev/net/tun")(error),
    })?;
    let mut flags = ioctl::IFF_TAP | ioctl::IFF_NO_PI | ioctl::IFF_VNET_HDR;
    if queues > 1 {
        flags |= ioctl::IFF_MULTI_QUEUE;
    }
    if number == 0 {
        flags |= ioctl::IFF_TUN_EXCL;
    }
    ioctl::set_interface(tun.as_fd(), name, flags).map_err(|error| match error {
        Errno::BUSY | Errno::EXIST => TapError::InUse(name.to_owned()),
        Errno::PERM => TapError::NoPermission,
        error => TapError::io("TUNSETIFF")(error),
    })?;
    ioctl::set_header_bytes(tun.as_fd(), HEADER_BYTES as i32).map_err(TapError::io("TUNSETVNETHDRSZ"))?;
    ioctl::set_little_endian(tun.as_fd()).map_err(TapError::io("TUNSETVNETLE"))?;
    Ok(tun)
}

/// What the kernel may leave to the device. It wants checksums for everything else.
fn offloads(net: &NetProperties) -> usize {
    let offloads = &net.offloads;
    if !offloads.transmit_checksum {
        return 0;
    }
    let bit = |has: bool, bit: usize| if has { bit } else { 0 };
    ioctl::TUN_F_CSUM | bit(offloads.transmit_tcp4, ioctl::TUN_F_TSO4) | bit(offloads.transmit_tcp6, ioctl::TUN_F_TSO6)
}
