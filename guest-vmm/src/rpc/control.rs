//! GuestControl: the operator's capability, to the guest of one create.

use super::debugger;
use super::keeper::{Keeper, KeptSnapshot, nobody};
use super::observer::{Observed, inspected};
use crate::config::refused;
use crate::driver::{Command, DriverHandle};
use crate::guest::Guest;
use guest_schema::common_capnp::file;
use guest_schema::guest_capnp::{guest_control, observer};
use guest_schema::{Failure, GuestError, MAX_FILE_READ, UnitConfig, chain};
use guest_transport::broken;
use inspect::View;
use machine::CoreDump;
use std::rc::Rc;
use std::sync::Arc;

/// A guest, controlled.
pub(crate) struct Control {
    driver: DriverHandle,
    guest: Rc<Guest>,
    keeper: Option<Keeper>,
}

impl Control {
    pub fn new(driver: DriverHandle, guest: Rc<Guest>, keeper: Option<Keeper>) -> Self {
        Self { driver, guest, keeper }
    }

    async fn keep_snapshot(&self) -> Result<KeptSnapshot, Failure> {
        let keeper = self.keeper.as_ref().ok_or_else(nobody)?;
        let taken = self.driver.ask_of(&self.guest, Command::Snapshot).await?;
        let sealed = tokio::task::spawn_blocking(move || taken.seal()).await;
        let panicked = |_| Failure::new(GuestError::InternalError, "completing the snapshot panicked");
        keeper.keep(sealed.map_err(panicked)??).await
    }
}

impl guest_control::Server for Control {
    async fn pause(
        self: Rc<Self>,
        _: guest_control::PauseParams,
        mut results: guest_control::PauseResults,
    ) -> capnp::Result<()> {
        Failure::write_result(
            &self.driver.ask_of(&self.guest, Command::Pause).await,
            results.get().init_result(),
        );
        Ok(())
    }

    async fn resume(
        self: Rc<Self>,
        _: guest_control::ResumeParams,
        mut results: guest_control::ResumeResults,
    ) -> capnp::Result<()> {
        Failure::write_result(
            &self.driver.ask_of(&self.guest, Command::Resume).await,
            results.get().init_result(),
        );
        Ok(())
    }

    async fn reset(
        self: Rc<Self>,
        _: guest_control::ResetParams,
        mut results: guest_control::ResetResults,
    ) -> capnp::Result<()> {
        Failure::write_result(
            &self.driver.ask_of(&self.guest, Command::Reset).await,
            results.get().init_result(),
        );
        Ok(())
    }

    async fn stop(
        self: Rc<Self>,
        _: guest_control::StopParams,
        mut results: guest_control::StopResults,
    ) -> capnp::Result<()> {
        let stopped = self.driver.ask_of(&self.guest, Command::Stop).await;
        Failure::write_result(&stopped, results.get().init_result());
        Ok(())
    }

    async fn snapshot(
        self: Rc<Self>,
        _: guest_control::SnapshotParams,
        mut results: guest_control::SnapshotResults,
    ) -> capnp::Result<()> {
        let kept = self.keep_snapshot().await;
        let mut results = results.get();
        match kept {
            Ok(KeptSnapshot { snapshot, token }) => {
                results.set_snapshot(snapshot);
                results.set_token(&token);
            }
            Err(failure) => {
                results.set_snapshot(broken(&failure));
                failure.write(results.init_error());
            }
        }
        Ok(())
    }

    async fn observer(
        self: Rc<Self>,
        _: guest_control::ObserverParams,
        mut results: guest_control::ObserverResults,
    ) -> capnp::Result<()> {
        let observer: observer::Client = capnp_rpc::new_client(Observed::new(self.guest.clone()));
        results.get().set_observer(observer);
        Ok(())
    }

