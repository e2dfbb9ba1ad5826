//! How wide the fields of device configurations are: each is to be read with an access of its own width (virtio 1.2, section 4.1.3.1), and a caller asks for a range of bytes.

use cofferdam_device::{TransportError, Width};

use super::part::Part;

/// Bytes up to `end` are fields of `width`; the next entry begins there.
struct Run {
    end: u64,
    width: Width,
}

const fn run(end: u64, width: Width) -> Run {
    Run { end, width }
}

/// `struct virtio_net_config` (section 5.1.4).
const NET: &[Run] =
    &[run(6, Width::U8), run(12, Width::U16), run(16, Width::U32), run(18, Width::U8), run(20, Width::U16)];

/// `struct virtio_blk_config` (section 5.2.4). A 64-bit field is two of 32 bits.
const BLOCK: &[Run] = &[
    run(16, Width::U32),
    run(18, Width::U16),
    run(20, Width::U8),
    run(24, Width::U32),
    run(26, Width::U8),
    run(28, Width::U16),
    run(32, Width::U32),
    run(34, Width::U8),
    run(36, Width::U16),
    run(56, Width::U32),
    run(60, Width::U8),
];

/// `struct virtio_console_config` (section 5.3.4).
const CONSOLE: &[Run] = &[run(4, Width::U16)];

/// The width of the field at `offset` of a device of type `kind`; 32 bits where that is not known.
pub(super) fn width_at(kind: u32, offset: u64) -> Width {
    let runs = match kind {
        1 => NET,
        2 => BLOCK,
        3 => CONSOLE,
        _ => &[],
    };
    runs.iter().find(|run| offset < run.end).map_or(Width::U32, |run| run.width)
}

/// Reads the fields that `offset` and what follows it touch, and cuts out what was asked for. The caller has checked that all of it is in `part`.
pub(super) fn read(part: &Part, kind: u32, offset: u64, into: &mut [u8]) -> Result<(), TransportError> {
    let mut done = 0;
    while done < into.len() {
        let at = offset + done as u64;
        // Bytes where the part ends within a field.
        let wide = Some(width_at(kind, at)).filter(|wide| (at & !(wide.bytes() - 1)) + wide.bytes() <= part.bytes());
        let width = wide.unwrap_or(Width::U8);
        let first = at & !(width.bytes() - 1);
        let value = part.read(first, width)?.to_le_bytes();
        let wanted = &value[(at - first) as usize..width.bytes() as usize];
        let count = wanted.len().min(into.len() - done);
        into[done..done + count].copy_from_slice(&wanted[..count]);
        done += count;
    }
    Ok(())
}
