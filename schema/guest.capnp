@0xa6c80f3e51d27b04;
# A guest's life, and what can be done with a guest. Mirrors fuchsia.virtualization/GuestLifecycle and Guest.

using Common = import "common.capnp";
using Config = import "config.capnp";
using Snapshot = import "snapshot.capnp";

interface GuestLifecycle {
  # The lease. It is the bootstrap capability of its own channel, and the guest lives no longer than that channel.
  #
  # Calls take effect in the order sent: create, bind, getSerial on bind's result and run may all be sent without waiting.
  # A dropped call cancels nothing.

  create @0 (config :Config.GuestConfig) -> (result :Common.Result);
  # Makes the VMM: checks the config, loads the kernel, builds the devices. No VP runs. Before run it may be called again, and
  # then the former VMM is destroyed first, whatever the new config is worth. alreadyRunning while a guest runs.
  # Errors: badConfig, kernelLoadFailure, guestInitializationFailure, deviceInitializationFailure, deviceMemoryOverlap,
  # alreadyRunning, controllerForcedHalt (stop came first), faulted.
  bind @1 () -> (guest :Guest, error :Common.Failure);
  # The guest of the last create. May be called by any number of times. notCreated, with create's failure as its cause.
  run @2 () -> (result :Common.Result);
  # Starts VP 0; the guest starts the others. Answers when the VMM has stopped: ok if the guest ended itself, else
  # controllerForcedHalt, vcpuStartFailure, deviceStartFailure, vcpuRuntimeFailure, transitionTimedOut. At once: notCreated,
  # alreadyRunning (the first run stays pending). After any end there is no VMM: notCreated until the next create.
  stop @3 () -> (result :Common.Result);
  # Halts the guest by force and answers when its VPs are joined, its units stopped and its VMM gone. A create that is under
  # way is cancelled. Without a guest there is nothing to do, which is ok.
  control @4 () -> (control :GuestControl, error :Common.Failure);
  # The operator's capability to the guest of the last create. notCreated as in bind.
}

interface Guest {
  # A guest's user: its devices. Nothing here starts, stops or pauses it; dropping it changes nothing.

  getSerial @0 (output :Common.OutputSink) -> (input :Common.ByteStream, error :Common.Failure);
  # The serial port ttyS0. Every reader sees all output; the last 64 KiB are replayed to a late one; a slow one loses the oldest
  # bytes and never stalls the guest. `output` may be null.
  getConsole @1 (output :Common.OutputSink) -> (input :Common.ByteStream, error :Common.Failure);
  # The terminal of the virtio console, hvc0 on Linux. As getSerial; deviceNotPresent without one.
  getHostVsockEndpoint @2 () -> (endpoint :HostVsockEndpoint, error :Common.Failure);
  getBalloonController @3 () -> (controller :BalloonController, error :Common.Failure);
  # deviceNotPresent without one, like getMemController.
  getMemController @4 () -> (controller :MemController, error :Common.Failure);
  observer @5 () -> (observer :Observer, error :Common.Failure);
  whenTerminated @6 () -> (exit :Exit);
  # Answers when the guest has ended, with how. Answered before the capability breaks.
  getConsolePort @7 (name :Text, output :Common.OutputSink) -> (input :Common.ByteStream, error :Common.Failure);
  # A further port of the virtio console, by its name. As getSerial; input waits for as long as the guest does not have the port
  # open. deviceNotPresent without such a port.
  resizeConsole @8 (columns :UInt16, rows :UInt16) -> (result :Common.Result);
  # The terminal of the virtio console has this size now, in characters; 0 by 0 if it is not known, as at the beginning. The guest
  # is told, also if its driver comes only later. deviceNotPresent without a console, notRunning once the guest has ended.
}

struct Exit {
  # How a guest ended.

