//! A typed asynchronous client of guestd.
//!
//! [`Host`] is a connection to guestd; [`Host::launch`] gives a [`Lifecycle`], the lease of one guest, over a channel of its own;
//! [`Lifecycle::bind`] gives the [`Guest`], its user, and [`Lifecycle::control`] its operator. [`Control::snapshot`] keeps the guest as it
//! is; [`Snapshot::launch`] gives the lease of another that goes on from there, and [`Snapshot::save`] writes it to a file.
//!
//! Everything here belongs to one thread and must be used inside a tokio `LocalSet`, which runs the connections: nothing is
//! sent, and no answer arrives, while that set is not polled.
//!
//! Every method that asks for something **sends before it returns** and gives back a [`Call`], or an object whose own calls may
//! be made at once. So a whole life goes out in one flight, without one wait:
//!
//! ```no_run
//! # use guest_client::{DevicesConfig, GuestConfig, Host, MacAddress, MemoryConfig, NetBackend, NetConfig, OnReset, SerialChunk, VpAffinity};
//! # async fn boot(host: &Host, kernel: std::fs::File) -> Result<(), Box<dyn std::error::Error>> {
//! let launched = host.launch("")?;
//! let lifecycle = launched.lifecycle;
//! let config = GuestConfig {
//!     saved: None,
//!     kernel: Some(lifecycle.file(kernel)),
//!     ramdisk: None,
//!     cmdline: "console=ttyS0".into(),
//!     cpus: 1,
//!     affinity: VpAffinity::Any,
//!     cpuid_mask: Vec::new(),
//!     memory: MemoryConfig::of_bytes(128 << 20),
//!     on_reset: OnReset::Restart,
//!     devices: DevicesConfig::default(),
//!     units: Vec::new(),
//!     catch_up_time: false,
//!     debug_exit: false,
//! };
//! let (output, mut chunks) = tokio::sync::mpsc::channel::<SerialChunk>(16);
//! let created = lifecycle.create(&config);
//! let serial = lifecycle.bind().serial(output);
//! let ended = lifecycle.run();
//! created.await?;
//! serial.write(b"poweroff\n").await?;
//! while let Some(chunk) = chunks.recv().await {
//!     print!("{}", String::from_utf8_lossy(&chunk.bytes));
//! }
//! ended.await?;
//! # Ok(())
//! # }
//! ```
//!
//! Limits: one host, Unix sockets only.

mod balloon;
mod block;
mod call;
mod channel;
mod debugger;
mod dump;
mod error;
mod events;
mod file;
mod guest;
mod host;
mod lifecycle;
mod mem;
mod saved;
mod serial;
mod snapshot;
mod vsock;

pub use balloon::{Balloon, BalloonSize, MemoryStatistic};
pub use block::image_service;
pub use call::Call;
pub use debugger::{Debugger, MemoryRead};
pub use dump::{CoreDump, DumpError};
pub use error::{ClientError, ConnectError};
pub use events::{Events, EventsClosed};
pub use guest::{Control, Guest, GuestExit, Observer, Subscription};
pub use guest_schema::block_capnp::block_service::Client as BlockService;
pub use guest_schema::guest_capnp::vsock_acceptor::Client as VsockAcceptor;
pub use guest_schema::{
    AddressSpace, BlockConfig, BlockMode, Breakpoint, BreakpointAccess, ConsoleConfig, CpuidMask, DebugHalt,
    DebuggedVps, DeviceError, DevicesConfig, DiskSource, Event, EventKind, Exit, Failure, FileSource,
    GuestConfig, GuestError, GuestState, HaltReason, ImageFormat, LossPolicy, MacAddress, MemDeviceConfig,
    MemoryConfig, MemoryKept, NetBackend, NetConfig, OnReset, Outcome, Panic, PanicReport, Phase, RateLimits,
    Rendering, SavedSource, SavedStateKind, SegmentRegister, SnapshotInfo, StepOutcome, TableRegister,
    Transition, TransitionEnd, UnitConfig, UnitStatus, UnitStep, VpAffinity, VpRegisters, VpState,
    VsockConfig,
};
pub use guest_snapshot_file as snapshot_file;
pub use host::{Found, GuestInfo, Host, HostInfo, Launched};
pub use lifecycle::Lifecycle;
pub use mem::{Mem, MemSize};
pub use saved::{SaveError, SavedSnapshot};
pub use serial::{ByteStream, Callback, OutputClosed, SerialChunk, SerialOutput};
pub use snapshot::Snapshot;
pub use vsock::{
    VsockEndpoint, VsockInput, VsockListener, VsockOutput, VsockRequest, VsockRequests, VsockReset,
    VsockStream, vsock_acceptor,
};
