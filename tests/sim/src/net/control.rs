//! The control queue (virtio 1.2, section 5.1.6.5).

use std::collections::VecDeque;

use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_MQ};

use super::model::has;

/// VIRTIO_NET_OK.
pub(super) const OK: u8 = 0;
/// VIRTIO_NET_ERR.
pub(super) const ERROR: u8 = 1;

const CLASS_RX: u8 = 0;
const CLASS_MAC: u8 = 1;
const CLASS_MQ: u8 = 4;

/// Most commands that are kept; the oldest go.
const MAX_COMMANDS: usize = 1024;

/// One command, as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// VIRTIO_NET_CTRL_RX (0), MAC (1), MQ (4).
    pub class: u8,
    /// Which of the class's commands.
    pub command: u8,
    /// What is between the two and the acknowledgement.
    pub data: Vec<u8>,
    /// The acknowledgement: 0 is VIRTIO_NET_OK, 1 is VIRTIO_NET_ERR.
    pub ack: u8,
}

/// What commands have set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlState {
    /// VIRTIO_NET_CTRL_RX_PROMISC.
    pub promiscuous: bool,
    /// VIRTIO_NET_CTRL_RX_ALLMULTI.
    pub all_multicast: bool,
    /// Pairs of queues in use, from 1.
    pub pairs: u16,
}

impl Default for ControlState {
    fn default() -> Self {
        Self { promiscuous: false, all_multicast: false, pairs: 1 }
    }
}

#[derive(Default)]
pub(super) struct Control {
    pub(super) state: ControlState,
    pub(super) commands: VecDeque<Command>,
}

impl Control {
    /// Carries a command out, unless it is to `fail`, and acknowledges it.
    pub(super) fn carry_out(&mut self, bytes: &[u8], features: u64, max_pairs: u16, fail: bool) -> u8 {
        let (&class, &command, data) = match bytes {
            [class, command, data @ ..] => (class, command, data),
            _ => return ERROR,
        };
        let done = !fail && self.apply(class, command, data, features, max_pairs);
        let ack = if done { OK } else { ERROR };
        if self.commands.len() == MAX_COMMANDS {
            self.commands.pop_front();
        }
        self.commands.push_back(Command { class, command, data: data.to_vec(), ack });
        ack
    }

    fn apply(&mut self, class: u8, command: u8, data: &[u8], features: u64, max_pairs: u16) -> bool {
        let filters = has(features, VIRTIO_NET_F_CTRL_RX);
        match (class, command, data) {
            (CLASS_RX, 0, [on]) if filters => self.state.promiscuous = *on != 0,
            (CLASS_RX, 1, [on]) if filters => self.state.all_multicast = *on != 0,
            // Everything is received whatever the table says, which a device may do (section 5.1.6.5.2).
            (CLASS_MAC, 0, tables) if filters => return are_tables(tables),
            (CLASS_MQ, 0, &[low, high]) if has(features, VIRTIO_NET_F_MQ) => {
                let pairs = u16::from_le_bytes([low, high]);
                if pairs == 0 || pairs > max_pairs {
                    return false;
                }
                self.state.pairs = pairs;
            }
            _ => return false,
        }
        true
    }
}

/// Two tables of addresses, each with their number in front (`struct virtio_net_ctrl_mac`).
fn are_tables(bytes: &[u8]) -> bool {
    let table = |bytes: &mut &[u8]| {
        let (count, rest) = bytes.split_first_chunk::<4>()?;
        let bytes_of = usize::try_from(u32::from_le_bytes(*count)).ok()?.checked_mul(6)?;
        *bytes = rest.get(bytes_of..)?;
        Some(())
    };
    let mut rest = bytes;
    table(&mut rest).and_then(|()| table(&mut rest)).is_some() && rest.is_empty()
}
