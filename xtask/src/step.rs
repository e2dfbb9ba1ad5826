//! Saying what is done while it is done, and for how long.

use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// How long a silent step may run before it says that it is still at work, and how often it says so afterwards.
const FIRST_SIGN: Duration = Duration::from_secs(2);
const NEXT_SIGN: Duration = Duration::from_secs(15);

/// Text in bold on a terminal that wants it.
pub(crate) fn bold(text: &str) -> String {
    if std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        format!("\x1b[1m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

/// A duration as a person reads it.
pub(crate) fn seconds(duration: Duration) -> String {
    match duration.as_secs() {
        0..60 => format!("{:.1} s", duration.as_secs_f64()),
        total => format!("{} min {:02} s", total / 60, total % 60),
    }
}

/// Prints a headline on stderr, where cargo's own progress goes.
pub(crate) fn announce(what: &str) {
    eprintln!("==> {what}");
}

/// Runs `work`, which prints nothing itself, with a sign of life from time to time.
pub(crate) fn with_signs_of_life<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let (done, over) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let begin = Instant::now();
            let mut wait = FIRST_SIGN;
            while over.recv_timeout(wait) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("    {what}: at it for {}", seconds(begin.elapsed()));
                wait = NEXT_SIGN;
            }
        });
        let result = work();
        drop(done);
        result
    })
}

/// Announces and runs a command that speaks for itself (cargo does), and fails if it fails.
pub(crate) fn run(what: &str, command: &mut Command) -> Result<()> {
    announce(what);
    let status = command.status().with_context(|| format!("cannot start {:?}", command.get_program()))?;
    if !status.success() {
        bail!("{what}: {} ({status})", shown(command));
    }
    Ok(())
}

/// Like [`run`], with standard output passed on line by line and also handed to `each_line`; tells whether the command succeeded.
pub(crate) fn run_reading(what: &str, command: &mut Command, mut each_line: impl FnMut(&str)) -> Result<bool> {
    announce(what);
    let mut child =
        command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot start {:?}", command.get_program()))?;
    let output = child.stdout.take().context("the child has no standard output")?;
    let mut to = std::io::stdout();
    for line in BufReader::new(output).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        writeln!(to, "{line}")?;
        each_line(&line);
    }
    to.flush()?;
    Ok(child.wait()?.success())
}

/// Standard output of a command that has to succeed.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start {}", command.get_program().display()))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<_> = text.trim().lines().collect();
        let tail = lines[lines.len().saturating_sub(10)..].join("\n    ");
        bail!("{}: {tail}", shown(command));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A command as one could type it.
pub(crate) fn shown(command: &Command) -> String {
    let program = command.get_program().to_string_lossy().into_owned();
    let name = program.rsplit('/').next().unwrap_or_default().to_owned();
    command.get_args().fold(name, |line, argument| format!("{line} {}", argument.to_string_lossy()))
}
