//! Asking whoever runs the machine to do something to it: QMP commands over the second serial port.
//!
//! One line of JSON each way, `{"execute": ..., "arguments": ..., "id": N}` and `{"return": ..., "id": N}` or `{"error": ..., "id": N}`. xtask passes commands on to QEMU
//! as they are. `/init` has put the port into raw mode.

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::time::{Duration, Instant};

const PORT: &str = "/dev/ttyS1";

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(60);

/// Longest answer that is waited for, in bytes.
const MAX_BYTES: usize = 1 << 20;

/// The open port.
#[derive(Debug)]
pub struct Outside {
    port: File,
    /// Read and not yet a whole line.
    rest: Vec<u8>,
    /// Of the last command.
    id: u64,
}

impl Outside {
    /// Opens the port.
    pub fn open() -> Result<Outside> {
        let port = OpenOptions::new().read(true).write(true).open(PORT).context(PORT)?;
        Ok(Outside { port, rest: Vec::new(), id: 0 })
    }

    /// Has QEMU execute a command and gives what it returned.
    ///
    /// # Errors
    /// QEMU's own words if it refused.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        self.id += 1;
        let line = json!({ "execute": command, "arguments": arguments, "id": self.id });
        self.port.write_all(format!("{line}\n").as_bytes()).context(PORT)?;
        let deadline = Instant::now() + LIMIT;
        loop {
            let line = self.line(deadline).with_context(|| format!("no answer to {command}"))?;
            let answer: Value =
                serde_json::from_slice(&line).with_context(|| String::from_utf8_lossy(&line).into_owned())?;
            // An answer to a command that nobody waits for any more has another number.
            if answer["id"] != self.id {
                continue;
            }
            match answer.get("return") {
                Some(value) => return Ok(value.clone()),
                None => bail!("{command} {arguments}: {}", answer["error"]["desc"].as_str().unwrap_or("refused")),
            }
        }
    }

    fn line(&mut self, deadline: Instant) -> Result<Vec<u8>> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.rest.drain(..=end).collect();
                line.pop();
                return Ok(line);
            }
            if self.rest.len() > MAX_BYTES {
                bail!("a line of more than {MAX_BYTES} bytes");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            if poll(&mut [PollFd::new(&self.port, PollFlags::IN)], Some(&timeout))? == 0 {
                bail!("within {LIMIT:?}");
            }
            let mut buffer = [0; 4096];
            let length = self.port.read(&mut buffer)?;
            self.rest.extend_from_slice(&buffer[..length]);
        }
    }
}
