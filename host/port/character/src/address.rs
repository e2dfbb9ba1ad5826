//! Where the bytes go.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::CharacterError;

/// Bytes per second that the kernel's pool is credited with, if nothing else is said: enough to reseed it every few seconds.
const POOL_RATE: u32 = 64;
/// Most of them: more is of no use to anybody, and each is work of the kernel.
const MAX_POOL_RATE: u32 = 4096;
/// Ports that a console may have (`wit/stream.wit`).
const PORTS: u32 = 32;

/// An address as an operator writes it.
///
/// ```
/// use cofferdam_port_character::CharacterAddress;
/// assert!("fifo:/run/random".parse::<CharacterAddress>().is_ok());
/// assert!("pty:/run/console,port=1".parse::<CharacterAddress>().is_ok());
/// assert!("pty:console".parse::<CharacterAddress>().is_err(), "only absolute paths mean the same in the daemon");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CharacterAddress {
    /// `fifo:/path`: random bytes for whoever reads the named pipe.
    Fifo(PathBuf),
    /// `entropy-pool[,rate=N]`: random bytes into the kernel's own pool, which is credited with them.
    EntropyPool {
        /// Bytes per second, 1 to 4096.
        rate: u32,
    },
    /// `pty:/link/path[,port=N]`: a port of a console as a pseudo terminal, with a symbolic link to it.
    Pty {
        /// The link.
        link: PathBuf,
        /// The device's number of the port.
        port: u32,
    },
    /// `stdio[,port=N]`: a port of a console on the terminal, or the pipes, of this very process.
    Stdio {
        /// The device's number of the port.
        port: u32,
    },
}

impl CharacterAddress {
    /// Whether `text` is meant to be one of these, right or wrong.
    #[must_use]
    pub fn is_meant(text: &str) -> bool {
        let scheme = text.split([':', ',']).next();
        matches!(scheme, Some("fifo" | "entropy-pool" | "pty" | "stdio"))
    }

    /// The service that it needs, as `cofferdam_manager::Offer` calls it.
    #[must_use]
    pub fn service(&self) -> &'static str {
        match self {
            CharacterAddress::Fifo(_) | CharacterAddress::EntropyPool { .. } => "entropy",
            CharacterAddress::Pty { .. } | CharacterAddress::Stdio { .. } => "stream",
        }
    }
}

impl FromStr for CharacterAddress {
    type Err = CharacterError;

    fn from_str(text: &str) -> Result<CharacterAddress, CharacterError> {
        let bad = |why: &'static str| CharacterError::Address { address: text.to_owned(), why };
        let path = |path: &str| {
            let is_file = path.starts_with('/') && !path.ends_with('/') && !path.contains('\0');
            if is_file { Ok(Path::new(path).to_owned()) } else { Err(bad("expected the absolute path of a file")) }
        };
        // A comma in a path is a part of it, unless what is behind it is an option.
        let option = |text: &str, name: &str, default: u32, range: std::ops::RangeInclusive<u32>, why: &'static str| {
            let Some((before, value)) = text.rsplit_once(&format!(",{name}=")) else {
                return Ok::<_, CharacterError>((text.to_owned(), default));
            };
            let value = value.parse().ok().filter(|value| range.contains(value)).ok_or_else(|| bad(why))?;
            Ok((before.to_owned(), value))
        };
        let port = |text: &str| option(text, "port", 0, 0..=PORTS - 1, "a port's number is 0 to 31");
        if let Some(rest) = text.strip_prefix("fifo:") {
            return path(rest).map(CharacterAddress::Fifo);
        }
        if let Some(rest) = text.strip_prefix("pty:") {
            let (link, port) = port(rest)?;
            return Ok(CharacterAddress::Pty { link: path(&link)?, port });
        }
        let (name, port) = port(text)?;
        if name == "stdio" {
            return Ok(CharacterAddress::Stdio { port });
        }
        let why = "a rate is 1 to 4096 bytes per second";
        match option(text, "rate", POOL_RATE, 1..=MAX_POOL_RATE, why)? {
            (name, rate) if name == "entropy-pool" => Ok(CharacterAddress::EntropyPool { rate }),
            _ => Err(bad("expected fifo:/path, entropy-pool[,rate=N], pty:/link/path[,port=N] or stdio[,port=N]")),
        }
    }
}

impl fmt::Display for CharacterAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let port = |port: u32| if port == 0 { String::new() } else { format!(",port={port}") };
        match self {
            CharacterAddress::Fifo(path) => write!(f, "fifo:{}", path.display()),
            CharacterAddress::EntropyPool { rate: POOL_RATE } => write!(f, "entropy-pool"),
            CharacterAddress::EntropyPool { rate } => write!(f, "entropy-pool,rate={rate}"),
            CharacterAddress::Pty { link, port: number } => write!(f, "pty:{}{}", link.display(), port(*number)),
            CharacterAddress::Stdio { port: number } => write!(f, "stdio{}", port(*number)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_prints_as_it_is_written() {
        for text in [
            "fifo:/run/random",
            "fifo:/run/a,b",
            "entropy-pool",
            "entropy-pool,rate=1",
            "pty:/run/console",
            "pty:/run/console,port=31",
            "stdio",
            "stdio,port=2",
        ] {
            let address = text.parse::<CharacterAddress>().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(address.to_string(), text);
            assert!(CharacterAddress::is_meant(text));
        }
    }

    #[test]
    fn addresses_say_what_is_wrong_with_them() {
        for (text, why) in [
            ("fifo:random", "absolute"),
            ("fifo:/run/", "absolute"),
            ("fifo", "expected fifo:/path"),
            ("entropy-pool,rate=0", "1 to 4096"),
            ("entropy-pool,rate=4097", "1 to 4096"),
            ("entropy-pool:/x", "expected fifo:/path"),
            ("pty:/run/console,port=32", "0 to 31"),
            ("pty:/run/console,port=", "0 to 31"),
            ("pty:", "absolute"),
            ("stdio:", "expected fifo:/path"),
            ("stdio,port=-1", "0 to 31"),
        ] {
            let error = text.parse::<CharacterAddress>().map(|a| a.to_string()).unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
            assert!(CharacterAddress::is_meant(text), "{text}");
        }
        assert!(!CharacterAddress::is_meant("nbd:/fifo:") && !CharacterAddress::is_meant("ptyx:/a"));
    }
}
