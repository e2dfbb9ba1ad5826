//! The plots: plain lines in SVG.

use std::path::Path;

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;

/// Size of a plot, in pixels.
const SIZE: (u32, u32) = (960, 420);
/// Most points of a line over cycles; of more, the least and the greatest of each bucket are drawn.
const MOST_POINTS: usize = 4000;
/// Lines of one plot are told apart by these.
const COLOURS: [RGBColor; 6] = [
    RGBColor(31, 119, 180),
    RGBColor(255, 127, 14),
    RGBColor(44, 160, 44),
    RGBColor(214, 39, 40),
    RGBColor(148, 103, 189),
    RGBColor(110, 110, 110),
];

/// One line.
pub struct Line {
    /// For the legend.
    pub name: String,
    /// From left to right.
    pub points: Vec<(f64, f64)>,
}

/// Draws one series over the cycles. The vertical axis begins at zero, so that noise looks like what it is.
pub fn over_cycles(path: &Path, title: &str, unit: &str, line: &Line) -> anyhow::Result<()> {
    let greatest = |of: fn(&(f64, f64)) -> f64| line.points.iter().map(of).fold(1.0, f64::max);
    let least = line.points.first().map_or(0.0, |point| point.0);
    let (right, top) = (greatest(|point| point.0), greatest(|point| point.1));
    let thin = Line { name: line.name.clone(), points: thinned(&line.points) };
    draw(path, title, "cycle", unit, least..right.max(least + 1.0), 0.0..top * 1.15, &[thin])
}

/// Draws how many of the values, in per cent, are at most so long; time is logarithmic.
pub fn distributions(path: &Path, title: &str, unit: &str, lines: &[Line]) -> anyhow::Result<()> {
    let all = || lines.iter().flat_map(|line| &line.points).map(|point| point.0);
    let (least, greatest) = (all().fold(f64::MAX, f64::min), all().fold(f64::MIN, f64::max));
    if least > greatest || least <= 0.0 {
        return Err(anyhow!("nothing to draw in {}", path.display()));
    }
    let range = (least * 0.9..greatest * 1.1).log_scale();
    draw(path, title, unit, "per cent of the unloads that took at most so long", range, 0.0..100.0, lines)
}

/// The points with which the same line is drawn.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MOST_POINTS {
        return points.to_vec();
    }
    let width = (points.len() * 2).div_ceil(MOST_POINTS);
    let extremes = |bucket: &[(f64, f64)]| {
        let by_height = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let mut two: Vec<_> =
            bucket.iter().min_by(by_height).into_iter().chain(bucket.iter().max_by(by_height)).copied().collect();
        two.sort_by(|a, b| a.0.total_cmp(&b.0));
        two
    };
    points.chunks(width).flat_map(extremes).collect()
}

fn draw<X>(
    path: &Path,
    title: &str,
    across: &str,
    up: &str,
    x: X,
    y: std::ops::Range<f64>,
    lines: &[Line],
) -> anyhow::Result<()>
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let area: DrawingArea<_, Shift> = SVGBackend::new(path, SIZE).into_drawing_area();
    let failed = |error: &dyn std::fmt::Display| anyhow!("{}: {error}", path.display());
    area.fill(&WHITE).map_err(|error| failed(&error))?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(x, y)
        .map_err(|error| failed(&error))?;
    let mut mesh = chart.configure_mesh();
    mesh.x_desc(across).y_desc(up).light_line_style(TRANSPARENT).label_style(("sans-serif", 13));
    mesh.draw().map_err(|error| failed(&error))?;
    for (line, colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        let series = LineSeries::new(line.points.iter().copied(), colour.stroke_width(1));
        let drawn = chart.draw_series(series).map_err(|error| failed(&error))?;
        if lines.len() > 1 {
            let colour = *colour;
            drawn
                .label(&line.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(3)));
        }
    }
    if lines.len() > 1 {
        let mut labels = chart.configure_series_labels();
        labels.position(SeriesLabelPosition::LowerRight).background_style(WHITE).border_style(BLACK.mix(0.3));
        labels.label_font(("sans-serif", 13)).draw().map_err(|error| failed(&error))?;
    }
    area.present().map_err(|error| failed(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_many_points_keeps_what_sticks_out() {
        let mut points: Vec<_> = (0..100_000).map(|at| (f64::from(at), 10.0)).collect();
        points[77_777].1 = 99.0;
        let thin = thinned(&points);
        assert!(thin.len() <= MOST_POINTS && thin.contains(&(77_777.0, 99.0)), "{} points", thin.len());
        assert!(thin.is_sorted_by(|a, b| a.0 <= b.0));
    }

    #[test]
    fn plots_say_what_they_show() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plot.svg");
        let line = |name: &str| Line { name: name.into(), points: vec![(1.0, 0.0), (20.0, 50.0), (300.0, 100.0)] };
        over_cycles(&path, "The title", "MiB", &line("memory")).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        for word in ["The title", "MiB", "cycle", "polyline"] {
            assert!(text.contains(word), "no {word}: {text}");
        }
        distributions(&path, "Another", "ms", &[line("one"), line("two")]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        for word in ["Another", "ms", "per cent", "one", "two"] {
            assert!(text.contains(word), "no {word}: {text}");
        }
    }
}