  outcome @0 :Outcome;
  code @1 :UInt16;
  # One of GuestError's; 0 after a clean end.
  detail @2 :Text;
  log @3 :Text;
  # After a crash of the VMM's process: the end of its log, at most 4 KiB.
  panic @4 :Panic;
  # What the guest has reported of its kernel since it was started or last reset, the latest. It changes no outcome: a guest that has
  # panicked and then resets itself, which ends it, has ended itself.
  panics @5 :UInt32;
  # How many panics it has reported in all, before resets included.
  debugExit :union {
    none @6 :Void;
    value @7 :UInt32;
    # What the guest has written to its debug-exit port, which ended it.
  }

  enum Outcome {
    clean @0;
    # The guest ended itself.
    forced @1;
    # It was stopped, or its lease ended.
    crashed @2;
    # A VP, a unit or the VMM's process failed.
  }
}

enum Panic {
  # What a guest reports of its own kernel through pvpanic.
  none @0;
  panicked @1;
  # It has panicked, and does nothing about it but what its own settings say: it stays, or resets itself.
  crashLoaded @2;
  # It has panicked, and goes on with a crash kernel.
}

interface GuestControl {
  # A guest's operator.

  pause @0 () -> (result :Common.Result);
  # Stops VPs and devices; answers when they have stopped. ok if paused already; notRunning, faulted.
  resume @1 () -> (result :Common.Result);
  # notRunning unless paused.
  reset @2 () -> (result :Common.Result);
  # Resets the guest as its own reset with onReset = restart does. notRunning unless running or paused.
  stop @3 () -> (result :Common.Result);
  # As GuestLifecycle.stop.
  observer @4 () -> (observer :Observer, error :Common.Failure);

  powerButton @5 () -> (result :Common.Result);
  # Presses the guest's power button (ACPI), which asks its operating system to shut down; answers when the button is pressed,
  # whatever the guest makes of it. One that has no driver for the button yet hears of it with the next press. A paused guest hears
  # of it when it goes on; a reset forgets it. notRunning unless running or paused.
  nmi @6 () -> (result :Common.Result);
  # Sends every VP a non-maskable interrupt, as a front panel's button does. The VPs of a paused guest take it when they go on.
  # notRunning unless running or paused.
  snapshot @7 () -> (snapshot :Snapshot.Snapshot, error :Common.Failure, token :Data);
  # Keeps the guest as it is at this moment, which it runs on from: it pauses for some milliseconds if it runs, and stays paused if it is.
  # The service keeps the snapshot; one that comes over the guest's own channel ends with that channel, and `token` finds the same
  # one at the service: GuestHost.snapshot. Answers when nothing can change it any more. snapshotNotSupported, whose detail says
  # which units refuse and why, and the guest was never paused; notRunning unless running or paused; notSupported without a
  # service; internalError if the host has no room for it, and the guest goes on.
  debugger @8 (sink :DebugSink) -> (debugger :Debugger, error :Common.Failure);
  # Begins to debug the guest; its VPs go on until they are stopped. limitExceeded if there is another debugger that
  # does not let go within half a second, notRunning once the guest has ended.
  inspect @9 (path :Text, depth :UInt32, rendering :Rendering) -> (tree :Text, error :Common.Failure);
  # As Observer.inspect, with what is the guest's own.
  update @10 (path :Text, value :Text) -> (result :Common.Result, value :Text);
  # Gives the writable node at `path` of the inspection tree a new value, written as inspect shows it in text, 4,096 bytes at most;
  # `value` is then what the node has. Writable are `deadline` (of a transition's passes: 100ms to 10min), `on_reset` (restart
  # or stop) and `log` (directives such as "info,guest_vmm=debug"; of the VMM's own process). badConfig if there is no such node or
  # the node does not take the value, notSupported if it is not writable, limitExceeded, transitionTimedOut if it has not answered
  # within half a second, notRunning once the guest has ended.
  addUnit @11 (unit :Config.UnitConfig) -> (result :Common.Result);
  # Lets a client's unit join the guest's, and starts it if they run; if that fails, it is not added. badConfig, notRunning once
  # the guest has ended, faulted, deviceStartFailure.
  dump @12 () -> (core :Common.File, error :Common.Failure);
  # A core dump: an ELF file (ET_CORE) with a PT_LOAD for each range of memory, at its guest physical address, and two notes for each
  # VP, NT_PRSTATUS (its number and one is the thread's) and QEMU's with segment and control registers. The registers are as of
  # this call, the memory is as of each read: pause the guest for a dump of one moment. Reads fail once the guest has ended.
  # notRunning then, internalError if a VP does not show its registers within half a second.
}

