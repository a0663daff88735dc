//! What observers and operators see of a guest, and what an operator does to its VMM: events, units, the inspection tree, dumps.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use guest_client::{Event, EventKind, Observer, Rendering, StepOutcome};
use guest_schema::{Failure, GuestConfig, GuestError, Outcome, VpState};
use guest_tests::service::PATIENCE;
use guest_tests::stage::{Act, Kind, Stage, Story, expect, refusal, refused, says};
use guest_tests::wait;
use object::Endianness;
use object::elf::{FileHeader64, NT_PRSTATUS, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use tokio::sync::mpsc;

/// All events from a sequence number on, to the last.
pub async fn events(observer: &Observer, from: u64) -> anyhow::Result<Vec<Event>> {
    let (sender, mut arriving) = mpsc::channel(1);
    let _subscription = observer.subscribe(from, sender).await?;
    let mut events = Vec::new();
    while let Some(event) = arriving.recv().await {
        events.push(event);
    }
    Ok(events)
}

fn told(events: &[Event]) -> Vec<String> {
    let word = |event: &Event| match &event.kind {
        EventKind::Phase(phase) => phase.name().to_owned(),
        EventKind::Transition(end) if end.failure.is_some() => format!("{} failed", end.operation),
        EventKind::Transition(end) => format!("{} done", end.operation),
        EventKind::DeviceError(error) => format!("{} failed", error.device),
        EventKind::Terminated(exit) => format!("{:?}", exit.outcome),
        EventKind::Panic(report) => format!("{:?}", report.panic),
        EventKind::PowerButton => "power button".to_owned(),
    };
    events.iter().map(word).collect()
}

pub async fn an_observer_hears_of_all_that_becomes_of_the_guest(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::PowerOff).await?;
    let observer = running.guest.observer();
    let (sender, mut arriving) = mpsc::channel(1);
    let subscription = observer.subscribe(0, sender).await?;
    let control = player.lifecycle.control();
    control.pause().await?;
    control.resume().await?;
    player.cue(&running, Act::PowerOff).await?;
    running.run.await?;
    let mut heard = Vec::new();
    while let Some(event) = arriving.recv().await {
        heard.push(event);
    }
    drop(subscription);
    // A guest is running from when it is to run until it has paused or begins to stop.
    let expected = [
        "created",
        "running",
        "start done",
        "pause done",
        "paused",
        "running",
        "resume done",
        "stopping",
        "stop done",
        "Clean",
    ];
    expect("what was told", told(&heard), expected.map(str::to_owned).to_vec())?;
    let numbers: Vec<u64> = heard.iter().map(|event| event.sequence).collect();
    expect("sequence", numbers, (0..heard.len() as u64).collect())?;
    expect("missed", heard.iter().map(|event| event.missed).sum::<u64>(), 0)?;
    expect("times in order", heard.is_sorted_by_key(|event| event.at_us), true)?;
    // Whoever asks after the end gets the same, from where it asks.
    expect("a late subscriber", events(&observer, 0).await?, heard.clone())?;
    expect("from the seventh on", &events(&observer, 7).await?[..], &heard[7..])
}

pub async fn a_failed_transition_is_told_with_its_reason(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    let observer = running.guest.observer();
    let (_, detail) = refused(player.lifecycle.control().reset().await)?;
    player.lifecycle.stop().await?;
    let heard = events(&observer, 0).await?;
    let failures = heard.iter().filter_map(|event| match &event.kind {
        EventKind::Transition(end) if end.operation == "reset" => end.failure.as_ref(),
        _ => None,
    });
    let reasons: Vec<String> = failures.map(Failure::chain).collect();
    expect("the reason", reasons, vec![detail])
}

