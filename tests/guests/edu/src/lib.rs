//! Drivers for QEMU's edu device (docs/specs/edu.rst of QEMU): a BAR of registers, an interrupt, and a DMA engine with a buffer of 4 KiB.
//!
//! | feature | what it does in `attach` |
//! | --- | --- |
//! | (none) | liveness check and a factorial; registers alone |
//! | `dma` | besides, 4 KiB of its own memory out to the device and back to another place, and the interrupt at the end |
//! | `stray` | besides, a DMA to an address beside its memory |
//! | `guess` | registers alone, and a DMA from [`SOURCE`] to [`GUESSED`], where it has no business |
//!
//! What came of it is written to the log, in words that tests look for.

use cofferdam_sdk::function::{FunctionDriver, Registers};
use cofferdam_sdk::{DriverError, log};

/// Vendor and device.
const IDS: (u16, u16) = (0x1234, 0x11e8);
const IDENTIFICATION: u64 = 0x00;
const LIVENESS: u64 = 0x04;
const FACTORIAL: u64 = 0x08;
const STATUS: u64 = 0x20;
const COMPUTING: u32 = 0x01;

/// The physical address that `guess` programs: in the first 64 KiB, which Linux leaves alone.
pub const GUESSED: u64 = 0x9000;
/// Where it has the 8 bytes from: the first of the kernel, which lies at 16 MiB unless it is moved.
pub const SOURCE: u64 = 0x100_0000;

/// One of the drivers.
pub struct Edu;

impl FunctionDriver for Edu {
    fn attach(function: &dyn Registers) -> Result<Self, DriverError> {
        let ids = function.ids();
        if (ids.vendor, ids.device) != IDS {
            return Err(DriverError::NotMine(format!("{:04x}:{:04x} is not edu", ids.vendor, ids.device)));
        }
        look(function)?;
        #[cfg(all(target_family = "wasm", feature = "dma"))]
        engine::with_memory(function)?;
        #[cfg(feature = "guess")]
        engine::guess(function)?;
        Ok(Edu)
    }
}

/// Registers that any driver may use.
fn look(function: &dyn Registers) -> Result<(), DriverError> {
    let identification = function.read32(0, IDENTIFICATION)?;
    if identification & 0xff != 0xed {
        return Err(DriverError::Device(format!("identification {identification:#x} does not end in 0xed")));
    }
    function.write32(0, LIVENESS, 0x1234_5678)?;
    let inverted = function.read32(0, LIVENESS)?;
    if inverted != !0x1234_5678 {
        return Err(DriverError::Device(format!("liveness check read {inverted:#x}")));
    }
    function.write32(0, FACTORIAL, 5)?;
    // The device computes in a thread of its own. A register read is a call of the host, which bounds how many of them there can be in time.
    while function.read32(0, STATUS)? & COMPUTING != 0 {}
    let factorial = function.read32(0, FACTORIAL)?;
    log::info(&format!("edu: 5! is {factorial}"));
    Ok(())
}

#[cfg(any(feature = "dma", feature = "guess"))]
mod engine {
    use cofferdam_sdk::function::Registers;
    use cofferdam_sdk::{DriverError, log};

    const SOURCE: u64 = 0x80;
    const DESTINATION: u64 = 0x88;
    const COUNT: u64 = 0x90;
    const COMMAND: u64 = 0x98;
    /// Address of the device's own buffer, as its DMA engine has it.
    const BUFFER: u64 = 0x4_0000;
    const START: u32 = 1;
    const TO_MEMORY: u32 = 2;
    #[cfg(all(target_family = "wasm", feature = "dma"))]
    const INTERRUPT: u32 = 4;

    /// Starts a transfer and waits until the device says that it is over; the device takes 100 ms.
    fn transfer(
        function: &dyn Registers,
        from: u64,
        to: u64,
        count: u64,
        command: u32,
        mut meanwhile: impl FnMut() -> Result<(), DriverError>,
    ) -> Result<(), DriverError> {
        function.write64(0, SOURCE, from)?;
        function.write64(0, DESTINATION, to)?;
        function.write64(0, COUNT, count)?;
        function.write32(0, COMMAND, command | START)?;
        meanwhile()?;
        while function.read32(0, COMMAND)? & START != 0 {}
        Ok(())
    }

    #[cfg(feature = "guess")]
    pub(crate) fn guess(function: &dyn Registers) -> Result<(), DriverError> {
        let address = crate::GUESSED;
        transfer(function, crate::SOURCE, BUFFER, 8, 0, || Ok(()))?;
        transfer(function, BUFFER, address, 8, TO_MEMORY, || Ok(()))?;
        log::info(&format!("edu: a DMA to {address:#x} was asked for"));
        Ok(())
    }

    #[cfg(all(target_family = "wasm", feature = "dma"))]
    pub(crate) fn with_memory(function: &dyn Registers) -> Result<(), DriverError> {
        use cofferdam_sdk::{dma, interrupt};

        const INTERRUPT_STATUS: u64 = 0x24;
        const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
        const HALF: u64 = 2048;
        let region = dma::Region::allocate(4096)?;
        let pattern: Vec<u8> = (0..HALF).map(|number| (number % 251) as u8).collect();
        region.write(0, &pattern)?;
        transfer(function, region.address(), BUFFER, HALF, 0, || Ok(()))?;
        let mut came = false;
        transfer(function, BUFFER, region.address() + HALF, HALF, TO_MEMORY | INTERRUPT, || {
            came = interrupt::wait(0, 1_000)?;
            let status = function.read32(0, INTERRUPT_STATUS)?;
            function.write32(0, INTERRUPT_ACKNOWLEDGE, status)?;
            Ok(())
        })?;
        if region.read(HALF as u32, HALF as u32)? != pattern {
            return Err(DriverError::Device("what came back by DMA is not what went out".into()));
        }
        log::info(&format!("edu: {HALF} bytes went out and came back by DMA, interrupt: {came}"));
        #[cfg(feature = "stray")]
        {
            let beside = region.address() + 0x100_0000;
            transfer(function, BUFFER, beside, 64, TO_MEMORY, || Ok(()))?;
            let intact = region.read(0, HALF as u32)? == pattern;
            log::info(&format!("edu: a DMA to {beside:#x} was asked for, own memory intact: {intact}"));
        }
        Ok(())
    }
}

cofferdam_sdk::export_function_driver!(Edu, devices: [cofferdam_sdk::DeviceId::pci(IDS.0, IDS.1)]);
