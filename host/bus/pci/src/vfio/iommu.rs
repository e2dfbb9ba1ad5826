//! An IOMMU domain that holds one binding's memory and nothing else, and the function that was put behind it.

use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use cap_std::fs::Dir;
use cofferdam_device::DmaRegion;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use vfio_bindings::bindings::vfio as v;

use super::ioctl::{self, Argument, Plain, Request, Translator};
use crate::attributes::{self, refused};
use crate::{Address, PciError};

/// What translates for one function.
pub(super) trait IommuBackend: Send {
    /// Its name, for the log.
    fn name(&self) -> &'static str;

    /// Whom to ask.
    fn translator(&self) -> Translator<'_>;

    /// Lets the function reach `bytes` bytes from `offset` of `region` at `iova`, which is in one of [`IommuBackend::ranges`].
    fn map(&self, region: &DmaRegion, offset: u64, bytes: u64, iova: u64) -> io::Result<()> {
        ioctl::map(self.translator(), region, offset, bytes, iova)
    }

    /// Takes exactly that away again. When this answers, the IOMMU has forgotten it.
    fn unmap(&self, iova: u64, bytes: u64) -> io::Result<()> {
        ioctl::unmap(self.translator(), iova, bytes)
    }

    /// I/O addresses that it takes: first and last of each run, in order.
    fn ranges(&self) -> &[(u64, u64)];

    /// What it holds open and nobody else does: [`Claimed::descriptors`](crate::claimed::Claimed::descriptors).
    fn descriptors(&self) -> Vec<BorrowedFd<'_>>;

    /// Group and container, for another process to go on with; `None` where it cannot.
    fn to_hand_over(&self) -> Option<[BorrowedFd<'_>; 2]> {
        None
    }
}

/// The group and the container of another process, as it left them.
///
/// # Errors
/// When they are something else.
pub(super) fn adopt(group: OwnedFd, container: OwnedFd) -> io::Result<Box<dyn IommuBackend>> {
    let mut status = Argument::new(size_of::<v::vfio_group_status>());
    status.call(group.as_fd(), Request::GroupStatus)?;
    let expected = v::VFIO_GROUP_FLAGS_VIABLE | v::VFIO_GROUP_FLAGS_CONTAINER_SET;
    if status.u32(offset_of!(v::vfio_group_status, flags)) & expected != expected {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the group is in no container"));
    }
    let ranges = ranges(container.as_fd())?;
    Ok(Box::new(Group { group, container, ranges }))
}

/// Puts the function behind an IOMMU of its own, and opens it.
///
/// The group is taken where there is one, because that way is what the test bed proves; iommufd where the kernel has nothing else (`CONFIG_VFIO_GROUP=n`).
///
/// # Errors
/// [`PciError::Unusable`] where nothing would keep the function to its memory, and where somebody else has the group.
pub(super) fn open(address: Address, device: &Dir) -> Result<(OwnedFd, Box<dyn IommuBackend>), PciError> {
    let unusable = |why: String| PciError::Unusable { address, why };
    let group = match attributes::link(device, "iommu_group") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let why = "no IOMMU is in front of it (is one enabled, as with intel_iommu=on?); --uio does without";
            return Err(unusable(why.to_owned()));
        }
        group => group.map_err(refused(address, "read iommu_group".to_owned()))?,
    };
    let group: u32 = group.parse().map_err(|_| unusable(format!("its IOMMU group is called {group:?}")))?;
    let exists = |path: &str| rustix::fs::stat(path).is_ok();
    if exists(&format!("/dev/vfio/noiommu-{group}")) {
        let why = "its vfio group is one without an IOMMU (enable_unsafe_noiommu_mode), which keeps it from nothing; use --uio";
        return Err(unusable(why.to_owned()));
    }
    if !exists(&format!("/dev/vfio/{group}")) && exists("/dev/iommu") {
        return super::iommufd::open(address, device);
    }
    Group::open(address, group)
}

/// A container with one group in it (`VFIO_TYPE1v2_IOMMU`).
struct Group {
    // In the order in which they are closed.
    group: OwnedFd,
    container: OwnedFd,
    ranges: Vec<(u64, u64)>,
}

