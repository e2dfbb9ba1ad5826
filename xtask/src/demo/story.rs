//! The demo's voice: numbered steps, the commands as one could type them, and what came of them.

use crate::step;
use std::io::Write;
use std::process::Command;
use std::time::Instant;

/// A story that is being told on standard output.
pub(crate) struct Story {
    step: u32,
    begin: Instant,
}

impl Story {
    /// Begins with a headline.
    pub(crate) fn begin(headline: &str) -> Story {
        println!("\n{}", step::bold(headline));
        Story { step: 0, begin: Instant::now() }
    }

    /// The next step.
    pub(crate) fn step(&mut self, text: &str) {
        self.step += 1;
        println!("\n{}", step::bold(&format!("{}. {text}", self.step)));
        flush();
    }

    /// A command that is about to run.
    pub(crate) fn command(&self, command: &Command) {
        println!("   $ {}", step::shown(command));
        flush();
    }

    /// What came of it.
    pub(crate) fn line(&self, text: &str) {
        println!("   {text}");
        flush();
    }

    /// Several lines, each on its own.
    pub(crate) fn lines(&self, text: &str) {
        for line in text.lines() {
            self.line(line);
        }
    }

    /// The last line.
    pub(crate) fn end(&self, text: &str) {
        println!("\n{} ({})\n", step::bold(text), step::seconds(self.begin.elapsed()));
    }
}

/// A story is read while it happens, also through a pipe. Whoever closed the pipe does not want to read on: not an error here.
fn flush() {
    let _ = std::io::stdout().flush();
}

/// A count with thousands set apart.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn thousands_are_set_apart() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(super::count(number), text);
        }
    }
}
