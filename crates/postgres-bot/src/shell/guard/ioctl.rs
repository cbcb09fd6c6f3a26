//! The calls to a watchdog device, as `linux/watchdog.h` has them.

use std::os::fd::BorrowedFd;

use rustix::{
    io::Errno,
    ioctl::{Getter, Opcode, Updater, ioctl, opcode},
};

/// A device with this option is disarmed by a `V` before it is closed.
pub(super) const MAGIC_CLOSE: u32 = 0x0100;

/// What a driver says of itself: `struct watchdog_info`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Support {
    /// What it can do.
    pub(super) options: u32,
    _firmware_version: u32,
    _identity: [u8; 32],
}

const GROUP: u8 = b'W';
const GET_SUPPORT: Opcode = opcode::read::<Support>(GROUP, 0);
const SET_TIMEOUT: Opcode = opcode::read_write::<i32>(GROUP, 6);
const GET_TIMEOUT: Opcode = opcode::read::<i32>(GROUP, 7);

/// What the driver says of itself. Whatever is no watchdog device has no such call.
#[expect(unsafe_code, reason = "an ioctl's number and type are the caller's word")]
pub(super) fn support(device: BorrowedFd<'_>) -> Result<Support, Errno> {
    // SAFETY: the number is made of the type, and the type is as the kernel's header has it.
    unsafe { ioctl(device, Getter::<GET_SUPPORT, Support>::new()) }
}

/// Asks for a time-out in seconds; the one that is granted, which may be another.
#[expect(unsafe_code, reason = "an ioctl's number and type are the caller's word")]
pub(super) fn set_timeout(device: BorrowedFd<'_>, seconds: i32) -> Result<i32, Errno> {
    let mut granted = seconds;
    // SAFETY: the number is made of the type, and the type is as the kernel's header has it.
    unsafe { ioctl(device, Updater::<SET_TIMEOUT, i32>::new(&mut granted))? };
    Ok(granted)
}

/// The time-out in seconds.
#[expect(unsafe_code, reason = "an ioctl's number and type are the caller's word")]
pub(super) fn timeout(device: BorrowedFd<'_>) -> Result<i32, Errno> {
    // SAFETY: the number is made of the type, and the type is as the kernel's header has it.
    unsafe { ioctl(device, Getter::<GET_TIMEOUT, i32>::new()) }
}
