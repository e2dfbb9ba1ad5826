//! Where a port listens.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::DataError;

/// Longest path of a Unix socket, in bytes (unix(7): `sun_path` and its terminator).
const MAX_PATH_BYTES: usize = 107;

/// An address as an operator writes it: `data:/run/disk.data`.
///
/// ```
/// use cofferdam_port_data::DataAddress;
/// assert!("data:/run/disk.data".parse::<DataAddress>().is_ok());
/// assert!("data:disk.data".parse::<DataAddress>().is_err(), "absolute, because the daemon's directory is not the operator's");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataAddress(PathBuf);

impl DataAddress {
    /// The socket's file.
    #[must_use]
    pub fn path(&self) -> &std::path::Path {
        &self.0
    }
}

impl FromStr for DataAddress {
    type Err = DataError;

    fn from_str(text: &str) -> Result<DataAddress, DataError> {
        let bad = |why: &'static str| DataError::Address { address: text.to_owned(), why };
        let path = text.strip_prefix("data:").ok_or_else(|| bad("it does not begin with 'data:'"))?;
        if !path.starts_with('/') {
            return Err(bad("expected an absolute path"));
        }
        if path.len() > MAX_PATH_BYTES {
            return Err(bad("the path of a Unix socket has at most 107 bytes"));
        }
        if path.contains('\0') || path.ends_with('/') {
            return Err(bad("this is not the path of a file"));
        }
        Ok(DataAddress(PathBuf::from(path)))
    }
}

impl fmt::Display for DataAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "data:{}", self.0.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_say_what_is_wrong_with_them_and_print_as_they_are_written() {
        for (text, why) in [
            ("nbd:/a", "data:"),
            ("data:a", "absolute"),
            ("data:", "absolute"),
            ("data:/a/", "path"),
            ("data:/a\0", "path"),
        ] {
            let error = text.parse::<DataAddress>().map(|a| a.to_string()).unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
        assert!(format!("data:/{}", "x".repeat(107)).parse::<DataAddress>().is_err());
        assert_eq!("data:/run/a".parse::<DataAddress>().map(|a| a.to_string()).ok().as_deref(), Some("data:/run/a"));
    }
}
