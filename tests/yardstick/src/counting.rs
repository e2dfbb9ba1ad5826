//! What the hot path must not do, counted on its own thread: allocations, by an allocator that a program may install, and system calls, by the kernel.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, poll};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, which counts what each thread takes: `#[global_allocator] static COUNTING: Counting = Counting;`.
pub struct Counting;

fn count() {
    // A thread that is ending has no cell any more, and nobody to ask for it.
    let _ = ALLOCATIONS.try_with(|cell| cell.set(cell.get() + 1));
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are the system's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are the system's.
        unsafe { System.realloc(pointer, layout, bytes) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are the system's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Allocations of the calling thread since it began; 0 for ever where [`Counting`] is not installed.
#[must_use]
pub fn allocations() -> u64 {
    ALLOCATIONS.with(Cell::get)
}

thread_local! {
    static CALLS: Cell<Option<&'static AtomicU64>> = const { Cell::new(None) };
}

/// System calls of the calling thread since [`count_system_calls`] began; `None` on other threads.
#[must_use]
pub fn system_calls() -> Option<u64> {
    CALLS.with(Cell::get).map(|calls| calls.load(Ordering::SeqCst))
}

/// Runs `work` on a thread of its own, whose system calls are counted one by one from when it calls what it is given: a seccomp filter has the kernel ask before each, and this thread
/// counts and lets it go on (seccomp_unotify(2)). So each costs some microseconds: this is for counting, not for measuring. Calls that go through the vDSO are none. Threads
/// and processes that `work` starts afterwards are counted with it.
///
/// # Errors
/// When the kernel has no such filter, and what `work` says.
pub fn count_system_calls<T: Send>(work: impl FnOnce(&dyn Fn() -> Result<()>) -> Result<T> + Send) -> Result<T> {
    // Of a test or a bench: a word for good.
    let calls: &'static AtomicU64 = Box::leak(Box::new(AtomicU64::new(0)));
    // Handed over without a system call, which nobody would answer yet.
    let slot = AtomicI32::new(-1);
    let died = || anyhow::anyhow!("the counted thread panicked");
    std::thread::scope(|scope| {
        let begin = || {
            CALLS.with(|cell| cell.set(Some(calls)));
            slot.store(install()?, Ordering::Release);
            Ok(())
        };
        let worker = scope.spawn(move || work(&begin));
        let listener = loop {
            let listener = slot.load(Ordering::Acquire);
            if listener >= 0 {
                break listener;
            }
            if worker.is_finished() {
                return worker.join().map_err(|_| died())?;
            }
            std::thread::park_timeout(std::time::Duration::from_millis(1));
        };
        // SAFETY: the kernel has made it for this process, and the thread that asked for it has let go of it.
        answer(&unsafe { OwnedFd::from_raw_fd(listener) }, calls)?;
        worker.join().map_err(|_| died())?
    })
}

/// Filters the calling thread, for good; the descriptor on which its system calls are asked for. Makes no system call after the filter is there.
fn install() -> Result<i32> {
    // BPF_RET | BPF_K with SECCOMP_RET_USER_NOTIF: every system call.
    let mut all = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: libc::SECCOMP_RET_USER_NOTIF };
    let program = libc::sock_fprog { len: 1, filter: &raw mut all };
    // SAFETY: prctl takes five integers here; the filter's program is a live local of one instruction, which the kernel copies.
    let listener = unsafe {
        ensure!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS");
        let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program)
    };
    i32::try_from(listener).ok().filter(|fd| *fd >= 0).context("seccomp with a listener")
}

/// Counts and allows until the filtered thread has ended.
fn answer(listener: &OwnedFd, calls: &AtomicU64) -> Result<()> {
    loop {
        let mut fds = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)];
        if poll(&mut fds, None).is_err() {
            continue;
        }
        if fds[0].revents().contains(PollFlags::HUP) {
            return Ok(());
        }
        // SAFETY: plain integers, for which zero is a value; the kernel wants them zeroed.
        let (mut asked, mut allowed) =
            unsafe { (std::mem::zeroed::<libc::seccomp_notif>(), std::mem::zeroed::<libc::seccomp_notif_resp>()) };
        // SAFETY: the listener is a seccomp one and the structure is what this request fills in.
        if unsafe { libc::ioctl(listener.as_raw_fd(), SECCOMP_IOCTL_NOTIF_RECV, &raw mut asked) } != 0 {
            // Its thread was interrupted by a signal meanwhile, and asks again.
            continue;
        }
        calls.fetch_add(1, Ordering::SeqCst);
        allowed.id = asked.id;
        allowed.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32;
        // SAFETY: as above.
        unsafe { libc::ioctl(listener.as_raw_fd(), SECCOMP_IOCTL_NOTIF_SEND, &raw mut allowed) };
    }
}

/// `SECCOMP_IOWR(0, struct seccomp_notif)` and `SECCOMP_IOWR(1, struct seccomp_notif_resp)` (linux/seccomp.h).
const SECCOMP_IOCTL_NOTIF_RECV: libc::Ioctl = iowr(0, size_of::<libc::seccomp_notif>());
const SECCOMP_IOCTL_NOTIF_SEND: libc::Ioctl = iowr(1, size_of::<libc::seccomp_notif_resp>());

const fn iowr(number: libc::Ioctl, bytes: usize) -> libc::Ioctl {
    3 << 30 | (bytes as libc::Ioctl) << 16 | (b'!' as libc::Ioctl) << 8 | number
}
