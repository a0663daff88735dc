//! The socket device with Linux's driver: streams both ways, through `guestctl run --vsock path=…`.

use super::{BOOTED, LIMIT, MIB, assert_is_in_order};
use anyhow::{Context, ensure};
use guest_tests::lab::{Lab, LabGuest, LabProcess, Toolset};
use guest_tests::requirements::scaled;

/// Connections at once.
const CONNECTIONS: u32 = 100;
/// What goes through one connection each way.
const TRANSFER_MIB: u32 = 64;
/// 1 GiB.
const MOST_MIB: u32 = 1024;

// Linux gives a connection two seconds to be accepted, which is little for an emulated host that does something else: hence
// socat's retry=9, which tries again before the first byte.

/// A guest with the device, whose sockets on the host are in its folder.
fn start<'lab>(lab: &'lab Lab, name: &str) -> anyhow::Result<LabGuest<'lab>> {
    let guest = LabGuest::start_with(
        &[Toolset::Vsock],
        lab,
        name,
        "panic=-1",
        "--memory 256M --vsock path=vsock.sock",
    )?;
    guest.saw(BOOTED, 1, LIMIT)?;
    Ok(guest)
}

/// Lets the host's programs `command` answer what the guest connects to at `port`, each on its own connection.
pub(super) fn serve<'lab>(
    lab: &'lab Lab,
    guest: &LabGuest<'_>,
    port: u32,
    command: &str,
) -> anyhow::Result<LabProcess<'lab>> {
    let path = format!("{}/vsock.sock_{port}", guest.folder());
    let name = format!("{}-{port}", guest.folder().trim_start_matches("/tmp/"));
    let server = lab.spawn(
        &name,
        &format!("exec socat -b 65536 -t 100 UNIX-LISTEN:{path},fork,backlog=1000 {command}"),
    )?;
    server.until(&format!("test -S {path}"), "socket", LIMIT)?;
    Ok(server)
}

/// Lets the guest's program `command` answer what the host connects to at `port`.
pub(super) fn serve_in_guest(guest: &LabGuest<'_>, port: u32, command: &str) -> anyhow::Result<()> {
    guest.ask(
        &format!("{{ socat -b 65536 -t 100 VSOCK-LISTEN:{port},fork {command} 2>/tmp/err-{port} & }}"),
        LIMIT,
    )?;
    // Listening shows nowhere: whoever connects too early is refused, so that is tried.
    // With a space, for two parentheses would be arithmetic.
    let seen = format!("test \"$( {})\"", connect(port, ":", "true"));
    guest.until(&seen, &format!("program on the guest's port {port}"), LIMIT)?;
    Ok(())
}

/// The host's command that connects to the guest's `port`, sends what `source` writes, and gives what comes back to `sink`.
pub(super) fn connect(port: u32, source: &str, sink: &str) -> String {
    format!(
        "(echo CONNECT {port}; {source}) | socat -b 65536 -t 100 - UNIX-CONNECT:vsock.sock | (read -r ok && echo $ok; {sink})"
    )
}

pub fn linux_connects_and_is_connected_to(lab: &Lab) -> anyhow::Result<()> {
    let guest = start(lab, "vsock")?;
    let _echo = serve(lab, &guest, 1000, "EXEC:cat")?;
    let answer =
        guest.ask("echo from the guest | socat -b 65536 -t 100 - VSOCK-CONNECT:2:1000,retry=9", LIMIT)?;
    ensure!(answer == "from the guest\n", "{answer:?}");
    let refused = guest.ask("socat - VSOCK-CONNECT:2:1001 </dev/null 2>&1 || echo refused", LIMIT)?;
    ensure!(refused.contains("Connection reset") && refused.ends_with("refused\n"), "{refused:?}");

    serve_in_guest(&guest, 2000, "EXEC:cat")?;
    let answer = guest.here(&connect(2000, "echo from the host", "cat"))?;
    let (ok, echo) = answer.split_once('\n').context(answer.clone())?;
    let port = ok.strip_prefix("OK ").and_then(|port| port.parse::<u32>().ok());
    ensure!(port.is_some_and(|port| (49152..=65535).contains(&port)), "{answer:?}");
    ensure!(echo == "from the host\n", "{answer:?}");
    let refused = guest.here(&connect(2001, ":", "cat"))?;
    ensure!(refused.is_empty(), "{refused:?}");
    assert_is_in_order(&guest, 1, 256 * MIB)?;
    Ok(())
}