interface Debugger {
  # Stops VPs and looks into them. A guest has one at a time. It is no lease, and no phase of the guest: a VP runs while the guest
  # does and its debugger does not hold it. Devices, time and deadlines go on while VPs are held. pause, resume, reset and stop by
  # others do as ever: held VPs stay held through a pause; a reset puts them back to their start, where they are held, and keeps the
  # breakpoints; what is resumed while the guest is paused, or does not run yet, goes on when that does.
  #
  # Dropping it ends debugging: breakpoints are removed and held VPs go on. Calls take effect in the order sent. All: badConfig for
  # a VP that there is not, notRunning once the guest has ended.

  vps @0 () -> (vps :List(DebuggedVp), breakpoints :UInt32, singleStep :Bool, watchpoints :Bool, error :Common.Failure);
  # The VPs, in order, and what the hypervisor can do: how many breakpoints, whether steps, whether breakpoints for data.
  stop @1 () -> (result :Common.Result);
  # Holds all VPs; answers when none is in the guest. Nothing is sent to the sink for it.
  resume @2 (run :List(UInt32), step :List(UInt32)) -> (resumption :UInt64, error :Common.Failure);
  # Lets held VPs go on: `run` for good, `step` for one instruction; others stay held. A VP that stopped at a breakpoint executes the
  # instruction there first. Interrupts are held back from a VP that steps, so that one in HLT makes no step. `resumption` counts these
  # calls, from 1. alreadyRunning if one of the VPs is not held; badConfig if one is named twice; notSupported without steps;
  # limitExceeded while too much waits to be taken by the sink.
  setBreakpoints @3 (breakpoints :List(Breakpoint)) -> (result :Common.Result);
  # Replaces the breakpoints, which are those of all VPs, held or not. badConfig for one that the architecture does not have,
  # limitExceeded for more than there are, notSupported for one for data where only instructions have them; nothing changes then.

  getRegisters @4 (vp :UInt32) -> (registers :VpRegisters, error :Common.Failure);
  # Also of a VP that runs, which leaves the guest for a moment.
  setRegisters @5 (vp :UInt32, registers :VpRegisters) -> (result :Common.Result);
  # alreadyRunning unless the VP is held; badConfig for values that the hypervisor refuses.
  readMemory @6 (space :AddressSpace, address :UInt64, bytes :UInt32) -> (data :Data, error :Common.Failure);
  # At most 64 KiB (limitExceeded), fewer than asked for only up to an address that is not mapped or has no memory; the error,
  # badConfig, names it. Whatever the guest's own rights are.
  writeMemory @7 (space :AddressSpace, address :UInt64, data :Data) -> (result :Common.Result);
  # As readMemory, but all or nothing.
}

struct AddressSpace {
  union {
    linear @0 :UInt32;
    # As this VP sees it, by its page tables.
    physical @1 :Void;
    # Guest physical; memory only, no device.
  }
}

struct DebuggedVp {
  index @0 :UInt32;
  held @1 :Bool;
  # Its debugger keeps it out of the guest.
}

struct Breakpoint {
  # A hardware breakpoint (Intel SDM volume 3, section 18.2).

  address @0 :UInt64;
  # Linear; a multiple of the length.
  length @1 :UInt8;
  # In bytes: 1, 2, 4 or 8; 1 for execute.
  access @2 :Access;

