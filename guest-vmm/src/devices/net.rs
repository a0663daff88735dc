//! Network devices.

use super::{RequestedDevices, block};
use crate::config::refused;
use devices::virtio::net::{
    LinkEvent, LinkWatcher, MAX_QUEUE_PAIRS, MIN_MTU, Net, NetBackend, NetSpec, Tap, VhostUser,
    VhostUserError,
};
use futures::future::join_all;
use guest_schema::{ConfigFault, DeviceError, Failure, GuestError, MacAddress, NetConfig, RateLimits, chain};
use guest_transport::Descriptors;
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType, getpeername};
use rustix::rand::{GetRandomFlags, getrandom};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use tokio::sync::mpsc;

/// The most network devices of a guest.
const MAX_DEVICES: usize = 32;

/// A network device, its descriptors in hand.
pub(super) struct RequestedNet<B = OpenBackend> {
    mac: Option<MacAddress>,
    mtu: Option<u16>,
    backend: B,
    limits: RateLimits,
}

/// A back end, its descriptors in hand.
pub(super) enum OpenBackend {
    Ready(NetBackend),
    /// One that is to be agreed with about so many queue pairs.
    VhostUser(OwnedFd, u16),
}

/// Takes the devices' descriptors. What of them cannot be is a fault.
pub(super) fn take(
    devices: &[NetConfig],
    descriptors: &Descriptors,
    faults: &mut Vec<ConfigFault>,
) -> Vec<RequestedNet> {
    let mut taken = Vec::new();
    for (index, NetConfig { mac, mtu, backend, limits }) in devices.iter().enumerate() {
        let field = |kind: &str| format!("net[{index}].backend.{kind}");
        match back_end(backend, descriptors) {
            Ok(backend) => taken.push(RequestedNet { mac: *mac, mtu: *mtu, backend, limits: *limits }),
            Err((kind, problem)) => faults.push(ConfigFault::new(field(kind), problem)),
        }
    }
    taken
}

/// Has the back ends serve other devices, of which there are as many.
pub(super) fn serve(taken: &mut [RequestedNet], devices: &[NetConfig]) {
    for (net, device) in taken.iter_mut().zip(devices) {
        (net.mac, net.mtu, net.limits) = (device.mac, device.mtu, device.limits);
    }
}

/// Opens a back end, or says what of which kind it is not.
fn back_end(
    backend: &guest_schema::NetBackend,
    descriptors: &Descriptors,
) -> Result<OpenBackend, (&'static str, String)> {
    let take = |number: u64| descriptors.take(number).map_err(|error| error.to_string());
    match backend {
        guest_schema::NetBackend::Tap(numbers) => {
            let kind = if numbers.len() == 1 { "tap" } else { "tapQueues" };
            let queue = |number: &u64| {
                let tap = Tap::new(take(*number)?);
                tap.map_err(|error| format!("descriptor {number}: {}", chain(&error)))
            };
            let queues: Result<Vec<Tap>, String> = numbers.iter().map(queue).collect();
            Ok(OpenBackend::Ready(NetBackend::Tap(queues.map_err(|problem| (kind, problem))?)))
        }
        guest_schema::NetBackend::Stream(number) => {
            let socket = take(*number).and_then(|socket| connected(socket, *number));
            Ok(OpenBackend::Ready(NetBackend::Stream(socket.map_err(|problem| ("stream", problem))?)))
        }
        guest_schema::NetBackend::VhostUser { socket, queue_pairs } => {
            let connected = take(*socket).and_then(|descriptor| connected(descriptor, *socket));
            Ok(OpenBackend::VhostUser(connected.map_err(|problem| ("vhostUser", problem))?, *queue_pairs))
        }
    }
}

/// A connected Unix stream socket.
fn connected(socket: OwnedFd, number: u64) -> Result<OwnedFd, String> {
    let is_stream = socket_type(&socket).is_ok_and(|kind| kind == SocketType::STREAM)
        && socket_domain(&socket).is_ok_and(|domain| domain == AddressFamily::UNIX);
    if !is_stream {
        return Err(format!("descriptor {number} is no Unix stream socket"));
    }
    match getpeername(&socket) {
        Ok(_) => Ok(socket),
        Err(error) => Err(format!("descriptor {number}: the socket has no peer: {error}")),
    }
}