/// Each end closes first, one way or both, and whole programs wait for the end of one way before they use the other.
pub fn linux_closes_in_every_order(lab: &Lab) -> anyhow::Result<()> {
    let guest = start(lab, "closing")?;
    // Says nothing before it has seen the end.
    let _sum = serve(lab, &guest, 1000, "EXEC:sha256sum")?;
    let expected = guest.here("printf half | sha256sum")?;
    let answer = guest.ask("printf half | socat -b 65536 -t 100 - VSOCK-CONNECT:2:1000,retry=9", LIMIT)?;
    ensure!(answer == expected, "the guest ends its way first: {answer:?}");
    serve_in_guest(&guest, 2000, "EXEC:sha256sum")?;
    let answer = guest.here(&connect(2000, "printf half", "cat"))?;
    ensure!(answer.ends_with(&expected), "the host ends its way first: {answer:?}");

    // The server speaks and is gone before the client, which has ended nothing, has read.
    let _hasty = serve(lab, &guest, 1001, "SYSTEM:'echo hasty'")?;
    let answer = guest.ask("sleep 3 | socat -b 65536 -t 100 - VSOCK-CONNECT:2:1001,retry=9", LIMIT)?;
    ensure!(answer == "hasty\n", "the host closes first: {answer:?}");
    serve_in_guest(&guest, 2001, "SYSTEM:'echo hasty'")?;
    let answer = guest.here(&connect(2001, "sleep 3", "cat"))?;
    ensure!(answer.ends_with("\nhasty\n"), "the guest closes first: {answer:?}");

    // The client sends and is gone, while all is still on its way.
    let keep =
        serve(lab, &guest, 1002, "SYSTEM:'until [ -e go ]; do sleep 0.2; done; cat >kept; touch whole'")?;
    guest.ask("head -c 200000 /dev/zero | socat -b 65536 -u - VSOCK-CONNECT:2:1002,retry=9", LIMIT)?;
    keep.here("touch go")?;
    keep.until("test -e whole", "end of what the guest has sent", LIMIT)?;
    let kept = keep.here("wc -c <kept")?;
    ensure!(kept.trim() == "200000", "the guest sends and goes: {kept:?}");
    assert_is_in_order(&guest, 1, 256 * MIB)?;
    Ok(())
}

pub fn linux_has_many_connections_at_once(lab: &Lab) -> anyhow::Result<()> {
    let count = scaled(CONNECTIONS);
    let guest = start(lab, "many")?;
    let hold = serve(lab, &guest, 1000, "SYSTEM:'touch up-$$; until [ -e go ]; do sleep 1; done; cat'")?;
    // The host's program takes some connections at a time, and refuses the others until it has started a shell for each of these.
    let client = "(echo $i | socat -b 65536 -t 100 - VSOCK-CONNECT:2:1000,retry=200 >/tmp/answer-$i) &";
    guest.ask(&format!("for i in $(seq {count}); do {client} done"), LIMIT)?;
    let up = format!("test $(ls | grep -c up-) = {count}");
    hold.until(&up, "connection of each program at the same time", LIMIT)?;
    hold.here("touch go")?;
    let wrong = format!(
        "wait; for i in $(seq {count}); do [ \"$(cat /tmp/answer-$i)\" = $i ] || echo wrong $i; done"
    );
    let wrong = guest.ask(&wrong, LIMIT)?;
    ensure!(wrong.is_empty(), "{wrong}");
    assert_is_in_order(&guest, 1, 256 * MIB)?;
    Ok(())
}

pub fn what_linux_sends_and_gets_is_whole(lab: &Lab) -> anyhow::Result<()> {
    let count = scaled(TRANSFER_MIB).min(MOST_MIB);
    let guest = start(lab, "transfer")?;
    // No two pieces are the same, so that none can stand for another.
    let pieces = format!("for i in $(seq {count}); do echo $i; cat random; done");
    let random = "head -c 1048576 /dev/urandom >random";
    guest.ask(&format!("cd /tmp; {random}"), LIMIT)?;
    let sum = serve(lab, &guest, 1000, "SYSTEM:'sha256sum >sum; touch whole'")?;
    guest.ask(&format!("({pieces}) | socat -b 65536 -u - VSOCK-CONNECT:2:1000,retry=9"), 5 * LIMIT)?;
    sum.until("test -e whole", "end of what the guest has sent", LIMIT)?;
    let sent = guest.ask(&format!("({pieces}) | sha256sum"), 5 * LIMIT)?;
    let received = sum.here("cat sum")?;
    ensure!(sent == received, "the guest sent {sent:?}, the host got {received:?}");

    serve_in_guest(&guest, 2000, "EXEC:sha256sum")?;
    let transfer = connect(2000, &pieces, "cat");
    let to_guest =
        format!("cd {}; {random}; ({pieces}) | sha256sum >sent; {transfer} >got; touch done", guest.folder());
    let host = lab.spawn("to-guest", &to_guest)?;
    host.end(5 * LIMIT)?;
    let (sent, got) = (guest.here("cat sent")?, guest.here("tail -n 1 got")?);
    ensure!(!sent.is_empty() && sent == got, "the host sent {sent:?}, the guest got {got:?}");
    assert_is_in_order(&guest, 1, 256 * MIB)?;
    Ok(())
}
