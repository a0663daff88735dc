//! The CMOS clock at ports 0x70 and 0x71 (Motorola MC146818A).

use core::fmt;

use crate::port;

const INDEX: u16 = 0x70;
const DATA: u16 = 0x71;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const UPDATING: u8 = 0x80;
const BINARY: u8 = 0x04;
const HOURS_24: u8 = 0x02;
const CENTURY: u8 = 0x32;
/// A clock that always updates is not there.
const ATTEMPTS: u32 = 10_000;

/// Date and time as the clock keeps them.
#[derive(PartialEq)]
pub struct Time {
    year: u32,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

/// Reads the clock until it says the same twice; `None` if there is no clock.
pub fn read() -> Option<Time> {
    let mut last = read_once()?;
    for _ in 0..ATTEMPTS {
        let time = read_once()?;
        if time == last {
            return Some(time);
        }
        last = time;
    }
    None
}

fn read_once() -> Option<Time> {
    (0..ATTEMPTS).find(|_| register(STATUS_A) & UPDATING == 0)?;
    let mode = register(STATUS_B);
    let number = |index| if mode & BINARY == 0 { from_bcd(register(index)) } else { register(index) };
    Some(Time {
        year: u32::from(number(CENTURY)) * 100 + u32::from(number(9)),
        month: number(8),
        day: number(7),
        hour: hour(mode),
        minute: number(2),
        second: number(0),
    })
}

/// The hour; in the 12-hour mode bit 7 says that it is past noon.
fn hour(mode: u8) -> u8 {
    let raw = register(4);
    let digits = raw & 0x7f;
    let hour = if mode & BINARY == 0 { from_bcd(digits) } else { digits };
    if mode & HOURS_24 != 0 { hour } else { hour % 12 + raw / 0x80 * 12 }
}

fn register(index: u8) -> u8 {
    port::write_u8(INDEX, index);
    port::read_u8(DATA)
}

fn from_bcd(byte: u8) -> u8 {
    byte / 16 * 10 + byte % 16
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { year, month, day, hour, minute, second } = self;
        write!(f, "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
    }
}
