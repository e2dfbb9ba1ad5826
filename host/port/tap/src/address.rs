//! The name of the interface.

use std::fmt;
use std::str::FromStr;

use crate::error::TapError;

/// Longest name of an interface, in bytes (linux/if.h: `IFNAMSIZ` and its terminator).
const MAX_NAME_BYTES: usize = 15;

/// An address as an operator writes it: `tap:lan0`.
///
/// ```
/// use cofferdam_port_tap::TapAddress;
/// assert!("tap:lan0".parse::<TapAddress>().is_ok());
/// assert!("tap:a-name-of-16-byt".parse::<TapAddress>().is_err());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapAddress {
    name: String,
}

impl TapAddress {
    /// The interface's name, 1 to 15 bytes.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl FromStr for TapAddress {
    type Err = TapError;

    fn from_str(text: &str) -> Result<TapAddress, TapError> {
        let bad = |why: &'static str| TapError::Address { address: text.to_owned(), why };
        let name = text.strip_prefix("tap:").ok_or_else(|| bad("it does not begin with 'tap:'"))?;
        if name.is_empty() {
            return Err(bad("the name of the interface is missing"));
        }
        if name.len() > MAX_NAME_BYTES {
            return Err(bad("the name of an interface has at most 15 bytes"));
        }
        // The kernel's rules (dev_valid_name), and '%', which would have it choose a number.
        let is_odd = |c: char| c == '/' || c == ':' || c == '%' || c.is_whitespace() || c.is_control();
        if name == "." || name == ".." || name.contains(is_odd) {
            return Err(bad("this cannot be the name of an interface"));
        }
        Ok(TapAddress { name: name.to_owned() })
    }
}

impl fmt::Display for TapAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tap:{}", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_the_kernel_would_refuse_or_change_is_refused() {
        for good in ["tap:lan0", "tap:a", "tap:a-15-bytes-name"] {
            assert_eq!(good.parse::<TapAddress>().unwrap().to_string(), good);
        }
        let odd = [
            "tap",
            "nbd:a",
            "tap:",
            "tap:a-16-bytes-names",
            "tap:a/b",
            "tap:a b",
            "tap:tap%d",
            "tap:..",
            "tap:a:1",
            "tap:a\0",
        ];
        for bad in odd {
            assert!(matches!(bad.parse::<TapAddress>(), Err(TapError::Address { .. })), "{bad}");
        }
    }
}
