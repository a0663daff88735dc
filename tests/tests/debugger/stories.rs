//! What a client sees of the debugger.

use crate::kernel;
use anyhow::anyhow;
use guest_client::{
    AddressSpace, Breakpoint, BreakpointAccess, ClientError, Control, DebugHalt, Debugger, HaltReason,
    Observer, Rendering, VpRegisters,
};
use guest_schema::{GuestError, Outcome, Phase, VpState};
use guest_tests::service::PATIENCE;
use guest_tests::stage::{Act, Kind, Player, Running, Stage, Story, expect, refusal, refused, says};
use guest_tests::wait;
use processor::scripted::Script;
use tokio::sync::mpsc;

/// Free in every guest here: below its 16 MiB, and above what is loaded.
const FREE: u64 = 12 << 20;
const MEMORY: u64 = 16 << 20;
const POST_CODE: u16 = 0x80;
const SERIAL: u16 = 0x3f8;

type Halts = mpsc::Receiver<DebugHalt>;

fn attach(control: &Control) -> (Debugger, Halts) {
    let (halt, halts) = mpsc::channel(16);
    (control.debugger(halt), halts)
}

async fn next(halts: &mut Halts) -> anyhow::Result<DebugHalt> {
    let halt = tokio::time::timeout(PATIENCE, halts.recv()).await?;
    halt.ok_or_else(|| anyhow!("the sink was dropped"))
}

/// A guest that never waits: in a loop of two instructions.
async fn busy(player: &Player, stage: &Stage) -> anyhow::Result<Running> {
    let kernel = if stage.kind == Kind::BuiltIn { kernel::counting() } else { scripted_loop() };
    player.play_config(&player.config_of(&kernel)?).await
}

fn scripted_loop() -> Vec<u8> {
    let mut script = Script::new();
    script.out(SERIAL, b"READY\n");
    let again = script.here();
    script.out(POST_CODE, &[0]).jump(again);
    script.to_elf()
}

async fn vps(observer: &Observer) -> anyhow::Result<Vec<VpState>> {
    Ok(observer.state().await?.vps)
}

pub async fn a_guest_is_stopped_looked_into_and_goes_on(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = busy(&player, &stage).await?;
    let control = player.lifecycle.control();
    let observer = control.observer();
    let (debugger, mut halts) = attach(&control);
    debugger.opened().await?;
    expect("it runs until it is stopped", vps(&observer).await?, vec![VpState::Running])?;
    debugger.stop().await?;
    let seen = debugger.vps().await?;
    expect("held", (&seen.held[..], seen.breakpoints, seen.single_step), (&[true][..], 4, true))?;
    let state = observer.state().await?;
    expect("state", (state.phase, state.vps), (Phase::Running, vec![VpState::Debugged]))?;
    let shown = observer.inspect("debugger", 1, Rendering::Text).await?;
    expect("the inspection", &shown[..], "attached: true\nheld_vps: 0\n")?;

    // The same instruction, as the VP sees it and where it is.
    let rip = debugger.registers(0).await?.rip;
    expect("it stands still", debugger.registers(0).await?.rip, rip)?;
    let code = debugger.read_memory(AddressSpace::Linear(0), rip, 4).await?;
    expect("code", (code.bytes.len(), &code.ended), (4, &None))?;
    // Both kinds of guest map what they use at its own address.
    expect("code", debugger.read_memory(AddressSpace::Physical, rip, 4).await?, code)?;
    debugger.write_memory(AddressSpace::Physical, FREE, b"a mark").await?;
    let mark = debugger.read_memory(AddressSpace::Physical, FREE, 6).await?;
    expect("the mark", &mark.bytes[..], &b"a mark"[..])?;

    expect("the first resumption", debugger.resume(&[0], &[]).await?, 1)?;
    expect("it runs", vps(&observer).await?, vec![VpState::Running])?;
    expect("nothing is told of a stop that was asked for", halts.try_recv().is_err(), true)?;
    drop((debugger, control));
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)
}

