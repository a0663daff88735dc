@0x9ce1b4d07a5263f8;
# A disk whose data a client keeps.

using Common = import "common.capnp";

interface BlockService {
  # A disk's data, implemented by the client and named in `BlockConfig.format.service`. The VMM asks it for `info` at create, and has
  # further calls under way at a time, which may be answered in any order; together they move at most 8 MiB for one guest.
  #
  # Offsets and lengths are bytes, multiples of 512, and inside the disk. An error, an exception, a call that is not answered within
  # 10 s and data of another length than was asked for are I/O errors to the guest, and `deviceError` events to its observers; the
  # next call is made all the same. The capability is dropped once the guest has ended.

  info @0 () -> (info :BlockServiceInfo, error :Common.Failure);
  read @1 (offset :UInt64, count :UInt32) -> (bytes :Data, error :Common.Failure);
  # Exactly `count` bytes, at most 256 KiB.
  write @2 (offset :UInt64, bytes :Data, durable :Bool) -> (result :Common.Result);
  # At most 256 KiB. With `durable` it answers only once the data would survive a crash of whatever keeps it.
  flush @3 () -> (result :Common.Result);
  # Answers once all writes that were answered before would survive such a crash.
  discard @4 (offset :UInt64, count :UInt64) -> (result :Common.Result);
  # The data is not needed any more, at most 1 GiB of it. May do nothing; what is read there afterwards may be anything that was
  # once there.
  writeZeroes @5 (offset :UInt64, count :UInt64, unmap :Bool, durable :Bool) -> (result :Common.Result);
  # At most 16 MiB. With `unmap` the space may be given back.
}

struct BlockServiceInfo {
  bytes @0 :UInt64;
  # The disk's size, rounded down to a sector of 512: it needs one at least. It does not change while a guest has the disk.
  blockBytes @1 :UInt32 = 512;
  # The block that is written without reading around it: a power of two from 512 to 64 KiB.
  readOnly @2 :Bool;
  # It takes no writes: badConfig for a disk with readWrite.
}
