//! Contents that tell where and when they were written.
//!
//! Each 512-byte sector begins with its own number and the version of the write that made it; the rest follows from both. So one look at a sector tells
//! whether it is whole, whether it belongs there, and how old it is.

use std::fmt;

/// The unit in which a write may be torn: the smallest logical block of a virtio disk.
pub(crate) const SECTOR_BYTES: usize = 512;

/// Fills `bytes`, which are to be written at `offset` (a multiple of [`SECTOR_BYTES`]), as version `version`.
pub(crate) fn stamp(bytes: &mut [u8], offset: u64, version: u32) {
    let first = offset / SECTOR_BYTES as u64;
    for (sector, chunk) in (first..).zip(bytes.chunks_exact_mut(SECTOR_BYTES)) {
        for (index, word) in (0..).zip(chunk.chunks_exact_mut(8)) {
            word.copy_from_slice(&word_of(sector, version, index).to_le_bytes());
        }
    }
}

/// Why contents are wrong.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Wrong {
    /// The sector does not begin as any write of its place would.
    Foreign { sector: u64 },
    /// It begins well and does not go on so.
    Torn { sector: u64, version: u32 },
    /// It is of a version that cannot be there.
    Version { sector: u64, version: u32, oldest: u32, newest: u32 },
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Wrong::Foreign { sector } => {
                write!(f, "sector {sector} holds what was never written there")
            }
            Wrong::Torn { sector, version } => {
                write!(f, "sector {sector} holds version {version} in part")
            }
            Wrong::Version { sector, version, oldest, newest } => {
                write!(f, "sector {sector} holds version {version}, not one of {oldest} to {newest}")
            }
        }
    }
}

/// Checks that every sector of `bytes`, found at `offset`, is whole and of a version from `oldest` to `newest`.
pub(crate) fn check(bytes: &[u8], offset: u64, oldest: u32, newest: u32) -> Result<(), Wrong> {
    let first = offset / SECTOR_BYTES as u64;
    for (sector, chunk) in (first..).zip(bytes.chunks_exact(SECTOR_BYTES)) {
        let mut words =
            chunk.chunks_exact(8).map(|word| word.first_chunk().map_or(0, |word| u64::from_le_bytes(*word)));
        if words.next() != Some(sector) {
            return Err(Wrong::Foreign { sector });
        }
        let Some(version) = words.next().and_then(|word| u32::try_from(word).ok()) else {
            return Err(Wrong::Foreign { sector });
        };
        if (2..).zip(words).any(|(index, word)| word != word_of(sector, version, index)) {
            return Err(Wrong::Torn { sector, version });
        }
        if !(oldest..=newest).contains(&version) {
            return Err(Wrong::Version { sector, version, oldest, newest });
        }
    }
    Ok(())
}

fn word_of(sector: u64, version: u32, index: u64) -> u64 {
    match index {
        0 => sector,
        1 => u64::from(version),
        _ => mix(sector ^ (u64::from(version) << 40) ^ (index << 33)),
    }
}

/// The finalizer of splitmix64: every bit of the input reaches every bit of the output.
pub(crate) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_stamped_is_right_and_anything_else_is_told_apart() {
        let mut bytes = vec![0; 4 * SECTOR_BYTES];
        stamp(&mut bytes, 8192, 3);
        assert_eq!(check(&bytes, 8192, 3, 3), Ok(()));
        assert_eq!(check(&bytes, 8192, 1, 9), Ok(()));
        assert_eq!(check(&bytes, 8192, 4, 5), Err(Wrong::Version { sector: 16, version: 3, oldest: 4, newest: 5 }));
        assert_eq!(check(&bytes, 4096, 3, 3), Err(Wrong::Foreign { sector: 8 }));
        bytes[3 * SECTOR_BYTES - 1] ^= 1;
        assert_eq!(check(&bytes, 8192, 3, 3), Err(Wrong::Torn { sector: 18, version: 3 }));
        assert_eq!(check(&[0; SECTOR_BYTES], 0, 0, 9), Err(Wrong::Torn { sector: 0, version: 0 }));
    }
}
