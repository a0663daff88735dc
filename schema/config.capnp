@0xb94e2c1d7a3f5802;
# What a guest is made of. Mirrors fuchsia.virtualization/GuestConfig.

using Block = import "block.capnp";
using Common = import "common.capnp";
using Guest = import "guest.capnp";
using Snapshot = import "snapshot.capnp";

struct GuestConfig {
  # `create` checks all of it and lists every fault in one badConfig. What is absent is absent: there are no default devices
  # but the board's (serial port, RTC, keyboard controller, interrupt controllers, ACPI's power button, pvpanic, generation ID).

  source :union {
    boot @0 :BootSource;
    snapshot @1 :Snapshot.Snapshot;
    # Not supported yet: badConfig.
    saved @24 :SavedSnapshot;
    # A snapshot's file: the guest goes on from it with `run`. All else here is grants, as in the `create` of a guest that was launched
    # from a Snapshot: snapshot.capnp.
  }
  cpus @2 :UInt32 = 1;
  # VPs, 1 to min(the host's limit, 254).
  memory @3 :MemoryConfig;
  onReset @4 :OnReset;

  block @5 :List(BlockConfig);
  # At most 32, in the order in which the guest finds them.
  net @6 :List(NetConfig);
  # At most 32.
  console @7 :Bool;
  # The virtio console: a terminal, and the further ports of `consoleConfig`.
  rng @8 :Bool;
  vsock @9 :VsockConfig;
  balloon @10 :Bool;
  mem @11 :MemDeviceConfig;
  units @12 :List(UnitConfig);
  # State units that the client implements; at most 64.

  gpu @13 :Bool;
  # Kept places of fuchsia.virtualization: badConfig "not supported", like the three that follow.
  sound @14 :Bool;
  wayland @15 :Bool;
  magma @16 :Bool;

  affinity :union {
    # On which of the host's CPUs each VP's thread may run. CPUs are numbered as in /proc/cpuinfo; one that is named twice counts
    # once. One that the VMM itself may not use (sched_setaffinity(2), cpuset(7)) is badConfig. More VPs than CPUs take turns.

    any @17 :Void;
    # Every VP wherever the VMM may run.
    all @18 :List(UInt32);
    # Every VP on these; if there are none, on any.
    each @19 :List(List(UInt32));
    # VP n on those of the nth list. An empty list, and none for a VP, means any. More lists than `cpus` are badConfig.
  }
  cpuidMask @20 :List(CpuidMask);
  # What the host's CPU has and the VPs are not to see. At most 1024.

  catchUpTime @21 :Bool;
  # Time that passed while the guest was paused or saved shows in its clocks, which jump when it goes on. Otherwise they go on from
  # where they were, unless the host's KVM has no time-stamp counter for guests but its own.

  debugExit @22 :Bool;
  # A port for test guests, 0xf4 to 0xf7 (QEMU's isa-debug-exit): what the guest writes there, in one, two or four bytes, ends it
  # cleanly and is in `Exit.debugExit`.

  consoleConfig @23 :ConsoleConfig;
  # badConfig without `console`. Absent, the console has no further ports.
}

struct SavedSnapshot {
  # A snapshot that was written to a file, as Snapshot.export writes it.
  #
  # A descriptor is of a regular file or a memfd that was opened for reading alone, or of a sealed memfd: it is used as it is, and
  # its memory read as the guest touches it. So whoever can write to that file meanwhile can change the guest, and guests that are
  # launched from its snapshots, or end them by cutting it short: keep it as you keep the disks. What a `File` has is copied by `create`.
  #
  # snapshotCorrupt: it is no snapshot's file, or damaged; of a descriptor, the memory's checksum is not looked at.
  # snapshotIncompatible: another version of the format, other units, more than the host has. The detail names what it is.

  file @0 :Common.FileSource;
  base @1 :Common.FileSource;
  # If the file is a layer: the file that it is a layer of. badConfig for a layer without one, with another, and beside what is no layer.
}

struct ConsoleConfig {
  # What a console has beside its terminal.

  ports @0 :List(Text);
  # Further ports by their names, at most 15, over which programs talk: Guest.getConsolePort here, /dev/virtio-ports/NAME on Linux.
  # A name has 1 to 64 of the characters A-Z, a-z, 0-9, '.', '_', ':' and '-', begins with a letter or a digit, and is no other port's.
}

