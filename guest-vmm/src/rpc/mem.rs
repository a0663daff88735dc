//! MemController: the host's end of a guest's memory device.

use crate::devices::mem::request;
use crate::guest::Guest;
use devices::virtio::mem::MemHandle;
use guest_schema::Failure;
use guest_schema::guest_capnp::mem_controller;
use std::rc::Rc;

/// A memory device, for as long as its guest lives.
pub(crate) struct Mem(Rc<Guest>);

impl Mem {
    pub fn new(guest: Rc<Guest>) -> Self {
        Self(guest)
    }

    fn handle(&self) -> Result<MemHandle, Failure> {
        self.0.end_of("memory device", |ends| ends.mem.clone())
    }
}

impl mem_controller::Server for Mem {
    async fn size(
        self: Rc<Self>,
        _: mem_controller::SizeParams,
        mut results: mem_controller::SizeResults,
    ) -> capnp::Result<()> {
        let mut results = results.get();
        match self.handle() {
            Ok(mem) => {
                let geometry = mem.geometry();
                results.set_block_bytes(geometry.block_bytes());
                results.set_region_bytes(geometry.region_bytes());
                results.set_usable_bytes(geometry.region_bytes());
                results.set_plugged_bytes(mem.plugged_bytes());
                results.set_requested_bytes(mem.requested_bytes());
            }
            Err(failure) => failure.write(results.init_error()),
        }
        Ok(())
    }

    async fn request_size(
        self: Rc<Self>,
        params: mem_controller::RequestSizeParams,
        mut results: mem_controller::RequestSizeResults,
    ) -> capnp::Result<()> {
        let bytes = params.get()?.get_bytes();
        let asked = self.handle().and_then(|mem| request(&mem, bytes));
        Failure::write_result(&asked, results.get().init_result());
        Ok(())
    }
}
