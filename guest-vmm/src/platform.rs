//! What guests run on: KVM, or scripts for tests without a hypervisor.

use crate::rehearsal::rehearse;
use devices::ByteSink;
use kvm::KvmHypervisor;
use machine::{
    Halt, InjectedFault, InjectedStep, Machine, MachineConfig, MachineError, MachineShape, PreparedMachine,
};
use processor::scripted::{ScriptedHypervisor, ScriptedOptions};
use processor::{Hypervisor, PartitionError, VpIndex};
use std::cell::Cell;
use std::str::FromStr;
use std::sync::Arc;
use tokio::sync::{Mutex, OnceCell, mpsc};

/// What guests run on, as `--hypervisor` names it.
///
/// `kvm`; or `scripted`, a processor that interprets scripts, whose faults are injected by `fail-bind=VP`, `fail-start=VP`,
/// `panic=VP`, and a unit that fails at a step (`fail-unit=STEP`), never answers there (`hold-unit=STEP`) or takes 2 s for it
/// (`slow-unit=STEP`), behind commas. Steps are those of [`InjectedStep`]: `start`, `resume`, `go-on`, `stop`, `reset`, `can-save`,
/// `save`, `restore`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Platform {
    /// The host's KVM.
    Kvm,
    /// Scripts.
    Scripted(ScriptedOptions, Option<InjectedFault>),
}

/// A name that is none of a hypervisor's.
#[derive(Debug, thiserror::Error)]
#[error(
    "hypervisor {0:?}: `kvm` and `scripted[,fail-bind=VP][,fail-start=VP][,panic=VP][,fail-unit=STEP|,hold-unit=STEP|,slow-unit=STEP]` \
     are known"
)]
pub struct UnknownPlatform(String);

impl FromStr for Platform {
    type Err = UnknownPlatform;

    fn from_str(text: &str) -> Result<Self, UnknownPlatform> {
        let mut parts = text.split(',');
        match parts.next() {
            Some("kvm") if text == "kvm" => Ok(Self::Kvm),
            Some("scripted") => {
                let mut options = ScriptedOptions::default();
                let mut inject = None;
                for part in parts {
                    read_fault(part, &mut options, &mut inject)
                        .ok_or_else(|| UnknownPlatform(text.to_owned()))?;
                }
                Ok(Self::Scripted(options, inject))
            }
            _ => Err(UnknownPlatform(text.to_owned())),
        }
    }
}

fn read_fault(part: &str, options: &mut ScriptedOptions, inject: &mut Option<InjectedFault>) -> Option<()> {
    let (name, value) = part.split_once('=')?;
    let vp = || value.parse().ok().map(VpIndex);
    let step = || InjectedStep::NAMED.into_iter().find_map(|(name, step)| (name == value).then_some(step));
    match name {
        "fail-bind" => options.fail_bind = Some(vp()?),
        "fail-start" => options.fail_set_registers = Some(vp()?),
        "panic" => options.panic_at_first_instruction = Some(vp()?),
        "fail-unit" => *inject = Some(InjectedFault::Fails(step()?)),
        "hold-unit" => *inject = Some(InjectedFault::Holds(step()?)),
        "slow-unit" => *inject = Some(InjectedFault::IsSlow(step()?)),
        _ => return None,
    }
    Some(())
}

/// A platform, and what has been opened of it.
pub(crate) struct Host {
    platform: Platform,
    /// Opening it takes as long as half a launch, and what it tells of the host does not change. A failure is not kept.
    kvm: OnceCell<KvmHypervisor>,
    /// What was made ahead, for the first guest that it fits. Locked while it is being made: a create waits for that, rather than to
    /// begin anew beside it.
    prepared: Mutex<Option<PreparedMachine>>,
    has_rehearsed: Cell<bool>,
    /// Whether a guest was asked for: nothing is made ahead any more.
    is_used: Cell<bool>,
}

