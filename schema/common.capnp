@0xd3f1b6a7c0e94a01;
# What every part of the protocol uses: errors, streams of bytes, files.

struct GuestError {
  # The codes of `Failure.code` and `Exit.code`. 1 to 15 are those of fuchsia.virtualization/GuestError, by number; from 64 on
  # they are this protocol's own. 0 is no error. Constants, since an enum's ordinals cannot leave gaps.

  const internalError :UInt16 = 1;
  # The VMM failed in a way that it has no better name for.
  const deviceNotPresent :UInt16 = 2;
  # The guest was not given this device.
  const badConfig :UInt16 = 3;
  # The config asks for what cannot be; the detail lists every fault, each with its field and value.
  const guestInitializationFailure :UInt16 = 4;
  # The partition or the guest's memory could not be made.
  const deviceInitializationFailure :UInt16 = 5;
  const deviceStartFailure :UInt16 = 6;
  # A state unit could not start; `Failure.units` names it.
  const deviceMemoryOverlap :UInt16 = 7;
  const failedServiceConnect :UInt16 = 8;
  const duplicatePublicServices :UInt16 = 9;
  const kernelLoadFailure :UInt16 = 10;
  # The kernel or initrd cannot be loaded; the detail says which and why.
  const vcpuStartFailure :UInt16 = 11;
  const vcpuRuntimeFailure :UInt16 = 12;
  # A VP cannot go on; the detail has the exit reason and the registers.
  const notCreated :UInt16 = 13;
  const alreadyRunning :UInt16 = 14;
  const controllerForcedHalt :UInt16 = 15;

  const snapshotNotSupported :UInt16 = 64;
  const snapshotIncompatible :UInt16 = 65;
  const snapshotCorrupt :UInt16 = 66;
  const transitionTimedOut :UInt16 = 67;
  # A state unit did not answer within its deadline; `Failure.units` names it.
  const faulted :UInt16 = 68;
  # A transition failed and could not be undone: only stop and inspect are legal.
  const notRunning :UInt16 = 69;
  const notSupported :UInt16 = 70;
  const limitExceeded :UInt16 = 71;
  const connectionRefused :UInt16 = 72;
  # The guest does not want the connection, or did not answer.
  const alreadyBound :UInt16 = 73;
  # The port is in use.
  const noResources :UInt16 = 74;
  # There are as many connections as there may be, or no port is free.
}

struct Failure {
  # An expected refusal. It is data in the results, never an exception: exceptions are for bugs, lost connections and overload.

  code @0 :UInt16;
  # One of GuestError's.
  detail @1 :Text;
  # Which field, file, device or unit, with the value.
  units @2 :List(Text);
  # The state units concerned.
  cause @3 :Failure;
  # What led to it, or null.
}

struct Result {
  # The answer of a method that returns no data.
  union {
    ok @0 :Void;
    error @1 :Failure;
  }
}

interface ByteStream {
  # Bytes, one way: towards the guest, or from a vsock connection towards the client, which then implements it.

  write @0 (bytes :Data) -> stream;
  # Queues bytes, in order. Answers once there is room for them: at most 64 KiB ahead of the guest's serial port, 256 KiB of a vsock
  # connection.
  end @1 ();
  # Answers once all that was written has been accepted; fails if any of it was not. The only trustworthy end of a stream.
}

interface OutputSink {
  # Bytes from the guest, implemented by the client. The VMM drops the capability after the last byte.

  write @0 (bytes :Data, lost :UInt64) -> stream;
  # `lost` counts the bytes that were dropped before these, because the reader was too slow.
}

interface File {
  # A file that one side keeps and the other reads, over any transport: a client's kernel, a VMM's core dump.

  size @0 () -> (bytes :UInt64);
  read @1 (offset :UInt64, count :UInt32) -> (bytes :Data);
  # At most `count` bytes, at most 1 MiB, fewer only at the end of the file.
}

struct FileSource {
  # Where the VMM gets a file from. It opens no path: the client opens its files with its own rights.
  union {
    none @0 :Void;
    descriptor @1 :UInt64;
    # An open descriptor of a regular file or memfd, handed over the same channel: its running number there, from 0. At most
    # 512 may wait to be used. On any other channel: badConfig.
    file @2 :File;
  }
}