/// What of the devices cannot be, whatever their descriptors are.
pub(super) fn faults(devices: &[NetConfig]) -> Vec<ConfigFault> {
    let mut faults = Vec::new();
    if devices.len() > MAX_DEVICES {
        let problem = format!("{} devices are more than {MAX_DEVICES}", devices.len());
        faults.push(ConfigFault::new("net", problem));
    }
    let mut known = BTreeMap::new();
    for (index, NetConfig { mac, mtu, backend, limits }) in devices.iter().enumerate() {
        let mut fault = |field: &str, problem: String| {
            faults.push(ConfigFault::new(format!("net[{index}].{field}"), problem));
        };
        if let Some(mac) = mac {
            match known.insert(*mac, index) {
                _ if !mac.is_unicast() => fault("mac", format!("{mac} is no unicast address")),
                Some(other) => fault("mac", format!("{mac} is net[{other}]'s")),
                None => {}
            }
        }
        if let Some(mtu) = mtu.filter(|mtu| *mtu < MIN_MTU) {
            fault("mtu", format!("{mtu} is below the least of {MIN_MTU}"));
        }
        let is_vhost_user = matches!(backend, guest_schema::NetBackend::VhostUser { .. });
        if is_vhost_user && *limits != RateLimits::default() {
            fault("limits", "a vhost-user back end keeps to none".into());
        }
        let (field, pairs) = match backend {
            guest_schema::NetBackend::Tap(numbers) => ("backend.tapQueues", numbers.len()),
            guest_schema::NetBackend::Stream(_) => continue,
            guest_schema::NetBackend::VhostUser { queue_pairs, .. } => {
                ("queuePairs", usize::from(*queue_pairs))
            }
        };
        if !(1..=MAX_QUEUE_PAIRS).contains(&pairs) {
            fault(field, format!("{pairs} queue pairs are not from 1 to {MAX_QUEUE_PAIRS}"));
        }
    }
    faults
}

/// Agrees with the back ends that need it, all at once. What they lack are faults, all of them in one failure.
async fn agreed(taken: Vec<RequestedNet>) -> Result<Vec<RequestedNet<NetBackend>>, Failure> {
    let agree = async |RequestedNet { mac, mtu, backend, limits }| {
        let backend = match backend {
            OpenBackend::Ready(backend) => Ok(backend),
            OpenBackend::VhostUser(socket, pairs) => {
                VhostUser::connect(socket, pairs).await.map(NetBackend::VhostUser)
            }
        };
        backend.map(|backend| RequestedNet { mac, mtu, backend, limits })
    };
    let (mut agreed, mut faults) = (Vec::new(), Vec::new());
    for (index, outcome) in join_all(taken.into_iter().map(agree)).await.into_iter().enumerate() {
        match outcome {
            Ok(device) => agreed.push(device),
            Err(error @ (VhostUserError::Lacks(_) | VhostUserError::Queues { .. })) => {
                faults.push(ConfigFault::new(format!("net[{index}].backend.vhostUser"), error.to_string()));
            }
            Err(error) => return Err(unmade(&name(index), &error)),
        }
    }
    refused(&faults).map_or(Ok(agreed), Err)
}

fn name(index: usize) -> String {
    format!("net{index}")
}

fn unmade(name: &str, error: &dyn std::error::Error) -> Failure {
    Failure::new(GuestError::DeviceInitializationFailure, format!("{name}: {}", chain(error)))
}

/// Adds the devices. A back end is waited for some seconds at most, and not at all any more once this is dropped.
pub(super) async fn add(taken: Vec<RequestedNet>, devices: &mut RequestedDevices) -> Result<(), Failure> {
    let agreed = agreed(taken).await?;
    for (index, RequestedNet { mac, mtu, backend, limits }) in agreed.into_iter().enumerate() {
        let name = name(index);
        let mac = match mac {
            Some(mac) => mac,
            None => made_up().map_err(|error| unmade(&name, &error))?,
        };
        let watcher = Some(watcher(name.clone(), devices.told.clone()));
        let spec = NetSpec { mac: mac.0, mtu, backend, rates: Arc::new(block::rates(limits)), watcher };
        // The link is switched by its node in the inspection tree.
        let (spec, _link) = Net::spec(&name, spec).map_err(|error| unmade(&name, &error))?;
        devices.specs.push(spec);
    }
    Ok(())
}

/// Tells of a link that was lost, as of a request that a disk has failed.
fn watcher(device: String, errors: mpsc::Sender<DeviceError>) -> LinkWatcher {
    Box::new(move |LinkEvent::BackendGone(detail)| {
        let error = DeviceError { device: device.clone(), operation: "link".into(), detail, suppressed: 0 };
        // A log that cannot take them all is no reason to keep the device waiting.
        drop(errors.try_send(error));
    })
}

