#!/bin/sh
# guest-initramfs TOOLSET…: prints the path of an initramfs for guests that holds the toolsets (block, net, vsock), and
# makes it if it is not there yet: the kernel unpacks several archives in one file, one over the other.
for set; do
    if [ ! -r "/lab/toolsets/$set" ]; then
        echo "guest-initramfs: no toolset $set; there are: $(ls -x /lab/toolsets)" >&2
        exit 1
    fi
done
made=/guest/initramfs$(printf -- '-%s' "$@")
[ $# = 0 ] && made=/guest/initramfs
if [ ! -e "$made" ]; then
    cd / || exit 1
    {
        cat /guest/initramfs
        for set; do
            cpio -o -H newc <"/lab/toolsets/$set" || exit 1
        done
    } >"$made.$$" && mv "$made.$$" "$made" || exit 1
fi
echo "$made"
