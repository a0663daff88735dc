#!/bin/sh
# The first program of the Linux guests that boot in the lab: says that the guest is up, then is a shell on the first
# serial line. GUEST_RUN="COMMAND" on the kernel's command line is run before the shell. When the shell ends, the guest
# powers off.
export PATH=/bin:/sbin HOME=/ TERM=linux PS1='guest# '

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
ip link set lo up

# load NAME: inserts the modules that the list /modules/NAME names, unless they are there.
load() {
    while read -r module; do
        name=${module##*/}
        [ -d "/sys/module/${name%.ko}" ] || insmod "$module"
    done <"/modules/$1"
}

# The drivers of the virtio devices that the guest has, and no others: each costs time.
set -- /sys/bus/acpi/devices/LNRO0005:*
if [ -e "$1" ]; then
    load virtio_mmio
    for device in /sys/bus/virtio/devices/*; do
        case $(cat "$device/device") in
            0x0001) load virtio_net ;;
            0x0002) load virtio_blk && load ext4 ;;
            0x0003) load virtio_console ;;
            0x0004) load virtio_rng ;;
            0x0005) load virtio_balloon ;;
            0x0013) load vmw_vsock_virtio_transport ;;
            0x0018) load virtio_mem ;;
        esac
    done
fi

read -r _ memory _ </proc/meminfo
read -r uptime _ </proc/uptime
echo "GUEST-UP nproc=$(nproc) memory_kib=$memory uptime=$uptime"
[ -n "$GUEST_RUN" ] && sh -c "$GUEST_RUN"
if [ "$GUEST_SHELL" = plain ]; then
    stty -echo
    # A shell that reads a script has no prompt and edits no lines. Of a terminal it reads one line at a time, so a command
    # may read what follows. (A pipe from busybox's cat would hold each line back until the next one: it splices, and the
    # kernel keeps the pipe locked while it waits for the terminal.)
    sh /dev/console
else
    setsid cttyhack sh
fi
poweroff -f
