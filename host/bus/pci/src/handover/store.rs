//! Records of what was handed over, and notes of who claims what: small JSON files in /run/cofferdam/pci, which only root reads. /run does not outlive a boot, and neither
//! does a hand-over.

use std::io;

use cap_std::fs::{Dir, DirBuilder, DirBuilderExt};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::{By, Via};
use crate::claim::Claimant;
use crate::sysfs::{is_name, read};
use crate::{Address, PciError, Sysfs};

/// The directory, below /run.
const FOLDER: [&str; 2] = ["cofferdam", "pci"];
/// Longest file that is read.
const FILE_BYTES: u64 = 4096;

/// Where a function came from. JSON keys are stable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The function, as its address is written.
    pub address: String,
    /// Its vendor id: another function in the same place has nothing to do with this record.
    pub vendor: u16,
    /// Its device id.
    pub device: u16,
    /// The driver that had it.
    pub driver: Option<String>,
    /// The `driver_override` that it had.
    pub driver_override: Option<String>,
    /// To what it was handed over.
    pub via: Via,
    /// For whom.
    pub by: By,
    /// When, in seconds since 1970.
    pub unix_s: u64,
}

impl Record {
    /// Every word that may become part of a path or of a write is what the kernel could have said.
    fn is_sound(&self, address: Address) -> bool {
        let names = [&self.driver, &self.driver_override];
        self.address == address.to_string() && names.into_iter().flatten().all(|name| is_name(name))
    }
}

/// The open directory.
#[derive(Debug)]
pub(crate) struct Store {
    dir: Dir,
}

impl Store {
    /// Opens the directory; `None` where there is none, or where this process may not look into it.
    pub(crate) fn open(sysfs: &Sysfs) -> Result<Option<Store>, PciError> {
        match open(&sysfs.run) {
            Ok(dir) => Ok(Some(Store { dir })),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => Ok(None),
            Err(source) => Err(failed(sysfs, "open", source)),
        }
    }

    /// Opens the directory, made where there is none.
    pub(crate) fn make(sysfs: &Sysfs) -> Result<Store, PciError> {
        let make = || {
            let mut below = FOLDER[0].to_owned();
            make_private(&sysfs.run, &below)?;
            below = format!("{below}/{}", FOLDER[1]);
            make_private(&sysfs.run, &below)?;
            open(&sysfs.run)
        };
        Ok(Store { dir: make().map_err(|source| failed(sysfs, "make", source))? })
    }

    /// The record of a function. One that is damaged is an error, or with `force` none.
    pub(crate) fn record(&self, sysfs: &Sysfs, address: Address, force: bool) -> Result<Option<Record>, PciError> {
        let text = match read(&self.dir, format!("{address}.json"), FILE_BYTES) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => String::new(),
            Err(source) => return Err(failed(sysfs, "read a record in", source)),
        };
        match serde_json::from_str::<Record>(&text).ok().filter(|record| record.is_sound(address)) {
            None if !force => {
                let path = sysfs.told_run(&format!("cofferdam/pci/{address}.json"));
                let why = format!("the record of where it came from is damaged ({path}); --force goes on without it");
                Err(PciError::Unusable { address, why })
            }
            record => Ok(record),
        }
    }

    /// Whether there is a record, whatever it says.
    pub(crate) fn has_record(&self, address: Address) -> bool {
        self.dir.exists(format!("{address}.json"))
    }

    pub(crate) fn put_record(&self, sysfs: &Sysfs, record: &Record) -> Result<(), PciError> {
        let bytes = serde_json::to_vec(record).map_err(|error| failed(sysfs, "write a record in", error.into()))?;
        let written = sysfs.effects.replace(&self.dir, &format!("{}.json", record.address), &bytes);
        written.map_err(|source| failed(sysfs, "write a record in", source))
    }

    pub(crate) fn remove_record(&self, sysfs: &Sysfs, address: Address) -> Result<(), PciError> {
        let removed = sysfs.effects.remove(&self.dir, &format!("{address}.json"));
        removed.map_err(|source| failed(sysfs, "remove a record in", source))
    }

    /// The note of who claims a function; a damaged one says nothing.
    pub(crate) fn claimant(&self, address: Address) -> Option<Claimant> {
        serde_json::from_str(&read(&self.dir, format!("{address}.claim"), FILE_BYTES).ok()?).ok()
    }

    pub(crate) fn put_claimant(&self, address: Address, claimant: &Claimant) -> io::Result<()> {
        // Not one of the effects that can be interrupted: nothing depends on it.
        let bytes = serde_json::to_vec(claimant)?;
        super::Effects::replace(&super::Kernel, &self.dir, &format!("{address}.claim"), &bytes)
    }

    pub(crate) fn remove_claimant(&self, address: Address) {
        let _ = self.dir.remove_file(format!("{address}.claim"));
    }
}

fn failed(sysfs: &Sysfs, what: &str, source: io::Error) -> PciError {
    let hint = if source.kind() == io::ErrorKind::PermissionDenied { " (run as root)" } else { "" };
    PciError::Io { what: format!("{what} {}{hint}", sysfs.told_run("cofferdam/pci")), source }
}

/// Opens it step by step without following links, and only if nobody but this user can have put anything there.
fn open(run: &Dir) -> io::Result<Dir> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut dir = run.try_clone()?;
    for name in FOLDER {
        let below = rustix::fs::openat(&dir, name, flags, Mode::empty())?;
        let stat = rustix::fs::fstat(&below)?;
        let (user, mode) = (rustix::process::geteuid().as_raw(), stat.st_mode & 0o7777);
        if stat.st_uid != user || mode & 0o022 != 0 {
            return Err(io::Error::other(format!(
                "{name} belongs to user {} with mode {mode:04o}; it must be user {user}'s, and for others not to write",
                stat.st_uid
            )));
        }
        dir = Dir::from_std_file(std::fs::File::from(below));
    }
    Ok(dir)
}

fn make_private(run: &Dir, below: &str) -> io::Result<()> {
    match run.create_dir_with(below, DirBuilder::new().mode(0o700)) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}
