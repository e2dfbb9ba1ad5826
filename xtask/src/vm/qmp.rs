//! QEMU's machine protocol (QEMU, docs/interop/qmp-spec.rst), as far as it takes to pass commands on.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How long QEMU may take to answer. `device_del` and the like only ask; what they cause comes later, as events, which nobody here waits for.
const LIMIT: Duration = Duration::from_secs(30);

/// Most events that may lie before an answer.
const MAX_EVENTS: usize = 100_000;

/// A connection that is ready for commands.
pub(super) struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Takes a new connection through the greeting.
    pub(super) fn new(stream: UnixStream) -> Result<Qmp> {
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        let mut qmp = Qmp { reader: BufReader::new(stream) };
        let greeting = qmp.receive()?;
        if greeting.get("QMP").is_none() {
            bail!("QEMU greets with {greeting}");
        }
        qmp.execute(&json!({ "execute": "qmp_capabilities" }))?;
        Ok(qmp)
    }

    /// Has a command executed and gives the whole answer: `return` or `error`, and the command's `id`.
    pub(super) fn execute(&mut self, command: &Value) -> Result<Value> {
        let stream = self.reader.get_mut();
        stream.write_all(format!("{command}\n").as_bytes()).context("QEMU does not listen")?;
        for _ in 0..MAX_EVENTS {
            let answer = self.receive()?;
            if answer.get("event").is_none() {
                return Ok(answer);
            }
        }
        bail!("nothing but events")
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.reader.read_line(&mut line).context("no answer of QEMU")?;
        serde_json::from_str(&line).with_context(|| format!("QEMU says {line:?}"))
    }
}