pub async fn breakpoints_and_steps_stop_a_guest(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = busy(&player, &stage).await?;
    let control = player.lifecycle.control();
    let (debugger, mut halts) = attach(&control);
    debugger.stop().await?;
    let here = debugger.registers(0).await?.rip;
    debugger.resume(&[], &[0]).await?;
    let step = |resumption| DebugHalt::Vp { index: 0, resumption, reason: HaltReason::Step };
    expect("a step", next(&mut halts).await?, step(1))?;
    let there = debugger.registers(0).await?.rip;
    expect("two places", here == there, false)?;
    // Round and round, from each place to the other and back.
    let breakpoints = [here, there].map(Breakpoint::execute);
    debugger.set_breakpoints(&breakpoints[..1]).await?;
    for resumption in 2..6 {
        expect("resumption", debugger.resume(&[0], &[]).await?, resumption)?;
        let reason = HaltReason::Breakpoint(breakpoints[0]);
        expect("a hit", next(&mut halts).await?, DebugHalt::Vp { index: 0, resumption, reason })?;
        expect("its place", debugger.registers(0).await?.rip, here)?;
        expect("held", debugger.vps().await?.held, vec![true])?;
    }
    debugger.resume(&[], &[0]).await?;
    expect("a step off the breakpoint", next(&mut halts).await?, step(6))?;
    expect("its place", debugger.registers(0).await?.rip, there)?;
    // Set while it runs.
    debugger.set_breakpoints(&[]).await?;
    debugger.resume(&[0], &[]).await?;
    debugger.set_breakpoints(&breakpoints[1..]).await?;
    let hit = DebugHalt::Vp { index: 0, resumption: 7, reason: HaltReason::Breakpoint(breakpoints[1]) };
    expect("a hit while it runs", next(&mut halts).await?, hit)?;
    drop(running);
    Ok(player.lifecycle.stop().await?)
}

pub async fn registers_are_set(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let _running = busy(&player, &stage).await?;
    let control = player.lifecycle.control();
    let (debugger, _halts) = attach(&control);
    debugger.stop().await?;
    let before = debugger.registers(0).await?;
    let changed = VpRegisters { r13: 0x0123_4567_89ab_cdef, rdi: !before.rdi, cr2: 0x5000, ..before };
    debugger.set_registers(0, &changed).await?;
    expect("registers", debugger.registers(0).await?, changed)?;
    debugger.resume(&[0], &[]).await?;
    let running = debugger.set_registers(0, &changed).await;
    expect("registers of a VP that runs", refusal(running)?, GuestError::AlreadyRunning)?;
    expect("they are read, though", debugger.registers(0).await?.r13, changed.r13)?;
    Ok(player.lifecycle.stop().await?)
}

pub async fn a_guest_is_held_before_its_first_instruction(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let created = player.lifecycle.create(&player.config(Act::PowerOff)?);
    let guest = player.lifecycle.bind();
    let console = guest_tests::console::Console::default();
    let input = guest.serial(console.writer());
    let control = player.lifecycle.control();
    created.await?;
    let (debugger, mut halts) = attach(&control);
    debugger.stop().await?;
    let run = player.lifecycle.run();
    let held = || async { vps(&control.observer()).await.is_ok_and(|vps| vps == [VpState::Debugged]) };
    wait::until_async("the guest to be held", PATIENCE, held).await?;
    expect("it has done nothing", &console.text()[..], "")?;
    let entry = debugger.registers(0).await?.rip;
    expect("where it starts", entry >= 1 << 20, true)?;
    debugger.resume(&[], &[0]).await?;
    next(&mut halts).await?;
    expect("its first step", debugger.registers(0).await?.rip == entry, false)?;
    drop(debugger);
    console.saw("READY").await?;
    input.write(stage.kind.cue(Act::PowerOff)).await?;
    Ok(run.await?)
}

pub async fn others_pause_resume_reset_and_stop_a_debugged_guest(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = busy(&player, &stage).await?;
    let control = player.lifecycle.control();
    let observer = control.observer();
    let (debugger, mut halts) = attach(&control);
    debugger.stop().await?;
    let rip = debugger.registers(0).await?.rip;
    control.pause().await?;
    let state = observer.state().await?;
    expect("paused", (state.phase, state.vps), (Phase::Paused, vec![VpState::Stopped]))?;
    expect("where it stood", debugger.registers(0).await?.rip, rip)?;
    control.resume().await?;
    expect("resumed", vps(&observer).await?, vec![VpState::Debugged])?;
    expect("where it stood", debugger.registers(0).await?.rip, rip)?;

    // A step in a paused guest is made when it goes on.
    control.pause().await?;
    debugger.resume(&[], &[0]).await?;
    expect("not held", debugger.vps().await?.held, vec![false])?;
    expect("where it stood", debugger.registers(0).await?.rip, rip)?;
    control.resume().await?;
    let step = DebugHalt::Vp { index: 0, resumption: 1, reason: HaltReason::Step };
    expect("the step", next(&mut halts).await?, step)?;

    control.reset().await?;
    expect("after a reset", vps(&observer).await?, vec![VpState::Debugged])?;
    expect("back at its start", debugger.registers(0).await?.rip == rip, false)?;
    debugger.resume(&[0], &[]).await?;
    running.console.saw_times("READY", 2).await?;
    debugger.stop().await?;

    control.stop().await?;
    let DebugHalt::Terminated(exit) = next(&mut halts).await? else {
        return Err(anyhow!("the guest's end is not told"));
    };
    expect("outcome", exit.outcome, Outcome::Forced)?;
    expect("nothing follows", halts.recv().await, None)?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)?;
    expect("stop", refusal(debugger.stop().await)?, GuestError::NotRunning)?;
    expect("vps", refusal(debugger.registers(0).await)?, GuestError::NotRunning)?;
    expect("resume", refusal(debugger.resume(&[0], &[]).await)?, GuestError::NotRunning)?;
    let read = debugger.read_memory(AddressSpace::Physical, 0, 1).await?;
    expect("memory", read.ended.map(|failure| failure.code), Some(GuestError::NotRunning))?;
    let (late, _halts) = attach(&control);
    expect("a debugger of what has ended", refusal(late.opened().await)?, GuestError::NotRunning)
}

