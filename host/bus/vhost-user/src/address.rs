//! The address of a vhost-user device as an operator writes it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::ConnectError;

/// What an address of this bus starts with.
pub const SCHEME: &str = "vhost-user:";

/// Longest path of a Unix socket in bytes: `sun_path` is 108 with its closing zero (unix(7)).
pub const MAX_PATH_BYTES: usize = 107;

/// A checked address: `vhost-user:` and the absolute path of a Unix socket.
///
/// ```
/// use cofferdam_bus_vhost_user::Address;
///
/// let address: Address = "vhost-user:/run/blk.sock".parse()?;
/// assert_eq!(address.path().to_str(), Some("/run/blk.sock"));
/// assert!("vhost-user:blk.sock".parse::<Address>().is_err());
/// # Ok::<(), cofferdam_bus_vhost_user::ConnectError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    path: PathBuf,
}

impl Address {
    /// The socket's path: absolute, from 2 to [`MAX_PATH_BYTES`] bytes, no zero byte.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl FromStr for Address {
    type Err = ConnectError;

    /// Checks the form alone; whether anything is there is for [`crate::VhostUser::connect`] to say.
    fn from_str(text: &str) -> Result<Self, ConnectError> {
        let refuse = |why: &str| Err(ConnectError::Address { address: text.to_owned(), why: why.to_owned() });
        let Some(path) = text.strip_prefix(SCHEME) else {
            return refuse("it does not start with vhost-user:");
        };
        if path.is_empty() {
            return refuse("the path is empty");
        }
        // A daemon and its command line have different working directories: a relative path would mean two things.
        if !path.starts_with('/') {
            return refuse("the path is relative; write it from / on");
        }
        if path.ends_with('/') {
            return refuse("the path names a directory");
        }
        if path.len() > MAX_PATH_BYTES {
            return refuse("the path is longer than the 107 bytes that a Unix socket may have");
        }
        if path.contains('\0') {
            return refuse("the path contains a zero byte");
        }
        Ok(Address { path: PathBuf::from(path) })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", self.path.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why(text: &str) -> String {
        text.parse::<Address>().unwrap_err().to_string()
    }

    #[test]
    fn an_absolute_path_is_kept_as_written() {
        let address: Address = "vhost-user:/run/a b.sock".parse().unwrap();
        assert_eq!(address.path(), Path::new("/run/a b.sock"));
        assert_eq!(address.to_string(), "vhost-user:/run/a b.sock");
    }

    #[test]
    fn every_bad_form_says_what_is_wrong_with_it() {
        assert!(why("pci:0000:00:01.0").contains("does not start with"));
        assert!(why("vhost-user:").contains("empty"));
        assert!(why("vhost-user:blk.sock").contains("relative"));
        assert!(why("vhost-user:/run/").contains("directory"));
        assert!(why("vhost-user:/a\0b").contains("zero byte"));
    }

    #[test]
    fn the_longest_path_is_107_bytes() {
        let longest = format!("vhost-user:/{}", "x".repeat(MAX_PATH_BYTES - 1));
        assert!(longest.parse::<Address>().is_ok());
        assert!(why(&format!("{longest}x")).contains("107 bytes"));
    }
}
