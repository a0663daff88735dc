@0xc2d96b18e7f04a05;
# The service: launches guests, and finds those that it launched. Mirrors fuchsia.virtualization's VmmLauncher (RFC-0210) and
# GuestManager.

using Common = import "common.capnp";
using Config = import "config.capnp";
using Guest = import "guest.capnp";
using Snapshot = import "snapshot.capnp";

interface GuestHost {
  # The bootstrap capability of guestd's socket.

  launch @0 (serverEnd :UInt64, id :Text) -> (id :Text, exit :GuestExit, error :Common.Failure);
  # Starts a guest VMM and hands it the end of a Unix stream socket pair, sent over this connection (`serverEnd` is its running
  # number here, from 0). The bootstrap capability of that channel is the GuestLifecycle. The caller may speak on its own end at
  # once, without waiting for the answer. An empty `id` lets the service choose one. Errors: badConfig (the id is taken, too
  # long or not printable; no such descriptor), failedServiceConnect (the VMM cannot be started), limitExceeded.
  launchProxied @1 (id :Text) -> (lifecycle :Guest.GuestLifecycle, id :Text, exit :GuestExit, error :Common.Failure);
  # The same for a caller that cannot pass descriptors. The lease is the returned capability: dropping it, and the calls on it that
  # are pending, ends the guest.
  find @2 (id :Text) -> (id :Text, control :Guest.GuestControl, observer :Guest.Observer, exit :GuestExit, error :Common.Failure);
  # The guest with this id, or the only one whose id begins so. badConfig if there is none or more than one. A user finds its
  # own guests.
  list @3 () -> (guests :List(GuestInfo));
  info @4 () -> (info :HostInfo);
  manager @5 () -> (manager :GuestManager, error :Common.Failure);
  # unimplemented.
  snapshot @6 (token :Data) -> (snapshot :Snapshot.Snapshot, error :Common.Failure);
  # The snapshot with this token, of GuestControl.snapshot, as long as anybody refers to it. badConfig if there is none.
}

interface GuestExit {
  # Served by the service, so that it outlives the VMM; no lease.
  whenTerminated @0 () -> (exit :Guest.Exit);
  # As Guest.whenTerminated, for the guest of the last create; also answers when the VMM's process has ended without one.
}

struct GuestInfo {
  id @0 :Text;
  phase @1 :Guest.GuestState.Phase;
  pid @2 :UInt32;
  # Of the guest VMM's process.
  uptimeUs @3 :UInt64;
  vps @4 :UInt32;
  proxied @5 :Bool;
}

struct HostInfo {
  version @0 :Text;
  protocol @1 :UInt32;
  # Counts the versions of this schema, from 1. An old client works with a newer service.
  guests @2 :UInt32;
  hypervisor @3 :Text;
  warm @4 :UInt32;
  # How many VMMs are ready for guests to come. None of them has a guest.
  prepared @5 :UInt32;
  # How many of them have memory, partition and VPs ready for a guest like one of the last.
}

interface GuestManager {
  # Guests that belong to the service and outlive their clients. unimplemented.
  launch @0 (id :Text, config :Config.GuestConfig) -> (guest :Guest.Guest, status :UInt16);
  connect @1 (id :Text) -> (guest :Guest.Guest, status :UInt16);
  control @2 (id :Text) -> (control :Guest.GuestControl, status :UInt16);
  forceShutdown @3 (id :Text) -> (status :UInt16);
  getInfo @4 (id :Text) -> (info :GuestInfo, status :UInt16);
  list @5 () -> (ids :List(Text));
  watch @6 (sink :AnyPointer) -> (status :UInt16);
}
