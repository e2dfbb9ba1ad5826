//! The two ways in which things are refused: by the driver, and to the driver.

/// Why a driver refuses a device or cannot go on: `types.driver-error` of the WIT. The text is for the operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    /// The device is not of a kind that this driver serves; the host may ask another driver.
    #[error("not a device of this driver: {0}")]
    NotMine(String),
    /// The device broke its specification; the text says how and cites the section.
    #[error("the device broke its specification: {0}")]
    Device(String),
    /// The device is of the right kind, but needs something that this driver does not do.
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// The host refused an import that the driver cannot do without, or called out of order.
    #[error("the host refused: {0}")]
    Host(String),
}

/// Why the host or the device refused a call of the driver: `virtio.virtio-error` of the WIT.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VirtioError {
    /// The call is not legal now (for instance a second `negotiate`).
    #[error("called out of order: {0}")]
    OutOfOrder(String),
    /// An argument is out of its bound.
    #[error("invalid argument: {0}")]
    Invalid(String),
    /// The device refused, timed out or is gone.
    #[error("device: {0}")]
    Device(String),
}

impl From<VirtioError> for DriverError {
    /// A refusal is handed on to whoever caused it: the device, or the host.
    fn from(error: VirtioError) -> Self {
        match error {
            VirtioError::Device(text) => Self::Device(text),
            other => Self::Host(other.to_string()),
        }
    }
}
