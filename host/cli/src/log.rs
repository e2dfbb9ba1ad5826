//! Everything that goes to stderr: the log, errors, words to a person who waits. Whoever says something never waits for whoever reads it.
//!
//! A pipe that nobody reads fills up, and then `write(2)` blocks: a lane's thread with its lease, the ladder's, the one that heard SIGTERM. So what is said goes into a
//! bounded queue, and one thread of its own writes it out. Where there is no room lines are dropped and counted; the count stands in the log where they are missing.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

/// What may wait for its reader, in bytes. A single piece may be longer: then it waits alone.
const WAITING_BYTES: usize = 256 << 10;
/// The writer's progress is known this exactly, in bytes.
const PIECE_BYTES: usize = 16 << 10;

static LOG: OnceLock<Log> = OnceLock::new();

/// Starts the log of this process, panics included.
///
/// # Errors
/// When the host has no thread or descriptor for it.
pub(crate) fn start(filter: &str) -> io::Result<()> {
    use tracing_subscriber::EnvFilter;
    let stderr = io::stderr();
    let ansi = io::IsTerminal::is_terminal(&stderr);
    // A descriptor of its own: the writer may be stuck, and must not be so with the lock of the process's stderr.
    let log = Log::to(File::from(stderr.as_fd().try_clone_to_owned()?))?;
    let log = LOG.get_or_init(|| log);
    let filter = EnvFilter::try_from_env("COFFERDAM_LOG").unwrap_or_else(|_| EnvFilter::new(filter));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Line(log)).with_ansi(ansi).init();
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let backtrace = std::backtrace::Backtrace::capture();
        say(&format!("thread '{}' {panic}\n{backtrace}", thread.name().unwrap_or("?")));
    }));
    Ok(())
}

/// Says a line, in order with the log.
pub(crate) fn say(text: &str) {
    match LOG.get() {
        Some(log) => log.push(format!("{text}\n").as_bytes()),
        // Nothing can be done about a stderr that is closed.
        None => drop(writeln!(io::stderr().lock(), "{text}")),
    }
}

/// Waits until everything is written, and says whether it is; no longer than `stuck` without progress, and `bound` in all.
pub(crate) fn finish(stuck: Duration, bound: Duration) -> bool {
    LOG.get().is_none_or(|log| log.finish(stuck, bound))
}

#[derive(Clone)]
struct Log(Arc<Shared>);

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// Something was said, or written.
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    waiting: Vec<u8>,
    /// Lines dropped since the writer took what waited.
    dropped: u64,
    /// The writer has something in its hands.
    writing: bool,
    /// Pieces written, ever.
    written: u64,
}

impl Queue {
    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.dropped == 0 && !self.writing
    }
}

impl Log {
    fn to(out: File) -> io::Result<Log> {
        let log = Log(Arc::default());
        let writer = log.clone();
        std::thread::Builder::new().name("cofferdam-log".into()).spawn(move || writer.write_for_ever(&out))?;
        Ok(log)
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: &[u8]) {
        let mut queue = self.lock();
        // Once a line is missing the following ones are too, so that the gap is in one place.
        let fits = queue.waiting.is_empty() || queue.waiting.len() + line.len() <= WAITING_BYTES;
        if fits && queue.dropped == 0 {
            queue.waiting.extend_from_slice(line);
        } else {
            queue.dropped += 1;
        }
        drop(queue);
        self.0.changed.notify_all();
    }

    fn write_for_ever(&self, out: &File) {
        loop {
            let wait = |queue: &mut Queue| queue.waiting.is_empty() && queue.dropped == 0;
            let mut queue = self.0.changed.wait_while(self.lock(), wait).unwrap_or_else(PoisonError::into_inner);
            let mut text = std::mem::take(&mut queue.waiting);
            let dropped = std::mem::take(&mut queue.dropped);
            queue.writing = true;
            drop(queue);
            if dropped > 0 {
                let lines = if dropped == 1 { "line was" } else { "lines were" };
                text.extend_from_slice(
                    format!("cofferdam: {dropped} {lines} dropped here, because nobody read the log\n").as_bytes(),
                );
            }
            for piece in text.chunks(PIECE_BYTES) {
                // A stderr that is closed takes nothing any more, and there is nobody to tell.
                let closed = write(out, piece).is_err();
                self.lock().written += 1;
                self.0.changed.notify_all();
                if closed {
                    break;
                }
            }
            self.lock().writing = false;
            self.0.changed.notify_all();
        }
    }

