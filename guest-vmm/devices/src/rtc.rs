//! The real-time clock and CMOS RAM (Motorola MC146818A datasheet; the century at 0x32 as ACPI's FADT announces it).
//!
//! The time is the host's, in UTC, moved by what the guest sets. It is computed when it is read: nothing ticks. Two ports: the
//! register's index, and the register.
//!
//! A restored clock follows the host's clock as before: saved is how far the guest has moved it, and not the time. So the guest
//! finds the time of day when it goes on, however long it was away, and on whichever host.
//!
//! Limits: no interrupt, so alarms and the periodic rate are stored and do nothing; the day of the week follows from the date;
//! daylight saving is stored and ignored; years 1970 to 9999.

use crate::ByteRegisters;
use crate::saved::{invalid, register};
use guest_saved_state::devices::rtc::RtcState;
use inspect::{Inspect, Request};
use processor::PowerRequest;
use save_restore::{RestoreError, SaveError, SaveRestore};
use std::fmt;
use std::ops::ControlFlow;
use std::time::{Duration, SystemTime};

const INDEX: u64 = 0;
const DATA: u64 = 1;

/// Bit 7 of the index port switches NMIs off; it is no part of the index.
const INDEX_MASK: u8 = 0x7f;

const SECONDS: u8 = 0x00;
const ALARM_SECONDS: u8 = 0x01;
const MINUTES: u8 = 0x02;
const ALARM_MINUTES: u8 = 0x03;
const HOURS: u8 = 0x04;
const ALARM_HOURS: u8 = 0x05;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
/// Where the RAM begins that the clock has no use for, but for the century.
const RAM: u8 = 0x0e;
const CENTURY: u8 = 0x32;
const RAM_BYTES: usize = 128;

const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// The time base of a 32768 Hz crystal, and the rate that PC firmware sets.
const A_RESET: u8 = 0x26;
const A_RATE: u8 = 0x0f;
const B_SET: u8 = 1 << 7;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
const C_UPDATE_ENDED: u8 = 1 << 4;
const D_VALID: u8 = 1 << 7;
const HOUR_PM: u8 = 1 << 7;

/// The update-in-progress bit is set this long before the second changes: a guest that sees it clear has as long to read.
const UPDATE_NANOSECONDS: u32 = 244_000;
const SECONDS_PER_DAY: i64 = 86_400;
/// 9999-12-31T23:59:59Z, the last second that four digits can show.
const LAST_SECOND: i64 = 253_402_300_799;

/// What tells the time of day. Must not block.
pub trait HostClock: Send {
    /// The time since 1970-01-01T00:00:00 UTC.
    fn now(&self) -> Duration;
}

/// The system's own clock. A time before 1970 reads as 1970.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl HostClock for SystemClock {
    fn now(&self) -> Duration {
        SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default()
    }
}

/// A moment as the registers show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Calendar {
    year: i64,
    month: u8,
    day: u8,
    /// From 1, Sunday.
    weekday: u8,
    hours: u8,
    minutes: u8,
    seconds: u8,
}

impl Calendar {
    fn from_unix(time: i64) -> Self {
        let (days, second) = (time.div_euclid(SECONDS_PER_DAY), time.rem_euclid(SECONDS_PER_DAY));
        let (year, month, day) = date_from_days(days);
        Self {
            year,
            month,
            day,
            // 1970-01-01 was a Thursday.
            weekday: small((days + 4).rem_euclid(7)) + 1,
            hours: small(second / 3600),
            minutes: small(second / 60 % 60),
            seconds: small(second % 60),
        }
    }

    /// The moment, or `None` if there is none with these fields. The weekday is not looked at.
    fn to_unix(self) -> Option<i64> {
        let in_range = (1..=12).contains(&self.month)
            && (1..=31).contains(&self.day)
            && (self.hours < 24 && self.minutes < 60 && self.seconds < 60);
        let days = days_from_date(self.year, self.month, self.day);
        let second = i64::from(self.hours) * 3600 + i64::from(self.minutes) * 60 + i64::from(self.seconds);
        let time = days * SECONDS_PER_DAY + second;
        (in_range && (0..=LAST_SECOND).contains(&time)).then_some(time)
    }
}

/// ISO 8601, in UTC.
impl fmt::Display for Calendar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { year, month, day, weekday: _, hours, minutes, seconds } = self;
        write!(f, "{year:04}-{month:02}-{day:02}T{hours:02}:{minutes:02}:{seconds:02}Z")
    }
}

