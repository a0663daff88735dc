//! The lease of one guest.

use crate::block::image_service;
use crate::call::{Call, SharedCall, failure_beside};
use crate::channel::Channel;
use crate::error::ClientError;
use crate::file::FileServer;
use crate::guest::{Control, Guest};
use crate::host::WeakHost;
use guest_schema::guest_capnp::guest_lifecycle;
use guest_schema::{BlockMode, DiskSource, Failure, FileSource, GuestConfig, ImageFormat};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use tokio::sync::watch;

/// How the guest's VMM gets at the client's files.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Files {
    /// As descriptors over the guest's own channel.
    Descriptors,
    /// As capabilities that this process serves.
    Served,
}

/// The lease of one guest, which lives no longer than this object: dropping it ends the guest by force, and every call made
/// through it fails with [`ClientError::Lost`].
///
/// Calls take effect in the order in which they were made, whether or not anything was awaited in between.
pub struct Lifecycle {
    client: guest_lifecycle::Client,
    files: Files,
    channel: Rc<Channel>,
    launched: SharedCall<String>,
    lease: watch::Sender<()>,
    host: WeakHost,
}

impl Lifecycle {
    /// `channel` carries the capability: the guest's own, or the host's for one that is proxied. `launched` is the answer of
    /// the launch, and `host` the connection that it was asked over.
    pub(crate) fn new(
        client: guest_lifecycle::Client,
        files: Files,
        channel: Rc<Channel>,
        launched: SharedCall<String>,
        host: WeakHost,
    ) -> Self {
        Self { client, files, channel, launched, lease: watch::Sender::new(()), host }
    }

    /// Makes an open regular file, memfd or block device part of a config for this lifecycle: its descriptor goes with the next message, or,
    /// on a proxied lifecycle, this process serves reads of it. A snapshot's file is to be opened for reading alone. Each result is good for one `create`; at most 512 may wait.
    pub fn file(&self, file: impl Into<OwnedFd>) -> FileSource {
        match self.files {
            Files::Descriptors => FileSource::Descriptor(self.channel.descriptors.push(file.into())),
            Files::Served => FileSource::File(FileServer::client(file.into())),
        }
    }

    /// Makes an open image part of a config for this lifecycle, as the source of a disk: its descriptor goes with the next message, or,
    /// of a raw image on a proxied lifecycle, this process serves what the guest reads and writes (see
    /// [`image_service`](crate::image_service)), for as long as the guest has the disk.
    ///
    /// # Errors
    /// Those of [`image_service`](crate::image_service). What is wrong with an image that goes as a descriptor is told by `create`.
    pub fn image(
        &self,
        image: impl Into<OwnedFd>,
        format: ImageFormat,
        mode: BlockMode,
    ) -> std::io::Result<DiskSource> {
        if self.files == Files::Served && format == ImageFormat::Raw {
            let service = image_service(image, mode == BlockMode::ReadWrite)?;
            return Ok(DiskSource::Service(Some(service)));
        }
        Ok(DiskSource::Image(format, Some(self.file(image))))
    }

    /// Makes any open descriptor part of a config for this lifecycle, as the back end of a device: it goes with the next message, and
    /// this is its number. `None` on a proxied lifecycle, over which no descriptors go.
    pub fn descriptor(&self, descriptor: impl Into<OwnedFd>) -> Option<u64> {
        let passed = self.files == Files::Descriptors;
        passed.then(|| self.channel.descriptors.push(descriptor.into()))
    }

    /// Makes the VMM: checks the config, loads the kernel, builds the devices; no VP runs. Before run it may be called again;
    /// the former VMM is destroyed first.
    ///
    /// Refused with `badConfig` (all faults in one detail), `kernelLoadFailure`, `guestInitializationFailure`,
    /// `deviceInitializationFailure`, `deviceMemoryOverlap`, `alreadyRunning`, `controllerForcedHalt` (stop came first), `faulted`; a
    /// guest that goes on from a snapshot also with `snapshotCorrupt` and `snapshotIncompatible`.
    pub fn create(&self, config: &GuestConfig) -> Call<()> {
        let mut request = self.client.create_request();
        config.write(request.get().init_config());
        self.leased(Call::send(request, (), |results| Failure::read_result(results.get_result()?)))
    }

    /// The guest of the last create; calls on it may be made at once. `notCreated`, with create's failure as its cause.
    pub fn bind(&self) -> Guest {
        let sent = self.client.bind_request().send();
        let bound = Call::answer(sent.promise, (), |results| {
            failure_beside(results.has_error(), results.get_error())
        });
        Guest::new(sent.pipeline.get_guest(), self.leased(bound))
    }

    /// Starts the guest. Answers when it has ended and its VMM is gone: ok if the guest ended itself.
    ///
    /// Refused with `controllerForcedHalt`, `vcpuStartFailure`, `deviceStartFailure`, `vcpuRuntimeFailure`,
    /// `transitionTimedOut`; at once with `notCreated` or `alreadyRunning`, which leaves the first run pending.
    pub fn run(&self) -> Call<()> {
        let request = self.client.run_request();
        self.leased(Call::send(request, (), |results| Failure::read_result(results.get_result()?)))
    }

    /// Halts the guest by force, or cancels its create; answers when nothing of it is left. ok without a guest.
    pub fn stop(&self) -> Call<()> {
        let request = self.client.stop_request();
        self.leased(Call::send(request, (), |results| Failure::read_result(results.get_result()?)))
    }

    /// The operator of the guest of the last create; calls on it may be made at once. `notCreated` as in bind.
    pub fn control(&self) -> Control {
        let sent = self.client.control_request().send();
        let opened = Call::answer(sent.promise, (), |results| {
            failure_beside(results.has_error(), results.get_error())
        });
        Control::new(sent.pipeline.get_control(), Some(self.leased(opened)), None, self.host.clone())
    }

    /// The call, as long as the lease lasts. A pending call would keep a proxied lease alive, and a launch that was refused
    /// shows as a lost channel only: this tells the reason.
    fn leased<T: 'static>(&self, call: Call<T>) -> Call<T> {
        let mut lease = self.lease.subscribe();
        let launched = self.launched.clone();
        Call::around(async move {
            let answer = tokio::select! {
                biased;
                answer = call => answer,
                _ = lease.changed() => return Err(ClientError::Lost("the lease was given up".into())),
            };
            match answer {
                Err(ClientError::Lost(reason)) => Err(match launched.await {
                    Err(refused @ ClientError::Refused(_)) => refused,
                    _ => ClientError::Lost(reason),
                }),
                answer => answer,
            }
        })
    }
}
