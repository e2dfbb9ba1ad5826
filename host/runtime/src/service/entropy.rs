//! What a source of entropy can do.

use super::breach;
use crate::bindings::entropy::exports::cofferdam::driver::entropy as wit;
use crate::fault::GuestFault;

/// What a source of entropy can do, checked against the bounds in `wit/entropy.wit`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntropyProperties {
    /// Largest payload of one request in bytes, 1 to 65,536.
    pub max_request_bytes: u32,
}

impl EntropyProperties {
    pub(crate) fn check(words: &wit::Properties) -> Result<EntropyProperties, GuestFault> {
        match words.max_request_bytes {
            max_request_bytes @ 1..=65_536 => Ok(EntropyProperties { max_request_bytes }),
            other => breach("max-request-bytes", other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_a_byte_at_least_and_no_more_than_a_buffer() {
        let check = |max_request_bytes| EntropyProperties::check(&wit::Properties { max_request_bytes }).is_ok();
        assert!(check(1) && check(65_536));
        assert!(!check(0) && !check(65_537));
    }
}
