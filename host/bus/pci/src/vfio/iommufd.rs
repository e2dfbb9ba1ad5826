//! The same through iommufd: `/dev/iommu` and the function's own node, without groups and containers.
//!
//! Written from linux/iommufd.h and linux/vfio.h, and run on no kernel so far: the one of the test bed has no iommufd. It is used where a kernel offers nothing else.

use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use cap_std::fs::Dir;
use rustix::fs::{Mode, OFlags};
use vfio_bindings::bindings::vfio as v;

use super::ioctl::{self, Argument, Request, Translator};
use super::iommu::IommuBackend;
use crate::attributes::{self, refused};
use crate::{Address, PciError};

/// An address space of its own.
struct Iommufd {
    iommufd: OwnedFd,
    space: u32,
    ranges: Vec<(u64, u64)>,
}

/// Binds the function to an iommufd of its own and attaches it to an empty address space, in this order: before it is bound it answers nothing else.
pub(super) fn open(address: Address, device: &Dir) -> Result<(OwnedFd, Box<dyn IommuBackend>), PciError> {
    let io = |what: &str| refused(address, what.to_owned());
    let number = match attributes::numbered(device, "vfio-dev", "vfio") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(PciError::Unusable { address, why: "vfio-pci is not bound to it".to_owned() });
        }
        number => number.map_err(io("find its vfio device"))?,
    };
    let (dev, path) = (format!("vfio-dev/vfio{number}/dev"), format!("/dev/vfio/devices/vfio{number}"));
    let function = attributes::open_node(device, &dev, &path).map_err(io(&format!("open {path}")))?;
    let iommufd = rustix::fs::open("/dev/iommu", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| io("open /dev/iommu")(errno.into()))?;

    type Bind = v::vfio_device_bind_iommufd;
    let mut bind = Argument::new(size_of::<Bind>());
    bind.set_u32(offset_of!(Bind, iommufd), iommufd.as_raw_fd() as u32);
    bind.call(function.as_fd(), Request::BindIommufd).map_err(io("VFIO_DEVICE_BIND_IOMMUFD"))?;

    // struct iommu_ioas_alloc: size, flags, out_ioas_id.
    let mut space = Argument::new(12);
    space.call(iommufd.as_fd(), Request::IoasAlloc).map_err(io("IOMMU_IOAS_ALLOC"))?;
    let space = space.u32(8);

    type Attach = v::vfio_device_attach_iommufd_pt;
    // Without `pasid`, which older kernels do not have.
    let mut attach = Argument::new(offset_of!(Attach, pasid));
    attach.set_u32(offset_of!(Attach, pt_id), space);
    attach.call(function.as_fd(), Request::AttachIommufd).map_err(io("VFIO_DEVICE_ATTACH_IOMMUFD_PT"))?;

    let ranges = ioctl::iova_ranges(iommufd.as_fd(), space).map_err(io("IOMMU_IOAS_IOVA_RANGES"))?;
    Ok((function, Box::new(Iommufd { iommufd, space, ranges })))
}

impl IommuBackend for Iommufd {
    fn name(&self) -> &'static str {
        "iommufd"
    }

    fn translator(&self) -> Translator<'_> {
        Translator::Iommufd(self.iommufd.as_fd(), self.space)
    }

    fn ranges(&self) -> &[(u64, u64)] {
        &self.ranges
    }

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        // Every binding has one, and all have one name.
        Vec::new()
    }
}
