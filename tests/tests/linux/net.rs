//! The network device with Linux's driver, over a TAP device with two queues and over passt at once.

use super::{BOOTED, LIMIT, MIB, assert_is_clean, assert_is_in_order, power_off, serve};
use anyhow::{Context, ensure};
use guest_tests::lab::{Lab, LabGuest, TapQueues, Toolset};

/// The host's address and the guest's, on either network. Behind passt it is one of the host's that passt does not translate: what
/// passt makes of its own gateway is not for pings.
const TAP: [&str; 2] = ["198.51.100.1", "198.51.100.2"];
const PASST: [&str; 2] = ["203.0.113.1", "192.0.2.2"];

pub fn linux_talks_over_tap_and_passt(lab: &Lab) -> anyhow::Result<()> {
    lab.make_tap("tap-net", TapQueues::Many, "root", &format!("{}/24", TAP[0]))?;
    // passt pings through sockets that only these groups of users may have.
    lab.run("echo 0 2147483647 >/proc/sys/net/ipv4/ping_group_range", LIMIT)?;
    let passt = lab.start_passt("net-passt", "")?;
    lab.run(&format!("ip address add {}/32 dev uplink", PASST[0]), LIMIT)?;
    let log = serve(lab, "/tmp/guestd-net")?;
    let arguments = format!(
        "--cpus 2 --memory 512M --socket /tmp/guestd-net.sock --net tap=tap-net,mac=02:00:00:00:00:05,queues=2 \
         --net passt={}/socket,mtu=9000",
        passt.folder()
    );
    let guest =
        LabGuest::start_with(&[Toolset::Net], lab, "net", "panic=-1", &arguments).with_context(|| log)?;
    guest.saw(BOOTED, 1, LIMIT)?;
    let net = Net { guest: &guest };
    net.configure()?;
    net.is_as_configured()?;
    for host in [TAP[0], PASST[0]] {
        net.carries_traffic(host)?;
    }
    net.link_goes_down_and_up()?;
    net.tap_is_deleted_under_load()?;
    // The other device knows nothing of that, until its own back end goes.
    net.ping(PASST[0])?;
    guest.here(&format!("kill -KILL $(cat {}/pid)", passt.folder()))?;
    net.carrier_becomes("eth1", 0)?;
    assert_is_in_order(&guest, 2, 512 * MIB)?;
    assert_is_clean(&power_off(&guest)?, 1)
}

/// A guest with a TAP device as `eth0`, and passt behind `eth1`.
struct Net<'g, 'lab> {
    guest: &'g LabGuest<'lab>,
}

impl Net<'_, '_> {
    /// Asks the guest for something that has to succeed.
    fn succeed(&self, command: &str) -> anyhow::Result<String> {
        let answer = self.guest.ask(&format!("{command}; echo STATUS=$?"), LIMIT)?;
        match answer.strip_suffix("STATUS=0\n") {
            Some(answer) => Ok(answer.to_owned()),
            None => anyhow::bail!("{command:?} in the guest: {answer}"),
        }
    }

    fn configure(&self) -> anyhow::Result<()> {
        self.succeed(&format!(
            "ethtool -L eth0 combined 2 && ip address add {}/24 dev eth0 && ip link set eth0 up && \
             ip address add {}/24 dev eth1 && ip link set eth1 up && ip route add {} via 192.0.2.1 dev eth1",
            TAP[1], PASST[1], PASST[0]
        ))?;
        Ok(())
    }

    /// Address, queues, MTU and offloads are what the config and the back end say.
    fn is_as_configured(&self) -> anyhow::Result<()> {
        let address = self.succeed("cat /sys/class/net/eth0/address /sys/class/net/eth1/mtu")?;
        ensure!(address == "02:00:00:00:00:05\n9000\n", "address and MTU: {address}");
        let channels = self.succeed("ethtool -l eth0")?;
        ensure!(channels.matches("Combined:\t2").count() == 2, "two queue pairs of two: {channels}");
        let offloads = |device: &str| {
            self.succeed(&format!("ethtool -k {device} | grep -E '^(tx-checksumming|tcp-seg)'"))
        };
        let (tap, passt) = (offloads("eth0")?, offloads("eth1")?);
        ensure!(tap.matches(": on").count() == 2, "a TAP device has offloads: {tap}");
        ensure!(passt.matches(": off").count() == 2, "a stream has none: {passt}");
        Ok(())
    }

    fn ping(&self, host: &str) -> anyhow::Result<()> {
        self.succeed(&format!("ping -q -c 3 -W 20 {host}"))?;
        Ok(())
    }

    /// Pings, one connection each way, and eight at once.
    fn carries_traffic(&self, host: &str) -> anyhow::Result<()> {
        self.ping(host)?;
        self.guest.here("(iperf3 --server --pidfile /tmp/iperf.pid >iperf.log 2>&1 </dev/null &)")?;
        self.guest.until("[ -s /tmp/iperf.pid ]", "iperf3's server", LIMIT)?;
        for arguments in ["-n 1M", "-n 1M --reverse", "-n 1M --parallel 8"] {
            let report = self.succeed(&format!("iperf3 --client {host} {arguments} --format m"))?;
            ensure!(report.contains("receiver"), "{report}");
        }
        self.guest.here("kill $(tr -d '\\0' </tmp/iperf.pid); rm -f /tmp/iperf.pid")?;
        Ok(())
    }

    fn carrier_becomes(&self, device: &str, carrier: u32) -> anyhow::Result<()> {
        let wait =
            format!("until [ \"$(cat /sys/class/net/{device}/carrier)\" = {carrier} ]; do sleep 0.1; done");
        self.succeed(&wait)?;
        Ok(())
    }

    fn link_goes_down_and_up(&self) -> anyhow::Result<()> {
        let update = |to: &str| {
            let node = "net units/net0/unit/device/link";
            self.guest.here(&format!("guestctl --socket /tmp/guestd-net.sock update {node} {to} 2>&1"))
        };
        for (to, carrier) in [("false", 0), ("true", 1)] {
            let answer = update(to)?;
            ensure!(answer.trim() == to, "{answer}");
            self.carrier_becomes("eth0", carrier)?;
        }
        self.ping(TAP[0])
    }

    fn tap_is_deleted_under_load(&self) -> anyhow::Result<()> {
        self.guest.here("(iperf3 --server --pidfile /tmp/iperf.pid >iperf.log 2>&1 </dev/null &)")?;
        self.guest.until("[ -s /tmp/iperf.pid ]", "iperf3's server", LIMIT)?;
        self.succeed(&format!("(iperf3 --client {} --time 1000 >/tmp/load 2>&1 &)", TAP[0]))?;
        self.succeed("until grep -q sec /tmp/load; do sleep 0.1; done")?;
        self.guest.here("/bin/ip link delete tap-net")?;
        self.carrier_becomes("eth0", 0)?;
        self.guest.here("kill -KILL $(tr -d '\\0' </tmp/iperf.pid)")?;
        self.succeed("killall -KILL iperf3; ip link set eth0 down; true")?;
        let shown = self
            .guest
            .here("guestctl --socket /tmp/guestd-net.sock inspect net units/net0/unit/device/backend")?;
        ensure!(shown.contains("gone"), "{shown}");
        Ok(())
    }
}
