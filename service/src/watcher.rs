//! What a guest's VMM tells the service: that guests begin and end, and snapshots to keep.

use crate::Service;
use crate::exit::Ending;
use crate::export::Exports;
use crate::launcher::Snapshot;
use crate::snapshots::Kept;
use guest_schema::vmm_capnp::{snapshot_parts, vmm_watcher};
use guest_schema::{Exit, Failure, GuestError, GuestShape};
use guest_transport::{Descriptors, broken};
use std::rc::Rc;

/// The largest shape that is kept, in words of 8 bytes: more than a config may have.
const MAX_SHAPE_WORDS: u64 = 8 << 10;

/// Watches one VMM, for the guest that it was launched for.
pub(crate) struct Watcher {
    pub service: Rc<Service>,
    /// What comes from the VMM.
    pub descriptors: Descriptors,
    pub guest: String,
    pub uid: u32,
    pub ending: Ending,
    /// Those that go through the VMM.
    pub exports: Exports,
}

impl Watcher {
    fn keep_parts(&self, parts: snapshot_parts::Reader<'_>) -> capnp::Result<Result<Rc<Kept>, Failure>> {
        if self.service.ending.get() {
            return Ok(Err(Failure::new(GuestError::NotSupported, "the service is ending")));
        }
        self.service.snapshots.keep(parts, &self.descriptors, self.uid, &self.guest)
    }
}

impl vmm_watcher::Server for Watcher {
    async fn created(
        self: Rc<Self>,
        params: vmm_watcher::CreatedParams,
        _: vmm_watcher::CreatedResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        self.ending.created(params.get_generation());
        if params.has_shape() {
            let shape = params.get_shape()?;
            if shape.total_size()?.word_count <= MAX_SHAPE_WORDS {
                self.service.pool.asked_for(GuestShape::read(shape)?);
            }
        }
        Ok(())
    }

    async fn terminated(
        self: Rc<Self>,
        params: vmm_watcher::TerminatedParams,
        _: vmm_watcher::TerminatedResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        self.ending.terminated(params.get_generation(), Exit::read(params.get_exit()?)?);
        Ok(())
    }

    async fn keep(
        self: Rc<Self>,
        params: vmm_watcher::KeepParams,
        mut results: vmm_watcher::KeepResults,
    ) -> capnp::Result<()> {
        let kept = self.keep_parts(params.get()?.get_parts()?)?;
        let mut results = results.get();
        match kept {
            Ok(kept) => {
                tracing::debug!(guest = self.guest, bytes = kept.info.memory_bytes, "a snapshot is kept");
                results.set_token(&kept.token);
                // Whoever calls it comes through the VMM, whose descriptors are not theirs.
                let snapshot =
                    Snapshot::new(self.service.clone(), None, self.uid, kept, self.exports.clone());
                results.set_snapshot(capnp_rpc::new_client(snapshot));
            }
            Err(failure) => {
                results.set_snapshot(broken(&failure));
                failure.write(results.init_error());
            }
        }
        Ok(())
    }
}
