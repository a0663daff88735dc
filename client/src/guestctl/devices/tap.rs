//! TAP devices, and descriptors that this process was started with.

// UNSAFETY: a TAP device is attached to with an ioctl, and a descriptor that was inherited is only a number.
#![expect(unsafe_code, reason = "an ioctl of the tuntap driver, and descriptors by number")]

use rustix::fs::{Mode, OFlags};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// How many bytes an interface's name takes, with the NUL behind it (IFNAMSIZ).
pub const NAME_BYTES: usize = 16;

/// A descriptor that is attached to the TAP device of this name, which is made if there is none. With headers for offloads.
pub fn open(name: &str, multi_queue: bool) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let descriptor = rustix::fs::open("/dev/net/tun", flags, Mode::empty())?;
    // SAFETY: a structure of integers and a pointer, for which zero is a value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // The last byte stays NUL.
    for (to, from) in request.ifr_name[..NAME_BYTES - 1].iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let several = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
    request.ifr_ifru.ifru_flags = flags.try_into().map_err(io::Error::other)?;
    // SAFETY: TUNSETIFF reads the structure, and writes the name into it.
    let result = unsafe { libc::ioctl(descriptor.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(descriptor) }
}

/// A descriptor of our own for one that this process was started with.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: if it is not open, the call fails; it is closed by nobody meanwhile, for whoever has opened it in this process has
    // not been told to close it.
    let inherited = unsafe { BorrowedFd::borrow_raw(number) };
    Ok(rustix::io::fcntl_dupfd_cloexec(inherited, 3)?)
}
