//! The guest's socket device from a client's side, by the client library: who listens, who connects, who is refused. The guest is a
//! script that sends packets and waits for them.

use devices::virtio::vsock::fake_guest::{RX, RX_BYTES, TX, packet};
use devices::virtio::vsock::{EPHEMERAL, HEADER_BYTES, Header, Op, PortPair};
use guest_client::{VsockConfig, VsockOutput, VsockReset, vsock_acceptor};
use guest_schema::{DevicesConfig, GuestConfig, GuestError};
use guest_tests::driver::{Buffer, ScriptedDriver};
use guest_tests::service::PATIENCE;
use guest_tests::stage::{Act, Player, Running, Stage, Story, expect, refusal};
use processor::scripted::Script;

const SERIAL: u16 = 0x3f8;
const SLEEP_CONTROL: u16 = 0x600;
/// Packets to the guest, more than any story has.
const PACKETS: usize = 16;
/// Where in a packet its `op` is: 16 bits, and the low half of the flags behind it (VIRTIO 1.3, 5.10.6).
const OP: u64 = 30;
/// VIRTIO_VSOCK_SHUTDOWN_F_SEND
const SHUTDOWN_SEND: u32 = 2;

/// A guest in the making.
struct Sockets {
    script: Script,
    driver: ScriptedDriver,
    /// Where the packets are that did not come yet.
    expected: std::vec::IntoIter<u64>,
}

impl Sockets {
    fn new() -> Self {
        let mut script = Script::new();
        let mut driver = ScriptedDriver::set_up(&mut script, 3);
        // So that an interrupt is a packet's.
        driver.silence(&mut script, TX);
        let mut packets = Vec::new();
        for _ in 0..PACKETS {
            packets.extend(driver.send(&mut script, RX, &[Buffer::In(RX_BYTES)]));
        }
        script.out(SERIAL, b"READY\n");
        Self { script, driver, expected: packets.into_iter() }
    }

    /// Waits for the test.
    fn cue(&mut self) -> &mut Self {
        self.script.serial_input(SERIAL, 0x80);
        self
    }

    fn sends(&mut self, header: Header, payload: &[u8]) -> &mut Self {
        let len = u32::try_from(payload.len()).expect("a short one");
        let bytes = [&Header { len, ..header }.to_bytes()[..], payload].concat();
        self.driver.send(&mut self.script, TX, &[Buffer::Out(&bytes)]);
        self
    }

    /// Waits for a packet, and tells its op, its flags and the first eight bytes of its payload.
    fn gets(&mut self) -> &mut Self {
        let place = self.expected.next().expect("there are enough");
        let payload = place + HEADER_BYTES as u64;
        self.script.hlt().read_long(place + OP, SERIAL).read_quad(payload, SERIAL).out(SERIAL, b"TOLD\n");
        self
    }

    fn kernel(&mut self) -> Vec<u8> {
        self.cue().script.out(SLEEP_CONTROL, &[0x34]).spin();
        self.script.to_elf()
    }
}

/// What the guest tells of a packet.
fn told(op: Op, flags: u8, payload: &[u8; 8]) -> String {
    let payload = String::from_utf8_lossy(payload);
    format!("{}\0{}\0{payload}TOLD", char::from(op as u8), char::from(flags))
}

async fn play(player: &Player, guest: &mut Sockets, vsock: VsockConfig) -> anyhow::Result<Running> {
    let devices = DevicesConfig { vsock: Some(vsock), ..DevicesConfig::default() };
    player.play_config(&GuestConfig { devices, ..player.config_of(&guest.kernel())? }).await
}

async fn cue(running: &Running) -> Story {
    Ok(running.input.write(b"!").await?)
}

/// The next bytes of the guest's, which have to come in time.
async fn read(output: &mut VsockOutput) -> anyhow::Result<Result<Option<Vec<u8>>, VsockReset>> {
    Ok(tokio::time::timeout(PATIENCE, output.read()).await?)
}

async fn next<T>(request: impl Future<Output = Option<T>>) -> anyhow::Result<T> {
    let request = tokio::time::timeout(PATIENCE, request).await?;
    request.ok_or_else(|| anyhow::anyhow!("there are no more requests"))
}

const NONE: &[u8; 8] = &[0; 8];

/// A port that the config names: bytes both ways, and both ways end one by one.
pub async fn a_guest_talks_to_a_listener_of_its_config(stage: Stage) -> Story {
    let pair = PortPair { guest: 5000, host: 1024 };
    let mut guest = Sockets::new();
    guest.cue().sends(packet(pair, Op::Request), b"").gets();
    guest.cue().sends(packet(pair, Op::Rw), b"to the host").gets();
    guest.cue().sends(Header { flags: SHUTDOWN_SEND, ..packet(pair, Op::Shutdown) }, b"").gets();
    let player = stage.launch("").await?;
    let (acceptor, mut requests) = vsock_acceptor();
    let config = VsockConfig { listeners: vec![(pair.host, acceptor)], unclaimed: None };
    let running = play(&player, &mut guest, config).await?;
    let endpoint = running.guest.vsock();
    endpoint.opened().await?;
    expect("its port", refusal(endpoint.listen(pair.host).await)?, GuestError::AlreadyBound)?;

    cue(&running).await?;
    let request = next(requests.next()).await?;
    expect("ports", (request.guest_port, request.host_port), (pair.guest, pair.host))?;
    let mut stream = request.accept();
    running.console.saw(&told(Op::Response, 0, NONE)).await?;
    cue(&running).await?;
    expect("from the guest", read(&mut stream.output).await?, Ok(Some(b"to the host".to_vec())))?;
    stream.input.write(b"to guest").await?;
    running.console.saw(&told(Op::Rw, 0, b"to guest")).await?;
    cue(&running).await?;
    expect("the end", read(&mut stream.output).await?, Ok(None))?;
    stream.input.end().await?;
    // Of one direction or of both, as it comes.
    running.console.saw("\u{4}\0").await?;
    cue(&running).await?;
    running.run.await?;
    expect("the listener's end", requests.next().await.is_none(), true)?;
    expect("a port of a guest that is gone", refusal(endpoint.listen(9).await)?, GuestError::NotRunning)
}

