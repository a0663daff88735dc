#!/bin/sh
# Brings the lab up on its final root: file systems, /dev/kvm, then a shell on the console (LAB=shell on the kernel's
# command line) or the commands that arrive on the second serial line.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=linux

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up
hostname lab

while read -r module; do
    insmod "$module"
done </lab/modules

cd /root || exit 1
if [ "$LAB" = shell ]; then
    echo "The lab: /dev/kvm is there; a guest's kernel and initramfs are in /guest, and guest-initramfs makes one with tools. exit powers off."
    setsid cttyhack sh -l
else
    /lab/serve </dev/ttyS1 >/dev/ttyS1
fi
poweroff -f
