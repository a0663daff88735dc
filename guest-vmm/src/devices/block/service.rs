//! Disks whose data a client keeps: what a disk asks becomes calls of the client's block service.

use ::devices::virtio::block::{DiskImage, PIECE, ServiceCall, ServiceDisk, ServiceRequest};
use capnp::capability::Promise;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use guest_schema::block_capnp::block_service::{self, read_results};
use guest_schema::common_capnp::{failure, result};
use guest_schema::{BlockMode, BlockServiceInfo, Failure, MAX_BLOCK_TRANSFER};
use std::io;
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::spawn_local;
use tokio::time::timeout;

/// How long a service may take for each answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// The blocks that a service may have, in bytes.
const BLOCKS: std::ops::RangeInclusive<u32> = 512..=64 << 10;
const SECTOR: u64 = 512;
/// How many bytes all services of a guest move at a time: far fewer than may wait on a connection.
const MOVING: usize = 8 << 20;

const _: () = assert!(PIECE == MAX_BLOCK_TRANSFER, "a piece of an operation is a call");

/// What is wrong with a service, or became of a call.
#[derive(Debug, thiserror::Error)]
pub(super) enum ServiceError {
    #[error("the block service failed: {0}")]
    Lost(#[from] capnp::Error),
    #[error("the block service refuses: {}", .0.chain())]
    Refused(Failure),
    #[error("the block service did not answer within {PATIENCE:?}")]
    Late,
    #[error("its {0} bytes are less than a sector of {SECTOR}")]
    Empty(u64),
    #[error("its blocks of {0} bytes are no power of two from 512 to 65536")]
    Blocks(u32),
    #[error("it takes no writes, and the disk is to be written")]
    ReadOnly,
}

/// What the services of one guest's disks share.
#[derive(Clone)]
pub(super) struct Services(Rc<Semaphore>);

impl Default for Services {
    fn default() -> Self {
        Self(Rc::new(Semaphore::new(MOVING)))
    }
}

impl Services {
    /// Asks a service for its measures, and serves a disk with it for as long as there is that disk.
    ///
    /// # Errors
    /// If there can be no such disk.
    pub async fn disk(
        &self,
        service: block_service::Client,
        mode: BlockMode,
    ) -> Result<DiskImage, ServiceError> {
        let info = info(&service).await?;
        check(info, mode)?;
        let (image, calls) = ServiceDisk::image(info.bytes, info.block_bytes);
        spawn_local(self.clone().serve(service, calls));
        Ok(image)
    }

    async fn serve(self, service: block_service::Client, mut calls: mpsc::Receiver<ServiceCall>) {
        let mut under_way = FuturesUnordered::new();
        loop {
            tokio::select! {
                call = calls.recv() => match call {
                    Some(call) => under_way.push(self.carry_out(&service, call)),
                    None => return,
                },
                Some(()) = under_way.next() => {}
            }
        }
    }

    async fn carry_out(&self, service: &block_service::Client, call: ServiceCall) {
        let ServiceCall { request, reply } = call;
        let _room = self.0.acquire_many(moved(&request)).await;
        let answer = within(ask(service, &request)).await;
        reply.send(answer.map_err(io::Error::other));
    }
}

/// How many bytes a request moves.
fn moved(request: &ServiceRequest) -> u32 {
    match request {
        ServiceRequest::Read { count, .. } => *count,
        ServiceRequest::Write { bytes, .. } => u32::try_from(bytes.len()).unwrap_or(PIECE),
        ServiceRequest::Flush | ServiceRequest::Discard { .. } | ServiceRequest::WriteZeroes { .. } => 0,
    }
}

async fn within<T>(answer: impl Future<Output = Result<T, ServiceError>>) -> Result<T, ServiceError> {
    timeout(PATIENCE, answer).await.unwrap_or(Err(ServiceError::Late))
}

async fn info(service: &block_service::Client) -> Result<BlockServiceInfo, ServiceError> {
    within(async {
        let answer = service.info_request().send().promise.await?;
        let results = answer.get()?;
        refusal(results.has_error(), results.get_error())?;
        Ok(BlockServiceInfo::read(results.get_info()?))
    })
    .await
}

fn check(info: BlockServiceInfo, mode: BlockMode) -> Result<(), ServiceError> {
    let BlockServiceInfo { bytes, block_bytes, read_only } = info;
    if bytes < SECTOR {
        return Err(ServiceError::Empty(bytes));
    }
    if !BLOCKS.contains(&block_bytes) || !block_bytes.is_power_of_two() {
        return Err(ServiceError::Blocks(block_bytes));
    }
    if read_only && mode == BlockMode::ReadWrite {
        return Err(ServiceError::ReadOnly);
    }
    Ok(())
}

/// Puts a request to a service: the bytes of a read, or none.
async fn ask(service: &block_service::Client, request: &ServiceRequest) -> Result<Vec<u8>, ServiceError> {
    match request {
        ServiceRequest::Read { offset, count } => {
            let mut call = service.read_request();
            call.get().set_offset(*offset);
            call.get().set_count(*count);
            let answer = call.send().promise.await?;
            bytes_read(answer.get()?)
        }
        ServiceRequest::Write { offset, bytes, durable } => {
            let mut call = service.write_request();
            call.get().set_offset(*offset);
            call.get().set_bytes(bytes);
            call.get().set_durable(*durable);
            done(call.send().promise, |results| results.get()?.get_result()).await
        }
        ServiceRequest::Flush => {
            done(service.flush_request().send().promise, |results| results.get()?.get_result()).await
        }
        ServiceRequest::Discard { offset, count } => {
            let mut call = service.discard_request();
            call.get().set_offset(*offset);
            call.get().set_count(*count);
            done(call.send().promise, |results| results.get()?.get_result()).await
        }
        ServiceRequest::WriteZeroes { offset, count, unmap, durable } => {
            let mut call = service.write_zeroes_request();
            let mut params = call.get();
            params.set_offset(*offset);
            params.set_count(*count);
            params.set_unmap(*unmap);
            params.set_durable(*durable);
            done(call.send().promise, |results| results.get()?.get_result()).await
        }
    }
}

fn bytes_read(results: read_results::Reader<'_>) -> Result<Vec<u8>, ServiceError> {
    refusal(results.has_error(), results.get_error())?;
    Ok(results.get_bytes()?.to_vec())
}

/// Waits for an answer without data.
async fn done<R>(
    answer: Promise<R, capnp::Error>,
    result: impl FnOnce(&R) -> capnp::Result<result::Reader<'_>>,
) -> Result<Vec<u8>, ServiceError> {
    let answer = answer.await?;
    let refused = Failure::read_result(result(&answer)?)?;
    refused.map(|()| Vec::new()).map_err(ServiceError::Refused)
}

fn refusal(has_error: bool, error: capnp::Result<failure::Reader<'_>>) -> Result<(), ServiceError> {
    if has_error { Err(ServiceError::Refused(Failure::read(error?)?)) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
