//! Columns.

use std::fmt::Write as _;

use super::harmless;

/// Lines of a head and rows, each column as wide as its widest cell, behind `indent`.
pub(super) fn lines<const N: usize>(
    indent: &str,
    head: [&str; N],
    rows: impl Iterator<Item = [String; N]>,
) -> Vec<String> {
    // Made harmless before it is measured: what is written out is longer.
    let harmless_row = |row: [String; N]| row.map(|cell| harmless(&cell).into_owned());
    let rows: Vec<_> = std::iter::once(head.map(str::to_owned)).chain(rows.map(harmless_row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let line = |row: &[String; N]| {
        let mut text = indent.to_owned();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(text, "{cell:<width$}  ");
        }
        text.trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}
