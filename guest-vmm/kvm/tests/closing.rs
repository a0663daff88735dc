//! A closed partition leaves nothing behind. Alone in its process, since it counts what the process has.

use futures::executor::block_on;
use kvm::KvmHypervisor;
use processor::{CpuIo, Hypervisor, NewPartition, PartitionConfig, PowerRequest, VpIndex, VpThread};
use std::ops::ControlFlow;
use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemoryMmap};

struct NoBus;

impl CpuIo for NoBus {
    fn read_io(&self, _: VpIndex, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_io(&self, _: VpIndex, _: u16, _: &[u8]) -> ControlFlow<PowerRequest> {
        ControlFlow::Continue(())
    }

    fn read_mmio(&self, _: VpIndex, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_mmio(&self, _: VpIndex, _: u64, _: &[u8]) -> ControlFlow<PowerRequest> {
        ControlFlow::Continue(())
    }

    fn handle_eoi(&self, _: u8) {}
}

fn entries(directory: &str) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

/// How many descriptors, threads and mappings there are.
fn possessions() -> [usize; 3] {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let vcpus = maps.lines().filter(|line| line.contains("kvm-vcpu")).count();
    [entries("/proc/self/fd"), entries("/proc/self/task"), vcpus]
}

fn life(hypervisor: &KvmHypervisor, vp_count: u32) {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let NewPartition { partition, processors } =
        hypervisor.build(&PartitionConfig::new(vp_count, memory)).unwrap();
    let spawn = |(n, binder)| {
        VpThread::spawn(VpIndex(n), None, binder, partition.clone(), Arc::new(NoBus), |_, _| ())
    };
    let vps: Vec<_> = (0..).zip(processors).map(|new| block_on(spawn(new)).unwrap()).collect();
    vps.iter().for_each(|vp| block_on(vp.start()).unwrap());
    for vp in vps {
        block_on(vp.shutdown());
    }
    assert_eq!(Arc::strong_count(&partition), 1);
}

#[test]
fn a_closed_partition_leaves_no_descriptor_thread_or_mapping() {
    let hypervisor = KvmHypervisor::open().unwrap_or_else(|error| panic!("no KVM: {error}"));
    life(&hypervisor, 1);
    let before = possessions();
    for vp_count in [1, 4, 16] {
        life(&hypervisor, vp_count);
        assert_eq!(possessions(), before, "after {vp_count} VPs");
    }
    // Partitions whose VPs were never bound, and one that was refused.
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    drop(hypervisor.build(&PartitionConfig::new(8, memory.clone())).unwrap());
    assert!(hypervisor.build(&PartitionConfig::new(10_000, memory)).is_err());
    assert_eq!(possessions(), before);
}