/// The proleptic Gregorian date of a day counted from 1970-01-01. Years begin in March here, so that the leap day is the last.
fn date_from_days(days: i64) -> (i64, u8, u8) {
    let days = days + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year + i64::from(month <= 2), small(month), small(day))
}

fn days_from_date(year: i64, month: u8, day: u8) -> i64 {
    let year = year - i64::from(month <= 2);
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let shifted = (i64::from(month) + 9) % 12;
    let of_year = (153 * shifted + 2) / 5 + i64::from(day) - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

fn small(value: i64) -> u8 {
    u8::try_from(value).expect("a field of a date or time of day is below 256")
}

/// The real-time clock with its 114 bytes of RAM.
pub struct Rtc {
    clock: Box<dyn HostClock>,
    index: u8,
    /// Everything that keeps what is written. The bytes at the time's own indices hold what the guest has written since it
    /// stopped the clock, and mean something only while [`B_SET`] is set.
    ram: [u8; RAM_BYTES],
    /// How far the guest's time is ahead of the host's, in seconds; at most [`LAST_SECOND`] either way.
    offset: i64,
    /// The second at which status C was read last; from 0 to [`LAST_SECOND`].
    acknowledged: i64,
}

impl fmt::Debug for Rtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rtc")
            .field("index", &self.index)
            .field("offset", &self.offset)
            .finish_non_exhaustive()
    }
}

impl Rtc {
    /// How many ports the window takes, from port 0x70.
    pub const PORTS: u16 = 2;

    /// A clock that shows the given host clock's time in BCD with 24 hours, its RAM zero.
    pub fn new(clock: Box<dyn HostClock>) -> Self {
        let mut ram = [0; RAM_BYTES];
        ram[usize::from(STATUS_A)] = A_RESET;
        ram[usize::from(STATUS_B)] = B_24_HOURS;
        Self { clock, index: 0, ram, offset: 0, acknowledged: 0 }
    }

    fn status_b(&self) -> u8 {
        self.ram[usize::from(STATUS_B)]
    }

    fn set_mode(&self) -> bool {
        self.status_b() & B_SET != 0
    }

    /// The host's time, in seconds.
    fn host_time(&self) -> i64 {
        i64::try_from(self.clock.now().as_secs()).map_or(LAST_SECOND, |seconds| seconds.min(LAST_SECOND))
    }

    /// The guest's time, in seconds.
    fn now(&self) -> i64 {
        (self.host_time() + self.offset).clamp(0, LAST_SECOND)
    }

    fn read_register(&mut self, index: u8) -> u8 {
        if index == STATUS_C { self.acknowledge() } else { self.peek(index) }
    }

    /// What a register reads next.
    fn peek(&self, index: u8) -> u8 {
        match index {
            STATUS_A => self.status_a(),
            STATUS_C => self.status_c(self.now()),
            STATUS_D => D_VALID,
            _ if is_time(index) && !self.set_mode() => self.show(index, &Calendar::from_unix(self.now())),
            _ => self.ram[usize::from(index)],
        }
    }

    fn status_a(&self) -> u8 {
        let updating = self.clock.now().subsec_nanos() >= 1_000_000_000 - UPDATE_NANOSECONDS;
        let stored = self.ram[usize::from(STATUS_A)] & !A_UPDATE_IN_PROGRESS;
        if updating && !self.set_mode() { stored | A_UPDATE_IN_PROGRESS } else { stored }
    }

    /// Says whether the time has moved on since the register was read last: guests poll it to meet a second's beginning.
    fn status_c(&self, now: i64) -> u8 {
        if now == self.acknowledged || self.set_mode() { 0 } else { C_UPDATE_ENDED }
    }

    /// Status C, which reading clears.
    fn acknowledge(&mut self) -> u8 {
        let now = self.now();
        let value = self.status_c(now);
        self.acknowledged = now;
        value
    }

    /// The rate that is set for the periodic interrupt, in Hz, with the time base of 32768 Hz (MC146818A, table 5).
    fn periodic_rate(&self) -> Option<u32> {
        match self.ram[usize::from(STATUS_A)] & A_RATE {
            0 => None,
            // The two fastest rates are not of this time base; they stand for two slow ones.
            rate @ (1 | 2) => Some(256 >> (rate - 1)),
            rate => Some(32_768 >> (rate - 1)),
        }
    }