/// Ports that nobody has named before: whoever takes the unclaimed ones decides about each.
pub async fn unclaimed_ports_are_accepted_or_refused_one_by_one(stage: Stage) -> Story {
    let pairs = [(5000, 2000), (5001, 2000), (5002, 2001)].map(|(guest, host)| PortPair { guest, host });
    let mut guest = Sockets::new();
    for pair in pairs {
        guest.cue().sends(packet(pair, Op::Request), b"").gets();
    }
    guest.cue().sends(packet(pairs[1], Op::Rst), b"");
    let player = stage.launch("").await?;
    let (acceptor, mut requests) = vsock_acceptor();
    let config = VsockConfig { unclaimed: Some(acceptor), ..VsockConfig::default() };
    let running = play(&player, &mut guest, config).await?;
    cue(&running).await?;
    drop(next(requests.next()).await?);
    running.console.saw("\u{3}\0").await?;

    let mut streams = Vec::new();
    for (pair, answers) in pairs[1..].iter().zip(1..) {
        cue(&running).await?;
        let request = next(requests.next()).await?;
        expect("ports", (request.guest_port, request.host_port), (pair.guest, pair.host))?;
        streams.push(request.accept());
        running.console.saw_times(&told(Op::Response, 0, NONE), answers).await?;
    }
    cue(&running).await?;
    expect("a reset by the guest", read(&mut streams[0].output).await?, Err(VsockReset))?;
    cue(&running).await?;
    running.run.await?;
    expect("a reset with the guest", read(&mut streams[1].output).await?, Err(VsockReset))?;
    expect("the end of the requests", requests.next().await.is_none(), true)
}

/// A port that is listened on while the guest runs, for as long as its listener is there.
pub async fn a_client_listens_for_as_long_as_it_likes(stage: Stage) -> Story {
    let pairs = [5000, 5001].map(|guest| PortPair { guest, host: 3000 });
    let mut guest = Sockets::new();
    guest.cue().sends(packet(pairs[0], Op::Request), b"").gets();
    guest.cue().sends(packet(pairs[0], Op::Rw), b"listened").sends(packet(pairs[0], Op::Rst), b"");
    guest.cue().sends(packet(pairs[1], Op::Request), b"").gets();
    let player = stage.launch("").await?;
    let running = play(&player, &mut guest, VsockConfig::default()).await?;
    let endpoint = running.guest.vsock();
    let mut listener = endpoint.listen(3000).await?;
    expect("its port", refusal(endpoint.listen(3000).await)?, GuestError::AlreadyBound)?;
    cue(&running).await?;
    let mut stream = next(listener.next()).await?.accept();
    running.console.saw(&told(Op::Response, 0, NONE)).await?;
    cue(&running).await?;
    expect("from the guest", read(&mut stream.output).await?, Ok(Some(b"listened".to_vec())))?;
    expect("a reset by the guest", read(&mut stream.output).await?, Err(VsockReset))?;
    drop((stream, listener));
    // Answered behind the listener's end, for calls keep their order.
    expect("another port", endpoint.listen(3001).await.is_ok(), true)?;
    cue(&running).await?;
    running.console.saw("\u{3}\0").await?;
    cue(&running).await?;
    Ok(running.run.await?)
}

/// The guest accepts one connection and refuses the next.
pub async fn a_client_connects_to_its_guest(stage: Stage) -> Story {
    let pairs = (7000..).zip(EPHEMERAL).map(|(guest, host)| PortPair { guest, host });
    let [accepted, refused] = pairs.take(2).collect::<Vec<_>>()[..] else { unreachable!("two of many") };
    let mut guest = Sockets::new();
    guest.gets().sends(packet(accepted, Op::Response), b"").sends(packet(accepted, Op::Rw), b"hello");
    guest.gets().gets().sends(packet(refused, Op::Rst), b"");
    let player = stage.launch("").await?;
    let running = play(&player, &mut guest, VsockConfig::default()).await?;
    let endpoint = running.guest.vsock();
    let mut stream = endpoint.connect(accepted.guest).await?;
    expect("ports", (stream.guest_port, stream.host_port), (accepted.guest, accepted.host))?;
    expect("from the guest", read(&mut stream.output).await?, Ok(Some(b"hello".to_vec())))?;
    stream.input.write(b"to guest").await?;
    running.console.saw(&told(Op::Rw, 0, b"to guest")).await?;
    let refused = refusal(endpoint.connect(refused.guest).await)?;
    expect("another port", refused, GuestError::ConnectionRefused)?;
    cue(&running).await?;
    running.run.await?;
    expect("a reset with the guest", read(&mut stream.output).await?, Err(VsockReset))?;
    let (written, ended) = (stream.input.write(b"late").await, stream.input.end().await);
    expect("input after the end fails", written.is_err() || ended.is_err(), true)?;
    expect("connect", refusal(endpoint.connect(7002).await)?, GuestError::NotRunning)
}

pub async fn a_guest_without_a_socket_device_says_so(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    let endpoint = running.guest.vsock();
    expect("the device", refusal(endpoint.opened().await)?, GuestError::DeviceNotPresent)
}
