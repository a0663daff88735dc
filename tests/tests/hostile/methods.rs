//! Methods that are in their places and do nothing yet, and looks that no tree can answer.

use capnp::Error;
use guest_schema::guest_capnp::{guest, guest_control, guest_lifecycle, observer};
use guest_schema::{Failure, GuestError};
use guest_tests::bare::{Bare, sink};
use guest_tests::console::Console;
use guest_tests::requirements::trial;
use guest_tests::stage::{Act, Channel, Kind, Stage, Story, expect, play, sealed_file};
use libtest_mimic::Trial;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("methods::direct", &[], || play(methods_without_a_body(Channel::Direct))),
        trial("methods::proxied", &[], || play(methods_without_a_body(Channel::Proxied))),
    ]
}

/// A call that has to be refused as not implemented, which the protocol has an exception for.
pub async fn unimplemented<T>(what: &str, answer: impl Future<Output = Result<T, Error>>) -> Story {
    match answer.await {
        Err(error) => expect(&format!("{what}: {error}"), error.kind, capnp::ErrorKind::Unimplemented),
        Ok(_) => anyhow::bail!("{what} was answered"),
    }
}

async fn methods_without_a_body(channel: Channel) -> Story {
    let stage = Stage::set(Kind::Scripted, Channel::Direct, "")?;
    let host = Bare::connect(&stage.service.socket())?;
    // Whichever of the two holds the lease.
    let (direct, proxied);
    let lifecycle: &guest_lifecycle::Client = match channel {
        Channel::Direct => {
            direct = host.launch("").await?;
            &direct.client
        }
        Channel::Proxied => {
            proxied = host.client.launch_proxied_request().send().pipeline.get_lifecycle();
            &proxied
        }
    };
    create(lifecycle).await?;
    let guest = lifecycle.bind_request().send().pipeline.get_guest();
    of_the_guest(&guest).await?;
    let control = lifecycle.control_request().send().pipeline.get_control();
    of_the_control(&control).await?;
    let observer = guest.observer_request().send().pipeline.get_observer();
    of_the_observer(&observer).await?;
    of_an_observer_that_claims_control(observer).await?;
    // None of it has changed anything.
    let stopped = lifecycle.stop_request().send().promise.await?;
    Ok(Failure::read_result(stopped.get()?.get_result()?)??)
}

async fn create(lifecycle: &guest_lifecycle::Client) -> Story {
    let kernel = sealed_file(&Kind::Scripted.image(Act::Spin))?;
    let mut request = lifecycle.create_request();
    let mut config = request.get().init_config();
    config.reborrow().init_memory().set_bytes(16 << 20);
    config.get_source().init_boot().init_kernel().set_file(crate::files::serve(&kernel));
    let created = request.send().promise.await?;
    Ok(Failure::read_result(created.get()?.get_result()?)??)
}

/// A guest without the device says so, and so do calls that did not wait for that.
async fn of_no_vsock(guest: &guest::Client) -> Story {
    let sent = guest.get_host_vsock_endpoint_request().send();
    let connected = sent.pipeline.get_endpoint().connect_request().send().promise;
    let answer = sent.promise.await?;
    let failure = Failure::read(answer.get()?.get_error()?)?;
    expect("getHostVsockEndpoint", failure.code, GuestError::DeviceNotPresent)?;
    expect("a connection to nowhere", connected.await.is_err(), true)
}

async fn of_the_guest(guest: &guest::Client) -> Story {
    of_no_vsock(guest).await?;
    of_no_balloon(guest).await?;
    let answer = guest.get_mem_controller_request().send().promise.await?;
    let failure = Failure::read(answer.get()?.get_error()?)?;
    expect("getMemController", failure.code, GuestError::DeviceNotPresent)?;
    of_no_console(guest).await
}

async fn of_no_console(guest: &guest::Client) -> Story {
    let mut request = guest.get_console_request();
    request.get().set_output(sink(&Console::default()));
    let sent = request.send();
    let mut cue = sent.pipeline.get_input().write_request();
    cue.get().set_bytes(b"hello");
    let written = cue.send().await;
    let answer = sent.promise.await?;
    let failure = Failure::read(answer.get()?.get_error()?)?;
    expect("getConsole", failure.code, GuestError::DeviceNotPresent)?;
    // Stream calls fail at the end at the latest.
    let ended = sent.pipeline.get_input().end_request().send().promise.await;
    expect("the console takes input", written.is_ok() && ended.is_ok(), false)?;
    let mut request = guest.get_console_port_request();
    request.get().set_name("agent");
    let answer = request.send().promise.await?;
    let failure = Failure::read(answer.get()?.get_error()?)?;
    expect("getConsolePort", failure.code, GuestError::DeviceNotPresent)?;
    let answer = guest.resize_console_request().send().promise.await?;
    let resized = Failure::read_result(answer.get()?.get_result()?)?;
    expect("resizeConsole", resized.map_err(|failure| failure.code), Err(GuestError::DeviceNotPresent))
}

