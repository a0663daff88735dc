//! A virtio device saved and restored: the transport's part of it.

use super::device::VirtioDevice;
use super::mmio::{QueueRegisters, Registers, STATUS_DEFINED, VirtioMmio, WorkerPlace};
use crate::saved::{invalid, register};
use guest_saved_state::devices::virtio::{VirtioState, VirtqueueState};
use save_restore::{RestoreError, SaveError, SaveRestore, SavedStateBlob};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

impl<D: VirtioDevice> SaveRestore for VirtioMmio<D> {
    type SavedState = VirtioState;

    fn save(&mut self) -> Result<VirtioState, SaveError> {
        self.collect();
        let WorkerPlace::Idle(worker) = &mut self.worker else {
            return Err(SaveError::other("the device's worker is not at rest"));
        };
        let device = self.device.save(worker)?;
        let status = self.status();
        let Registers {
            status: _,
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            queues,
        } = &self.registers;
        Ok(VirtioState {
            device_type: self.device.device_type() as u32,
            status,
            device_features_select: *device_features_select,
            driver_features_select: *driver_features_select,
            driver_features: *driver_features,
            queue_select: *queue_select,
            interrupt_status: self.interrupt.status(),
            config_generation: self.interrupt.generation(),
            queues: queues.iter().map(save_queue).collect(),
            device: Some(SavedStateBlob::new(&device)),
        })
    }

    fn restore(&mut self, state: VirtioState) -> Result<(), RestoreError> {
        self.collect();
        let VirtioState {
            device_type,
            status,
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            interrupt_status,
            config_generation,
            queues,
            device,
        } = state;
        if device_type != self.device.device_type() as u32 {
            return Err(RestoreError::invalid("device_type", device_type));
        }
        let status = checked_status(status)?;
        let settled = status & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        if settled && driver_features & !self.offered_features() != 0 {
            return Err(invalid("driver_features", driver_features));
        }
        let causes = VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG;
        let interrupt_status = register("interrupt_status", interrupt_status, causes)?;
        let queues = restore_queues(&self.registers.queues, &queues)?;
        let device = device.ok_or_else(|| RestoreError::invalid("device", "missing"))?.parse()?;
        let WorkerPlace::Idle(worker) = &mut self.worker else {
            return Err(RestoreError::other("the device's worker is not at rest"));
        };
        self.device.restore(worker, device)?;
        self.registers = Registers {
            status: status & !VIRTIO_CONFIG_S_NEEDS_RESET,
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            queues,
        };
        let needs_reset = status & VIRTIO_CONFIG_S_NEEDS_RESET != 0;
        self.interrupt.restore(interrupt_status, config_generation, needs_reset);
        Ok(())
    }
}

/// A status that drivers can bring about: DRIVER_OK comes after FEATURES_OK.
fn checked_status(status: u32) -> Result<u32, RestoreError> {
    let checked = register("status", status, STATUS_DEFINED)?;
    let features_ok = status & VIRTIO_CONFIG_S_FEATURES_OK != 0;
    if status & VIRTIO_CONFIG_S_DRIVER_OK != 0 && !features_ok {
        Err(invalid("status", status))
    } else {
        Ok(checked)
    }
}

fn save_queue(queue: &QueueRegisters) -> VirtqueueState {
    let &QueueRegisters { max_size: _, size, ready, descriptors, driver, device, next_available, next_used } =
        queue;
    VirtqueueState {
        size: size.into(),
        ready,
        descriptor_area: descriptors,
        driver_area: driver,
        device_area: device,
        next_available: next_available.into(),
        next_used: next_used.into(),
    }
}

fn restore_queues(
    present: &[QueueRegisters],
    saved: &[VirtqueueState],
) -> Result<Vec<QueueRegisters>, RestoreError> {
    if saved.len() != present.len() {
        return Err(RestoreError::invalid("queues", format_args!("{} queues long", saved.len())));
    }
    let pairs = present.iter().zip(saved).enumerate();
    pairs.map(|(index, (present, saved))| restore_queue(index, present.max_size, saved)).collect()
}

fn restore_queue(
    index: usize,
    max_size: u16,
    saved: &VirtqueueState,
) -> Result<QueueRegisters, RestoreError> {
    let &VirtqueueState { size, ready, descriptor_area, driver_area, device_area, next_available, next_used } =
        saved;
    let field = |name: &str| format!("queues[{index}].{name}");
    let fits = |size: &u16| size.is_power_of_two() && *size <= max_size;
    let size = u16::try_from(size).ok().filter(fits).ok_or_else(|| invalid(&field("size"), size))?;
    Ok(QueueRegisters {
        max_size,
        size,
        ready,
        descriptors: descriptor_area,
        driver: driver_area,
        device: device_area,
        next_available: register(&field("next_available"), next_available, u16::MAX.into())?,
        next_used: register(&field("next_used"), next_used, u16::MAX.into())?,
    })
}