    async fn inspect(
        self: Rc<Self>,
        params: guest_control::InspectParams,
        mut results: guest_control::InspectResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let (path, depth, rendering) =
            (params.get_path()?.to_str()?, params.get_depth(), params.get_rendering()?);
        match inspected(&self.guest, path, depth, rendering, View::Everything).await {
            Ok(tree) => results.get().set_tree(&tree[..]),
            Err(failure) => failure.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn update(
        self: Rc<Self>,
        params: guest_control::UpdateParams,
        mut results: guest_control::UpdateResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let (path, value) = (params.get_path()?.to_str()?, params.get_value()?.to_str()?);
        let updated = self.guest.update(path, value).await;
        if let Ok(value) = &updated {
            results.get().set_value(&value[..]);
        }
        Failure::write_result(&updated.map(drop), results.get().init_result());
        Ok(())
    }

    async fn debugger(
        self: Rc<Self>,
        params: guest_control::DebuggerParams,
        mut results: guest_control::DebuggerResults,
    ) -> capnp::Result<()> {
        let sink = params.get()?.get_sink()?;
        match debugger::attach(&self.guest, sink).await {
            Ok(debugger) => results.get().set_debugger(debugger),
            Err(failure) => {
                let mut results = results.get();
                results.set_debugger(broken(&failure));
                failure.write(results.init_error());
            }
        }
        Ok(())
    }

    async fn add_unit(
        self: Rc<Self>,
        params: guest_control::AddUnitParams,
        mut results: guest_control::AddUnitResults,
    ) -> capnp::Result<()> {
        let added = match UnitConfig::read(params.get()?.get_unit()?)? {
            Ok(unit) => {
                self.driver.ask_of(&self.guest, |reply| Command::AddUnit(Box::new(unit), reply)).await
            }
            Err(faults) => refused(&faults).map_or(Ok(()), Err),
        };
        Failure::write_result(&added, results.get().init_result());
        Ok(())
    }

    async fn nmi(
        self: Rc<Self>,
        _: guest_control::NmiParams,
        mut results: guest_control::NmiResults,
    ) -> capnp::Result<()> {
        Failure::write_result(&self.guest.inject_nmi(), results.get().init_result());
        Ok(())
    }

    async fn power_button(
        self: Rc<Self>,
        _: guest_control::PowerButtonParams,
        mut results: guest_control::PowerButtonResults,
    ) -> capnp::Result<()> {
        Failure::write_result(&self.guest.press_power_button(), results.get().init_result());
        Ok(())
    }

    async fn dump(
        self: Rc<Self>,
        _: guest_control::DumpParams,
        mut results: guest_control::DumpResults,
    ) -> capnp::Result<()> {
        match self.guest.dump().await {
            Ok(core) => {
                let core: file::Client = capnp_rpc::new_client(DumpFile(Arc::new(core)));
                results.get().set_core(core);
            }
            Err(failure) => {
                results.get().set_core(broken(&failure));
                failure.write(results.get().init_error());
            }
        }
        Ok(())
    }
}

/// A core dump, read by a client.
struct DumpFile(Arc<CoreDump>);

impl file::Server for DumpFile {
    async fn size(self: Rc<Self>, _: file::SizeParams, mut results: file::SizeResults) -> capnp::Result<()> {
        results.get().set_bytes(self.0.bytes());
        Ok(())
    }

    /// Memory is read on the blocking pool: the host may have to swap it in.
    async fn read(
        self: Rc<Self>,
        params: file::ReadParams,
        mut results: file::ReadResults,
    ) -> capnp::Result<()> {
        let (offset, count) = (params.get()?.get_offset(), params.get()?.get_count().min(MAX_FILE_READ));
        let core = self.0.clone();
        let read = tokio::task::spawn_blocking(move || core.read(offset, count as usize)).await;
        let bytes = read.map_err(|panicked| capnp::Error::failed(panicked.to_string()))?;
        results.get().set_bytes(&bytes.map_err(|error| capnp::Error::failed(chain(&error)))?);
        Ok(())
    }
}
