//! The calls on a TAP's descriptors and on interfaces (linux/if_tun.h, linux/sockios.h, linux/if.h).
#![allow(unsafe_code)]

use std::os::fd::BorrowedFd;

use rustix::io::Result;
use rustix::ioctl::{IntegerSetter, Opcode, Setter, Updater, ioctl, opcode};

/// Bytes of a name, with its terminator (`IFNAMSIZ`).
const NAME_BYTES: usize = 16;
/// Bytes of the union in `struct ifreq` on 64-bit machines: that of its largest member, `struct ifmap`.
const UNION_BYTES: usize = 24;

const TUNSETIFF: Opcode = opcode::write::<i32>(b'T', 202);
const TUNSETOFFLOAD: Opcode = opcode::write::<u32>(b'T', 208);
const TUNGETIFF: Opcode = opcode::read::<u32>(b'T', 210);
const TUNSETVNETHDRSZ: Opcode = opcode::write::<i32>(b'T', 216);
const TUNSETVNETLE: Opcode = opcode::write::<i32>(b'T', 220);
const TUNSETCARRIER: Opcode = opcode::write::<i32>(b'T', 226);
const SIOCGIFFLAGS: Opcode = 0x8913;
const SIOCSIFFLAGS: Opcode = 0x8914;
const SIOCSIFMTU: Opcode = 0x8922;
const SIOCSIFHWADDR: Opcode = 0x8924;

/// `ARPHRD_ETHER`.
const ETHERNET: u16 = 1;

/// Flag of an interface: it is up.
pub(crate) const IFF_UP: u16 = 1;
/// Flags of `TUNSETIFF`: Ethernet, no header of the driver's own, `virtio_net_hdr` in front, several queues, and an error if there is such an interface.
pub(crate) const IFF_TAP: u16 = 0x0002;
pub(crate) const IFF_NO_PI: u16 = 0x1000;
pub(crate) const IFF_VNET_HDR: u16 = 0x4000;
pub(crate) const IFF_MULTI_QUEUE: u16 = 0x0100;
pub(crate) const IFF_TUN_EXCL: u16 = 0x8000;
/// Bits of `TUNSETOFFLOAD`: packets may come with an open checksum, and unsegmented.
pub(crate) const TUN_F_CSUM: usize = 1;
pub(crate) const TUN_F_TSO4: usize = 2;
pub(crate) const TUN_F_TSO6: usize = 4;

/// `struct ifreq`: a name, and what the call is about in its first bytes.
#[repr(C, align(8))]
struct Request {
    name: [u8; NAME_BYTES],
    value: [u8; UNION_BYTES],
}

impl Request {
    fn new(name: &str, value: &[u8]) -> Request {
        let mut request = Request { name: [0; NAME_BYTES], value: [0; UNION_BYTES] };
        let length = name.len().min(NAME_BYTES - 1);
        request.name[..length].copy_from_slice(&name.as_bytes()[..length]);
        request.value[..value.len()].copy_from_slice(value);
        request
    }
}

/// One call with a `struct ifreq`, which the kernel may change.
fn with_request<const OPCODE: Opcode>(fd: BorrowedFd<'_>, request: &mut Request) -> Result<()> {
    // SAFETY: the calls of this file that come here take a pointer to `struct ifreq`, which `Request` is (16 bytes of name and a union of 24, aligned to 8); none of them follows an
    // address inside it, and it is borrowed exclusively for the call.
    unsafe { ioctl(fd, Updater::<OPCODE, Request>::new(request)) }
}

fn set_int<const OPCODE: Opcode>(fd: BorrowedFd<'_>, value: i32) -> Result<()> {
    // SAFETY: the calls of this file that come here take a pointer to an int and only read it.
    unsafe { ioctl(fd, Setter::<OPCODE, i32>::new(value)) }
}

/// Makes `tun` a queue of interface `name`, and the interface with it if there is none.
pub(crate) fn set_interface(tun: BorrowedFd<'_>, name: &str, flags: u16) -> Result<()> {
    with_request::<TUNSETIFF>(tun, &mut Request::new(name, &flags.to_ne_bytes()))
}

/// Flags of the interface that `tun` is a queue of, as [`set_interface`] gave them; an error for a descriptor that is none.
pub(crate) fn interface_flags(tun: BorrowedFd<'_>) -> Result<u16> {
    let mut request = Request::new("", &[]);
    with_request::<TUNGETIFF>(tun, &mut request)?;
    Ok(u16::from_ne_bytes([request.value[0], request.value[1]]))
}

/// What the kernel may leave open in packets that it hands over.
pub(crate) fn set_offloads(tun: BorrowedFd<'_>, bits: usize) -> Result<()> {
    // SAFETY: this call takes a number, no pointer.
    unsafe { ioctl(tun, IntegerSetter::<TUNSETOFFLOAD>::new_usize(bits)) }
}

/// Bytes of the header in front of each packet.
pub(crate) fn set_header_bytes(tun: BorrowedFd<'_>, bytes: i32) -> Result<()> {
    set_int::<TUNSETVNETHDRSZ>(tun, bytes)
}

/// The header's fields are little-endian, whatever the machine is.
pub(crate) fn set_little_endian(tun: BorrowedFd<'_>) -> Result<()> {
    set_int::<TUNSETVNETLE>(tun, 1)
}

/// Whether the interface has a carrier.
pub(crate) fn set_carrier(tun: BorrowedFd<'_>, on: bool) -> Result<()> {
    set_int::<TUNSETCARRIER>(tun, i32::from(on))
}

/// The interface's hardware address; it is down.
pub(crate) fn set_address(socket: BorrowedFd<'_>, name: &str, mac: [u8; 6]) -> Result<()> {
    let mut value = [0; 8];
    value[..2].copy_from_slice(&ETHERNET.to_ne_bytes());
    value[2..].copy_from_slice(&mac);
    with_request::<SIOCSIFHWADDR>(socket, &mut Request::new(name, &value))
}

/// The interface's MTU.
pub(crate) fn set_mtu(socket: BorrowedFd<'_>, name: &str, mtu: u16) -> Result<()> {
    with_request::<SIOCSIFMTU>(socket, &mut Request::new(name, &i32::from(mtu).to_ne_bytes()))
}

/// Brings the interface up.
pub(crate) fn set_up(socket: BorrowedFd<'_>, name: &str) -> Result<()> {
    let mut request = Request::new(name, &[]);
    with_request::<SIOCGIFFLAGS>(socket, &mut request)?;
    let flags = u16::from_ne_bytes([request.value[0], request.value[1]]) | IFF_UP;
    with_request::<SIOCSIFFLAGS>(socket, &mut Request::new(name, &flags.to_ne_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_layout_are_those_of_the_headers() {
        assert_eq!((TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ), (0x4004_54ca, 0x4004_54d0, 0x4004_54d8));
        assert_eq!((TUNSETVNETLE, TUNSETCARRIER, TUNGETIFF), (0x4004_54dc, 0x4004_54e2, 0x8004_54d2));
        assert_eq!((size_of::<Request>(), align_of::<Request>()), (40, 8));
    }
}