  enum Access {
    execute @0;
    # Before the instruction is executed.
    write @1;
    # After the access.
    readOrWrite @2;
  }
}

struct VpRegisters {
  # A VP's general, segment and control registers, by their names.

  rax @0 :UInt64;
  rbx @1 :UInt64;
  rcx @2 :UInt64;
  rdx @3 :UInt64;
  rsi @4 :UInt64;
  rdi @5 :UInt64;
  rsp @6 :UInt64;
  rbp @7 :UInt64;
  r8 @8 :UInt64;
  r9 @9 :UInt64;
  r10 @10 :UInt64;
  r11 @11 :UInt64;
  r12 @12 :UInt64;
  r13 @13 :UInt64;
  r14 @14 :UInt64;
  r15 @15 :UInt64;
  rip @16 :UInt64;
  rflags @17 :UInt64;

  cs @18 :Segment;
  ds @19 :Segment;
  es @20 :Segment;
  fs @21 :Segment;
  gs @22 :Segment;
  ss @23 :Segment;
  tr @24 :Segment;
  ldtr @25 :Segment;
  gdtr @26 :Table;
  idtr @27 :Table;

  cr0 @28 :UInt64;
  cr2 @29 :UInt64;
  cr3 @30 :UInt64;
  cr4 @31 :UInt64;
  efer @32 :UInt64;

  struct Segment {
    # With its hidden part (Intel SDM volume 3, section 3.4.5).
    base @0 :UInt64;
    limit @1 :UInt32;
    # In bytes, granularity applied.
    selector @2 :UInt16;
    attributes @3 :UInt16;
    # As in the descriptor's bits 40 to 55: type 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14, G 15.
  }

  struct Table {
    base @0 :UInt64;
    limit @1 :UInt16;
    # In bytes, less one.
  }
}

interface DebugSink {
  # Hears where VPs stop; implemented by the client. Dropped after `terminated`.

  halted @0 (halt :DebugHalt) -> stream;
}

struct DebugHalt {
  union {
    vp :group {
      # A VP has stopped; all others were held first.
      index @0 :UInt32;
      resumption @1 :UInt64;
      # After which resumption, so that it is not taken for the stop of a later one.
      reason :union {
        step @2 :Void;
        breakpoint @3 :Breakpoint;
      }
    }
    terminated @4 :Exit;
    # The guest has ended.
  }
}

interface Observer {
  # Looks at a guest and changes nothing; shows nothing that is the guest's own.

  state @0 () -> (state :GuestState);
  whenTerminated @1 () -> (exit :Exit);
  # As Guest.whenTerminated.

  subscribe @2 (fromSequence :UInt64, sink :EventSink) -> (subscription :Subscription, error :Common.Failure);
  # Sends `sink` every event from this sequence number on, 0 being the first, of those that are kept: the last 1,024. Answers at
  # once. limitExceeded with more than 64 subscriptions of one guest.
  unitGraph @3 () -> (units :List(UnitStatus));
  # The state units in the order of their addition, as they are at this moment, also during a transition; none without a VMM.
  timeline @4 () -> (transitions :List(Transition));
  # The latest passes over the units, the oldest first; the last may be under way. At most 64; none without a VMM.
  inspect @5 (path :Text, depth :UInt32, rendering :Rendering) -> (tree :Text, error :Common.Failure);
  # The node at `path` (names joined by "/", "" for the root) of the guest's inspection tree, with `depth` levels of children
  # below it, 32 at most. What is not answered within half a second shows as unanswered. badConfig if there is no such node,
  # notRunning once the guest has ended.
}

enum Rendering {
  json @0;
  # Objects and scalars; {"$state": …} in place of what is no value.
  text @1;
  # Lines "name: value", children indented.
}

interface EventSink {
  # Implemented by the client. The VMM drops the capability after the guest's last event, which is `terminated`.

  event @0 (event :Event) -> stream;
  # One event. A sink that is slow to answer loses the oldest ones, and holds up nothing else.
}

