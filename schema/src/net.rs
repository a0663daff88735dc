//! Network devices in a guest's config.

use crate::config_capnp::net_config as wire;
use crate::{ConfigFault, RateLimits};
use std::fmt;
use std::str::FromStr;

/// The hardware address of a network device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// Whether it is one device's, as a device's own has to be (IEEE 802: the first byte's lowest bit is clear).
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0
    }

    /// An address of these bytes that is unicast and locally administered, whatever they are.
    #[must_use]
    pub fn locally_administered(mut bytes: [u8; 6]) -> Self {
        bytes[0] = bytes[0] & !1 | 2;
        Self(bytes)
    }
}

/// As people write it: 02:00:00:00:00:01.
impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, rest @ ..] = self.0;
        write!(f, "{first:02x}")?;
        rest.iter().try_for_each(|byte| write!(f, ":{byte:02x}"))
    }
}

/// A text that is no hardware address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no hardware address such as 02:00:00:00:00:01")]
pub struct NotAMacAddress(String);

impl FromStr for MacAddress {
    type Err = NotAMacAddress;

    fn from_str(text: &str) -> Result<Self, NotAMacAddress> {
        let digits = |byte: &str| byte.len() == 2 && byte.bytes().all(|digit| digit.is_ascii_hexdigit());
        let byte = |byte: &str| u8::from_str_radix(byte, 16).ok().filter(|_| digits(byte));
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
        bytes.map(Self).ok_or_else(|| NotAMacAddress(text.to_owned()))
    }
}

/// Where a network device's frames come from and go to. Descriptors are running numbers on the guest's own channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetBackend {
    /// A TAP device: one descriptor for each queue pair.
    Tap(Vec<u64>),
    /// A connected Unix stream socket in the framing of QEMU and passt.
    Stream(u64),
    /// A connected Unix stream socket, with a vhost-user back end at its other end.
    VhostUser {
        /// The socket.
        socket: u64,
        /// How many queue pairs the device has.
        queue_pairs: u16,
    },
}

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    /// Its address; one is made up if there is none.
    pub mac: Option<MacAddress>,
    /// What the guest is told of the network's MTU, if anything.
    pub mtu: Option<u16>,
    /// Where its frames come from and go to.
    pub backend: NetBackend,
    /// How much may pass, each way for itself: frames, and their bytes.
    pub limits: RateLimits,
}

impl NetConfig {
    /// A device over this back end, with an address that is made up and without limits.
    pub fn new(backend: NetBackend) -> Self {
        Self { mac: None, mtu: None, backend, limits: RateLimits::default() }
    }

    pub(crate) fn read_all(
        list: capnp::struct_list::Reader<'_, wire::Owned>,
        faults: &mut Vec<ConfigFault>,
    ) -> capnp::Result<Vec<Self>> {
        let mut devices = Vec::new();
        for (index, reader) in list.iter().enumerate() {
            devices.extend(Self::read(reader, index, faults)?);
        }
        Ok(devices)
    }

    fn read(
        reader: wire::Reader<'_>,
        index: usize,
        faults: &mut Vec<ConfigFault>,
    ) -> capnp::Result<Option<Self>> {
        let mac = match reader.get_mac()? {
            [] => None,
            bytes => {
                let mac = bytes.try_into().map(MacAddress).ok();
                if mac.is_none() {
                    let problem = format!("{} bytes are not the 6 of an address", bytes.len());
                    faults.push(ConfigFault::new(format!("net[{index}].mac"), problem));
                }
                mac
            }
        };
        let backend = match reader.get_backend().which() {
            Ok(wire::backend::Tap(number)) => NetBackend::Tap(vec![number]),
            Ok(wire::backend::TapQueues(numbers)) => NetBackend::Tap(numbers?.iter().collect()),
            Ok(wire::backend::Stream(number)) => NetBackend::Stream(number),
            Ok(wire::backend::VhostUser(socket)) => {
                NetBackend::VhostUser { socket, queue_pairs: reader.get_queue_pairs() }
            }
            Err(unknown) => {
                let problem = format!("unknown kind {}", unknown.0);
                faults.push(ConfigFault::new(format!("net[{index}].backend"), problem));
                return Ok(None);
            }
        };
        let mtu = Some(reader.get_mtu()).filter(|mtu| *mtu != 0);
        let limits = RateLimits::read(reader.get_limits()?);
        Ok(Some(Self { mac, mtu, backend, limits }))
    }

