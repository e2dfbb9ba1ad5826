//! The plot: rates over depth, a panel per device and mode.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::report::Row;

const SIZE: (u32, u32) = (1320, 760);
/// The same client has the same colour in every panel.
const CLIENTS: [(&str, RGBColor); 6] = [
    ("cofferdam", RGBColor(214, 39, 40)),
    ("native", RGBColor(255, 127, 14)),
    ("blkio", RGBColor(31, 119, 180)),
    ("bare", RGBColor(110, 110, 110)),
    ("cofferdam-nbd", RGBColor(148, 103, 189)),
    ("qsd-nbd", RGBColor(44, 160, 44)),
];

/// Draws 4 KiB random reads on one queue.
///
/// # Errors
/// When the file cannot be written.
pub fn draw(path: &Path, rows: &[Row]) -> Result<()> {
    let failed = |error: &dyn std::fmt::Display| anyhow!("{}: {error}", path.display());
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(|error| failed(&error))?;
    let panels = area.split_evenly((2, 3));
    let kinds =
        ["null", "qsd"].into_iter().flat_map(|backend| ["poll", "event", "adaptive"].map(|mode| (backend, mode)));
    for (panel, (backend, mode)) in panels.iter().zip(kinds) {
        let of = |client: &str| -> Vec<(f64, f64)> {
            let mut points: Vec<_> = rows
                .iter()
                .filter(|row| (row.backend, row.mode, row.client) == (backend, mode, client))
                .filter(|row| row.op == "randread" && row.queues == 1 && row.kiops.is_finite())
                .map(|row| (f64::from(row.depth).log2(), row.kiops))
                .collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            points
        };
        let lines: Vec<_> = CLIENTS.iter().map(|(name, colour)| (*name, *colour, of(name))).collect();
        let top = lines.iter().flat_map(|line| &line.2).map(|point| point.1).fold(1.0, f64::max);
        let mut chart = ChartBuilder::on(panel)
            .caption(format!("{backend}, {mode}: 4 KiB random reads"), ("sans-serif", 16))
            .margin(10)
            .x_label_area_size(36)
            .y_label_area_size(60)
            .build_cartesian_2d(-0.2..7.2, 0.0..top * 1.1)
            .map_err(|error| failed(&error))?;
        let mut mesh = chart.configure_mesh();
        mesh.x_desc("requests in flight").y_desc("thousand per second").light_line_style(TRANSPARENT);
        mesh.x_labels(8)
            .x_label_formatter(&|power: &f64| format!("{:.0}", power.exp2()))
            .label_style(("sans-serif", 12));
        mesh.draw().map_err(|error| failed(&error))?;
        for (name, colour, points) in lines.into_iter().filter(|line| !line.2.is_empty()) {
            let dots: Vec<_> = points.iter().map(|point| Circle::new(*point, 3, colour.filled())).collect();
            let line = LineSeries::new(points, colour.stroke_width(2));
            chart
                .draw_series(line)
                .map_err(|error| failed(&error))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(3)));
            chart.draw_series(dots).map_err(|error| failed(&error))?;
        }
        let mut labels = chart.configure_series_labels();
        labels.position(SeriesLabelPosition::UpperLeft).background_style(WHITE).border_style(BLACK.mix(0.3));
        labels.label_font(("sans-serif", 12)).draw().map_err(|error| failed(&error))?;
    }
    area.present().map_err(|error| failed(&error))
}