pub async fn a_guest_has_one_debugger_at_a_time(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::PowerOff).await?;
    let control = player.lifecycle.control();
    let (first, _halts) = attach(&control);
    first.stop().await?;
    let (second, _others) = attach(&control);
    let (code, words) = refused(second.opened().await)?;
    expect("the second", code, GuestError::LimitExceeded)?;
    says(&words, "has a debugger already")?;
    expect("its calls", refusal(second.stop().await)?, GuestError::LimitExceeded)?;
    drop(second);
    expect("the first", first.vps().await?.held, vec![true])?;
    // One right after the other.
    drop(first);
    let (third, _halts) = attach(&control);
    expect("the third finds a guest that runs", third.vps().await?.held, vec![false])?;
    third.stop().await?;
    // Dropped in the middle of a step, which a guest that waits for its cue may never end.
    third.resume(&[], &[0]).await?;
    drop(third);
    player.cue(&running, Act::PowerOff).await?;
    Ok(running.run.await?)
}

pub async fn a_debugger_whose_connection_ends_leaves_nothing_behind(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::PowerOff).await?;
    {
        let host = stage.service.connect().await?;
        let control = host.find(&player.id).await?.control;
        let (debugger, _halts) = attach(&control);
        debugger.stop().await?;
        let rip = debugger.registers(0).await?.rip;
        debugger.set_breakpoints(&[Breakpoint::execute(rip)]).await?;
    }
    let observer = player.lifecycle.control().observer();
    let free = || async { vps(&observer).await.is_ok_and(|vps| vps != [VpState::Debugged]) };
    wait::until_async("the guest to go on", PATIENCE, free).await?;
    player.cue(&running, Act::PowerOff).await?;
    Ok(running.run.await?)
}

pub async fn what_cannot_be_is_refused(stage: Stage) -> Story {
    let player = stage.launch("").await?;
    let running = player.play(Act::Spin).await?;
    let control = player.lifecycle.control();
    let (debugger, mut halts) = attach(&control);
    debugger.stop().await?;
    let rip = debugger.registers(0).await?.rip;
    let bad = GuestError::BadConfig;
    for nobody in [1, u32::MAX] {
        expect("registers of nobody", refusal(debugger.registers(nobody).await)?, bad)?;
        let set = debugger.set_registers(nobody, &VpRegisters::default()).await;
        expect("registers for nobody", refusal(set)?, bad)?;
        expect("nobody goes on", refusal(debugger.resume(&[0, nobody], &[]).await)?, bad)?;
        let write = debugger.write_memory(AddressSpace::Linear(nobody), FREE, &[0]).await;
        expect("memory of nobody", refusal(write)?, bad)?;
    }
    expect("twice", refusal(debugger.resume(&[0], &[0]).await)?, bad)?;
    let many = vec![0; 10_000];
    expect("many times", refusal(debugger.resume(&many, &many).await)?, bad)?;
    memory_that_is_not_there(&debugger, stage.kind).await?;
    breakpoints_that_there_are_not(&debugger).await?;
    expect("it is still held", debugger.vps().await?.held, vec![true])?;
    expect("where it was", debugger.registers(0).await?.rip, rip)?;
    if stage.kind == Kind::BuiltIn {
        registers_that_no_processor_has(&debugger).await?;
    }
    // Calls that nobody waits for, in the middle of which the debugger goes away.
    for _ in 0..100 {
        drop((debugger.resume(&[0], &[]), debugger.stop(), debugger.resume(&[], &[0])));
    }
    halts.close();
    drop(debugger);
    let (next, _halts) = attach(&control);
    next.opened().await?;
    player.lifecycle.stop().await?;
    expect("run", refusal(running.run.await)?, GuestError::ControllerForcedHalt)
}

