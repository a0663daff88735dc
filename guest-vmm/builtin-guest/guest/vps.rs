//! The other VPs: started by INIT and SIPI, then each waits for a job in ring 3.
//!
//! The boot VP is the only one that starts VPs and gives jobs. Started VPs touch nothing but their own block and the
//! atomics here.

use core::arch::x86_64::_rdtsc;
use core::hint::spin_loop;
use core::ptr::{copy_nonoverlapping, with_exposed_provenance_mut};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::ram::{PAGE, Ram};
use crate::{acpi, apic, gate};

/// How often each VP increments the counter of `count`.
pub const INCREMENTS: u32 = 1000;

/// APIC IDs from here on are not started.
const IDS: usize = 4096;
/// The largest ID that the local APIC's memory-mapped mode can address.
const LARGEST_SHORT_ID: u32 = 254;
/// Time stamp ticks to wait for other VPs: several seconds on any processor.
const PATIENCE: u64 = 20_000_000_000;

const BLOCK_PAGES: u64 = 2;
const TASK: usize = 6;
const TASK_BYTES: u64 = 104;

/// The start of a VP's two pages; its ring 0 stack ends with the first page, its ring 3 stack with the second.
#[repr(C)]
struct Block {
    descriptors: [u64; 8],
    table: TablePointer,
    padding: [u8; 6],
    task: Task,
}

#[repr(C, packed)]
struct TablePointer {
    limit: u16,
    base: u64,
}

#[repr(C, packed)]
struct Task {
    reserved: u32,
    ring0_stack: u64,
    unused: [u8; 90],
    permission_bitmap: u16,
}

const _: () = assert!(core::mem::offset_of!(Block, table) == 64 && size_of::<Task>() == TASK_BYTES as usize);

unsafe extern "C" {
    static boot_gdt: [u64; TASK];
    static vp_blocks: AtomicU64;
    static next_vp_block: AtomicU32;
    static trampoline_start: u8;
    static trampoline_end: u8;
}

static UP: AtomicU32 = AtomicU32::new(0);
static DONE: AtomicU32 = AtomicU32::new(0);
static COUNTER: AtomicU64 = AtomicU64::new(0);
/// The number of the latest job; its kind is what `JOB` says.
static JOBS: AtomicU32 = AtomicU32::new(0);
static JOB: AtomicU32 = AtomicU32::new(COUNT);

const COUNT: u32 = 0;
const HALT: u32 = 1;

/// What the boot VP knows of the others.
pub struct Vps {
    asked: [u64; IDS / 64],
    asked_count: u32,
}

/// How many VPs are up of how many, the boot VP included.
pub struct Tally {
    /// Those that run.
    pub up: u32,
    /// Those that were started, now or before.
    pub asked: u32,
}

impl Vps {
    /// The boot VP alone.
    pub fn new() -> Self {
        let mut vps = Self { asked: [0; IDS / 64], asked_count: 0 };
        vps.note(apic::local_id());
        vps
    }

    /// Starts what ACPI tells of and is not up; `None` if there is no RAM for it.
    pub fn start_all(&mut self, rsdp: u64, ram: &mut Ram) -> Option<Tally> {
        let mut new = 0;
        let mut wide = false;
        acpi::for_each_vp(rsdp, |id| {
            new += u64::from(!self.is_noted(id));
            wide |= id > LARGEST_SHORT_ID;
        });
        if new > 0 {
            if wide {
                apic::widen_ids();
            }
            self.start_new(rsdp, ram, new)?;
        }
        wait_until(|| UP.load(Ordering::Acquire) == self.asked_count - 1);
        Some(Tally { up: UP.load(Ordering::Acquire) + 1, asked: self.asked_count })
    }

