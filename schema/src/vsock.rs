//! The vsock device of a config.

use crate::config::ConfigFault;
use crate::config_capnp::vsock_config;
use crate::guest_capnp::vsock_acceptor;
use std::collections::BTreeSet;
use std::fmt;

/// The most listeners of a config.
const MAX_LISTENERS: usize = 1024;

/// A vsock device, and what is there before the guest's first instruction.
#[derive(Clone, Default)]
pub struct VsockConfig {
    /// Who accepts connections to which of the host's ports; each port once.
    pub listeners: Vec<(u32, vsock_acceptor::Client)>,
    /// Who is asked for every other port.
    pub unclaimed: Option<vsock_acceptor::Client>,
}

/// The capabilities have nothing to show.
impl fmt::Debug for VsockConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ports: Vec<u32> = self.listeners.iter().map(|(port, _)| *port).collect();
        let mut shown = f.debug_struct("VsockConfig");
        shown.field("ports", &ports).field("unclaimed", &self.unclaimed.is_some()).finish()
    }
}

impl VsockConfig {
    pub(crate) fn read(
        reader: vsock_config::Reader<'_>,
        faults: &mut Vec<ConfigFault>,
    ) -> capnp::Result<Self> {
        let list = reader.get_listeners()?;
        if list.len() as usize > MAX_LISTENERS {
            let problem = format!("{} listeners are more than {MAX_LISTENERS}", list.len());
            faults.push(ConfigFault::new("vsock.listeners", problem));
            return Ok(Self::default());
        }
        let (mut listeners, mut ports) = (Vec::new(), BTreeSet::new());
        for (index, listener) in list.iter().enumerate() {
            let port = listener.get_port();
            if !ports.insert(port) {
                let field = format!("vsock.listeners[{index}].port");
                faults.push(ConfigFault::new(field, format!("{port} is there already")));
            }
            if listener.has_acceptor() {
                listeners.push((port, listener.get_acceptor()?));
            } else {
                let field = format!("vsock.listeners[{index}].acceptor");
                faults.push(ConfigFault::new(field, "none was given"));
            }
        }
        let unclaimed = if reader.has_unclaimed() { Some(reader.get_unclaimed()?) } else { None };
        Ok(Self { listeners, unclaimed })
    }

    pub(crate) fn write(&self, mut builder: vsock_config::Builder<'_>) {
        if let Some(unclaimed) = &self.unclaimed {
            builder.set_unclaimed(unclaimed.clone());
        }
        let length = u32::try_from(self.listeners.len()).expect("a list of 32 bits' length");
        let mut list = builder.init_listeners(length);
        for (index, (port, acceptor)) in (0..).zip(&self.listeners) {
            let mut listener = list.reborrow().get(index);
            listener.set_port(*port);
            listener.set_acceptor(acceptor.clone());
        }
    }
}
