//! A split virtqueue as its driver has it (VIRTIO 1.3, 2.7).

use super::FakeRam;
use crate::virtio::GuestRam;
use std::collections::HashMap;
use std::sync::atomic::{Ordering, fence};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY};
use vm_memory::{Bytes, GuestAddress};

const DESCRIPTOR_BYTES: u64 = 16;

/// A piece of memory in a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The guest physical address of its first byte.
    pub address: u64,
    /// How many bytes.
    pub length: u32,
    /// Whether it is the device that writes it.
    pub writable: bool,
}

/// A request that the device has answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Used {
    /// Its first descriptor.
    pub head: u16,
    /// How many bytes the device says that it has written.
    pub written: u32,
    /// The chain.
    pub segments: Vec<Segment>,
}

/// A queue's areas, and what the driver knows of them.
#[derive(Debug, Clone)]
pub struct Ring {
    /// The number of descriptors.
    pub size: u16,
    /// The address of the descriptor area.
    pub descriptors: u64,
    /// The address of the driver area.
    pub available: u64,
    /// The address of the device area.
    pub used: u64,
    event_idx: bool,
    free: Vec<u16>,
    chains: HashMap<u16, (Vec<u16>, Vec<Segment>)>,
    next_available: u16,
    /// Up to where the device was told.
    told: u16,
    next_used: u16,
}

impl Ring {
    pub(super) fn new(ram: &FakeRam, size: u16, event_idx: bool) -> Self {
        let area = |bytes: u64| {
            let address = ram.allocate(bytes);
            ram.write(address, &vec![0; usize::try_from(bytes).expect("fits")]);
            address
        };
        let entries = u64::from(size);
        Self {
            size,
            descriptors: area(entries * DESCRIPTOR_BYTES),
            available: area(6 + 2 * entries),
            used: area(6 + 8 * entries),
            event_idx,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
            next_available: 0,
            told: 0,
            next_used: 0,
        }
    }

    /// How many descriptors are free.
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    pub(super) fn add(&mut self, ram: &FakeRam, segments: &[Segment]) -> u16 {
        let from = self.free.len().checked_sub(segments.len()).expect("enough free descriptors");
        let indices: Vec<u16> = self.free.drain(from..).rev().collect();
        for (at, (&index, segment)) in indices.iter().zip(segments).enumerate() {
            let next = indices.get(at + 1).copied();
            let flags = if segment.writable { VRING_DESC_F_WRITE } else { 0 }
                | if next.is_some() { VRING_DESC_F_NEXT } else { 0 };
            self.write_descriptor(ram, index, segment.address, segment.length, flags, next.unwrap_or(0));
        }
        let head = indices[0];
        self.chains.insert(head, (indices, segments.to_vec()));
        self.make_available(ram, head);
        head
    }

    /// Writes a descriptor as it is given.
    pub fn write_descriptor(
        &self,
        ram: &FakeRam,
        index: u16,
        address: u64,
        length: u32,
        flags: u32,
        next: u16,
    ) {
        let at = self.descriptors + u64::from(index) * DESCRIPTOR_BYTES;
        ram.write(at, &descriptor(address, length, flags, next));
    }

    /// Puts a descriptor's index into the driver area, and moves that on.
    pub fn make_available(&mut self, ram: &FakeRam, head: u16) {
        let entry = u64::from(self.next_available % self.size);
        ram.write(self.available + 4 + 2 * entry, &head.to_le_bytes());
        self.next_available = self.next_available.wrapping_add(1);
        self.set_available_index(ram, self.next_available);
    }

    /// Sets the index up to which chains are available.
    pub fn set_available_index(&mut self, ram: &FakeRam, index: u16) {
        self.next_available = index;
        let at = GuestAddress(self.available + 2);
        ram.view().store(index.to_le(), at, Ordering::Release).expect("there is memory");
    }

    /// Whether the device wants to be told of what was made available since it was told last (2.7.10).
    pub(super) fn wants_notification(&mut self, ram: &FakeRam) -> bool {
        fence(Ordering::SeqCst);
        let (old, new) = (self.told, self.next_available);
        self.told = new;
        if self.event_idx {
            let event = load(ram, self.used + 4 + 8 * u64::from(self.size));
            return new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old);
        }
        u32::from(load(ram, self.used)) & VRING_USED_F_NO_NOTIFY == 0
    }

    pub(super) fn poll(&mut self, ram: &FakeRam) -> Option<Used> {
        if load(ram, self.used + 2) == self.next_used {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        let element = ram.read(at, 8);
        let [head, written] =
            [0, 4].map(|at| u32::from_le_bytes(element[at..at + 4].try_into().expect("four bytes")));
        self.next_used = self.next_used.wrapping_add(1);
        let head = u16::try_from(head).expect("the device gives back an index");
        let (indices, segments) = self.chains.remove(&head).unwrap_or_default();
        self.free.extend(indices);
        Some(Used { head, written, segments })
    }

    /// As [`poll`](Self::poll); if there is none, the device is to interrupt for the next one.
    pub(super) fn poll_or_arm(&mut self, ram: &FakeRam) -> Option<Used> {
        if let Some(used) = self.poll(ram) {
            return Some(used);
        }
        let event = GuestAddress(self.available + 4 + 2 * u64::from(self.size));
        ram.view().store(self.next_used.to_le(), event, Ordering::Release).expect("there is memory");
        fence(Ordering::SeqCst);
        self.poll(ram)
    }
}

/// A descriptor's bytes, for indirect tables.
pub fn descriptor(address: u64, length: u32, flags: u32, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..14].copy_from_slice(&u16::try_from(flags).expect("16 bits of flags").to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

fn load(ram: &FakeRam, address: u64) -> u16 {
    u16::from_le(ram.view().load(GuestAddress(address), Ordering::Acquire).expect("there is memory"))
}