interface Subscription {
  # Holds the events coming: none is sent once it is dropped.
}

struct Event {
  # Something that became of a guest.

  sequence @0 :UInt64;
  # Counts the guest's events from 0.
  missed @1 :UInt64;
  # How many events before this one the subscriber asked for and did not get.
  atUs @2 :UInt64;
  # When, in µs since 1970 (UTC).
  union {
    phase @3 :GuestState.Phase;
    # The guest entered this phase.
    transition @4 :TransitionEnd;
    terminated @5 :Exit;
    # It has ended.
    panic @6 :PanicReport;
    # Its kernel has panicked.
    powerButton @7 :Void;
    # Its operator has pressed its power button.
    deviceError @8 :DeviceError;
    # The host has failed a device.
  }
}

struct DeviceError {
  # The host failed what a device was to do; the guest was told, as hardware tells it. At most eight of one device in ten seconds.

  device @0 :Text;
  # The device's state unit.
  operation @1 :Text;
  # Of a disk: read, write, flush, discard, or "write of zeros". Of a network device: link, when its back end is gone.
  detail @2 :Text;
  # What the host says.
  suppressed @3 :UInt64;
  # How many more there were since the last one that was told.
}

struct PanicReport {
  # What a guest has reported of its kernel. At most one event a second tells of such reports, and one before each reset and the end.

  panic @0 :Panic;
  # The latest.
  count @1 :UInt32;
  # How many were reported since the event before, this one included.
}

struct TransitionEnd {
  # A transition of all state units has ended.

  operation @0 :Text;
  # start, pause, resume, reset, snapshot or stop.
  durationUs @1 :UInt64;
  failure @2 :Common.Failure;
  # Null if it succeeded.
}

struct Transition {
  # One pass over the state units.

  operation @0 :Text;
  # What the units were asked: start, stop, reset, save, restore, "post-restore", "can-save".
  beganAtUs @1 :UInt64;
  # When it began, in µs since 1970 (UTC).
  units @2 :List(UnitStep);
  # Those that take part, in the order of their addition.
}

struct UnitStep {
  # One unit's part in a pass. Times are µs since the pass began, or -1 for what has not happened.

  name @0 :Text;
  readyUs @1 :Int64;
  # The units that it waits for were done, and it was asked.
  begunUs @2 :Int64;
  # It took up the request.
  endedUs @3 :Int64;
  # It answered, or was passed over.
  outcome @4 :Outcome;
  detail @5 :Text;
  # The error of one that failed; the units that a waiting one waits for, separated by ", ".

  enum Outcome {
    waiting @0;
    # For other units.
    asked @1;
    # And has not answered yet.
    done @2;
    failed @3;
    gone @4;
    # Its channel ended, or it dropped the request.
    removed @5;
    skipped @6;
    # Not asked, because of others.
    late @7;
  }
}

struct GuestState {
  phase @0 :Phase;
  vps @1 :List(VpStatus);
  # One a VP, in order; empty without a VMM.
  units @2 :List(UnitStatus);
  uptimeUs @3 :UInt64;
  # Since run began, µs; 0 before.
  resets @4 :UInt32;
  # How often the guest was reset.

  enum Phase {
    empty @0;
    creating @1;
    created @2;
    running @3;
    paused @4;
    stopping @5;
    faulted @6;
    terminated @7;
  }
}

struct VpStatus {
  index @0 :UInt32;
  state @1 :State;

  enum State {
    stopped @0;
    # The VMM keeps it out of the guest.
    running @1;
    halted @2;
    # In HLT, until an interrupt comes.
    waitForSipi @3;
    # Not yet started by the guest.
    failed @4;
    unanswered @5;
    # It did not say in time.
    debugged @6;
    # A debugger keeps it out of the guest.
  }
}