async fn memory_that_is_not_there(debugger: &Debugger, kind: Kind) -> Story {
    for bytes in [(64 << 10) + 1, u32::MAX] {
        let read = debugger.read_memory(AddressSpace::Physical, 0, bytes).await?;
        let code = read.ended.map(|failure| failure.code);
        expect("too much", (read.bytes.len(), code), (0, Some(GuestError::LimitExceeded)))?;
    }
    let long = vec![0; (64 << 10) + 1];
    let written = debugger.write_memory(AddressSpace::Physical, FREE, &long).await;
    expect("too much", refusal(written)?, GuestError::LimitExceeded)?;

    let beyond = debugger.read_memory(AddressSpace::Physical, MEMORY - 1, 2).await?;
    let ended = beyond.ended.ok_or_else(|| anyhow!("there is more memory than there is"))?;
    expect("beyond memory", (beyond.bytes.len(), ended.code), (1, GuestError::BadConfig))?;
    says(&ended.detail, &format!("{MEMORY:#x}"))?;
    let nowhere: &[u64] = match kind {
        // Not canonical; the last address; and one that its tables leave out.
        Kind::BuiltIn => &[1 << 47, u64::MAX, 0x7fff_ffff_f000],
        // Without paging there are 32 bits, of which few are memory.
        Kind::Scripted => &[1 << 32, u64::MAX, 0xf000_0000],
    };
    for &address in nowhere {
        let read = debugger.read_memory(AddressSpace::Linear(0), address, 8).await?;
        let ended = read.ended.ok_or_else(|| anyhow!("{address:#x} was read"))?;
        expect("unmapped", (read.bytes.len(), ended.code), (0, GuestError::BadConfig))?;
        says(&ended.detail, &format!("{address:#x}"))?;
        let (code, words) = refused(debugger.write_memory(AddressSpace::Linear(0), address, &[0; 8]).await)?;
        expect("unmapped", code, GuestError::BadConfig)?;
        says(&words, &format!("{address:#x}"))?;
    }
    Ok(())
}

async fn breakpoints_that_there_are_not(debugger: &Debugger) -> Story {
    let five: Vec<Breakpoint> = (0..5).map(Breakpoint::execute).collect();
    let refusal_of = |answer: Result<(), ClientError>| refusal(answer);
    expect("five", refusal_of(debugger.set_breakpoints(&five).await)?, GuestError::LimitExceeded)?;
    let many: Vec<Breakpoint> = (0..10_000).map(Breakpoint::execute).collect();
    expect("many", refusal_of(debugger.set_breakpoints(&many).await)?, GuestError::LimitExceeded)?;
    let odd = [
        Breakpoint { length: 2, ..Breakpoint::execute(0) },
        Breakpoint { length: 0, ..Breakpoint::execute(0) },
        Breakpoint::execute(1 << 60),
        Breakpoint { address: 0x1001, length: 4, access: BreakpointAccess::Write },
        Breakpoint { address: 0x1000, length: 255, access: BreakpointAccess::ReadOrWrite },
    ];
    for breakpoint in odd {
        let answer = debugger.set_breakpoints(&[breakpoint]).await;
        expect(&format!("{breakpoint:?}"), refusal(answer)?, GuestError::BadConfig)?;
    }
    Ok(())
}

/// Refused or taken, as the hypervisor likes; what it takes can be read again.
async fn registers_that_no_processor_has(debugger: &Debugger) -> Story {
    let now = debugger.registers(0).await?;
    for odd in [
        VpRegisters { cr0: u64::MAX, ..now },
        VpRegisters { cr4: u64::MAX, ..now },
        VpRegisters { efer: u64::MAX, ..now },
        VpRegisters { cr3: u64::MAX, ..now },
    ] {
        match debugger.set_registers(0, &odd).await {
            Ok(()) => drop(debugger.registers(0).await?),
            Err(ClientError::Refused(failure)) => expect("code", failure.code, GuestError::BadConfig)?,
            Err(other) => return Err(other.into()),
        }
        // Whatever the tables are now.
        let _ = debugger.read_memory(AddressSpace::Linear(0), now.rip, 8).await?;
    }
    Ok(debugger.set_registers(0, &now).await?)
}
