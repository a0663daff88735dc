//! What the Cap'n Proto compiler made of the schema.

#![expect(
    missing_docs,
    clippy::allow_attributes_without_reason,
    clippy::match_single_binding,
    clippy::needless_pass_by_value,
    clippy::unimplemented,
    reason = "generated: the schema is the documentation"
)]

#[rustfmt::skip]
pub mod block_capnp;
#[rustfmt::skip]
pub mod common_capnp;
#[rustfmt::skip]
pub mod config_capnp;
#[rustfmt::skip]
pub mod guest_capnp;
#[rustfmt::skip]
pub mod host_capnp;
#[rustfmt::skip]
pub mod snapshot_capnp;
#[rustfmt::skip]
pub mod vmm_capnp;
