@0xe0a7d25b93c64103;
# A guest at one moment, from which others go on.

using Common = import "common.capnp";
using Guest = import "guest.capnp";
using Host = import "host.capnp";
using Vmm = import "vmm.capnp";

interface Snapshot {
  # A guest at one moment: its memory, its state units, its kernel and config. Kept by the service; immutable; outlives its guest. The
  # last reference frees it, as does the service's end.

  info @0 () -> (memoryBytes :UInt64, units :List(Text), parent :Text, error :Common.Failure, info :SnapshotInfo);
  # The size of the guest's memory, the state units that it has state of, and the id of the guest that it is of; and more.
  canRestore @1 (grants :AnyPointer) -> (result :Common.Result);
  # Whether a guest's `create` with these grants, a GuestConfig, would be refused, as far as that can be told without making the guest:
  # the snapshot's format, its config and that its units' states are of known types and can be decoded; that there are as many disks and
  # networks, listeners only for a vsock device, and each of the clients' units that has a state; and no kernel. The errors are those of
  # `create`: badConfig with every fault, snapshotIncompatible and snapshotCorrupt with the units. Not looked at: files, back ends and
  # capabilities that are granted, what the host lacks, and values that only a device can judge.
  launch @2 (serverEnd :UInt64, id :Text) -> (id :Text, exit :Host.GuestExit, error :Common.Failure);
  # As GuestHost.launch. The `create` on that channel makes a guest that goes on from here with the first `run`. Its config carries
  # grants only: a source for each disk and a back end for each network device, in the order of the snapshot's, each disk's mode, the
  # listeners of the vsock device, and the units that clients implement. All else is the snapshot's, and is not looked at; a kernel
  # is badConfig. Errors of create besides: snapshotIncompatible (the host lacks what the guest has; the detail names it),
  # snapshotCorrupt.
  export @3 (output :Common.OutputSink) -> (result :Common.Result);
  # Writes the snapshot's file to the output, from its beginning to its end, with zeros for the memory that has nothing; `lost` is always
  # 0. It goes as fast as the output answers, and the result comes once it has answered all of it. failedServiceConnect if the output
  # fails. Dropping the call ends it. A client that can be passed descriptors is faster with `files`.
  launchProxied @4 (id :Text) -> (lifecycle :Guest.GuestLifecycle, id :Text, exit :Host.GuestExit, error :Common.Failure);
  # As GuestHost.launchProxied, and launch.
  files @5 () -> (parts :Vmm.SnapshotParts, error :Common.Failure);
  # What it consists of, over the client's own channel: whoever holds them has the snapshot without the service, and can write its file.
  # badConfig for a capability that came over another channel: GuestHost.snapshot finds one.
}

struct SnapshotInfo {
  # What a snapshot has.

  memoryBytes @0 :UInt64;
  units @1 :List(Text);
  parent @2 :Text;
  takenAtUs @3 :UInt64;
  # When, in µs since 1970 (UTC).
  vps @4 :UInt32;
  disks @5 :List(Text);
  # The ids of the disks, which have to be granted.
  networks @6 :UInt32;
  # How many network devices there are, which have to be granted.
  memory @7 :MemoryKept;
  copiedBytes @8 :UInt64;
  # How many bytes of memory were copied while the guest was paused.

  enum MemoryKept {
    remapped @0;
    # The guest goes on with a private mapping of its own memory; nothing was copied.
    layered @1;
    # What the guest had written since it was frozen or restored before was copied, beside the memory from then.
    copied @2;
    # All of it was copied: of huge pages, locked, shared with another process, or written more than half since the last time.
  }
}
