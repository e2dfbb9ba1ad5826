//! The service `entropy`: random bytes.

/// What a source of entropy can do: `entropy.properties` of the WIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntropyProperties {
    /// Largest payload of one request in bytes, 1 to 65,536.
    pub max_request_bytes: u32,
}