impl Host {
    pub fn new(platform: Platform) -> Self {
        Self {
            platform,
            kvm: OnceCell::new(),
            prepared: Mutex::default(),
            has_rehearsed: Cell::default(),
            is_used: Cell::default(),
        }
    }

    /// Opens the platform before it is needed. What fails will fail again for whom it matters.
    pub async fn open_ahead(&self) {
        if self.platform == Platform::Kvm
            && let Err(error) = self.kvm().await
        {
            tracing::debug!(%error, "KVM cannot be opened yet");
        }
    }

    async fn kvm(&self) -> Result<&KvmHypervisor, PartitionError> {
        let open = || async {
            let opened = tokio::task::spawn_blocking(KvmHypervisor::open).await;
            opened.unwrap_or_else(|panic| Err(PartitionError::Unavailable(panic.to_string())))
        };
        self.kvm.get_or_try_init(open).await
    }

    /// The most VPs that a guest can have here.
    pub async fn max_vps(&self) -> Result<u32, PartitionError> {
        match &self.platform {
            Platform::Kvm => self.kvm().await?.max_vps(),
            Platform::Scripted(options, _) => ScriptedHypervisor { options: *options }.max_vps(),
        }
    }

    /// Makes ahead what machines of this shape begin with, in place of what was made before. Does nothing once a guest was asked for.
    pub async fn prepare(&self, shape: MachineShape) -> Result<(), MachineError> {
        self.rehearse().await;
        let mut prepared = self.prepared.lock().await;
        if self.is_used.get() || prepared.as_ref().is_some_and(|prepared| *prepared.shape() == shape) {
            return Ok(());
        }
        if let Some(former) = prepared.take() {
            former.discard().await;
        }
        *prepared = Some(match &self.platform {
            Platform::Kvm => {
                let kvm = self.kvm().await.map_err(MachineError::Partition)?.clone();
                PreparedMachine::new(kvm, shape).await?
            }
            Platform::Scripted(options, _) => {
                PreparedMachine::new(ScriptedHypervisor { options: *options }, shape).await?
            }
        });
        Ok(())
    }

    /// Runs a guest that nobody sees, the first time. Nothing depends on its success.
    async fn rehearse(&self) {
        if self.platform == Platform::Kvm
            && !self.has_rehearsed.replace(true)
            && let Ok(kvm) = self.kvm().await
            && let Err(error) = rehearse(kvm.clone()).await
        {
            tracing::debug!(error = &error as &dyn std::error::Error, "no rehearsal");
        }
    }

    /// What was made ahead, if it fits; otherwise it is given back, for which nobody waits.
    async fn take_prepared(&self, shape: &MachineShape) -> Option<PreparedMachine> {
        let prepared = self.prepared.lock().await.take()?;
        let fits = prepared.shape() == shape;
        tracing::debug!(fits, "memory, partition and VPs were made ahead");
        if fits {
            return Some(prepared);
        }
        tokio::task::spawn_local(prepared.discard());
        None
    }

