//! What a guest's devices use of the lab's host: disk images, TAP devices, passt.

use std::time::Duration;

use super::background::{LabProcess, LabProcessError};
use super::{Lab, LabError};

const PASST_LIMIT: Duration = Duration::from_secs(60);

/// The usual size of a cluster of a qcow2 image.
const QCOW2_CLUSTER: u64 = 64 << 10;
/// How many of them [`qcow2_metadata`] takes.
const QCOW2_METADATA: usize = 4;

/// How many queues a TAP device is opened with. The kernel refuses the one kind to who asks for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TapQueues {
    /// One, opened without `IFF_MULTI_QUEUE`.
    One,
    /// Any number, each opened with `IFF_MULTI_QUEUE`.
    Many,
}

impl Lab {
    /// Makes a sparse file of `size` bytes, all zeros, in the lab's `/tmp` and returns its path.
    ///
    /// # Errors
    /// As [`Lab::run`]; [`LabError::Status`] when there is such a file or it cannot be that long.
    pub fn make_disk(&self, name: &str, size: u64) -> Result<String, LabError> {
        let path = format!("/tmp/{name}");
        self.succeed(&format!("[ ! -e {path} ] && truncate -s {size} {path}"))?;
        Ok(path)
    }

    /// Makes an image in the qcow2 format, version 3, of a disk of `size` bytes, all zeros, in the lab's `/tmp` and returns its path.
    ///
    /// # Errors
    /// As [`Lab::make_disk`].
    pub fn make_qcow2(&self, name: &str, size: u64) -> Result<String, LabError> {
        let clusters = qcow2_metadata(size);
        let path = self.make_disk(name, clusters.len() as u64 * QCOW2_CLUSTER)?;
        for (cluster, bytes) in (0..).zip(clusters) {
            let seek = cluster * QCOW2_CLUSTER;
            let escaped: String = bytes.iter().map(|byte| format!("\\{byte:03o}")).collect();
            self.succeed(&format!("printf '{escaped}' | dd of={path} bs=1 seek={seek} conv=notrunc"))?;
        }
        Ok(path)
    }

    /// Makes a TAP device that stays until `ip link delete` and that `user` may open. It is up, and the host has `address`, an IP address
    /// with the length of its prefix, on it.
    ///
    /// # Errors
    /// As [`Lab::run`]; [`LabError::Status`] with what `ip` says.
    pub fn make_tap(&self, name: &str, queues: TapQueues, user: &str, address: &str) -> Result<(), LabError> {
        let queues = match queues {
            TapQueues::One => "",
            TapQueues::Many => "multi_queue",
        };
        self.succeed(&format!(
            "/bin/ip tuntap add dev {name} mode tap {queues} user {user} && /bin/ip address add {address} dev {name} && \
             /bin/ip link set {name} up"
        ))?;
        Ok(())
    }

    /// Starts passt, which listens on the Unix socket `socket` in its folder, and returns once it does. `name` is used as for
    /// [`Lab::spawn`], `arguments` are passt's. The host's address is 192.0.2.1, a guest's 192.0.2.2; through it a guest
    /// reaches the host's loopback.
    ///
    /// # Errors
    /// As [`Lab::spawn`]; [`LabProcessError::NotSeen`] with what passt says when it does not come up.
    pub fn start_passt(&self, name: &str, arguments: &str) -> Result<LabProcess<'_>, LabProcessError> {
        // It takes a guest's addresses from the interface with the default route, and does not start without one.
        self.succeed(
            "[ -e /sys/class/net/uplink ] || { ip link add uplink type dummy && \
             ip address add 192.0.2.2/24 dev uplink && ip link set uplink up && ip route add default via 192.0.2.1; }",
        )?;
        // Started by root, it becomes nobody before it makes its socket.
        let run = format!("chown nobody . && exec passt --foreground --socket $PWD/socket {arguments}");
        let passt = self.spawn(name, &run)?;
        passt.until("[ -S socket ]", "socket of passt", PASST_LIMIT)?;
        Ok(passt)
    }
}

/// How each cluster begins of an image that holds nothing yet (QEMU, docs/interop/qcow2): the header, the refcount table, its one
/// block, the level 1 table.
fn qcow2_metadata(size: u64) -> [Vec<u8>; QCOW2_METADATA] {
    let [table, block, level_1] = [1, 2, 3].map(|cluster| cluster * QCOW2_CLUSTER);
    // As many bytes as one table of level 2 maps, whose entries have eight bytes.
    let level_1_entries = size.div_ceil(QCOW2_CLUSTER * QCOW2_CLUSTER / 8);
    let short = |value: u64| u32::try_from(value).expect("a count of few").to_be_bytes().to_vec();
    let long = |value: u64| value.to_be_bytes().to_vec();
    let header = [
        [b"QFI\xfb".to_vec(), short(3)].concat(),
        // Of a backing file: none.
        [long(0), short(0)].concat(),
        [short(QCOW2_CLUSTER.trailing_zeros().into()), long(size), short(0)].concat(),
        [short(level_1_entries), long(level_1)].concat(),
        [long(table), short(1)].concat(),
        // No snapshots, no features.
        [short(0), long(0), long(0), long(0), long(0)].concat(),
        // Refcounts of 1 << 4 bits; the header's own length.
        [short(4), short(104)].concat(),
    ];
    let refcounts = 1u16.to_be_bytes().repeat(QCOW2_METADATA);
    [header.concat(), long(block), refcounts, Vec::new()]
}
