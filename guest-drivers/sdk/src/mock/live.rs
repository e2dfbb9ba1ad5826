//! The device from DRIVER_OK on: a script of answers, and a record of what was asked.

use std::collections::VecDeque;

use crate::device::{LiveDevice, VirtioDevice};
use crate::error::VirtioError;
use crate::mock::MockDevice;

/// Longest request and longest response of a command in bytes (`wit/virtio.wit`).
const MAX_COMMAND_BYTES: usize = 4096;

/// A [`MockDevice`] that runs: it takes down every command, and answers as the test has put it down beforehand.
///
/// ```
/// use cofferdam_sdk::{LiveDevice, VirtioError, mock::{MockDevice, MockLive}};
///
/// let mut live = MockLive::new(MockDevice::new(1));
/// live.answers.extend([Ok(vec![0]), Err(VirtioError::Device("no answer in time".into()))]);
/// assert_eq!(live.command(&[1, 2], 1).unwrap(), [0]);
/// assert!(live.command(&[3], 1).is_err());
/// assert!(live.command(&[4], 1).is_err()); // the queue was given up
/// assert_eq!(live.commands, [vec![1, 2], vec![3]]);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MockLive {
    /// What configuration space is read from.
    pub device: MockDevice,
    /// The requests that reached the device, in order.
    pub commands: Vec<Vec<u8>>,
    /// What the device answers to the next commands. With none left it uses the request and writes nothing. A longer answer than there is room for is cut.
    pub answers: VecDeque<Result<Vec<u8>, VirtioError>>,
    /// A command was not answered: every later one fails and reaches nobody.
    pub given_up: bool,
}

impl MockLive {
    /// A device that writes nothing into any response.
    #[must_use]
    pub fn new(device: MockDevice) -> Self {
        Self { device, commands: Vec::new(), answers: VecDeque::new(), given_up: false }
    }
}

impl LiveDevice for MockLive {
    fn read_config(&mut self, offset: u32, length: u32) -> Result<Vec<u8>, VirtioError> {
        self.device.read_config(offset, length)
    }

    fn command(&mut self, request: &[u8], response_bytes: u32) -> Result<Vec<u8>, VirtioError> {
        if request.is_empty() || request.len() > MAX_COMMAND_BYTES || response_bytes as usize > MAX_COMMAND_BYTES {
            let sent = request.len();
            return Err(VirtioError::Invalid(format!("a command of {sent} bytes, {response_bytes} for the response")));
        }
        if self.given_up || self.device.lost {
            return Err(VirtioError::Device("gone".into()));
        }
        self.commands.push(request.to_vec());
        let answer = self.answers.pop_front().unwrap_or_else(|| Ok(Vec::new()));
        self.given_up = matches!(answer, Err(VirtioError::Device(_)));
        answer.map(|mut bytes| {
            bytes.truncate(response_bytes as usize);
            bytes
        })
    }
}
