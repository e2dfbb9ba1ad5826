//! An archive as the kernel unpacks it at boot: cpio in the format "newc" (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_644;
const PROGRAM: u32 = 0o100_755;
const LINK: u32 = 0o120_777;
const CHARACTERS: u32 = 0o020_600;

/// Writes an archive. Paths are relative to the root; the folders above a path are made by themselves.
pub(super) struct Cpio<W: Write> {
    to: W,
    folders: BTreeSet<String>,
    inode: u32,
}

impl<W: Write> Cpio<W> {
    /// Begins an archive.
    pub(super) fn new(to: W) -> Cpio<W> {
        Cpio { to, folders: BTreeSet::new(), inode: 0 }
    }

    /// A folder.
    pub(super) fn folder(&mut self, path: &str) -> Result<()> {
        if path.is_empty() || self.folders.contains(path) {
            return Ok(());
        }
        self.above(path)?;
        self.folders.insert(path.to_owned());
        self.entry(path, DIRECTORY, (0, 0), &[])
    }

    /// A file that is not run.
    pub(super) fn file(&mut self, path: &str, bytes: &[u8]) -> Result<()> {
        self.above(path)?;
        self.entry(path, FILE, (0, 0), bytes)
    }

    /// A program or a library.
    pub(super) fn program(&mut self, path: &str, bytes: &[u8]) -> Result<()> {
        self.above(path)?;
        self.entry(path, PROGRAM, (0, 0), bytes)
    }

    /// A symbolic link.
    pub(super) fn link(&mut self, path: &str, to: &str) -> Result<()> {
        self.above(path)?;
        self.entry(path, LINK, (0, 0), to.as_bytes())
    }

    /// A node of a character device.
    pub(super) fn characters(&mut self, path: &str, major: u32, minor: u32) -> Result<()> {
        self.above(path)?;
        self.entry(path, CHARACTERS, (major, minor), &[])
    }

    /// Ends the archive.
    pub(super) fn finish(mut self) -> Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.to.flush()?;
        Ok(self.to)
    }

    fn above(&mut self, path: &str) -> Result<()> {
        match Path::new(path).parent().and_then(Path::to_str) {
            Some(parent) => self.folder(parent),
            None => Ok(()),
        }
    }

    fn entry(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), bytes: &[u8]) -> Result<()> {
        self.inode += 1;
        let length = u32::try_from(bytes.len()).with_context(|| format!("{name} is too long"))?;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        let name_length = u32::try_from(name.len())? + 1;
        let fields = [self.inode, mode, 0, 0, links, 0, length, 0, 0, major, minor, name_length, 0];
        let mut head = "070701".to_owned();
        for field in fields {
            head += &format!("{field:08X}");
        }
        head += name;
        head.push('\0');
        self.to.write_all(head.as_bytes())?;
        self.pad(head.len())?;
        self.to.write_all(bytes)?;
        self.pad(bytes.len())
    }

    /// To a multiple of four.
    fn pad(&mut self, length: usize) -> Result<()> {
        Ok(self.to.write_all(&[0; 3][..length.wrapping_neg() % 4])?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_folders_come_first_and_once() {
        let mut cpio = Cpio::new(Vec::new());
        cpio.file("etc/a", b"12345").expect("written");
        cpio.file("etc/b", b"").expect("written");
        let bytes = cpio.finish().expect("written");
        assert_eq!(bytes.len() % 4, 0);
        let mut names = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let field = |number: usize| {
                let begin = at + 6 + number * 8;
                let text = std::str::from_utf8(&bytes[begin..begin + 8]).expect("a number");
                usize::from_str_radix(text, 16).expect("a number")
            };
            assert_eq!(&bytes[at..at + 6], b"070701");
            let (length, name_length) = (field(6), field(11));
            names.push(String::from_utf8_lossy(&bytes[at + 110..at + 110 + name_length - 1]).into_owned());
            at += (110 + name_length).next_multiple_of(4) + length.next_multiple_of(4);
        }
        assert_eq!(names, ["etc", "etc/a", "etc/b", "TRAILER!!!"]);
    }
}
