//! What the binaries have in common: one line when they are ready, an end by a signal or by a scripted fault.

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc;

use anyhow::Context as _;

use crate::device::SimDevice;
use crate::server::OnDeath;
use crate::signals;

/// A process that is one device behind a vhost-user socket.
pub struct Program(signals::Blocked);

enum Ending {
    Signal,
    Server,
}

impl Program {
    /// Blocks SIGTERM and SIGINT. Before any thread exists, so that every thread inherits it and only the waiting one takes the
    /// signal.
    ///
    /// # Errors
    /// The system refuses.
    pub fn begin() -> anyhow::Result<Self> {
        signals::block().map(Self).context("block SIGTERM and SIGINT")
    }

    /// Serves `device` on `socket` until a signal (0) or until it dies of a scripted fault (3, and a line that says so as
    /// `name`). Prints `ready SOCKET` when connections are taken.
    ///
    /// # Errors
    /// The server cannot start or go on.
    pub fn serve(self, device: &SimDevice, socket: &Path, name: &str) -> anyhow::Result<ExitCode> {
        let server = device.serve(socket, OnDeath::End)?;
        println!("ready {}", socket.display());
        std::io::stdout().flush().context("write to standard output")?;

        let (ended, endings) = mpsc::channel();
        let from_signal = ended.clone();
        std::thread::spawn(move || {
            self.0.wait();
            let _ = from_signal.send(Ending::Signal);
        });
        let (give, take) = mpsc::channel();
        let stopper = server.stopper();
        std::thread::spawn(move || {
            let _ = give.send(server.wait());
            let _ = ended.send(Ending::Server);
        });
        let ending = endings.recv().context("both threads are gone")?;
        stopper.stop();
        take.recv().context("the server's thread is gone")??;
        Ok(match ending {
            Ending::Signal => ExitCode::SUCCESS,
            Ending::Server => {
                eprintln!("{name}: the device died of a scripted fault (seed {})", device.seed());
                ExitCode::from(3)
            }
        })
    }
}