    /// Makes a machine, of what was made ahead if that fits.
    pub async fn build(
        &self,
        config: MachineConfig,
        output: Arc<dyn ByteSink>,
        halts: mpsc::UnboundedSender<Halt>,
        cancelled: impl Fn() -> bool + Send + 'static,
    ) -> Result<Machine, MachineError> {
        let config = match &self.platform {
            Platform::Kvm => config,
            Platform::Scripted(_, inject) => MachineConfig { inject: *inject, ..config },
        };
        self.is_used.set(true);
        if let Some(prepared) = self.take_prepared(&config.shape).await {
            return Machine::build_on(prepared, config, output, halts).await;
        }
        match &self.platform {
            Platform::Kvm => {
                let kvm = self.kvm().await.map_err(MachineError::Partition)?.clone();
                Machine::build(kvm, config, output, halts, cancelled).await
            }
            Platform::Scripted(options, _) => {
                let scripted = ScriptedHypervisor { options: *options };
                Machine::build(scripted, config, output, halts, cancelled).await
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use machine::BootFiles;
    use processor::scripted::Script;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::fs::File;
    use std::io::Write;

    async fn built(host: &Host, config: MachineConfig) -> Result<Machine, MachineError> {
        let (halts, _) = mpsc::unbounded_channel();
        host.build(config, Arc::new(|_: &[u8]| ()), halts, || false).await
    }

    fn config(vps: u32) -> MachineConfig {
        let mut script = Script::new();
        script.spin();
        let mut kernel = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).expect("a memfd"));
        kernel.write_all(&script.to_elf()).expect("written");
        MachineConfig::new(vps, 4 << 20, BootFiles { kernel, initrd: None, cmdline: String::new() })
    }

    /// What a host has made ahead.
    async fn is_prepared(host: &Host) -> Option<MachineShape> {
        host.prepared.lock().await.as_ref().map(|prepared| prepared.shape().clone())
    }

    async fn on_local_set(story: impl Future<Output = ()>) {
        tokio::task::LocalSet::new().run_until(story).await;
    }

    #[tokio::test]
    async fn what_was_made_ahead_is_taken_by_the_first_guest_and_given_back_by_an_unlike_one() {
        on_local_set(async {
            let host = Host::new("scripted".parse().expect("known"));
            let shape = config(2).shape;
            host.prepare(shape.clone()).await.expect("prepared");
            host.prepare(shape.clone()).await.expect("prepared already");
            assert_eq!(is_prepared(&host).await, Some(shape.clone()));
            let partition =
                Arc::downgrade(host.prepared.lock().await.as_ref().expect("prepared").partition());
            let first = built(&host, config(2)).await.expect("built");
            assert!(partition.upgrade().is_some(), "the machine is made of it");
            assert_eq!(is_prepared(&host).await, None);
            let second = built(&host, config(2)).await.expect("built anew");
            first.destroy().await;
            second.destroy().await;
            assert!(partition.upgrade().is_none());

            host.prepare(shape.clone()).await.expect("nothing to do");
            assert_eq!(is_prepared(&host).await, None, "it has had its guest");

            let host = Host::new("scripted".parse().expect("known"));
            host.prepare(shape).await.expect("prepared");
            let partition =
                Arc::downgrade(host.prepared.lock().await.as_ref().expect("prepared").partition());
            built(&host, config(1)).await.expect("built anew").destroy().await;
            assert_eq!(is_prepared(&host).await, None);
            let gone = async {
                while partition.upgrade().is_some() {
                    tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                }
            };
            tokio::time::timeout(std::time::Duration::from_secs(60), gone).await.expect("given back");
        })
        .await;
    }

    #[tokio::test]
    async fn a_machine_that_cannot_be_prepared_leaves_others_possible() {
        on_local_set(async {
            let host = Host::new("scripted,fail-bind=1".parse().expect("known"));
            let error = host.prepare(config(2).shape).await.expect_err("VP 1 cannot be bound");
            assert!(matches!(error, MachineError::Vp(_)), "{error}");
            assert_eq!(is_prepared(&host).await, None);
            built(&host, config(1)).await.expect("it has no VP 1").destroy().await;
        })
        .await;
    }

    #[test]
    fn names_are_read_and_others_refused() {
        assert_eq!("kvm".parse::<Platform>().expect("known"), Platform::Kvm);
        let Platform::Scripted(options, inject) =
            "scripted,fail-start=1,fail-unit=stop".parse().expect("known")
        else {
            panic!("scripted")
        };
        assert_eq!(options.fail_set_registers, Some(VpIndex(1)));
        assert_eq!(inject, Some(InjectedFault::Fails(InjectedStep::Stop)));
        for unknown in
            ["", "xen", "kvm,panic=0", "scripted,panic", "scripted,panic=x", "scripted,hold-unit=all"]
        {
            let error = unknown.parse::<Platform>().expect_err(unknown);
            assert!(error.to_string().contains(&format!("{unknown:?}")), "{error}");
        }
    }
}
