//! What changes the machine, behind one trait: the kernel's files, modules, records. Tests play the kernel and break off after any effect.

use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use cap_std::fs::{Dir, OpenOptions, OpenOptionsExt};
use rustix::fs::{Mode, OFlags};

/// How long the kernel may take for one write, and modprobe for one module.
pub(super) const EFFECT_LIMIT: Duration = Duration::from_secs(10);
/// Writes of this process that the kernel may be busy with beyond their time.
const MAX_STUCK: usize = 8;

/// Effects, each whole or not at all as far as the kernel has it so.
pub(crate) trait Effects: Send + Sync {
    /// Writes `value` at once to a file that exists. `TimedOut` when the kernel takes over 10 s; it goes on with it then.
    fn write(&self, dir: &Dir, path: &str, value: &str) -> io::Result<()>;

    /// Writes bytes at an offset of a file that exists: configuration space.
    fn write_at(&self, dir: &Dir, path: &str, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Loads a kernel module.
    fn load_module(&self, module: &str) -> io::Result<()>;

    /// Puts a file of mode 0600 in place of another: afterwards the old one or the new one is there, whole, whatever happens.
    fn replace(&self, dir: &Dir, name: &str, bytes: &[u8]) -> io::Result<()>;

    /// Removes a file for good; one that is not there is fine.
    fn remove(&self, dir: &Dir, name: &str) -> io::Result<()>;

    /// How long to wait for what usually takes at most `long`.
    fn patience(&self, long: Duration) -> Duration {
        long
    }
}

/// The real one.
pub(crate) struct Kernel;

impl Effects for Kernel {
    fn write(&self, dir: &Dir, path: &str, value: &str) -> io::Result<()> {
        let mut file =
            dir.open_with(path, OpenOptions::new().write(true).custom_flags(OFlags::NONBLOCK.bits() as i32))?;
        let value = value.to_owned();
        // One write(2): sysfs takes each as a value of its own.
        bounded(EFFECT_LIMIT, move || match file.write(value.as_bytes())? {
            written if written == value.len() => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::WriteZero, "the kernel took a part of the value")),
        })
    }

    fn write_at(&self, dir: &Dir, path: &str, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let file = dir.open_with(path, OpenOptions::new().write(true))?.into_std();
        let bytes = bytes.to_owned();
        bounded(EFFECT_LIMIT, move || file.write_all_at(&bytes, offset))
    }

    fn load_module(&self, module: &str) -> io::Result<()> {
        let start = |program: &str| {
            let mut command = Command::new(program);
            command.arg(module).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
        };
        // A daemon's PATH often lacks /sbin.
        let mut child = match start("/sbin/modprobe") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => start("modprobe")?,
            started => started?,
        };
        let deadline = Instant::now() + EFFECT_LIMIT;
        loop {
            match child.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(io::Error::other(status.to_string())),
                None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
                None => {
                    // It may sit in the kernel where no signal reaches it: then it is left to end there.
                    let _ = child.kill();
                    let _ = child.try_wait();
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
        }
    }

    fn replace(&self, dir: &Dir, name: &str, bytes: &[u8]) -> io::Result<()> {
        // Whoever writes has the function's claim: one temporary name is enough, and what a killed process left there is written over.
        let temporary = format!(".{name}.tmp");
        dir.remove_file(&temporary).or_else(|error| if_missing(error, ()))?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(dir, &temporary, flags, Mode::RUSR | Mode::WUSR)?;
        let mut file = std::fs::File::from(file);
        file.write_all(bytes)?;
        file.sync_all()?;
        dir.rename(&temporary, dir, name)?;
        Ok(rustix::fs::fsync(dir)?)
    }

    fn remove(&self, dir: &Dir, name: &str) -> io::Result<()> {
        dir.remove_file(name).or_else(|error| if_missing(error, ()))?;
        Ok(rustix::fs::fsync(dir)?)
    }
}

fn if_missing<T>(error: io::Error, missing: T) -> io::Result<T> {
    if error.kind() == io::ErrorKind::NotFound { Ok(missing) } else { Err(error) }
}

/// Calls `work` on a thread of its own and waits for at most `limit`. A call that is late is left to end by itself; only so many may be.
fn bounded(limit: Duration, work: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    static RUNNING: AtomicUsize = AtomicUsize::new(0);
    struct Count;
    impl Drop for Count {
        fn drop(&mut self) {
            RUNNING.fetch_sub(1, Ordering::Relaxed);
        }
    }
    if RUNNING.fetch_add(1, Ordering::Relaxed) >= MAX_STUCK {
        RUNNING.fetch_sub(1, Ordering::Relaxed);
        return Err(io::Error::other(format!("the kernel is still busy with {MAX_STUCK} earlier writes")));
    }
    let count = Count;
    let (answer, wait) = mpsc::sync_channel(1);
    std::thread::Builder::new().name("cofferdam-sysfs".into()).spawn(move || {
        let _count = count;
        let _ = answer.send(work());
    })?;
    wait.recv_timeout(limit).unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_that_the_kernel_sits_in_is_given_up_and_ends_by_itself() {
        let (release, held) = mpsc::channel::<()>();
        let (ended, end) = mpsc::channel();
        let answer = bounded(Duration::from_millis(20), move || {
            let _ = held.recv();
            ended.send(()).map_err(io::Error::other)
        });
        assert_eq!(answer.unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(release);
        end.recv_timeout(Duration::from_secs(30)).expect("the thread goes on when the kernel does");
        bounded(Duration::from_secs(30), || Ok(())).expect("and others are served");
    }

    #[test]
    fn a_write_goes_to_a_file_that_is_there_and_to_no_other() {
        let (folder, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let dir = Dir::open_ambient_dir(folder.path(), cap_std::ambient_authority()).unwrap();
        std::fs::write(folder.path().join("unbind"), "").unwrap();
        std::fs::write(outside.path().join("victim"), "as it was").unwrap();
        std::os::unix::fs::symlink(outside.path().join("victim"), folder.path().join("link")).unwrap();
        Kernel.write(&dir, "unbind", "0000:00:04.0").unwrap();
        assert_eq!(std::fs::read(folder.path().join("unbind")).unwrap(), b"0000:00:04.0");
        assert!(Kernel.write(&dir, "missing", "1").is_err() && !folder.path().join("missing").exists());
        assert!(Kernel.write(&dir, "link", "1").is_err() && Kernel.write_at(&dir, "link", 0, b"1").is_err());
        assert_eq!(std::fs::read(outside.path().join("victim")).unwrap(), b"as it was");
        assert!(Kernel.load_module("cofferdam-there-is-no-such-module").is_err());
    }

    #[test]
    fn a_record_is_replaced_whole_over_what_a_killed_process_left() {
        let folder = tempfile::tempdir().unwrap();
        // Not by `open_ambient_dir`: that one is for looking up only and cannot be synchronized.
        let dir = Dir::from_std_file(std::fs::File::open(folder.path()).unwrap());
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join(".x.json.tmp")).unwrap();
        Kernel.replace(&dir, "x.json", b"one").unwrap();
        Kernel.replace(&dir, "x.json", b"two").unwrap();
        assert_eq!(std::fs::read(folder.path().join("x.json")).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
        Kernel.remove(&dir, "x.json").unwrap();
        Kernel.remove(&dir, "x.json").unwrap();
    }
}
