@0xe0a7d25b93c64103;
# A frozen guest. In its place for later versions: nothing hands one out yet.

using Common = import "common.capnp";

interface Snapshot {
  # Immutable; outlives its guest; the last reference frees it.

  info @0 () -> (memoryBytes :UInt64, units :List(Text), parent :Text, error :Common.Failure);
  canRestore @1 (grants :AnyPointer) -> (result :Common.Result);
  launch @2 (serverEnd :UInt64, id :Text) -> (id :Text, exit :AnyPointer, error :Common.Failure);
  export @3 (output :Common.OutputSink) -> (result :Common.Result);
}
