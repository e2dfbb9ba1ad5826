//! Where a function is.

use std::fmt;
use std::str::FromStr;

use crate::error::PciError;

/// Domain, bus, device and function; written `0000:00:04.0` as sysfs and lspci do. An operator may leave out the domain and may put `pci:` in front.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    domain: u32,
    bus: u8,
    /// 0 to 31.
    device: u8,
    /// 0 to 7.
    function: u8,
}

impl FromStr for Address {
    type Err = PciError;

    fn from_str(text: &str) -> Result<Self, PciError> {
        let bad = || PciError::Address { address: text.chars().take(64).collect() };
        let bare = text.strip_prefix("pci:").unwrap_or(text);
        let (front, function) = bare.rsplit_once('.').ok_or_else(bad)?;
        let mut parts = front.rsplit(':');
        let (device, bus, domain) = (parts.next(), parts.next(), parts.next());
        if parts.next().is_some() {
            return Err(bad());
        }
        // `from_str_radix` takes a sign, an address has none.
        let hex = |part: Option<&str>, digits: std::ops::RangeInclusive<usize>, most: u32| {
            let part = part.filter(|part| digits.contains(&part.len()) && part.bytes().all(|b| b.is_ascii_hexdigit()));
            part.and_then(|part| u32::from_str_radix(part, 16).ok()).filter(|value| *value <= most).ok_or_else(bad)
        };
        // Domains of more than 16 bits exist (Hyper-V, VMD: sysfs writes them with up to 8 digits).
        Ok(Address {
            domain: hex(domain.or(Some("0000")), 1..=8, u32::MAX)?,
            bus: hex(bus, 1..=2, 0xff)? as u8,
            device: hex(device, 1..=2, 0x1f)? as u8,
            function: hex(Some(function), 1..=1, 7)? as u8,
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_operators_write_is_understood_and_told_in_one_way() {
        for (written, told) in [
            ("pci:0000:00:04.0", "0000:00:04.0"),
            ("0000:00:04.0", "0000:00:04.0"),
            ("00:1f.7", "0000:00:1f.7"),
            ("pci:3:A.1", "0000:03:0a.1"),
            ("10000:e1:00.0", "10000:e1:00.0"),
        ] {
            assert_eq!(written.parse::<Address>().unwrap().to_string(), told, "{written}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused_and_builds_no_path() {
        for text in [
            "",
            "pci:",
            ".",
            ":.",
            "0000:00:04",
            "0000:00:04.8",
            "0000:00:20.0",
            "0000:100:04.0",
            "1:0000:00:04.0",
            "00:04.00",
            "+0:04.0",
            "00:-4.0",
            "../../x.0",
            "00:04.0/..",
            "00:04.0\n",
            " 00:04.0",
            "00:０4.0",
            "123456789:00:00.0",
        ] {
            assert!(matches!(text.parse::<Address>(), Err(PciError::Address { .. })), "{text:?}");
        }
    }
}
