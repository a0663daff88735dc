//! The benchmarks: what a guest's life costs, beside what the bare system calls of the same cost in the same run; and in
//! [`units`] what a transition of state units costs, beside bare channels, in [`vps`] what VPs cost, in [`devices`] what devices do, in
//! [`snapshot`] what a snapshot costs its guest, and in [`memory`] what it costs to freeze and restore a guest's memory.
//!
//! Parts: [`figure`] is what is measured and what comes of it; each other module is a group of figures, which `GROUPS` lists.
//! In every round every group takes its turn, so that whatever else the machine does meanwhile hits the floor and guestd alike.
//! Every group is played once more before the first round and that is not counted. It begins when no VMM is left of the one before.
//!
//! The guest is the built-in one, with 128 MiB and one VP. guestd logs as it does by default. It keeps no VMMs ready but in
//! `warm` and `fork`, which have a guestd of their own each.
//!
//! Limits: one machine's own /dev/kvm; nothing here is a test, and no figure fails the run.

pub mod devices;
pub mod figure;
mod floor;
mod fork;
mod launch;
mod life;
mod lost_client;
pub mod memory;
mod rpc;
pub mod snapshot;
pub mod units;
pub mod vps;
mod warm;

use std::path::Path;

use anyhow::{Context, ensure};
use futures::future::LocalBoxFuture;
use guest_client::{
    Callback, DevicesConfig, GuestConfig, Host, Launched, Lifecycle, MemoryConfig, OnReset, VpAffinity,
};
use guest_client::{SerialChunk, SerialOutput};
use tokio::sync::mpsc;

use crate::service::{PATIENCE, Service};
use crate::stage::sealed_file;
use crate::wait;
use figure::{Definition, Row, Samples};

pub use lost_client::hold;

/// The guest's memory, in bytes.
const MEMORY_BYTES: u64 = 128 << 20;

/// Figures that are measured together.
struct Group {
    figures: &'static [Definition],
    open: fn(&Setting) -> Opening<'_>,
}

/// A group that gets itself ready.
type Opening<'a> = LocalBoxFuture<'a, anyhow::Result<Box<dyn Rounds>>>;

/// A group that is being measured.
trait Rounds {
    /// Measures everything once, or a few times where once is too short.
    fn round<'a>(&'a mut self, samples: &'a mut Samples) -> LocalBoxFuture<'a, anyhow::Result<()>>;
}

/// In the order in which they are measured and shown.
const GROUPS: [&Group; 7] = [
    &floor::GROUP,
    &launch::GROUP,
    &warm::GROUP,
    &fork::GROUP,
    &life::GROUP,
    &rpc::GROUP,
    &lost_client::GROUP,
];

/// What the groups are measured on.
struct Setting {
    service: Service,
    host: Host,
}

impl Setting {
    /// Waits until no VMM is left of what was measured before: it would take time, and share its memory with the next.
    async fn quiet(&self) -> anyhow::Result<()> {
        let empty = async || self.host.list().await.is_ok_and(|guests| guests.is_empty());
        Ok(wait::until_async("the end of all guests", PATIENCE, empty).await?)
    }
}

/// All figures there are.
pub fn definitions() -> impl Iterator<Item = &'static Definition> {
    GROUPS.iter().flat_map(|group| group.figures)
}

/// Measures the figures that begin with one of `wanted`, or all, and what they refer to.
///
/// # Errors
/// When a name begins no figure, a program is not built, or anything that is measured fails.
pub async fn measure(wanted: &[String], rounds: u32) -> anyhow::Result<Vec<Row>> {
    let chosen = figure::choose(definitions().copied().collect(), wanted)?;
    let service = Service::start_logging("info", "kvm", &[])?;
    let host = service.connect().await?;
    let setting = Setting { service, host };
    let mut samples = Samples::default();
    let mut groups = Vec::new();
    for group in GROUPS.iter().filter(|group| group.figures.iter().any(|figure| chosen.contains(figure))) {
        let mut group = (group.open)(&setting).await?;
        group.round(&mut Samples::default()).await?;
        groups.push(group);
    }
    for _ in 0..rounds {
        for group in &mut groups {
            setting.quiet().await?;
            group.round(&mut samples).await?;
        }
    }
    Ok(samples.rows(&chosen))
}

/// Fails for a debug build.
///
/// # Errors
/// When this is a debug build.
pub fn check_build() -> anyhow::Result<()> {
    let release =
        "build and run with --release: `cargo build --release --bins`, then `cargo run --release …`";
    ensure!(!cfg!(debug_assertions), "debug builds are not worth measuring; {release}");
    Ok(())
}

/// Fails unless guests can be run here.
///
/// # Errors
/// When /dev/kvm cannot be opened.
pub fn check_kvm() -> anyhow::Result<()> {
    let kvm = Path::new("/dev/kvm");
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(kvm);
    opened.with_context(|| format!("nothing can be measured without {}", kvm.display()))?;
    Ok(())
}

/// A config that boots the built-in guest.
fn config(lifecycle: &Lifecycle) -> anyhow::Result<GuestConfig> {
    Ok(GuestConfig {
        saved: None,
        kernel: Some(lifecycle.file(sealed_file(builtin_guest::IMAGE)?)),
        ramdisk: None,
        cmdline: String::new(),
        cpus: 1,
        affinity: VpAffinity::Any,
        cpuid_mask: Vec::new(),
        memory: MemoryConfig::of_bytes(MEMORY_BYTES),
        on_reset: OnReset::Stop,
        units: Vec::new(),
        devices: DevicesConfig::default(),
        catch_up_time: false,
        debug_exit: false,
    })
}

/// Where a guest's output goes, and the end that it is read at.
fn output() -> (impl SerialOutput, mpsc::UnboundedReceiver<SerialChunk>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let callback = Callback::new(move |bytes: &[u8], lost| {
        // Who has seen enough reads no more.
        let _ = sender.send(SerialChunk { bytes: bytes.to_vec(), lost });
    });
    (callback, receiver)
}

/// Waits for the guest's first byte.
async fn first_byte(output: &mut mpsc::UnboundedReceiver<SerialChunk>) -> anyhow::Result<()> {
    output.recv().await.map(drop).context("the guest wrote nothing")
}

/// Launches a VMM without a guest, and waits until it is there.
async fn launched(host: &Host) -> anyhow::Result<Lifecycle> {
    let Launched { lifecycle, exit: _, id } = host.launch("")?;
    id.await?;
    lifecycle.stop().await?;
    Ok(lifecycle)
}
