#!/bin/sh
# The lab's first program. pivot_root fails on the initial rootfs, and sandboxes need it: move to a tmpfs.
mkdir /moved
mount -t tmpfs -o mode=755 lab /moved
for entry in /*; do
    case $entry in
        /moved | /dev | /proc | /sys) ;;
        *) cp -a "$entry" /moved/ ;;
    esac
done
mkdir -p /moved/dev /moved/proc /moved/sys
exec switch_root /moved /lab/start