    fn start_new(&mut self, rsdp: u64, ram: &mut Ram, new: u64) -> Option<()> {
        // One that was asked before and comes late takes a block too.
        let late = u64::from(self.asked_count - 1 - UP.load(Ordering::Acquire));
        let page = ram.real_mode_page()?;
        let blocks = ram.take((new + late) * BLOCK_PAGES)?;
        for index in 0..new + late {
            fill_block(blocks + index * BLOCK_PAGES * PAGE);
        }
        // SAFETY: entry.s reserves them for this and reads them atomically.
        unsafe {
            vp_blocks.store(blocks, Ordering::Release);
            next_vp_block.store(0, Ordering::Release);
        }
        copy_trampoline(page);
        acpi::for_each_vp(rsdp, |id| {
            if self.note(id) {
                apic::start(id, (page / PAGE) as u8);
            }
        });
        Some(())
    }

    fn is_noted(&self, id: u32) -> bool {
        // An ID that is too large counts as started, so that nobody tries.
        self.asked.get(id as usize / 64).is_none_or(|word| word & 1 << (id % 64) != 0)
    }

    /// Notes that a VP was asked to start; `false` if it was before.
    fn note(&mut self, id: u32) -> bool {
        let new = !self.is_noted(id);
        if new {
            self.asked[id as usize / 64] |= 1 << (id % 64);
            self.asked_count += 1;
        }
        new
    }
}

/// Lets every started VP increment one counter; returns the sum.
pub fn count() -> u64 {
    COUNTER.store(0, Ordering::Relaxed);
    DONE.store(0, Ordering::Relaxed);
    give(COUNT);
    wait_until(|| DONE.load(Ordering::Acquire) == UP.load(Ordering::Acquire));
    COUNTER.load(Ordering::Relaxed)
}

/// Halts all others, then this VP.
pub fn halt_all() -> ! {
    give(HALT);
    gate::halt()
}

fn give(job: u32) {
    JOB.store(job, Ordering::Relaxed);
    JOBS.fetch_add(1, Ordering::Release);
    apic::wake_others();
}

/// Ring 3 of a started VP, where `entry.s` ends.
#[unsafe(no_mangle)]
extern "C" fn started_main() -> ! {
    apic::enable_local();
    // Before it counts as up: a job that is given later must be seen.
    let mut seen = JOBS.load(Ordering::Acquire);
    UP.fetch_add(1, Ordering::Release);
    loop {
        let latest = JOBS.load(Ordering::Acquire);
        if latest == seen {
            gate::wait();
        } else {
            seen = latest;
            work(JOB.load(Ordering::Relaxed));
        }
    }
}

fn work(job: u32) {
    if job == HALT {
        gate::halt();
    }
    for _ in 0..INCREMENTS {
        COUNTER.fetch_add(1, Ordering::Relaxed);
    }
    DONE.fetch_add(1, Ordering::Release);
}

fn wait_until(condition: impl Fn() -> bool) {
    let start = ticks();
    while !condition() && ticks().wrapping_sub(start) < PATIENCE {
        spin_loop();
    }
}

fn ticks() -> u64 {
    // SAFETY: every processor with long mode has a time stamp counter.
    unsafe { _rdtsc() }
}

fn fill_block(address: u64) {
    let task = address + core::mem::offset_of!(Block, task) as u64;
    let mut descriptors = [0; 8];
    // SAFETY: entry.s's table has these entries, and only its task's changes.
    descriptors[..TASK].copy_from_slice(unsafe { &boot_gdt });
    descriptors[TASK] = (task & 0xff_ffff) << 16 | (task >> 24 & 0xff) << 56 | 0x89 << 40 | (TASK_BYTES - 1);
    descriptors[TASK + 1] = task >> 32;
    let block = Block {
        descriptors,
        table: TablePointer { limit: size_of_val(&descriptors) as u16 - 1, base: address },
        padding: [0; 6],
        task: Task {
            reserved: 0,
            ring0_stack: address + PAGE,
            unused: [0; 90],
            permission_bitmap: TASK_BYTES as u16,
        },
    };
    // SAFETY: the caller's fresh pages.
    unsafe { with_exposed_provenance_mut::<Block>(address as usize).write(block) }
}

fn copy_trampoline(page: u64) {
    // SAFETY: entry.s's bounds; the page is free RAM below 1 MiB.
    unsafe {
        let start = &raw const trampoline_start;
        let bytes = (&raw const trampoline_end).addr() - start.addr();
        copy_nonoverlapping(start, with_exposed_provenance_mut(page as usize), bytes);
    }
}