pub async fn subscriptions_are_bounded_and_end_when_they_are_dropped(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    let observer = running.guest.observer();
    let (sender, mut arriving) = mpsc::channel(1);
    let first = observer.subscribe(u64::MAX, sender).await?;
    let mut others = Vec::new();
    for _ in 1..64 {
        let (sender, _) = mpsc::channel(1);
        others.push(observer.subscribe(u64::MAX, sender).await?);
    }
    let (sender, _) = mpsc::channel(1);
    let one_more = observer.subscribe(0, sender).await.map(drop);
    expect("one more", refusal(one_more)?, GuestError::LimitExceeded)?;
    drop(first);
    expect("no event any more", arriving.recv().await, None)?;
    let (sender, mut arriving) = mpsc::channel(1);
    let _again = observer.subscribe(0, sender).await?;
    expect("an event", arriving.recv().await.map(|event| event.sequence), Some(0))?;
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)
}

pub async fn an_observer_sees_the_units_and_what_depends_on_what(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    let observer = running.guest.observer();
    let units = observer.unit_graph().await?;
    let names: Vec<&str> = units.iter().map(|unit| &unit.name[..]).collect();
    for unit in &units {
        expect(&unit.name, &unit.state[..], "running")?;
        expect(&unit.name, unit.depends_on.iter().all(|name| names.contains(&&name[..])), true)?;
    }
    let vps = units.iter().find(|unit| unit.name == "vps").ok_or_else(|| anyhow!("no vps in {names:?}"))?;
    expect("what the VPs depend on", vps.depends_on.len(), units.len() - 1)?;
    player.lifecycle.control().pause().await?;
    let paused = observer.unit_graph().await?;
    expect("paused", paused.iter().all(|unit| unit.state == "stopped"), true)?;
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)?;
    expect("after its end", observer.unit_graph().await?, Vec::new())
}

pub async fn a_timeline_tells_who_waited_for_whom(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    let observer = running.guest.observer();
    player.lifecycle.control().pause().await?;
    let passes = observer.timeline().await?;
    let operations: Vec<&str> = passes.iter().map(|pass| &pass.operation[..]).collect();
    expect("passes", operations, vec!["start", "stop"])?;
    expect("in order", passes[0].began_at_us <= passes[1].began_at_us, true)?;
    for pass in &passes {
        let step = |name: &str| pass.units.iter().find(|step| step.name == name);
        let (vps, memory) = (step("vps"), step("memory"));
        let (first, last) = if pass.operation == "start" { (memory, vps) } else { (vps, memory) };
        let (first, last) = first.zip(last).ok_or_else(|| anyhow!("no vps or no memory in {pass:?}"))?;
        expect("outcomes", (first.outcome, last.outcome), (StepOutcome::Done, StepOutcome::Done))?;
        expect("the last waits", first.ended_us.is_some() && first.ended_us <= last.ready_us, true)?;
    }
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)?;
    expect("after its end", observer.timeline().await?, Vec::new())
}

pub async fn only_an_operator_sees_what_is_the_guests_own(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    let (observer, control) = (running.guest.observer(), player.lifecycle.control());
    let shown: serde_json::Value = serde_json::from_str(&observer.inspect("", 32, Rendering::Json).await?)?;
    let memory = &shown["units"]["memory"]["unit"];
    expect("memory", memory["bytes"].as_u64(), Some(player.config(Act::Spin)?.memory.bytes))?;
    expect("the VP", shown["vps"]["0"].get("activity").is_some(), true)?;
    let secrets = [&shown["vps"]["0"]["state"], &memory["boot"]["command_line"]];
    expect("secrets", secrets.map(serde_json::Value::is_null), [true; 2])?;
    let registers = observer.inspect("vps/0/state", 1, Rendering::Json).await;
    expect("registers", refusal(registers)?, GuestError::BadConfig)?;
    control.inspect("vps/0/state", 1, Rendering::Json).await?;
    let text = control.inspect("units/vps/unit_state", 0, Rendering::Text).await?;
    expect("text", &text[..], "running\n")?;
    let (code, detail) = refused(control.inspect("units/nobody", 0, Rendering::Text).await)?;
    expect("code", code, GuestError::BadConfig)?;
    expect(&detail, detail.contains("units/nobody"), true)?;
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)?;
    let late = control.inspect("", 1, Rendering::Text).await;
    expect("after its end", refusal(late)?, GuestError::NotRunning)
}