    fn inspect_registers(&self, request: Request<'_>) {
        let mut response = request.respond();
        for (name, index) in SHOWN_REGISTERS {
            response.hex(name, self.peek(index));
        }
    }

    fn write_register(&mut self, index: u8, value: u8) {
        match index {
            STATUS_C | STATUS_D => {}
            STATUS_B => self.write_status_b(value),
            _ if is_time(index) && !self.set_mode() => {
                // A single register set while the clock runs: the others keep the time.
                self.latch();
                self.ram[usize::from(index)] = value;
                self.adopt();
            }
            _ => self.ram[usize::from(index)] = value,
        }
    }

    fn write_status_b(&mut self, value: u8) {
        let was_set = self.set_mode();
        if !was_set && value & B_SET != 0 {
            self.latch();
        }
        // The time that the guest has set is in the format in which it leaves the clock.
        self.ram[usize::from(STATUS_B)] = value;
        if was_set && value & B_SET == 0 {
            self.adopt();
        }
    }

    /// Copies the time into the registers' bytes, for the guest to change.
    fn latch(&mut self) {
        let calendar = Calendar::from_unix(self.now());
        for index in TIME_REGISTERS {
            self.ram[usize::from(index)] = self.show(index, &calendar);
        }
    }

    /// Takes the time from the registers' bytes. If they hold no time, the clock goes on as before.
    fn adopt(&mut self) {
        if let Some(time) = self.latched().and_then(Calendar::to_unix) {
            self.offset = time - self.host_time();
        }
    }

    fn latched(&self) -> Option<Calendar> {
        let number = |index: u8| self.decode(self.ram[usize::from(index)]);
        Some(Calendar {
            year: i64::from(number(CENTURY)?) * 100 + i64::from(number(YEAR)?),
            month: number(MONTH)?,
            day: number(DAY)?,
            weekday: 1,
            hours: self.decode_hours(self.ram[usize::from(HOURS)])?,
            minutes: number(MINUTES)?,
            seconds: number(SECONDS)?,
        })
    }

    fn show(&self, index: u8, calendar: &Calendar) -> u8 {
        match index {
            SECONDS => self.encode(calendar.seconds),
            MINUTES => self.encode(calendar.minutes),
            HOURS => self.encode_hours(calendar.hours),
            WEEKDAY => self.encode(calendar.weekday),
            DAY => self.encode(calendar.day),
            MONTH => self.encode(calendar.month),
            YEAR => self.encode(small(calendar.year % 100)),
            _ => self.encode(small(calendar.year / 100)),
        }
    }

    fn encode(&self, number: u8) -> u8 {
        if self.status_b() & B_BINARY != 0 { number } else { ((number / 10) << 4) | (number % 10) }
    }

    fn decode(&self, value: u8) -> Option<u8> {
        if self.status_b() & B_BINARY != 0 {
            return Some(value);
        }
        let (tens, ones) = (value >> 4, value & 0x0f);
        (tens < 10 && ones < 10).then_some(tens * 10 + ones)
    }

    fn encode_hours(&self, hours: u8) -> u8 {
        if self.status_b() & B_24_HOURS != 0 {
            return self.encode(hours);
        }
        let twelve = if hours.is_multiple_of(12) { 12 } else { hours % 12 };
        self.encode(twelve) | if hours >= 12 { HOUR_PM } else { 0 }
    }

    fn decode_hours(&self, value: u8) -> Option<u8> {
        if self.status_b() & B_24_HOURS != 0 {
            return self.decode(value);
        }
        let twelve = self.decode(value & !HOUR_PM).filter(|hours| (1..=12).contains(hours))?;
        Some(twelve % 12 + if value & HOUR_PM != 0 { 12 } else { 0 })
    }
}

impl SaveRestore for Rtc {
    type SavedState = RtcState;

    fn save(&mut self) -> Result<RtcState, SaveError> {
        let Self { clock: _, index, ram, offset, acknowledged } = self;
        Ok(RtcState {
            index: (*index).into(),
            ram: ram.to_vec(),
            offset_seconds: *offset,
            acknowledged_seconds: *acknowledged,
        })
    }