async fn of_no_balloon(guest: &guest::Client) -> Story {
    let sent = guest.get_balloon_controller_request().send();
    let early = sent.pipeline.get_controller().size_request().send().promise.await;
    expect("a controller of nothing answers", early.is_ok(), false)?;
    let answer = sent.promise.await?;
    let failure = Failure::read(answer.get()?.get_error()?)?;
    expect("getBalloonController", failure.code, GuestError::DeviceNotPresent)
}

async fn of_the_control(control: &guest_control::Client) -> Story {
    let pressed = control.power_button_request().send().promise.await?;
    let failure = Failure::read_result(pressed.get()?.get_result()?)?.err();
    expect("no button before run", failure.map(|failure| failure.code), Some(GuestError::NotRunning))?;
    let sent = control.snapshot_request().send();
    let early = sent.pipeline.get_snapshot().info_request().send().promise.await;
    expect("a snapshot of nothing answers", early.is_ok(), false)?;
    let answer = sent.promise.await?;
    let failure = Failure::read(answer.get()?.get_error()?)?;
    expect("no snapshot before run", failure.code, GuestError::NotRunning)?;
    of_the_update(control).await?;
    of_the_dump(control).await?;
    let unheard = control.debugger_request().send().promise.await;
    expect("a debugger without a sink is refused", unheard.is_err(), true)?;
    let answer = control.add_unit_request().send().promise.await?;
    let failure = Failure::read_result(answer.get()?.get_result()?)?.err();
    expect("a unit that is none", failure.map(|failure| failure.code), Some(GuestError::BadConfig))
}

/// Updates of what no tree has, and to what no node takes, are refused and change nothing.
async fn of_the_update(control: &guest_control::Client) -> Story {
    let unset = control.update_request().send().promise.await?;
    let failure = Failure::read_result(unset.get()?.get_result()?)?.err();
    expect("the root", failure.map(|failure| failure.code), Some(GuestError::NotSupported))?;
    let (slashes, deep, long) = ("/".repeat(1 << 16), "units/".repeat(1 << 14), "9".repeat(1 << 16));
    let cases = [
        (&slashes[..], "1", GuestError::NotSupported),
        (&deep, "1", GuestError::BadConfig),
        ("\0/../é", "1", GuestError::BadConfig),
        ("deadline/deadline", "1s", GuestError::BadConfig),
        ("deadline", &long, GuestError::LimitExceeded),
        ("deadline", &long[..4096], GuestError::BadConfig),
        ("deadline", "1s\0", GuestError::BadConfig),
        ("log", "info\0", GuestError::BadConfig),
        ("log", "\u{1b}[2J", GuestError::BadConfig),
    ];
    for (path, value, code) in cases {
        let mut request = control.update_request();
        request.get().set_path(path);
        request.get().set_value(value);
        let answer = request.send().promise.await?;
        let failure = Failure::read_result(answer.get()?.get_result()?)?;
        let Err(failure) = failure else { anyhow::bail!("{path:.20} took {value:.20}") };
        expect(&failure.detail, failure.code, code)?;
        expect("the detail is bounded", failure.detail.len() < 1024, true)?;
    }
    Ok(())
}

/// Whatever is asked of a core dump, at most 1 MiB comes, and nothing from beyond its end.
async fn of_the_dump(control: &guest_control::Client) -> Story {
    let core = control.dump_request().send().promise.await?.get()?.get_core()?;
    let bytes = core.size_request().send().promise.await?.get()?.get_bytes();
    let most = 1 << 20;
    let cases =
        [(0, 0, 0), (0, u32::MAX, most), (bytes - 1, u32::MAX, 1), (bytes, 1, 0), (u64::MAX, u32::MAX, 0)];
    for (offset, count, expected) in cases {
        let mut request = core.read_request();
        request.get().set_offset(offset);
        request.get().set_count(count);
        let read = request.send().promise.await?.get()?.get_bytes()?.len();
        expect(&format!("bytes at {offset}"), read, expected)?;
    }
    Ok(())
}

/// An observer is no operator, whatever a client calls it.
async fn of_an_observer_that_claims_control(observer: observer::Client) -> Story {
    let control = guest_control::Client { client: observer.client };
    let mut request = control.update_request();
    request.get().set_path("deadline");
    request.get().set_value("1s");
    unimplemented("an observer's update", request.send().promise).await
}

/// A subscription to nowhere, and a look at what no tree has, are refused.
async fn of_the_observer(observer: &observer::Client) -> Story {
    let nowhere = observer.subscribe_request().send().promise.await;
    expect("a subscription without a sink is refused", nowhere.is_err(), true)?;
    for path in ["/".repeat(1 << 16), "units/".repeat(1 << 14), "\0/../é".to_owned()] {
        let mut request = observer.inspect_request();
        let mut params = request.get();
        params.set_path(&path[..]);
        params.set_depth(u32::MAX);
        let answer = request.send().promise.await?;
        let results = answer.get()?;
        // Nothing but separators is the root.
        let is_root = path.chars().all(|c| c == '/');
        expect("it is shown", results.get_tree()?.is_empty(), !is_root)?;
        expect("it is refused", results.has_error(), !is_root)?;
    }
    Ok(())
}