pub async fn an_operator_dumps_the_guest(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let config = GuestConfig { cpus: 2, ..player.config(Act::Spin)? };
    let running = player.play_config(&config).await?;
    let control = player.lifecycle.control();
    let begun_before = control.dump().await?;
    control.pause().await?;
    let shown = control.inspect("vps/0/state/registers/rip", 0, Rendering::Text).await?;

    let core = control.dump().await?;
    let file = tempfile::tempfile()?;
    let mut told = Vec::new();
    core.save(&file, |done, bytes| told.push((done, bytes))).await?;
    let bytes = core.bytes().await?;
    expect("progress", (told.first(), told.last()), (Some(&(0, bytes)), Some(&(bytes, bytes))))?;
    let mut read = Vec::new();
    (&file).read_to_end(&mut read)?;
    expect("size", read.len() as u64, bytes)?;
    expect("holes", file.metadata()?.blocks() * 512 < bytes / 2, true)?;
    let core_file = CoreFile::read(&read)?;
    expect("memory", core_file.memory_bytes, config.memory.bytes)?;
    expect("threads", core_file.instruction_pointers.len(), 2)?;
    expect("rip", format!("{:#x}\n", core_file.instruction_pointers[0]), shown)?;

    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)?;
    expect("after its end", refusal(control.dump().await.map(drop))?, GuestError::NotRunning)?;
    expect("memory is gone", begun_before.read(1 << 20, 1).await.is_err(), true)
}

/// What a core file says of a guest.
struct CoreFile {
    memory_bytes: u64,
    instruction_pointers: Vec<u64>,
}

impl CoreFile {
    fn read(file: &[u8]) -> anyhow::Result<Self> {
        let header = FileHeader64::<Endianness>::parse(file)?;
        let endian = header.endian()?;
        let segments = header.program_headers(endian, file)?;
        let loads = segments.iter().filter(|segment| segment.p_type(endian) == PT_LOAD);
        let memory_bytes = loads.map(|segment| segment.p_filesz(endian)).sum();
        let mut notes = segments[0].notes(endian, file)?.ok_or_else(|| anyhow!("no notes"))?;
        let mut instruction_pointers = Vec::new();
        while let Some(note) = notes.next()? {
            if note.n_type(endian) == NT_PRSTATUS {
                // The registers begin at byte 112, and RIP is the 17th.
                let rip = note.desc()[112 + 16 * 8..].first_chunk().ok_or_else(|| anyhow!("a short note"))?;
                instruction_pointers.push(u64::from_le_bytes(*rip));
            }
        }
        Ok(Self { memory_bytes, instruction_pointers })
    }
}

pub async fn an_operator_sends_a_non_maskable_interrupt(stage: Stage) -> Story {
    let (player, kind) = (stage.launch("").await?, stage.kind);
    let running = player.play(Act::Halt).await?;
    let control = player.lifecycle.control();
    player.cue(&running, Act::Halt).await?;
    let observer = running.guest.observer();
    let does = |wanted: VpState| {
        let observer = observer.clone();
        move || {
            let observer = observer.clone();
            async move {
                let state = observer.state().await.map_err(|error| error.to_string())?;
                if state.vps == [wanted] { Ok(()) } else { Err(format!("VPs are {:?}", state.vps)) }
            }
        }
    };
    wait::found_async("VP 0 to halt", PATIENCE, does(VpState::Halted)).await?;
    control.nmi().await?;
    match kind {
        // What is behind the halt spins.
        Kind::Scripted => wait::found_async("VP 0 to go on", PATIENCE, does(VpState::Running)).await?,
        // Its handler tells the vector.
        Kind::BuiltIn => running.console.saw("fault 2 ").await?,
    }
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)?;
    expect("after its end", refusal(control.nmi().await)?, GuestError::NotRunning)
}