    fn restore(&mut self, state: RtcState) -> Result<(), RestoreError> {
        let RtcState { index, ram, offset_seconds, acknowledged_seconds } = state;
        let index = register("index", index, INDEX_MASK.into())?;
        let wrong_size =
            |ram: Vec<u8>| RestoreError::invalid("ram", format_args!("{} bytes long", ram.len()));
        let ram: [u8; RAM_BYTES] = ram.try_into().map_err(wrong_size)?;
        if let Some(read_only) = [STATUS_C, STATUS_D].into_iter().find(|at| ram[usize::from(*at)] != 0) {
            return Err(invalid(&format!("ram[{read_only}]"), ram[usize::from(read_only)]));
        }
        if !(-LAST_SECOND..=LAST_SECOND).contains(&offset_seconds) {
            return Err(RestoreError::invalid("offset_seconds", offset_seconds));
        }
        if !(0..=LAST_SECOND).contains(&acknowledged_seconds) {
            return Err(RestoreError::invalid("acknowledged_seconds", acknowledged_seconds));
        }
        (self.index, self.ram) = (index, ram);
        (self.offset, self.acknowledged) = (offset_seconds, acknowledged_seconds);
        Ok(())
    }
}

const TIME_REGISTERS: [u8; 8] = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY];

fn is_time(index: u8) -> bool {
    TIME_REGISTERS.contains(&index)
}

const SHOWN_REGISTERS: [(&str, u8); 15] = [
    ("seconds", SECONDS),
    ("minutes", MINUTES),
    ("hours", HOURS),
    ("weekday", WEEKDAY),
    ("day", DAY),
    ("month", MONTH),
    ("year", YEAR),
    ("century", CENTURY),
    ("alarm_seconds", ALARM_SECONDS),
    ("alarm_minutes", ALARM_MINUTES),
    ("alarm_hours", ALARM_HOURS),
    ("status_a", STATUS_A),
    ("status_b", STATUS_B),
    ("status_c", STATUS_C),
    ("status_d", STATUS_D),
];

/// Shows the host's time and, as the guest's own, its time, what it has set, and the registers as it would read them next.
impl Inspect for Rtc {
    fn inspect(&self, request: Request<'_>) {
        let host = || Calendar::from_unix(self.host_time()).to_string();
        request.respond().field_with("host_time", host).sensitive(|response| {
            response
                .field_with("time", || Calendar::from_unix(self.now()).to_string())
                .field("offset_seconds", &self.offset)
                .field_with("stopped", || self.set_mode())
                .field("periodic_rate_hz", &self.periodic_rate())
                .hex("selected_register", self.index)
                .child("registers", |request| self.inspect_registers(request))
                .field_with("ram", || (RAM..=INDEX_MASK).map(|index| self.peek(index)).collect::<Vec<u8>>());
        });
    }
}

impl ByteRegisters for Rtc {
    fn read_byte(&mut self, offset: u64) -> u8 {
        // The index cannot be read back on a PC.
        if offset == DATA { self.read_register(self.index) } else { 0xff }
    }

    fn write_byte(&mut self, offset: u64, value: u8) -> ControlFlow<PowerRequest> {
        match offset {
            INDEX => self.index = value & INDEX_MASK,
            DATA => self.write_register(self.index, value),
            _ => {}
        }
        ControlFlow::Continue(())
    }

