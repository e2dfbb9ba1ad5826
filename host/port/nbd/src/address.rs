//! Where a port listens.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::NbdError;

/// Longest path of a Unix socket, in bytes (unix(7): `sun_path` and its terminator).
const MAX_PATH_BYTES: usize = 107;

/// An address as an operator writes it: `nbd:/run/disk.sock`, `nbd:127.0.0.1:10809`, `nbd:[::1]:10809`.
///
/// ```
/// use cofferdam_port_nbd::NbdAddress;
/// assert!("nbd:/run/disk.sock".parse::<NbdAddress>().is_ok());
/// assert!("nbd:[::1]:10809".parse::<NbdAddress>().is_ok());
/// assert!("nbd:0.0.0.0:10809".parse::<NbdAddress>().is_err(), "only loopback: there is neither TLS nor a password");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdAddress {
    /// A Unix stream socket at an absolute path.
    Unix(PathBuf),
    /// TCP on a loopback address. Port 0 takes any that is free.
    Tcp(SocketAddr),
}

impl FromStr for NbdAddress {
    type Err = NbdError;

    fn from_str(text: &str) -> Result<NbdAddress, NbdError> {
        let bad = |why: &'static str| NbdError::Address { address: text.to_owned(), why };
        let rest = text.strip_prefix("nbd:").ok_or_else(|| bad("it does not begin with 'nbd:'"))?;
        if rest.starts_with('/') {
            if rest.len() > MAX_PATH_BYTES {
                return Err(bad("the path of a Unix socket has at most 107 bytes"));
            }
            if rest.contains('\0') || rest.ends_with('/') {
                return Err(bad("this is not the path of a file"));
            }
            return Ok(NbdAddress::Unix(PathBuf::from(rest)));
        }
        let socket: SocketAddr =
            rest.parse().map_err(|_| bad("expected an absolute path, 127.0.0.1:PORT or [::1]:PORT"))?;
        if !socket.ip().is_loopback() {
            return Err(bad(
                "only loopback addresses are served over TCP, for there is neither encryption nor authentication",
            ));
        }
        Ok(NbdAddress::Tcp(socket))
    }
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NbdAddress::Unix(path) => write!(f, "nbd:{}", path.display()),
            NbdAddress::Tcp(socket) => write!(f, "nbd:{socket}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_say_what_is_wrong_with_them() {
        for (text, why) in [
            ("unix:/a", "nbd:"),
            ("nbd:relative.sock", "absolute"),
            ("nbd:127.0.0.1", "PORT"),
            ("nbd:192.0.2.1:10809", "loopback"),
            ("nbd:[::]:10809", "loopback"),
            ("nbd:/dir/", "path"),
            ("nbd:", "absolute"),
        ] {
            let error = text.parse::<NbdAddress>().map(|a| a.to_string()).unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
        let long = format!("nbd:/{}", "x".repeat(107));
        assert!(long.parse::<NbdAddress>().is_err());
    }

    #[test]
    fn an_address_prints_as_it_is_written() {
        for text in ["nbd:/run/a.sock", "nbd:127.0.0.1:10809", "nbd:[::1]:10809"] {
            assert_eq!(text.parse::<NbdAddress>().map(|a| a.to_string()).ok().as_deref(), Some(text));
        }
    }
}
