//! `cofferdam:driver/log`: lines of a driver, bounded, escaped and marked with who speaks.

use std::sync::Arc;
use std::time::Instant;

use wasmtime::StoreContextMut;
use wasmtime::component::{Linker, WasmStr};

use crate::activity::Import;
use crate::bindings::cofferdam::driver::log::Level;
use crate::capability::rate::LogRate;
use crate::state::LaneState;
use crate::text::clean;

/// Longest line that is kept, in bytes of the guest's text (`wit/log.wit`).
pub(crate) const MAX_LINE_BYTES: usize = 4096;

/// Who speaks, and how much more they may say.
#[derive(Clone, Debug)]
pub(crate) struct LogSink {
    speaker: Arc<Speaker>,
    rate: Arc<LogRate>,
}

/// The fields of every line (DESIGN section 11).
#[derive(Debug)]
pub(crate) struct Speaker {
    pub(crate) binding: String,
    pub(crate) driver: String,
    pub(crate) device: String,
    pub(crate) generation: u64,
    pub(crate) lane: String,
}

macro_rules! emit {
    ($level:ident, $speaker:expr, $line:expr) => {
        tracing::$level!(
            target: "cofferdam::driver",
            binding = $speaker.binding,
            driver = $speaker.driver,
            generation = $speaker.generation,
            device = $speaker.device,
            lane = $speaker.lane,
            line = $line,
            "driver log"
        )
    };
}

impl LogSink {
    pub(crate) fn new(speaker: Speaker, rate: Arc<LogRate>) -> LogSink {
        LogSink { speaker: Arc::new(speaker), rate }
    }

    /// Writes one line, or counts it. `text` is called only if the line is to be written.
    pub(crate) fn write<E>(&self, level: Level, text: impl FnOnce() -> Result<String, E>) -> Result<(), E> {
        let admission = self.rate.admit(Instant::now());
        self.tell_dropped(admission.dropped_before);
        if !admission.write {
            return Ok(());
        }
        let line = clean(&text()?, MAX_LINE_BYTES);
        let speaker = &*self.speaker;
        match level {
            Level::Error => emit!(error, speaker, line),
            Level::Warn => emit!(warn, speaker, line),
            Level::Info => emit!(info, speaker, line),
            Level::Debug => emit!(debug, speaker, line),
            Level::Trace => emit!(trace, speaker, line),
        }
        Ok(())
    }

    fn tell_dropped(&self, dropped: u64) {
        if dropped > 0 {
            let speaker = &*self.speaker;
            tracing::warn!(
                target: "cofferdam::driver",
                binding = speaker.binding,
                driver = speaker.driver,
                generation = speaker.generation,
                device = speaker.device,
                dropped,
                "driver log lines dropped"
            );
        }
    }
}

impl Drop for LogSink {
    /// A driver that floods and then falls silent is told about when its last lane goes.
    fn drop(&mut self) {
        if Arc::strong_count(&self.speaker) == 1 {
            self.tell_dropped(self.rate.take_dropped());
        }
    }
}

/// Links by hand: the generated trait would copy a message of any length into the host before it could be cut, a [`WasmStr`] stays in the guest until then.
pub(crate) fn link(linker: &mut Linker<LaneState>) -> wasmtime::Result<()> {
    linker.instance("cofferdam:driver/log@0.1.0")?.func_wrap(
        "write",
        |store: StoreContextMut<'_, LaneState>, (level, message): (Level, WasmStr)| {
            // A line is written to wherever the host's log goes, which may take its time.
            let _within = store.data().watch.activity().within(Import::LogWrite);
            store.data().log.write(level, || message.to_str(&store).map(|text| text.into_owned()))
        },
    )
}
