//! What the service runs with: a TOML file, or the defaults.

use serde::Deserialize;
use std::path::{Path, PathBuf};
use tracing_subscriber::EnvFilter;

/// What guests run on; what follows a comma is for guest-vmm alone.
const HYPERVISORS: [&str; 2] = ["kvm", "scripted"];

/// The most VMMs that are kept ready.
const MAX_WARM: usize = 64;

/// The service's config. Every field has a default; an unknown one is an error.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct ServiceConfig {
    /// The guest-vmm to launch; `None` looks beside the running executable, then in PATH.
    pub vmm: Option<PathBuf>,
    /// Where guests run, as `guest-vmm --hypervisor` takes it: `kvm`, or `scripted` for tests without a hypervisor.
    pub hypervisor: String,
    /// How many VMMs are kept ready for guests to come, at most 64; 0 keeps none. They do not count as guests.
    pub warm: usize,
    /// How many guests there may be at a time.
    pub max_guests: usize,
    /// How many snapshots are kept at a time, each with up to five descriptors and as much memory as its guest's.
    pub max_snapshots: usize,
    /// How many connections one user may have.
    pub max_connections: usize,
    /// The log filter of the guest VMMs, in the syntax of `--log`.
    pub vmm_log: String,
}

impl Default for ServiceConfig {
    fn default() -> Self {
        Self {
            vmm: None,
            hypervisor: "kvm".into(),
            warm: 2,
            max_guests: 1024,
            max_snapshots: 256,
            max_connections: 256,
            vmm_log: "info".into(),
        }
    }
}

/// Why a config file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("config {path}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// It is not what is expected; the source names line and field.
    #[error("config {path}")]
    Parse {
        /// The file.
        path: String,
        /// The parser's words.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A field's value cannot be used.
    #[error("config {path}: {setting}")]
    Value {
        /// The file.
        path: String,
        /// The field, its value and what is wrong with it.
        setting: WrongSetting,
    },
}

/// A setting that no guest could be launched with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} = {value:?}: {problem}")]
pub struct WrongSetting {
    /// The field, as the config file calls it.
    pub field: &'static str,
    /// Its value.
    pub value: String,
    /// What is wrong with it.
    pub problem: String,
}

impl ServiceConfig {
    /// Reads a config file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let name = || path.display().to_string();
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: name(), source })?;
        let config: Self = toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: name(), source: Box::new(source) })?;
        config.check().map_err(|setting| ConfigError::Value { path: name(), setting })?;
        Ok(config)
    }

    /// Whether guests can be launched with these settings, as far as that can be told before.
    pub fn check(&self) -> Result<(), WrongSetting> {
        let wrong = |field, value: String, problem: String| Err(WrongSetting { field, value, problem });
        let hypervisor = self.hypervisor.split(',').next().unwrap_or_default();
        if !HYPERVISORS.contains(&hypervisor) {
            return wrong(
                "hypervisor",
                self.hypervisor.clone(),
                format!("{} are known", HYPERVISORS.join(", ")),
            );
        }
        if let Err(error) = EnvFilter::try_new(&self.vmm_log) {
            return wrong("vmm-log", self.vmm_log.clone(), error.to_string());
        }
        if self.warm > MAX_WARM {
            return wrong("warm", self.warm.to_string(), format!("at most {MAX_WARM} VMMs are kept ready"));
        }
        match &self.vmm {
            Some(path) if !path.is_file() => {
                wrong("vmm", path.display().to_string(), "no such executable file".into())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_have_defaults_and_unknown_ones_are_named() {
        let config: ServiceConfig = toml::from_str("max-guests = 3").expect("valid");
        assert_eq!((config.max_guests, &config.hypervisor[..]), (3, "kvm"));
        let error = toml::from_str::<ServiceConfig>("max_guest = 3").expect_err("unknown");
        assert!(error.to_string().contains("max_guest"), "{error}");
    }

    #[test]
    fn settings_that_launch_nothing_are_named() {
        assert_eq!(ServiceConfig::default().check(), Ok(()));
        let scripted = ServiceConfig { hypervisor: "scripted,panic=0".into(), ..ServiceConfig::default() };
        assert_eq!(scripted.check(), Ok(()));
        let wrong = ServiceConfig { hypervisor: "xen".into(), ..ServiceConfig::default() };
        let wrong = wrong.check().expect_err("unknown");
        assert_eq!(wrong.to_string(), "hypervisor = \"xen\": kvm, scripted are known");
        let wrong = ServiceConfig { vmm_log: "=,=".into(), ..ServiceConfig::default() };
        assert_eq!(wrong.check().expect_err("no filter").field, "vmm-log");
        let most = ServiceConfig { warm: MAX_WARM, ..ServiceConfig::default() };
        assert_eq!(most.check(), Ok(()));
        let wrong = ServiceConfig { warm: MAX_WARM + 1, ..ServiceConfig::default() }.check();
        let wrong = wrong.expect_err("too many").to_string();
        assert_eq!(wrong, "warm = \"65\": at most 64 VMMs are kept ready");
    }
}