    pub(crate) fn write_all<'a>(
        devices: &[Self],
        init: impl FnOnce(u32) -> capnp::struct_list::Builder<'a, wire::Owned>,
    ) {
        if devices.is_empty() {
            return;
        }
        let mut list = init(u32::try_from(devices.len()).expect("a list of 32 bits' length"));
        for (index, device) in (0..).zip(devices) {
            device.write(list.reborrow().get(index));
        }
    }

    fn write(&self, mut builder: wire::Builder<'_>) {
        let Self { mac, mtu, backend, limits } = self;
        if let Some(mac) = mac {
            builder.set_mac(&mac.0);
        }
        builder.set_mtu(mtu.unwrap_or(0));
        limits.write(builder.reborrow().init_limits());
        if let NetBackend::VhostUser { queue_pairs, .. } = backend {
            builder.set_queue_pairs(*queue_pairs);
        }
        let mut wire = builder.init_backend();
        match backend {
            NetBackend::Tap(numbers) if numbers.len() == 1 => wire.set_tap(numbers[0]),
            NetBackend::Tap(numbers) => {
                let count = u32::try_from(numbers.len()).expect("a list of 32 bits' length");
                let mut list = wire.init_tap_queues(count);
                (0..).zip(numbers).for_each(|(index, number)| list.set(index, *number));
            }
            NetBackend::Stream(number) => wire.set_stream(*number),
            NetBackend::VhostUser { socket, .. } => wire.set_vhost_user(*socket),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(devices: &[NetConfig]) -> (Vec<NetConfig>, Vec<ConfigFault>) {
        let mut message = capnp::message::Builder::new_default();
        let mut config = message.init_root::<crate::config_capnp::guest_config::Builder<'_>>();
        NetConfig::write_all(devices, |count| config.reborrow().init_net(count));
        let mut faults = Vec::new();
        let read = config.into_reader().get_net().and_then(|list| NetConfig::read_all(list, &mut faults));
        (read.expect("a message"), faults)
    }

    #[test]
    fn devices_come_back_as_they_were_written() {
        let mac = Some(MacAddress([2, 0, 0, 0, 0, 1]));
        let limits = RateLimits {
            bytes_per_second: 1,
            bytes_burst: 2,
            operations_per_second: 3,
            operations_burst: u64::MAX,
        };
        let devices = [
            NetConfig { mac, mtu: Some(1400), backend: NetBackend::Tap(vec![7]), limits },
            NetConfig::new(NetBackend::Tap(vec![1, 2, 3])),
            NetConfig::new(NetBackend::Tap(Vec::new())),
            NetConfig::new(NetBackend::Stream(u64::MAX)),
            NetConfig::new(NetBackend::VhostUser { socket: 3, queue_pairs: 4 }),
        ];
        assert_eq!(round_trip(&devices), (devices.to_vec(), vec![]));
    }

    #[test]
    fn an_address_of_another_length_is_a_fault() {
        let mut message = capnp::message::Builder::new_default();
        let config = message.init_root::<crate::config_capnp::guest_config::Builder<'_>>();
        let mut list = config.init_net(2);
        list.reborrow().get(1).set_mac(&[1, 2, 3]);
        let mut faults = Vec::new();
        let read = NetConfig::read_all(list.into_reader(), &mut faults).expect("a message");
        assert_eq!(read.len(), 2);
        assert_eq!(faults[0].to_string(), "net[1].mac: 3 bytes are not the 6 of an address");
    }

    #[test]
    fn addresses_are_read_as_they_are_written() {
        let mac: MacAddress = "02:00:0a:FF:10:01".parse().expect("an address");
        assert_eq!(mac, MacAddress([2, 0, 10, 255, 16, 1]));
        assert_eq!(mac.to_string(), "02:00:0a:ff:10:01");
        for text in ["", "02", "02:00:00:00:00", "02:00:00:00:00:00:00", "2:0:0:0:0:1", "02:00:00:00:00:+1"] {
            assert!(text.parse::<MacAddress>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_made_up_address_is_one_devices_own() {
        let mac = MacAddress::locally_administered([0xff; 6]);
        assert_eq!(mac.to_string(), "fe:ff:ff:ff:ff:ff");
        assert!(mac.is_unicast());
        assert!(!MacAddress([0xff; 6]).is_unicast());
    }
}