pub async fn an_operator_inspects_and_updates_what_is_writable(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Reset).await?;
    let (observer, control) = (running.guest.observer(), player.lifecycle.control());
    let shown = async |path| anyhow::Ok(observer.inspect(path, 0, Rendering::Text).await?);
    expect("at first", shown("deadline").await?, "10s\n".to_owned())?;
    expect("the deadline", control.update("deadline", "2500ms").await?, "2.5s".to_owned())?;
    expect("the deadline", shown("deadline").await?, "2.5s\n".to_owned())?;

    // What the VMM logs only in detail comes once that is asked for.
    let detail = "the guest reset itself";
    player.cue(&running, Act::Reset).await?;
    running.console.saw_times("READY", 2).await?;
    let filter = "guest_vmm=debug,info";
    expect("the log", control.update("log", "info,guest_vmm=debug").await?, filter.to_owned())?;
    expect("the log", shown("log").await?, format!("{filter}\n"))?;
    wait::until_async("the update to be logged", PATIENCE, async || {
        stage.service.log().contains("a node was updated path=\"log\"")
    })
    .await?;
    expect("details before", stage.service.log().contains(detail), false)?;
    player.cue(&running, Act::Reset).await?;
    wait::until_async("the detail to be logged", PATIENCE, async || stage.service.log().contains(detail))
        .await?;
    running.console.saw_times("READY", 3).await?;

    expect("at first", shown("on_reset").await?, "restart\n".to_owned())?;
    expect("a reset", control.update("on_reset", "stop").await?, "stop".to_owned())?;
    player.cue(&running, Act::Reset).await?;
    // A guest that starts anew instead would go on for ever.
    tokio::time::timeout(PATIENCE, running.run).await??;
    expect("outcome", running.guest.terminated().await?.outcome, Outcome::Clean)?;
    expect("after its end", refusal(control.update("on_reset", "stop").await)?, GuestError::NotRunning)
}

pub async fn an_inspected_node_that_cannot_be_updated_says_why(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    let control = player.lifecycle.control();
    let long = "9".repeat(4097);
    let cases = [
        ("", "1", GuestError::NotSupported, "not writable"),
        ("state", "running", GuestError::NotSupported, "\"state\": the node is not writable"),
        ("units/memory/unit/bytes", "1", GuestError::NotSupported, "not writable"),
        ("vps/0/state/registers/rip", "0", GuestError::NotSupported, "not writable"),
        ("units/nobody", "1", GuestError::BadConfig, "there is no node \"units/nobody\""),
        ("deadline/low", "10s", GuestError::BadConfig, "there is no node"),
        ("deadline\0", "10s", GuestError::BadConfig, "there is no node"),
        ("deadline", "soon", GuestError::BadConfig, "\"deadline\": \"soon\" is not a duration, such as 10s"),
        ("deadline", "10s\0", GuestError::BadConfig, "\"10s\\0\" is not a duration"),
        ("deadline", "1h", GuestError::BadConfig, "3600s is not within 100ms to 600s"),
        ("deadline", &long, GuestError::LimitExceeded, "4097 bytes"),
        ("on_reset", "explode", GuestError::BadConfig, "\"explode\" is not restart or stop"),
        ("log", "info,guest_vmm=loud", GuestError::BadConfig, "refused: error parsing level filter"),
        ("log", "", GuestError::BadConfig, "no directive"),
    ];
    for (path, value, code, reason) in cases {
        let (refused_with, detail) = refused(control.update(path, value).await)?;
        expect(&format!("{path} = {value}: {detail}"), refused_with, code)?;
        says(&detail, reason)?;
    }
    for (path, before) in [("deadline", "10s\n"), ("on_reset", "restart\n"), ("log", "info\n")] {
        expect(path, &control.inspect(path, 0, Rendering::Text).await?[..], before)?;
    }
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)
}

pub async fn an_operators_deadline_holds_for_a_unit_that_never_stops(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    let control = player.lifecycle.control();
    control.update("deadline", "100ms").await?;
    let begun = Instant::now();
    expect("pause", refusal(control.pause().await)?, GuestError::TransitionTimedOut)?;
    expect("within the default", begun.elapsed() < Duration::from_secs(10), true)?;
    // The unit is still at it, and answers nothing.
    let (code, detail) = refused(control.update("units/injected/unit/fault", "Fails(Start)").await)?;
    expect(&detail, code, GuestError::TransitionTimedOut)?;
    says(&detail, "not answered in time")?;
    expect("stop", refusal(player.lifecycle.stop().await)?, GuestError::TransitionTimedOut)?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)
}