/// An address that nobody else has, most likely: 46 random bits.
fn made_up() -> rustix::io::Result<MacAddress> {
    let mut bytes = [0; 6];
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(MacAddress::locally_administered(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::devices::virtio::fake_back_end::{FakeBackEnd, OFFERED, PROTOCOL};
    use guest_schema::NetBackend as Backend;

    fn device(mac: Option<[u8; 6]>, mtu: Option<u16>, backend: Backend) -> NetConfig {
        NetConfig { mac: mac.map(MacAddress), mtu, ..NetConfig::new(backend) }
    }

    fn limited(backend: Backend) -> NetConfig {
        let limits = RateLimits { operations_per_second: 1, ..RateLimits::default() };
        NetConfig { limits, ..NetConfig::new(backend) }
    }

    #[test]
    fn a_lost_link_is_told() {
        let (errors, mut told) = mpsc::channel(1);
        let watcher = watcher("net3".into(), errors);
        watcher(LinkEvent::BackendGone("it was closed".into()));
        watcher(LinkEvent::BackendGone("there is no room for a second".into()));
        let expected = DeviceError {
            device: "net3".into(),
            operation: "link".into(),
            detail: "it was closed".into(),
            suppressed: 0,
        };
        assert_eq!(told.try_recv(), Ok(expected));
        assert!(told.try_recv().is_err());
    }

    #[test]
    fn every_fault_names_its_field_and_value() {
        let own = Some([2, 0, 0, 0, 0, 1]);
        let devices = [
            device(own, Some(68), Backend::Stream(0)),
            device(own, Some(67), Backend::Tap(Vec::new())),
            device(Some([1, 0, 0, 0, 0, 1]), None, Backend::Tap(vec![0; 17])),
            device(None, None, Backend::VhostUser { socket: 0, queue_pairs: 0 }),
            device(None, Some(u16::MAX), Backend::VhostUser { socket: 0, queue_pairs: 16 }),
            limited(Backend::VhostUser { socket: 0, queue_pairs: 1 }),
            limited(Backend::Stream(0)),
        ];
        let found: Vec<_> = faults(&devices).iter().map(ToString::to_string).collect();
        assert_eq!(
            found,
            [
                "net[1].mac: 02:00:00:00:00:01 is net[0]'s",
                "net[1].mtu: 67 is below the least of 68",
                "net[1].backend.tapQueues: 0 queue pairs are not from 1 to 16",
                "net[2].mac: 01:00:00:00:00:01 is no unicast address",
                "net[2].backend.tapQueues: 17 queue pairs are not from 1 to 16",
                "net[3].queuePairs: 0 queue pairs are not from 1 to 16",
                "net[5].limits: a vhost-user back end keeps to none",
            ]
        );
        let many = vec![device(None, None, Backend::Stream(0)); 33];
        assert_eq!(faults(&many)[0].to_string(), "net: 33 devices are more than 32");
        assert_eq!(faults(&many[1..]), []);
    }

    fn vhost_user(socket: std::os::unix::net::UnixStream, pairs: u16) -> RequestedNet {
        let backend = OpenBackend::VhostUser(socket.into(), pairs);
        RequestedNet { mac: None, mtu: None, backend, limits: RateLimits::default() }
    }

    fn agreed_with(devices: Vec<RequestedNet>) -> Result<usize, Failure> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        runtime.block_on(agreed(devices)).map(|devices| devices.len())
    }

    #[test]
    fn what_back_ends_lack_is_in_one_failure() {
        let back_end = || FakeBackEnd::new(OFFERED, PROTOCOL);
        let ((_good, good), (_small, small), (_plain, plain)) =
            (back_end(), back_end(), FakeBackEnd::new(0, PROTOCOL));
        let (_one, one) = back_end();
        assert_eq!(agreed_with(vec![vhost_user(one, 1)]), Ok(1));
        let failure =
            agreed_with(vec![vhost_user(small, 3), vhost_user(good, 2), vhost_user(plain, 1)]).unwrap_err();
        assert_eq!(failure.code, GuestError::BadConfig);
        let expected = "net[0].backend.vhostUser: the vhost-user back end has 4 queues, not 6; \
                        net[2].backend.vhostUser: the vhost-user back end has no VIRTIO_F_VERSION_1";
        assert_eq!(failure.detail, expected);
    }

    /// Several that do not answer take no longer than one.
    #[test]
    fn back_ends_that_do_not_answer_are_given_up_together() {
        let (sockets, _others): (Vec<_>, Vec<_>) =
            (0..8).map(|_| std::os::unix::net::UnixStream::pair().expect("a pair")).unzip();
        let begun = std::time::Instant::now();
        let devices = sockets.into_iter().map(|socket| vhost_user(socket, 1));
        let failure = agreed_with(devices.collect()).unwrap_err();
        assert!(begun.elapsed() < std::time::Duration::from_secs(6), "{:?}", begun.elapsed());
        assert_eq!(failure.code, GuestError::DeviceInitializationFailure);
        assert_eq!(failure.detail, "net0: the vhost-user back end has not answered within 3s");
    }

    #[test]
    fn a_stream_is_a_connected_unix_socket() {
        let (ours, _its) = std::os::unix::net::UnixStream::pair().expect("a pair");
        connected(ours.into(), 3).expect("connected");
        let file = std::fs::File::open("/dev/null").expect("there");
        assert_eq!(connected(file.into(), 4).unwrap_err(), "descriptor 4 is no Unix stream socket");
        let flags = rustix::net::SocketFlags::CLOEXEC;
        let alone =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("one");
        let problem = connected(alone, 5).unwrap_err();
        assert!(problem.starts_with("descriptor 5: the socket has no peer: "), "{problem}");
    }
}