struct CpuidMask {
  # Bits that are cleared in what CPUID answers every VP. A mask only takes away; several of one leaf add up. A leaf or subleaf that
  # the host does not have has nothing to clear, so that one mask serves unlike hosts. What a host's KVM insists on because it cannot
  # keep it from a guest stays visible. What tells a VP its place among the VPs
  # (leaves 0xb, 0x1f and 0x8000001e, the counts and IDs in 0x1, 0x4, 0x80000008 and 0x8000001d) cannot be hidden.

  leaf @0 :UInt32;
  # EAX when CPUID is executed.
  subleaf :union {
    # ECX when CPUID is executed.
    all @1 :Void;
    # Whatever it is.
    only @2 :UInt32;
    # This one. A leaf without subleaves has subleaf 0.
  }
  eax @3 :UInt32;
  # The bits to clear, in each register of the answer.
  ebx @4 :UInt32;
  ecx @5 :UInt32;
  edx @6 :UInt32;
}

struct BootSource {
  kernelType @0 :KernelType;
  kernel @1 :Common.FileSource;
  # An ELF with a PVH note, an ELF vmlinux (64-bit boot protocol) or a bzImage.
  ramdisk @2 :Common.FileSource;
  cmdline @3 :Text;
  cmdlineAdd @4 :List(Text);
  # Appended to `cmdline`, a blank before each.
}

enum KernelType {
  linux @0;
  zircon @1;
  # badConfig "not supported".
}

enum OnReset {
  # What a reset by the guest itself does.
  restart @0;
  # Units stop, reset, the image is loaded again, units start.
  stop @1;
  # The guest ends cleanly.
}

struct MemoryConfig {
  bytes @0 :UInt64;
  # Rounded up to a page (4 KiB); 1 MiB to the host's memory.
  hugePages @1 :Bool;
  # Back it with 2 MiB pages of the host's pool.
  prefault @2 :Bool;
  # Touch every page at create.
  lock @3 :Bool;
  # Keep it from being swapped.
}

struct BlockConfig {
  # A disk. Its image is locked while the guest has it (F_OFD_SETLK of fcntl(2)): one that another guest or process writes, and one
  # to be written that another reads, is badConfig.

  id @0 :Text;
  # What the guest reads as the disk's serial number: at most 20 bytes, and no two the same unless they are empty.
  mode @1 :BlockMode;
  format :union {
    file @2 :Common.FileSource;
    # A raw image: a descriptor of a regular file or block device, opened for reading and, with readWrite, for writing. Its
    # size, rounded down to a sector of 512 bytes, is the disk's; it needs one sector at least.
    qcow2 @3 :Common.FileSource;
    # An image in the qcow2 format, version 2 or 3: a descriptor as of a raw one. badConfig is one that is encrypted, marked as dirty or
    # corrupt, or whose data is not all in this file: no backing file, no file for data, since guest-vmm opens no path.
    service @4 :Block.BlockService;
    # Data that a client keeps, on any channel. What kept it last is to be gone before: a service knows no locks.
  }
  limits @5 :RateLimits;
  queues @6 :UInt16 = 1;
  # Virtqueues, 1 to 16. One thread serves them all: more of them help guests whose processors contend for one.
}

struct RateLimits {
  # How much a device may do: token buckets. 0 a second is no limit; a burst of 0 is what comes in a second.

  bytesPerSecond @0 :UInt64;
  bytesBurst @1 :UInt64;
  operationsPerSecond @2 :UInt64;
  operationsBurst @3 :UInt64;
}

enum BlockMode {
  readWrite @0;
  readOnly @1;
  volatileWrite @2;
  # Writes stay in the VMM's memory and end with the guest; the image is only read, and any number of guests may share it. Memory is
  # taken by 64 KiB, at most a little more than the disk's size, and beside that of MemoryConfig; a discard gives it back, and shows
  # the image again. A guest with such a disk cannot be saved.
}

struct NetConfig {
  # A network device. Its link can be switched off and on at `units/net0/unit/device/link` in the inspection tree, if it is the first
  # one. A back end that goes away takes the link down, and the guest goes on.