    /// The battery keeps the RAM and the time over a reset; a clock that the guest has stopped runs again from its old time.
    fn reset(&mut self) {
        self.index = 0;
        self.ram[usize::from(STATUS_B)] &= !B_SET;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::IoDevice;
    use crate::inspected::{hex, inspected, observed};
    use proptest::prelude::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// A clock that a test sets, in nanoseconds.
    #[derive(Clone, Default)]
    pub(crate) struct Hand(Arc<AtomicU64>);

    impl HostClock for Hand {
        fn now(&self) -> Duration {
            Duration::from_nanos(self.0.load(Ordering::Relaxed))
        }
    }

    impl Hand {
        pub(crate) fn set(&self, seconds: u64, nanoseconds: u64) {
            self.0.store(seconds * 1_000_000_000 + nanoseconds, Ordering::Relaxed);
        }

        pub(crate) fn advance(&self, nanoseconds: u64) {
            self.0.fetch_add(nanoseconds, Ordering::Relaxed);
        }
    }

    /// 2024-02-29T23:59:58Z, a Thursday.
    const LEAP_DAY: u64 = 1_709_251_198;

    fn rtc() -> (Rtc, Hand) {
        let hand = Hand::default();
        hand.set(LEAP_DAY, 0);
        (Rtc::new(Box::new(hand.clone())), hand)
    }

    fn read(rtc: &mut Rtc, index: u8) -> u8 {
        assert!(rtc.write_byte(INDEX, index).is_continue());
        rtc.read_byte(DATA)
    }

    fn write(rtc: &mut Rtc, index: u8, value: u8) {
        assert!(rtc.write_byte(INDEX, index).is_continue());
        assert!(rtc.write_byte(DATA, value).is_continue());
    }

    fn time(rtc: &mut Rtc) -> [u8; 8] {
        TIME_REGISTERS.map(|index| read(rtc, index))
    }

    #[test]
    fn shows_the_time_in_bcd() {
        let (mut rtc, hand) = rtc();
        assert_eq!(time(&mut rtc), [0x58, 0x59, 0x23, 0x05, 0x29, 0x02, 0x24, 0x20]);
        hand.set(LEAP_DAY + 2, 0);
        assert_eq!(time(&mut rtc), [0x00, 0x00, 0x00, 0x06, 0x01, 0x03, 0x24, 0x20]);
    }

    #[test]
    fn shows_the_time_in_binary_and_twelve_hours() {
        let (mut rtc, hand) = rtc();
        write(&mut rtc, STATUS_B, B_BINARY);
        assert_eq!(time(&mut rtc), [58, 59, 11 | HOUR_PM, 5, 29, 2, 24, 20]);
        hand.set(LEAP_DAY + 2, 0);
        assert_eq!(read(&mut rtc, HOURS), 12, "midnight is 12 am");
        hand.set(LEAP_DAY + 2 + 12 * 3600, 0);
        assert_eq!(read(&mut rtc, HOURS), 12 | HOUR_PM, "noon is 12 pm");
    }

    #[test]
    fn an_update_is_in_progress_only_before_a_second_ends() {
        let (mut rtc, hand) = rtc();
        assert_eq!(read(&mut rtc, STATUS_A), A_RESET);
        hand.set(LEAP_DAY, 999_800_000);
        assert_eq!(read(&mut rtc, STATUS_A), A_RESET | A_UPDATE_IN_PROGRESS);
        hand.set(LEAP_DAY + 1, 0);
        assert_eq!(read(&mut rtc, STATUS_A), A_RESET);
    }

    #[test]
    fn status_c_reports_each_second_once() {
        let (mut rtc, hand) = rtc();
        assert_eq!(read(&mut rtc, STATUS_C), C_UPDATE_ENDED);
        assert_eq!(read(&mut rtc, STATUS_C), 0);
        hand.set(LEAP_DAY + 1, 0);
        assert_eq!(read(&mut rtc, STATUS_C), C_UPDATE_ENDED);
    }

    #[test]
    fn it_shows_what_a_guest_reads_next() {
        let (mut rtc, _) = rtc();
        write(&mut rtc, ALARM_HOURS, 0x07);
        write(&mut rtc, 0x40, 0x5a);
        write(&mut rtc, CENTURY, 0x21);
        let registers = inspected(&mut rtc, "registers");
        for (name, index) in SHOWN_REGISTERS {
            assert_eq!(registers.child(name), Some(&hex(read(&mut rtc, index))), "{name}");
        }
        assert_eq!(registers.child("alarm_hours"), Some(&hex(0x07_u8)));
        let ram = inspected(&mut rtc, "ram").to_string();
        assert_eq!((ram.trim().len(), &ram[(0x40 - 0x0e) * 2..][..2]), (114 * 2, "5a"));
        assert_eq!(&ram[(0x32 - 0x0e) * 2..][..2], "21");
        assert_eq!(inspected(&mut rtc, "time").to_string(), "2124-02-29T23:59:58Z\n");
        assert_eq!(inspected(&mut rtc, "selected_register"), hex(STATUS_D));
    }

    #[test]
    fn looking_at_it_acknowledges_no_update() {
        let (mut rtc, _) = rtc();
        for _ in 0..2 {
            assert_eq!(inspected(&mut rtc, "registers/status_c"), hex(C_UPDATE_ENDED));
        }
        assert_eq!(read(&mut rtc, STATUS_C), C_UPDATE_ENDED);
        assert_eq!(inspected(&mut rtc, "registers/status_c"), hex(0_u8));
    }

    #[test]
    fn it_shows_the_rate_that_is_set() {
        let (mut rtc, _) = rtc();
        for (rate, shown) in
            [(0, "none\n"), (1, "256\n"), (2, "128\n"), (3, "8192\n"), (6, "1024\n"), (15, "2\n")]
        {
            write(&mut rtc, STATUS_A, 0x20 | rate);
            assert_eq!(inspected(&mut rtc, "periodic_rate_hz").to_string(), shown);
        }
    }

    #[test]
    fn the_hosts_time_alone_is_not_the_guests() {
        let (mut rtc, _) = rtc();
        write(&mut rtc, CENTURY, 0x21);
        assert_eq!(observed(&mut rtc).to_string(), "host_time: 2024-02-29T23:59:58Z\n");
    }

    #[test]
    fn the_battery_is_good_and_ram_keeps_what_is_written() {
        let (mut rtc, _) = rtc();
        assert_eq!(read(&mut rtc, STATUS_D), D_VALID);
        write(&mut rtc, 0x40, 0x5a);
        write(&mut rtc, 0x01, 0x12);
        IoDevice::reset(&mut rtc);
        assert_eq!(read(&mut rtc, 0x40 | 0x80), 0x5a, "bit 7 of the index is the NMI switch");
        assert_eq!(read(&mut rtc, 0x01), 0x12, "an alarm register");
    }

    #[test]
    fn the_guest_sets_the_time() {
        let (mut rtc, hand) = rtc();
        write(&mut rtc, STATUS_B, B_SET | B_24_HOURS);
        let wanted = [0x07, 0x06, 0x05, 0x01, 0x04, 0x03, 0x99, 0x19];
        for (index, value) in TIME_REGISTERS.into_iter().zip(wanted) {
            write(&mut rtc, index, value);
        }
        hand.set(LEAP_DAY + 100, 0);
        write(&mut rtc, STATUS_B, B_24_HOURS);
        assert_eq!(time(&mut rtc), [0x07, 0x06, 0x05, 0x05, 0x04, 0x03, 0x99, 0x19]);
        hand.set(LEAP_DAY + 101, 0);
        assert_eq!(read(&mut rtc, SECONDS), 0x08);
    }

    #[test]
    fn a_time_that_does_not_exist_is_not_adopted() {
        let (mut rtc, _) = rtc();
        write(&mut rtc, MONTH, 0x13);
        write(&mut rtc, SECONDS, 0xff);
        assert_eq!(time(&mut rtc), [0x58, 0x59, 0x23, 0x05, 0x29, 0x02, 0x24, 0x20]);
    }

    #[test]
    fn a_clock_at_the_end_of_time_can_be_set_back() {
        let (mut rtc, hand) = rtc();
        write(&mut rtc, STATUS_B, B_SET | B_24_HOURS);
        for (index, value) in TIME_REGISTERS.into_iter().zip([0x59, 0x59, 0x23, 0x01, 0x31, 0x12, 0x99, 0x99])
        {
            write(&mut rtc, index, value);
        }
        write(&mut rtc, STATUS_B, B_24_HOURS);
        hand.set(LEAP_DAY + 10, 0);
        assert_eq!(time(&mut rtc), [0x59, 0x59, 0x23, 0x06, 0x31, 0x12, 0x99, 0x99], "it stands still");
        write(&mut rtc, CENTURY, 0x20);
        write(&mut rtc, HOURS, 0x11);
        assert_eq!(time(&mut rtc), [0x59, 0x59, 0x11, 0x05, 0x31, 0x12, 0x99, 0x20]);
    }

    #[test]
    fn a_reset_starts_a_clock_that_the_guest_had_stopped() {
        let (mut rtc, hand) = rtc();
        write(&mut rtc, STATUS_B, B_SET | B_24_HOURS);
        IoDevice::reset(&mut rtc);
        hand.set(LEAP_DAY + 1, 0);
        assert_eq!(read(&mut rtc, SECONDS), 0x59);
    }

    proptest! {
        #[test]
        fn dates_convert_both_ways(unix in 0..=LAST_SECOND) {
            let calendar = Calendar::from_unix(unix);
            prop_assert_eq!(calendar.to_unix(), Some(unix));
        }

        #[test]
        fn what_is_shown_can_be_set(unix in 0..=LAST_SECOND, format in 0u8..4) {
            let (mut rtc, hand) = rtc();
            write(&mut rtc, STATUS_B, format << 1);
            hand.set(0, 0);
            rtc.offset = unix;
            rtc.latch();
            prop_assert_eq!(rtc.latched().and_then(Calendar::to_unix), Some(unix));
        }
    }
}
