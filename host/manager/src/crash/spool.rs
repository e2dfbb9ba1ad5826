//! A directory with the last crashes: for each a report (`NAME-TIME.json`), and a core dump (`NAME-TIME.core`) where there is one. Bounded in files and bytes; the oldest
//! go first.

use std::fs::{DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::CrashReport;
use super::pace::Pace;

/// Reports in the directory.
const MOST_REPORTS: usize = 64;
/// Bytes of everything in it.
const MOST_BYTES: u64 = 256 << 20;
/// Bytes that are written in one step.
const STEP_BYTES: usize = 64 << 10;
/// Files that are looked at in one step.
const STEP_FILES: usize = 16;

/// Where crashes are written down.
#[derive(Clone, Debug)]
pub(crate) struct Spool {
    folder: PathBuf,
}

/// Of the names that crashes have been given, and no others: files of somebody else's are left alone.
struct Entry {
    stem: String,
    bytes: u64,
}

impl Spool {
    /// The directory is made with the first crash.
    pub(crate) fn new(folder: PathBuf) -> Spool {
        Spool { folder }
    }

    /// Writes a crash down, and forgets old ones. The core dump's path, if there is one. What cannot be written is told in the log: a full disk is no reason to serve
    /// nobody.
    pub(super) fn keep(&self, mut report: CrashReport, core: Option<&[u8]>, pace: &Pace<'_>) -> Option<PathBuf> {
        let stem = format!("{}-{:020}", report.binding, report.unix_micros);
        let kept = (|| {
            DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
            self.make_room(core.map_or(0, |core| core.len() as u64), pace)?;
            if let Some(core) = core.filter(|core| core.len() as u64 <= MOST_BYTES) {
                let path = self.folder.join(format!("{stem}.core"));
                write(&path, core, pace)?;
                report.core = Some(path);
            }
            let mut text = serde_json::to_vec_pretty(&report)?;
            text.push(b'\n');
            write(&self.folder.join(format!("{stem}.json")), &text, pace)
        })();
        if let Err(error) = kept {
            tracing::warn!(folder = %self.folder.display(), %error, "a crash could not be written down");
        }
        report.core
    }

    /// Removes the oldest until there is room for one more of `bytes`.
    fn make_room(&self, bytes: u64, pace: &Pace<'_>) -> std::io::Result<()> {
        let mut entries = self.entries(pace)?;
        // The time is the end of the name, and twenty digits long.
        entries.sort_by(|a, b| time_of(&b.stem).cmp(time_of(&a.stem)));
        let mut all: u64 = entries.iter().map(|entry| entry.bytes).sum();
        while entries.len() >= MOST_REPORTS || all + bytes > MOST_BYTES {
            let Some(oldest) = entries.pop() else { break };
            all -= oldest.bytes;
            for extension in ["json", "core"] {
                match std::fs::remove_file(self.folder.join(format!("{}.{extension}", oldest.stem))) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn entries(&self, pace: &Pace<'_>) -> std::io::Result<Vec<Entry>> {
        let mut entries: Vec<Entry> = Vec::new();
        for (nth, file) in self.folder.read_dir()?.enumerate() {
            if nth % STEP_FILES == STEP_FILES - 1 {
                pace.step();
            }
            let file = file?;
            let name = file.file_name();
            let Some((stem, extension)) = name.to_str().and_then(|name| name.rsplit_once('.')) else { continue };
            let is_ours = matches!(extension, "json" | "core") && time_of(stem).len() == 20;
            if !is_ours {
                continue;
            }
            let bytes = file.metadata()?.len();
            match entries.iter_mut().find(|entry| entry.stem == stem) {
                Some(entry) => entry.bytes += bytes,
                None => entries.push(Entry { stem: stem.to_owned(), bytes }),
            }
        }
        Ok(entries)
    }
}

/// The digits behind the last hyphen; nothing if there are none.
fn time_of(stem: &str) -> &str {
    let time = stem.rsplit_once('-').map_or("", |(_, time)| time);
    if time.chars().all(|digit| digit.is_ascii_digit()) { time } else { "" }
}

/// A whole file or none.
fn write(path: &Path, bytes: &[u8], pace: &Pace<'_>) -> std::io::Result<()> {
    pace.step();
    let half = path.with_extension("half");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&half)?;
    let written = bytes.chunks(STEP_BYTES).enumerate().try_for_each(|(nth, bytes)| {
        if nth > 0 {
            pace.step();
        }
        file.write_all(bytes)
    });
    let written = written.and_then(|()| std::fs::rename(&half, path));
    if written.is_err() {
        // Nobody would count it.
        let _ = std::fs::remove_file(&half);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("cofferdam-spool-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        folder
    }

    fn report(nth: u64) -> CrashReport {
        CrashReport {
            number: nth,
            unix_micros: 1_000_000 + nth,
            binding: format!("disk-{}", nth % 3),
            driver: "virtio-blk.wasm".into(),
            digest: "00".into(),
            device: "sim:0x0".into(),
            generation: nth,
            lane: "0".into(),
            kind: "trap".into(),
            message: "unreachable".into(),
            backtrace: Vec::new(),
            calls: Vec::new(),
            pause_micros: None,
            core: None,
        }
    }

    #[test]
    fn the_oldest_go_when_there_are_too_many_and_other_files_stay() {
        let folder = folder("many");
        let spool = Spool::new(folder.clone());
        spool.keep(report(0), None, &Pace::hurried());
        std::fs::write(folder.join("notes.json"), "mine").unwrap();
        for nth in 1..200 {
            assert!(spool.keep(report(nth), Some(b"core"), &Pace::hurried()).is_some());
        }
        let mut entries = spool.entries(&Pace::hurried()).unwrap();
        entries.sort_by(|a, b| time_of(&a.stem).cmp(time_of(&b.stem)));
        assert_eq!(entries.len(), MOST_REPORTS);
        assert_eq!(entries.last().map(|entry| time_of(&entry.stem).to_owned()), Some(format!("{:020}", 1_000_199)));
        assert!(folder.join("notes.json").exists());
        let text = std::fs::read(folder.join(format!("disk-1-{:020}.json", 1_000_199))).unwrap();
        let read: CrashReport = serde_json::from_slice(&text).unwrap();
        assert_eq!(std::fs::read(read.core.unwrap()).unwrap(), b"core");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn large_dumps_push_out_older_ones_and_one_that_is_too_large_is_not_written() {
        let folder = folder("large");
        let spool = Spool::new(folder.clone());
        let core = vec![7; 100 << 20];
        for nth in 0..4 {
            assert!(spool.keep(report(nth), Some(&core), &Pace::hurried()).is_some());
            let bytes: u64 = spool.entries(&Pace::hurried()).unwrap().iter().map(|entry| entry.bytes).sum();
            assert!(bytes <= MOST_BYTES + (1 << 20), "{bytes}");
        }
        assert_eq!(spool.entries(&Pace::hurried()).unwrap().len(), 2);
        let huge = vec![7; (MOST_BYTES + 1) as usize];
        assert!(spool.keep(report(9), Some(&huge), &Pace::hurried()).is_none());
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_made_loses_the_file_and_nothing_else() {
        let spool = Spool::new(PathBuf::from("/proc/nowhere"));
        assert_eq!(spool.keep(report(1), Some(b"core"), &Pace::hurried()), None);
    }
}
