//! What a disk can do.

use super::breach;
use crate::bindings::block::exports::cofferdam::driver::block as wit_block;
use crate::fault::GuestFault;

/// What a block device can do, checked against the bounds in `wit/block.wit`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockProperties {
    /// Size of the medium in bytes, a multiple of `logical_block_bytes`.
    pub capacity_bytes: u64,
    /// Smallest addressable unit: a power of two from 512 to 65,536.
    pub logical_block_bytes: u32,
    /// Best unit for writes: a power of two, at least `logical_block_bytes`.
    pub physical_block_bytes: u32,
    /// Largest payload of one read or write: a multiple of `logical_block_bytes`, at least one block.
    pub max_transfer_bytes: u32,
    /// Writes, discards and write-zeroes are refused.
    pub read_only: bool,
    /// Whether flush is served.
    pub can_flush: bool,
    /// Largest range of one discard; 0: not served.
    pub max_discard_bytes: u32,
    /// Alignment of a useful discard; at least one block when discard is served.
    pub discard_align_bytes: u32,
    /// Largest range of one write-zeroes; 0: not served.
    pub max_write_zeroes_bytes: u32,
    /// Whether write-zeroes may deallocate.
    pub write_zeroes_may_unmap: bool,
    /// Whether get-id is served.
    pub has_id: bool,
}

impl BlockProperties {
    pub(crate) fn check(words: &wit_block::Properties) -> Result<BlockProperties, GuestFault> {
        let block = words.logical_block_bytes;
        if !block.is_power_of_two() || !(512..=65_536).contains(&block) {
            return breach("logical-block-bytes", block);
        }
        if !words.capacity_bytes.is_multiple_of(block.into()) {
            return breach("capacity-bytes", words.capacity_bytes);
        }
        if !words.physical_block_bytes.is_power_of_two() || words.physical_block_bytes < block {
            return breach("physical-block-bytes", words.physical_block_bytes);
        }
        if words.max_transfer_bytes < block || !words.max_transfer_bytes.is_multiple_of(block) {
            return breach("max-transfer-bytes", words.max_transfer_bytes);
        }
        if words.max_discard_bytes != 0 && words.discard_align_bytes < block {
            return breach("discard-align-bytes", words.discard_align_bytes);
        }
        Ok(BlockProperties {
            capacity_bytes: words.capacity_bytes,
            logical_block_bytes: block,
            physical_block_bytes: words.physical_block_bytes,
            max_transfer_bytes: words.max_transfer_bytes,
            read_only: words.read_only,
            can_flush: words.can_flush,
            max_discard_bytes: words.max_discard_bytes,
            discard_align_bytes: words.discard_align_bytes,
            max_write_zeroes_bytes: words.max_write_zeroes_bytes,
            write_zeroes_may_unmap: words.write_zeroes_may_unmap,
            has_id: words.has_id,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn properties() -> wit_block::Properties {
        wit_block::Properties {
            capacity_bytes: 1 << 20,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            max_transfer_bytes: 1 << 16,
            read_only: false,
            can_flush: true,
            max_discard_bytes: 1 << 20,
            discard_align_bytes: 4096,
            max_write_zeroes_bytes: 0,
            write_zeroes_may_unmap: false,
            has_id: true,
        }
    }

    #[test]
    fn properties_within_their_bounds_are_taken() {
        assert_eq!(BlockProperties::check(&properties()).unwrap().capacity_bytes, 1 << 20);
    }

    #[test]
    fn every_property_out_of_its_bounds_is_a_layout_fault() {
        type Spoil = fn(&mut wit_block::Properties);
        let spoils: [Spoil; 8] = [
            |p| p.logical_block_bytes = 0,
            |p| p.logical_block_bytes = 256,
            |p| p.logical_block_bytes = 131_072,
            |p| p.capacity_bytes = 513,
            |p| p.physical_block_bytes = 0,
            |p| p.max_transfer_bytes = 0,
            |p| p.max_transfer_bytes = 1000,
            |p| p.discard_align_bytes = 0,
        ];
        for (number, spoil) in spoils.into_iter().enumerate() {
            let mut words = properties();
            spoil(&mut words);
            let fault = BlockProperties::check(&words).expect_err(&format!("case {number}"));
            assert_eq!(fault.kind, crate::FaultKind::Layout, "case {number}");
        }
    }
}
