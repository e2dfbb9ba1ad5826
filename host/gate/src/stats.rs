//! The counters as statistics: tracking and observing cost one increment.

use crate::cells::Column;
use crate::cpu::Row;
use crate::gate::Gate;
use crate::slot::Slot;
use crate::sync::atomic::Ordering::SeqCst;
use crate::sync::lock;

/// What happened on one core since the gate was made. Read without disturbing the writers, so
/// the numbers of a busy gate do not belong to one instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CoreStats {
    /// The core's number; the last entry, one above the largest core, is for threads whose core
    /// was not known.
    pub core: u32,
    /// Operations admitted on this core, by the gate and by its handles.
    pub entered: u64,
    /// Operations answered on this core. May exceed `entered`: guards migrate.
    pub left: u64,
    /// Crossings begun on this core.
    pub crossings_in: u64,
    /// Crossings ended on this core.
    pub crossings_out: u64,
    /// Admissions refused on this core because the gate was closed or the handle revoked.
    pub refused: u64,
    /// Admissions refused on this core because the gate was held.
    pub held: u64,
}

impl Gate {
    /// The counters, core by core; empty once the gate was retired.
    #[must_use]
    pub fn stats(&self) -> Vec<CoreStats> {
        let control = lock(&self.slot.control);
        if !self.is_current() {
            return Vec::new();
        }
        let rows = read_rows(self.slot);
        let stats = (0..).zip(rows.iter().zip(&control.baseline)).map(|(core, (now, then))| {
            let since = |column: Column| now[column as usize].wrapping_sub(then[column as usize]);
            CoreStats {
                core,
                entered: since(Column::Entered),
                left: since(Column::Left),
                crossings_in: since(Column::In),
                crossings_out: since(Column::Out),
                refused: since(Column::Refused),
                held: since(Column::Held),
            }
        });
        stats.collect()
    }
}

/// All counters of a slot, row by row, with those of its handles added in.
pub(crate) fn read_rows(slot: &Slot) -> Vec<[u64; 6]> {
    const COLUMNS: [Column; 6] =
        [Column::Entered, Column::Left, Column::In, Column::Out, Column::Refused, Column::Held];
    let directory = lock(&slot.directory);
    let rows = Row::all().map(|row| {
        COLUMNS.map(|column| {
            let own = slot.line.at(row, column).load(SeqCst);
            if !matches!(column, Column::Entered | Column::Left) {
                return own;
            }
            directory.entries().fold(own, |sum, entry| sum.wrapping_add(entry.pair.at(row, column).load(SeqCst)))
        })
    });
    rows.collect()
}