    fn finish(&self, stuck: Duration, bound: Duration) -> bool {
        let end = Instant::now() + bound;
        let mut queue = self.lock();
        loop {
            let written = queue.written;
            let wait = stuck.min(end.saturating_duration_since(Instant::now()));
            let goes_on = |queue: &mut Queue| !queue.is_idle() && queue.written == written;
            let waited = self.0.changed.wait_timeout_while(queue, wait, goes_on);
            let timed_out;
            (queue, timed_out) = waited.unwrap_or_else(PoisonError::into_inner);
            if queue.is_idle() || timed_out.timed_out() {
                return queue.is_idle();
            }
        }
    }
}

/// Blocks for as long as the reader wants it to: a descriptor may have been made non-blocking by whoever else has it.
fn write(mut out: &File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match out.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(&out, PollFlags::OUT)], None)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The subscriber's way in: it writes each line whole.
struct Line(&'static Log);

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn log() -> (io::PipeReader, Log) {
        let (reader, writer) = io::pipe().unwrap();
        (reader, Log::to(File::from(OwnedFd::from(writer))).unwrap())
    }

    /// Everything up to and with `last`.
    fn read_to(reader: &mut io::PipeReader, last: &str) -> String {
        let (mut text, mut piece) = (String::new(), [0; 4096]);
        while !text.ends_with(last) {
            let count = reader.read(&mut piece).unwrap();
            text.push_str(std::str::from_utf8(&piece[..count]).unwrap());
        }
        text
    }

    #[test]
    fn what_was_said_is_written_in_order_before_the_end() {
        let (mut reader, log) = log();
        let said: Vec<String> = (0..1000).map(|number| format!("line {number}\n")).collect();
        said.iter().for_each(|line| log.push(line.as_bytes()));
        assert!(log.finish(LONG, LONG));
        assert_eq!(read_to(&mut reader, "line 999\n"), said.concat());
    }

    #[test]
    fn a_log_that_nobody_reads_holds_up_nobody_and_tells_how_many_lines_it_dropped() {
        let (mut reader, log) = log();
        let first = format!("{}\n", "x".repeat(WAITING_BYTES));
        log.push(first.as_bytes());
        // More than a pipe takes: from here on the writer is stuck.
        while !log.lock().writing {
            std::thread::yield_now();
        }
        let line = |number: u64| format!("{number:0>99}\n");
        for number in 0..10_000 {
            log.push(line(number).as_bytes());
        }
        assert!(log.lock().waiting.len() <= WAITING_BYTES);
        // Nor does the end of the process wait for a reader.
        assert!(!log.finish(Duration::from_millis(10), LONG));
        let text = read_to(&mut reader, "nobody read the log\n");
        let kept: Vec<&str> = text.strip_prefix(&first).unwrap().lines().collect();
        let (note, kept) = kept.split_last().unwrap();
        for (number, kept) in (0..).zip(kept) {
            assert_eq!(*kept, line(number).trim_end());
        }
        let dropped = 10_000 - kept.len();
        assert_eq!(*note, format!("cofferdam: {dropped} lines were dropped here, because nobody read the log"));
        // And it goes on.
        log.push(b"after\n");
        assert_eq!(read_to(&mut reader, "after\n"), "after\n");
    }

    #[test]
    fn a_piece_longer_than_the_queue_is_written_if_it_is_alone() {
        let (mut reader, log) = log();
        let long = format!("{}\n", "x".repeat(2 * WAITING_BYTES));
        log.push(long.as_bytes());
        assert_eq!(read_to(&mut reader, "\n"), long);
    }

    #[test]
    fn a_log_whose_reader_has_gone_ends_at_once() {
        let (reader, log) = log();
        drop(reader);
        log.push(b"into the void\n");
        assert!(log.finish(LONG, LONG));
    }
}