  mac @0 :Data;
  # 6 bytes: a unicast address that no other device of the guest has. Without any, a locally administered one is made up.
  backend :union {
    # Descriptors are running numbers, as in FileSource; the client has opened, attached or connected them with its own rights.
    tap @1 :UInt64;
    # A descriptor that is attached to a TAP device with IFF_NO_PI and IFF_VNET_HDR.
    stream @2 :UInt64;
    # A connected Unix stream socket. Before each frame stands its length, 32 bits, big endian: as QEMU has it, and passt.
    vhostUser @3 :UInt64;
    # A connected Unix stream socket, with a vhost-user back end at its other end (QEMU's docs/interop/vhost-user.rst): another
    # process that serves the queues itself. It gets all of the guest's memory, to read and to write. It has to have VIRTIO_F_VERSION_1,
    # VHOST_USER_F_PROTOCOL_FEATURES and, for several queue pairs, VHOST_USER_PROTOCOL_F_MQ with as many queues: else badConfig. One
    # that does not agree within 3 s: deviceInitializationFailure.
    tapQueues @4 :List(UInt64);
    # The same TAP device once for each queue pair, attached with IFF_MULTI_QUEUE besides: 1 to 16.
  }
  mtu @5 :UInt16;
  # What the guest is told of the network's MTU, 68 or more; 0: nothing.
  queuePairs @6 :UInt16 = 1;
  # How many queue pairs a vhostUser device has: 1 to 16. A TAP device has as many as descriptors, a stream has one.
  limits @7 :RateLimits;
  # Each way for itself, over all queue pairs. An operation is a frame, and its bytes are those from the destination's address on; one
  # that is yet to be segmented (VIRTIO 1.3, 5.1.6.2) is one. What is too much waits. A vhostUser device has none: badConfig.
}

struct VsockConfig {
  # A vsock device (VIRTIO 1.3, 5.10): see Guest.getHostVsockEndpoint.

  listeners @0 :List(Listener);
  # What the host offers before the guest's first instruction, for as long as the guest lives; at most 1,024.
  unclaimed @1 :Guest.VsockAcceptor;
  # Is asked for every other port: its `accept` decides. May be null, and then they are refused.

  struct Listener {
    port @0 :UInt32;
    # Named once: badConfig.
    acceptor @1 :Guest.VsockAcceptor;
  }
}

struct MemDeviceConfig {
  # A region of guest physical addresses, above all other memory, into which memory is plugged block by block while the guest runs.

  blockBytes @0 :UInt64 = 2097152;
  # The size of a block: a power of two, at least 4 KiB, or 2 MiB if memory has huge pages.
  regionBytes @1 :UInt64;
  # The size of the region: whole blocks, at most 1,048,576, and no more than the host's memory.
  regionAlignmentBytes @2 :UInt64 = 134217728;
  # The region begins at a multiple of this: a power of two, at least a block. Linux plugs whole blocks of its own, of 128 MiB.
  requestedBytes @3 :UInt64;
  # How much the guest is asked to plug from the beginning.
}

struct UnitConfig {
  # A state unit that a client implements. It moves with the guest's own: in their order, within their deadlines.

  id @0 :Text;
  # Its name among the guest's units, and in saved state.
  dependsOn @1 :List(Text);
  # The units that it needs: it starts after them and stops before them. The guest's own, and those before it in the list. The
  # VPs need every unit that does not need them.
  deadlineMs @2 :UInt32 = 5000;
  # How long it may take to answer. The guest's own deadline, 10 s for a whole transition, holds besides.
  whenLost @3 :LossPolicy;
  unit @4 :StateUnit;
  savedState @5 :SavedStateKind;
}

enum LossPolicy {
  # What becomes of a transition whose unit does not answer within its deadline, or whose connection is lost.
  fault @0;
  # The transition fails, and names the unit.
  evict @1;
  # The unit is taken out of the graph, and the transition goes on without it.
}

enum SavedStateKind {
  none @0;
  # There is nothing to save; restore passes the unit by.
  saves @1;
  # save gives a state, and restore needs one.
  refused @2;
  # The unit cannot be saved, and so the guest cannot.
}

interface StateUnit {
  # A state unit that a client implements. One method is called at a time but for inspect, which may come while another is
  # under way. A refusal is data; an exception counts as the unit's loss.

  start @0 () -> (result :Common.Result);
  # The units that this one depends on run.
  stop @1 () -> (result :Common.Result);
  # The units that depend on this one have stopped. Answers when nothing is under way any more.
  reset @2 () -> (result :Common.Result);
  # Back to the state at the beginning. Only while stopped, like the three that follow.
  save @3 () -> (typeName :Text, state :Data, result :Common.Result);
  # The state, and the full name of its protobuf message.
  restore @4 (typeName :Text, state :Data) -> (result :Common.Result);
  postRestore @5 () -> (result :Common.Result);
  # All units have been restored.
  inspect @6 () -> (json :Text);
  # What it shows of itself: a JSON object of scalars and of such objects.
}
