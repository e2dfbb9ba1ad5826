//! Waiting for SIGTERM or SIGINT as for anything else.
#![allow(unsafe_code, reason = "sigset_t and sigwait are only to be had from libc")]

/// SIGTERM and SIGINT, blocked in this process.
pub(crate) struct Blocked(libc::sigset_t);

/// Blocks both in the calling thread and in those that it starts from now on.
pub(crate) fn block() -> std::io::Result<Blocked> {
    // SAFETY: `set` is initialised by `sigemptyset` before it is used, and every pointer is to a live local.
    let (failed, set) = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        (libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()), set)
    };
    if failed == 0 { Ok(Blocked(set)) } else { Err(std::io::Error::from_raw_os_error(failed)) }
}

impl Blocked {
    /// Sleeps until one of them comes.
    pub(crate) fn wait(&self) {
        let mut signal = 0;
        // SAFETY: the set was initialised by `block`; `signal` is a live local.
        while unsafe { libc::sigwait(&self.0, &mut signal) } != 0 {}
    }
}
