//! The vhost-user protocol, back-end side, over rust-vmm's `vhost`.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};

use rustix::io::ioctl_fionbio;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut as Handler};

use super::NullDisk;
use super::regions::Regions;
use super::ring::DeviceRing;
use super::worker::Worker;

/// Listens on `path` and serves one front end after another, for ever.
///
/// # Errors
/// When the socket cannot be made.
pub fn serve(path: &Path, disk: NullDisk) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    loop {
        let (stream, _) = listener.accept()?;
        let device = Arc::new(Mutex::new(Device::new(disk)));
        let mut connection = BackendReqHandler::from_stream(stream, Arc::clone(&device));
        // Ends with the connection, however that ends; the next front end begins afresh.
        while connection.handle_request().is_ok() {}
    }
}

/// What the front end has said of one ring.
#[derive(Default)]
struct RingState {
    size: u16,
    addresses: Option<(u64, u64, u64)>,
    next: u16,
    kick: Option<File>,
    call: Option<File>,
    enabled: bool,
}

struct Device {
    disk: NullDisk,
    features: u64,
    regions: Regions,
    rings: Vec<RingState>,
    worker: Option<Worker>,
}

impl Drop for Device {
    fn drop(&mut self) {
        self.pause();
    }
}

fn refused(what: &'static str) -> Error {
    Error::InvalidOperation(what)
}

impl Device {
    fn new(disk: NullDisk) -> Device {
        let rings = (0..disk.queues).map(|_| RingState::default()).collect();
        Device { disk, features: 0, regions: Regions::default(), rings, worker: None }
    }

    /// Ends the worker and takes its rings back.
    fn pause(&mut self) {
        for (index, ring) in self.worker.take().map(Worker::stop).unwrap_or_default() {
            self.rings[index].next = ring.next;
            self.rings[index].kick = Some(ring.kick);
            self.rings[index].call = ring.call;
        }
    }

    /// Starts the worker with every ring that may run.
    fn resume(&mut self) -> Result<()> {
        let regions = Arc::new(self.regions.clone());
        let mut live = Vec::new();
        for (index, state) in self.rings.iter_mut().enumerate() {
            let (Some((table, available, used)), true, true) = (state.addresses, state.enabled, state.kick.is_some())
            else {
                continue;
            };
            let size = u64::from(state.size);
            // Each with the event index behind it.
            let places = (
                regions.user(table, 16 * size),
                regions.user(available, 6 + 2 * size),
                regions.user(used, 6 + 8 * size),
            );
            // Memory may be exchanged while a ring runs, piece by piece.
            let (Some(table), Some(available), Some(used)) = places else { continue };
            let Some(kick) = state.kick.take() else { continue };
            live.push((
                index,
                DeviceRing {
                    regions: Arc::clone(&regions),
                    table,
                    available,
                    used,
                    size: state.size,
                    event_index: self.features & super::EVENT_IDX != 0,
                    next: state.next,
                    kick,
                    call: state.call.take(),
                },
            ));
        }
        if !live.is_empty() {
            self.worker = Some(Worker::start(live, self.disk.pace).map_err(Error::ReqHandlerError)?);
        }
        Ok(())
    }

    fn change<T>(&mut self, how: impl FnOnce(&mut Device) -> Result<T>) -> Result<T> {
        self.pause();
        let outcome = how(self)?;
        self.resume()?;
        Ok(outcome)
    }

    fn ring(&mut self, index: u32) -> Result<&mut RingState> {
        self.rings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }
}

impl Handler for Device {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        Ok(NullDisk::FEATURES | protocol)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        self.features = features;
        // Without protocol features rings are enabled from the beginning (vhost-user, "Ring states").
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            self.rings.iter_mut().for_each(|ring| ring.enabled = true);
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        self.change(|device| {
            device.regions.clear();
            for (region, file) in table.iter().zip(&files) {
                let (guest, user, bytes) = (region.guest_phys_addr, region.user_addr, region.memory_size);
                device.regions.add(guest, user, bytes, region.mmap_offset, file).map_err(Error::ReqHandlerError)?;
            }
            Ok(None)
        })
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two()).ok_or(Error::InvalidParam)?;
        self.ring(index)?.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _: u64,
    ) -> Result<()> {
        self.change(|device| {
            device.ring(index)?.addresses = Some((descriptor, available, used));
            Ok(())
        })
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.ring(index)?.next = base as u16;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.change(|device| {
            let ring = device.ring(index)?;
            (ring.kick, ring.call) = (None, None);
            Ok(VhostUserVringState::new(index, u32::from(ring.next)))
        })
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.change(|device| {
            if let Some(fd) = &fd {
                ioctl_fionbio(fd, true).map_err(|error| Error::ReqHandlerError(error.into()))?;
            }
            device.ring(index.into())?.kick = fd;
            Ok(())
        })
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.change(|device| {
            if let Some(fd) = &fd {
                ioctl_fionbio(fd, true).map_err(|error| Error::ReqHandlerError(error.into()))?;
            }
            device.ring(index.into())?.call = fd;
            Ok(())
        })
    }

    fn set_vring_err(&mut self, _: u8, _: Option<File>) -> Result<()> {
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, _: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.disk.queues.into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.change(|device| {
            device.ring(index)?.enabled = enable;
            Ok(())
        })
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let mut bytes = vec![0; size as usize];
        let config = self.disk.config();
        let from = config.get(offset as usize..).unwrap_or_default();
        let count = from.len().min(bytes.len());
        bytes[..count].copy_from_slice(&from[..count]);
        Ok(bytes)
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        Err(refused("the configuration space is not written"))
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(refused("no graphics"))
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(refused("no shared objects"))
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(refused("no in-flight region"))
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        Err(refused("no in-flight region"))
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(32)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _: Option<bool>,
    ) -> Result<Option<u64>> {
        let (guest, user, bytes) = (region.guest_phys_addr, region.user_addr, region.memory_size);
        let skip = region.mmap_offset;
        self.change(|device| {
            device.regions.add(guest, user, bytes, skip, &file).map_err(Error::ReqHandlerError)?;
            Ok(None)
        })
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let (guest, bytes) = (region.guest_phys_addr, region.memory_size);
        self.change(|device| {
            device.regions.remove(guest, bytes);
            Ok(())
        })
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(refused("no device state"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(refused("no device state"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(refused("no shared memory of its own"))
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        Err(refused("no migration"))
    }
}
