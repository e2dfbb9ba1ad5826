//! The healthy binding beside the one that leaves: it may notice nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cofferdam_manager::{IoOp, LoadSpec, Manager, UnloadOptions};
use cofferdam_process_tests::backend::Backend;

use crate::client::Client;
use crate::stage::{connect, driver};

/// Between two rounds, so that it is a client and not a load test.
const PAUSE: Duration = Duration::from_millis(1);
/// No round may take longer: what another binding does must not hold this one up. Far above a round's hundred microseconds, because a guest that loops on purpose and the
/// other cells of this test take the cores.
const ROUND_BOUND: Duration = Duration::from_secs(3);

/// A binding with a client that writes and reads back, all the time.
pub struct Neighbour {
    manager: Manager,
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    client: Option<JoinHandle<anyhow::Result<Duration>>>,
    _device: Backend,
}

impl Neighbour {
    /// Loads it, by the well-behaved driver.
    pub fn start(manager: &Manager) -> anyhow::Result<Neighbour> {
        let device = Backend::sim(&["--memory", "4M"]);
        let spec = LoadSpec {
            name: Some("neighbour".into()),
            ..LoadSpec::new("virtio-blk.wasm", driver("virtio-blk.wasm")?, Box::new(connect(&device)?))
        };
        let binding = manager.load(spec)?;
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut client = Client::open(&binding, 0, "neighbour")?;
        let (told, count) = (Arc::clone(&stop), Arc::clone(&rounds));
        let client = std::thread::Builder::new().name("neighbour".into()).spawn(move || {
            let mut longest = Duration::ZERO;
            while !told.load(Ordering::Acquire) {
                let round = count.load(Ordering::Relaxed);
                let (offset, fill) = (round % 512 * 4096, round as u8);
                let begin = Instant::now();
                client.one(IoOp::Write, offset, 4096, fill, ROUND_BOUND)?;
                client.one(IoOp::Read, offset, 4096, fill, ROUND_BOUND)?;
                longest = longest.max(begin.elapsed());
                count.store(round + 1, Ordering::Release);
                std::thread::park_timeout(PAUSE);
            }
            Ok(longest)
        })?;
        Ok(Neighbour { manager: manager.clone(), stop, rounds, client: Some(client), _device: device })
    }

    /// Rounds so far.
    #[must_use]
    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Acquire)
    }

    /// Waits until it has gone on for `more` rounds.
    pub fn goes_on(&self, more: u64) -> anyhow::Result<()> {
        let (from, deadline) = (self.rounds(), Instant::now() + 2 * ROUND_BOUND);
        while self.rounds() < from + more {
            let ended = self.client.as_ref().is_none_or(JoinHandle::is_finished);
            ensure!(!ended && Instant::now() < deadline, "the neighbour does not go on");
            std::thread::park_timeout(PAUSE);
        }
        Ok(())
    }

    /// Stops its client and takes it down; nothing may have gone wrong. The longest round.
    pub fn end(mut self) -> anyhow::Result<Duration> {
        self.stop.store(true, Ordering::Release);
        let client = self.client.take().context("it runs")?;
        let longest = client.join().map_err(|_| anyhow::anyhow!("the neighbour's client panicked"))?;
        let longest = longest.context("the neighbour")?;
        let certificate = self.manager.unload("neighbour", &UnloadOptions::default())?;
        ensure!(certificate.residual.is_zero() && certificate.leaked.bytes == 0, "the neighbour: {certificate:?}");
        Ok(longest)
    }
}