impl Group {
    fn open(address: Address, number: u32) -> Result<(OwnedFd, Box<dyn IommuBackend>), PciError> {
        let io = |what: String| refused(address, what);
        let unusable = |why: String| PciError::Unusable { address, why };
        let open = |path: &str| {
            let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            rustix::fs::open(path, flags, Mode::empty())
        };
        let container = open("/dev/vfio/vfio").map_err(|errno| io("open /dev/vfio/vfio".to_owned())(errno.into()))?;
        let version = ioctl::plain(container.as_fd(), Plain::ApiVersion).map_err(io("VFIO_GET_API_VERSION".into()))?;
        let has = ioctl::plain(container.as_fd(), Plain::CheckExtension(v::VFIO_TYPE1v2_IOMMU))
            .map_err(io("VFIO_CHECK_EXTENSION".into()))?;
        if u32::try_from(version) != Ok(v::VFIO_API_VERSION) || has <= 0 {
            return Err(unusable("this kernel's vfio has no IOMMU of type 1; modprobe vfio_iommu_type1".to_owned()));
        }
        let path = format!("/dev/vfio/{number}");
        let group = match open(&path) {
            Err(Errno::BUSY) => {
                return Err(unusable(format!(
                    "IOMMU group {number} is in use; its functions go to one binding at a time"
                )));
            }
            Err(Errno::NOENT) => return Err(unusable("vfio-pci is not bound to it".to_owned())),
            group => group.map_err(|errno| io(format!("open {path}"))(errno.into()))?,
        };
        let mut status = Argument::new(size_of::<v::vfio_group_status>());
        status.call(group.as_fd(), Request::GroupStatus).map_err(io("VFIO_GROUP_GET_STATUS".into()))?;
        if status.u32(offset_of!(v::vfio_group_status, flags)) & v::VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(unusable(format!(
                "another function of IOMMU group {number} has a driver of the kernel (ls /sys/kernel/iommu_groups/{number}/devices): \
                 bind all of them to vfio-pci or to none"
            )));
        }
        ioctl::set_container(group.as_fd(), container.as_fd()).map_err(io("VFIO_GROUP_SET_CONTAINER".into()))?;
        match ioctl::plain(container.as_fd(), Plain::SetIommu(v::VFIO_TYPE1v2_IOMMU)) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return Err(unusable(
                    "the IOMMU does not remap interrupts, so the function could send any (vfio_iommu_type1.allow_unsafe_interrupts=1 \
                     takes that upon oneself)"
                        .to_owned(),
                ));
            }
            set => set.map_err(io("VFIO_SET_IOMMU".into()))?,
        };
        let ranges = ranges(container.as_fd()).map_err(io("VFIO_IOMMU_GET_INFO".into()))?;
        let function = ioctl::device(group.as_fd(), &address.to_string())
            .map_err(io(format!("VFIO_GROUP_GET_DEVICE_FD in group {number}")))?;
        Ok((function, Box::new(Self { group, container, ranges })))
    }
}

/// The I/O addresses that a container takes: all of them where the kernel does not say (before 5.4).
fn ranges(container: BorrowedFd<'_>) -> io::Result<Vec<(u64, u64)>> {
    let info = Argument::new(size_of::<v::vfio_iommu_type1_info>()).call_for_all(container, Request::IommuInfo)?;
    Ok(parse_ranges(&info))
}

fn parse_ranges(info: &Argument) -> Vec<(u64, u64)> {
    type Info = v::vfio_iommu_type1_info;
    type Ranges = v::vfio_iommu_type1_info_cap_iova_range;
    if info.u32(offset_of!(Info, flags)) & v::VFIO_IOMMU_INFO_CAPS == 0 {
        return vec![(0, u64::MAX)];
    }
    let first = info.u32(offset_of!(Info, cap_offset));
    let Some(at) = info.capabilities(first, v::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE).first().copied() else {
        return vec![(0, u64::MAX)];
    };
    let count = info.u32(at + offset_of!(Ranges, nr_iovas)) as usize;
    // More than fit read as 0 to 0, which holds no page.
    let pairs = (0..count.min(4096)).map(|index| at + size_of::<Ranges>() + 16 * index);
    pairs.map(|at| (info.u64(at), info.u64(at + 8))).filter(|(start, last)| last > start).collect()
}

impl IommuBackend for Group {
    fn name(&self) -> &'static str {
        "container and group"
    }

    fn translator(&self) -> Translator<'_> {
        Translator::Container(self.container.as_fd())
    }

    fn ranges(&self) -> &[(u64, u64)] {
        &self.ranges
    }

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        // The kernel gives a group to one opener alone, while every binding has a container of that name.
        vec![self.group.as_fd()]
    }

    fn to_hand_over(&self) -> Option<[BorrowedFd<'_>; 2]> {
        Some([self.group.as_fd(), self.container.as_fd()])
    }
}

/// Whether one of `ranges` holds `bytes` bytes at `iova`.
pub(super) fn takes(ranges: &[(u64, u64)], iova: u64, bytes: u64) -> bool {
    let last = bytes.checked_sub(1).and_then(|more| iova.checked_add(more));
    last.is_some_and(|last| ranges.iter().any(|(start, end)| *start <= iova && last <= *end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_takes_what_is_inside_and_nothing_that_crosses_its_end() {
        let ranges = [(0, 0xfedf_ffff), (0xfef0_0000, 0x7f_ffff_ffff)];
        for (iova, bytes) in [(0, 4096), (0xfedf_f000, 4096), (0xfef0_0000, 1 << 30)] {
            assert!(takes(&ranges, iova, bytes), "{iova:#x}");
        }
        for (iova, bytes) in [(0xfedf_f000, 8192), (0xfee0_0000, 4096), (1 << 39, 1), (0, 0), (u64::MAX, 2)] {
            assert!(!takes(&ranges, iova, bytes), "{iova:#x}");
        }
    }

    #[test]
    fn the_ranges_of_a_container_are_read_and_a_count_that_lies_reads_none() {
        let mut info = Argument::new(24 + 16 + 32);
        assert_eq!(parse_ranges(&info), [(0, u64::MAX)], "an old kernel");
        info.set_u32(4, v::VFIO_IOMMU_INFO_CAPS);
        info.set_u32(16, 24);
        info.set_u32(24, v::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE);
        info.set_u32(32, 2);
        for (at, value) in [(40, 0), (48, 0xfedf_ffff), (56, 0xfef0_0000), (64, 0xff_ffff_ffff)] {
            info.set_u64(at, value);
        }
        let expected = [(0, 0xfedf_ffff), (0xfef0_0000, 0xff_ffff_ffff)];
        assert_eq!(parse_ranges(&info), expected);
        info.set_u32(32, u32::MAX);
        assert_eq!(parse_ranges(&info), expected);
    }
}
