//! The table, the aims, and the file.

use std::fmt::Write as _;

/// One measurement.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) case: String,
    pub(crate) threads: usize,
    pub(crate) gates: usize,
    pub(crate) ns: f64,
}

/// All of them.
pub(crate) struct Report {
    rows: Vec<Row>,
    cores: usize,
}

impl Report {
    pub(crate) fn new(rows: Vec<Row>, cores: usize) -> Report {
        Report { rows, cores }
    }

    fn ns(&self, case: &str, threads: usize, gates: usize) -> f64 {
        let row = self.rows.iter().find(|row| row.case == case && row.threads == threads && row.gates == gates);
        row.map_or(f64::NAN, |row| row.ns)
    }

    pub(crate) fn print(&self) {
        println!("{:28} {:>7} {:>5} {:>11} {:>9} {:>8}", "case", "threads", "gates", "ns", "x floor", "scaling");
        for row in &self.rows {
            let floor = self.ns("floor", row.threads, row.gates);
            let ratio = if floor.is_nan() { String::new() } else { format!("{:.1}", row.ns / floor) };
            let single = self.ns(&row.case, 1, row.gates);
            let scaled = row.threads > 1 && !single.is_nan();
            let scaling = if scaled { format!("{:.2}", single / row.ns) } else { String::new() };
            println!("{:28} {:>7} {:>5} {:>11.2} {ratio:>9} {scaling:>8}", row.case, row.threads, row.gates, row.ns);
        }
        println!();
        let one = |case| self.ns(case, 1, 1);
        let all = |case| self.ns(case, self.cores, 1);
        aim("gate pair / floor", one("gate-pair") / one("floor"), "at most", 8.0);
        aim("Arc clone / gate pair", one("arc-clone") / one("gate-pair"), "at least", 5.0);
        aim("gate pair, scaling to all cores", one("gate-pair") / all("gate-pair"), "at least", 0.95);
        aim("handle call / gate pair", one("handle-call") / one("gate-pair"), "at most", 1.25);
        aim("batch of 32, each / handle call", one("handle-batch-32") / one("handle-call"), "at most", 0.1);
        aim("pinned / floor", one("pinned") / one("floor"), "at most", 2.0);
        aim(
            "close+drain / bare membarrier, busy peer",
            self.ns("close-drain-busy", 2, 1) / self.ns("membarrier-busy", 2, 1),
            "at most",
            1.5,
        );
    }

    pub(crate) fn write_json(&self, path: &str) -> std::io::Result<()> {
        let mut text = String::from("[\n");
        for (at, row) in self.rows.iter().enumerate() {
            let comma = if at + 1 == self.rows.len() { "" } else { "," };
            writeln!(
                text,
                r#"  {{"case":"{}","threads":{},"gates":{},"ns":{:.3}}}{comma}"#,
                row.case, row.threads, row.gates, row.ns
            )
            .expect("a string takes everything");
        }
        text.push_str("]\n");
        if let Some(folder) = std::path::Path::new(path).parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(path, text)
    }
}

fn aim(what: &str, value: f64, bound: &str, limit: f64) {
    let met = if bound == "at most" { value <= limit } else { value >= limit };
    let verdict = if met { "met" } else { "MISSED" };
    println!("{what:42} {value:6.2}   {bound} {limit:<5} {verdict}");
}

/// The middle value.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
