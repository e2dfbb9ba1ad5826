//! The calls on descriptors that the libraries have no safe function for: random(4) and ioctl_tty(2).
#![allow(unsafe_code)]

use std::os::fd::AsFd;

use rustix::ioctl::{Getter, Setter, ioctl, opcode};

/// Bytes that one call adds to the kernel's pool at most.
pub(crate) const CREDIT_BYTES: usize = 4096;

/// `struct rand_pool_info`, with room behind it.
#[repr(C)]
struct RandPoolInfo {
    entropy_count: i32,
    buf_size: i32,
    bytes: [u8; CREDIT_BYTES],
}

/// `RNDADDENTROPY`: `_IOW('R', 0x03, int [2])`.
const RNDADDENTROPY: rustix::ioctl::Opcode = opcode::write::<[i32; 2]>(b'R', 0x03);
/// `TIOCSPTLCK`: `_IOW('T', 0x31, int)`.
const TIOCSPTLCK: rustix::ioctl::Opcode = opcode::write::<i32>(b'T', 0x31);
/// `TIOCGPTN`: `_IOR('T', 0x30, unsigned int)`.
const TIOCGPTN: rustix::ioctl::Opcode = opcode::read::<u32>(b'T', 0x30);

/// Adds up to [`CREDIT_BYTES`] bytes to the kernel's pool and credits it with eight bits for each; how many. Without bytes only the right to do so is checked.
pub(crate) fn credit(random: impl AsFd, bytes: &[u8]) -> rustix::io::Result<usize> {
    let count = bytes.len().min(CREDIT_BYTES);
    let mut info = RandPoolInfo { entropy_count: 8 * count as i32, buf_size: count as i32, bytes: [0; CREDIT_BYTES] };
    info.bytes[..count].copy_from_slice(&bytes[..count]);
    // SAFETY: the opcode's argument is a `struct rand_pool_info` of which the kernel reads the two numbers and `buf_size` bytes behind them (random(4)); `buf_size` is at most the length of
    // `bytes`, which lies there by `repr(C)`. The kernel writes nothing.
    unsafe { ioctl(random, Setter::<RNDADDENTROPY, RandPoolInfo>::new(info))? };
    Ok(count)
}

/// Lets the slave of a new pseudo terminal be opened, and says its number.
pub(crate) fn unlock(master: impl AsFd) -> rustix::io::Result<u32> {
    // SAFETY: the opcode's argument is an `int` that the kernel reads (ioctl_tty(2)).
    unsafe { ioctl(&master, Setter::<TIOCSPTLCK, i32>::new(0))? };
    number(master)
}

/// The number of a pseudo terminal's slave, by its master; an error for what is none.
pub(crate) fn number(master: impl AsFd) -> rustix::io::Result<u32> {
    // SAFETY: the opcode's argument is an `unsigned int` that the kernel writes (ioctl_tty(2)).
    unsafe { ioctl(&master, Getter::<TIOCGPTN, u32>::new()) }
}
