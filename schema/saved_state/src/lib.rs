//! The saved state of guestd's devices, VPs and partition: its protobuf schema as generated code, and a registry of all of it.
//!
//! The `.proto` files stand beside this crate's manifest and are the format's documentation. A message is a type apart from
//! the component's runtime type, and needs nothing of the component. The generated code is checked in; `tests/freshness.rs`
//! compares it with what the compiler makes of the schema today, and `tests/frozen.rs` keeps what was released as it was.
//!
//! A message with the option `save_restore.saved_state_root` can be the whole state of a component: it is generated with
//! [`SavedStateRoot`](save_restore::SavedStateRoot). With the feature `registry` it is also listed in `saved_state_roots`, which
//! reads a blob by the name that it carries; what only saves and restores does without:
//!
//! ```
//! # #[cfg(feature = "registry")] {
//! use guest_saved_state::devices::i8042::I8042State;
//! use guest_saved_state::saved_state_roots;
//! use save_restore::SavedStateBlob;
//!
//! let blob = SavedStateBlob::new(&I8042State { port_b: 0x13 });
//! assert_eq!(blob.type_name(), "devices.i8042.I8042State");
//!
//! let text = saved_state_roots().describe(blob.type_name(), blob.value())?;
//! assert_eq!(text, "port_b: 19");
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Limits: values are not checked here; what a component accepts is decided by the component.

mod generated;
#[cfg(feature = "registry")]
mod registry;

#[cfg(feature = "registry")]
pub use generated::FILE_DESCRIPTOR_SET;
pub use generated::{devices, machine, processor};
#[cfg(feature = "registry")]
pub use registry::{DescribeError, SavedStateRegistry, saved_state_roots};
