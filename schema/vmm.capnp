@0xf5b3079a6e1c8d06;
# Private: the channel between guestd and each guest VMM. Never a lease.

using Common = import "common.capnp";
using Guest = import "guest.capnp";

interface Vmm {
  # The bootstrap capability that a guest VMM serves to guestd.

  attach @0 (serverEnd :UInt64, id :Text, watcher :VmmWatcher) -> (result :Common.Result);
  # Serves GuestLifecycle on the channel with this running number here. That channel is the lease: once it closes, the guest is
  # stopped and the process ends. alreadyRunning the second time.
  control @1 () -> (control :Guest.GuestControl, error :Common.Failure);
  observer @2 () -> (observer :Guest.Observer, error :Common.Failure);
  # Of the guest of the last create, whatever its phase.
  shutdown @3 (deadlineMs :UInt32) -> (result :Common.Result);
  # Stops the guest by force and ends the process after the answer.
}

interface VmmWatcher {
  # Implemented by guestd.
  created @0 (generation :UInt64);
  # Another guest was created in this VMM, the generation-th.
  terminated @1 (generation :UInt64, exit :Guest.Exit);
  # It has ended. The VMM's process waits for the answer before it ends, within a deadline.
}