struct UnitStatus {
  name @0 :Text;
  state @1 :Text;
  # stopped, starting, running, stopping, resetting, saving, restoring or faulted.
  dependsOn @2 :List(Text);
  waitsFor @3 :List(Text);
  # The units that it waits for in the transition under way.
}

interface HostVsockEndpoint {
  # The host's end of the guest's vsock device (VIRTIO 1.3, 5.10): streams between the host, whose address (CID) is 2, and the guest,
  # whose address is 3. Nothing is lost: a slow end of a stream holds up the other end of that stream, and nobody else.
  #
  # Each direction of a stream is a ByteStream: the host's towards the guest is served by the VMM, the guest's towards the host by the
  # client. `end` ends a direction in order, and the other end learns of it once it has everything. A direction that is dropped without
  # `end` resets the stream: so the client resets it, and so it learns that the guest has, or that the guest is gone.

  listen @0 (port :UInt32, acceptor :VsockAcceptor) -> (listener :VsockListener, error :Common.Failure);
  # Offers the guest's programs a port of the host's. alreadyBound if somebody listens there or a connection still has the port,
  # notRunning once the guest has ended.
  connect @1 (guestPort :UInt32, output :Common.ByteStream)
      -> (input :Common.ByteStream, error :Common.Failure, hostPort :UInt32);
  # Connects to a port of the guest's, from an ephemeral port of the host's (49152 to 65535). What the guest sends goes to `output`.
  # Answers once the guest has accepted; a guest whose driver is not there yet is waited for, one that has been asked may take 10 s. A
  # call that is dropped connects to nothing. connectionRefused, noResources without a free port or with 2,048 connections,
  # notRunning once the guest has ended.
}

interface VsockListener {
  # Holds the port. Dropping it refuses what was not accepted, and frees the port once its last connection has ended.
}

interface VsockAcceptor {
  # Implemented by the client. Dropped with the listener.

  accept @0 (srcCid :UInt32, srcPort :UInt32, port :UInt32, input :Common.ByteStream)
      -> (output :Common.ByteStream, error :Common.Failure);
  # A program of the guest's connects to `port`. What the guest sends goes to `output`; bytes for it go to `input`, and what is written
  # before the answer waits for it. An error, null as output, or no answer within 10 s refuses: the guest gets a reset.
}

interface BalloonController {
  # The memory balloon: the guest's pages that are given back to the host, 4 KiB each. All: notRunning once the guest has ended.

  size @0 () -> (currentPages :UInt32, requestedPages :UInt32, error :Common.Failure);
  # How many pages the guest says that are in the balloon, and how many are wanted there.
  requestNumPages @1 (pages :UInt32) -> (acceptedPages :UInt32, error :Common.Failure);
  # Asks the guest for so many pages in the balloon, more or fewer than there are. Answers with the target, at once: the guest
  # takes its time, and may never get there. limitExceeded for more than it has.
  memoryStatistics @2 () -> (statistics :List(MemoryStatistic), error :Common.Failure);
  # What the guest says of its memory, asked now. notSupported while its driver gives none, transitionTimedOut if it does not
  # answer within two seconds, limitExceeded while 16 wait for an answer.
}

struct MemoryStatistic {
  # One figure of the guest's, by the number that VIRTIO 1.3, 5.5.6.3 gives it.

  tag @0 :UInt16;
  value @1 :UInt64;
}

interface MemController {
  # The memory device: memory that is plugged while the guest runs. All: notRunning once the guest has ended.

  size @0 () -> (blockBytes :UInt64, regionBytes :UInt64, usableBytes :UInt64, pluggedBytes :UInt64, requestedBytes :UInt64, error :Common.Failure);
  # The sizes of a block, of the region, of what of it can be used, of what is plugged, and of what is wanted.
  requestSize @1 (bytes :UInt64) -> (result :Common.Result);
  # Asks the guest for so many plugged bytes, more or fewer than there are. Answers at once: the guest takes its time, and may never
  # get there. badConfig unless they are whole blocks, limitExceeded for more than the region.
}
