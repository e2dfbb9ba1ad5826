//! The properties of the one service that this guest gives, in the words of its world.

#[cfg(feature = "block")]
pub use block::*;
#[cfg(all(feature = "entropy", not(feature = "block")))]
pub use entropy::*;
#[cfg(all(feature = "net", not(any(feature = "block", feature = "entropy", feature = "stream"))))]
pub use net::*;
#[cfg(all(feature = "stream", not(any(feature = "block", feature = "entropy"))))]
pub use stream::*;

#[cfg(feature = "block")]
mod block {
    pub use crate::glue::bindings::exports::cofferdam::driver::block::{
        Guest as BlockGuest, Properties as WitProperties,
    };

    impl From<crate::BlockProperties> for WitProperties {
        fn from(properties: crate::BlockProperties) -> Self {
            Self {
                capacity_bytes: properties.capacity_bytes,
                logical_block_bytes: properties.logical_block_bytes,
                physical_block_bytes: properties.physical_block_bytes,
                max_transfer_bytes: properties.max_transfer_bytes,
                read_only: properties.read_only,
                can_flush: properties.can_flush,
                max_discard_bytes: properties.max_discard_bytes,
                discard_align_bytes: properties.discard_align_bytes,
                max_write_zeroes_bytes: properties.max_write_zeroes_bytes,
                write_zeroes_may_unmap: properties.write_zeroes_may_unmap,
                has_id: properties.has_id,
            }
        }
    }
}

#[cfg(all(feature = "entropy", not(feature = "block")))]
mod entropy {
    pub use crate::glue::bindings::exports::cofferdam::driver::entropy::{
        Guest as EntropyGuest, Properties as WitProperties,
    };

    impl From<crate::EntropyProperties> for WitProperties {
        fn from(properties: crate::EntropyProperties) -> Self {
            Self { max_request_bytes: properties.max_request_bytes }
        }
    }
}

#[cfg(all(feature = "stream", not(any(feature = "block", feature = "entropy"))))]
mod stream {
    pub use crate::glue::bindings::exports::cofferdam::driver::stream::{
        Guest as StreamGuest, Port as WitPort, Properties as WitProperties,
    };
    pub use crate::glue::bindings::exports::cofferdam::driver::stream_control::Guest as StreamControlGuest;

    impl From<crate::StreamProperties> for WitProperties {
        fn from(properties: crate::StreamProperties) -> Self {
            let port = |port: crate::StreamPort| WitPort {
                index: port.index,
                set: port.set,
                name: port.name,
                console: port.console,
                open: port.open,
                size: port.size,
            };
            Self {
                ports: properties.ports.into_iter().map(port).collect(),
                max_write_bytes: properties.max_write_bytes,
            }
        }
    }
}

#[cfg(all(feature = "net", not(any(feature = "block", feature = "entropy", feature = "stream"))))]
mod net {
    pub use crate::glue::bindings::exports::cofferdam::driver::net::{
        Guest as NetGuest, Offloads as WitOffloads, Properties as WitProperties,
    };

    impl From<crate::NetProperties> for WitProperties {
        fn from(properties: crate::NetProperties) -> Self {
            let has = |on: bool, offload: WitOffloads| if on { offload } else { WitOffloads::empty() };
            let crate::Offloads {
                transmit_checksum,
                receive_checksum,
                transmit_tcp4,
                transmit_tcp6,
                receive_tcp4,
                receive_tcp6,
            } = properties.offloads;
            Self {
                mac: properties.mac.map(Vec::from),
                mtu: properties.mtu,
                link_up: properties.link_up,
                pairs: properties.pairs,
                max_packet_bytes: properties.max_packet_bytes,
                offloads: has(transmit_checksum, WitOffloads::TRANSMIT_CHECKSUM)
                    | has(receive_checksum, WitOffloads::RECEIVE_CHECKSUM)
                    | has(transmit_tcp4, WitOffloads::TRANSMIT_TCP4)
                    | has(transmit_tcp6, WitOffloads::TRANSMIT_TCP6)
                    | has(receive_tcp4, WitOffloads::RECEIVE_TCP4)
                    | has(receive_tcp6, WitOffloads::RECEIVE_TCP6),
            }
        }
    }
}
