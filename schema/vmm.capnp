@0xf5b3079a6e1c8d06;
# Private: the channel between guestd and each guest VMM. Never a lease.

using Common = import "common.capnp";
using Config = import "config.capnp";
using Guest = import "guest.capnp";
using Snapshot = import "snapshot.capnp";

interface Vmm {
  # The bootstrap capability that a guest VMM serves to guestd.

  attach @0 (serverEnd :UInt64, id :Text, watcher :VmmWatcher, snapshot :SnapshotParts) -> (result :Common.Result);
  # Serves GuestLifecycle on the channel with this running number here. That channel is the lease: once it closes, the guest is
  # stopped and the process ends. alreadyRunning the second time. With a snapshot, the guests of that lease go on from it.
  control @1 () -> (control :Guest.GuestControl, error :Common.Failure);
  observer @2 () -> (observer :Guest.Observer, error :Common.Failure);
  # Of the guest of the last create, whatever its phase.
  shutdown @3 (deadlineMs :UInt32) -> (result :Common.Result);
  # Stops the guest by force and ends the process after the answer.
  prepare @4 (shape :GuestShape) -> (result :Common.Result);
  # Before attach: makes memory, partition and VPs for a guest of this shape ahead, in place of what was made before. A create of
  # another shape costs as much as without. Answers once they are there; alreadyRunning after attach.
}

interface VmmWatcher {
  # Implemented by guestd.
  created @0 (generation :UInt64, shape :GuestShape);
  # Another guest was created in this VMM, the generation-th. The shape is null if it is none to prepare.
  terminated @1 (generation :UInt64, exit :Guest.Exit);
  # It has ended. The VMM's process waits for the answer before it ends, within a deadline.
  keep @2 (parts :SnapshotParts) -> (snapshot :Snapshot.Snapshot, token :Data, error :Common.Failure);
  # Keeps a snapshot of the guest for as long as anybody refers to it. With the token, 16 bytes that nobody guesses, others find it:
  # GuestHost.snapshot.
}

struct GuestShape {
  # What a guest's memory, partition and VPs depend on.

  vps @0 :UInt32;
  memoryBytes @1 :UInt64;
  hotplugStart @2 :UInt64;
  # The region for memory that is plugged later, in guest physical addresses; empty if there is none.
  hotplugEnd @3 :UInt64;
  catchUpTime @4 :Bool;
  cpuidMask @5 :List(Config.CpuidMask);
  # These three as in GuestConfig.
}

struct SnapshotParts {
  # What a snapshot consists of; all of it is immutable.

  files @0 :List(SnapshotFile);
  # Sealed memfds: "state", "memory", "kernel", and, if there are, "layer" and "ramdisk".
  info @1 :Snapshot.SnapshotInfo;
}

struct SnapshotFile {
  name @0 :Text;
  descriptor @1 :UInt64;
  # A running number of this channel.
}
