//! Updates: what a writable node takes, what it refuses, and nodes that take none.

use inspect::{
    Deferred, FromText, Hex, Inspect, InspectMut, Inspection, Node, Request, Update, UpdateError, Value, View,
};
use proptest::prelude::*;
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(1);

/// Counts how often it is read and written. An odd limit is rounded up, one above 100 is refused.
#[derive(Default)]
struct Throttle {
    limit: Cell<u64>,
    reads: Cell<u32>,
    writes: Cell<u32>,
}

impl Throttle {
    fn write(&self, new: u64) -> Result<u64, String> {
        self.writes.set(self.writes.get() + 1);
        if new > 100 {
            return Err(format!("{new} is more than the line can do"));
        }
        self.limit.set(new.next_multiple_of(2));
        Ok(self.limit.get())
    }
}

impl Inspect for Throttle {
    fn inspect(&self, request: Request<'_>) {
        let read = || {
            self.reads.set(self.reads.get() + 1);
            self.limit.get()
        };
        request
            .respond()
            .field("line", "eth0")
            .child("rates", |request| {
                request.respond().writable("limit", read, |new| self.write(new)).field("now", &7_u8);
            })
            .sensitive(|response| {
                response.writable("secret", || self.limit.get(), |new| self.write(new));
            });
    }
}

async fn update(path: &str, text: &str, component: &impl Inspect) -> Result<Value, UpdateError> {
    Update::start(path, text, |request| component.inspect(request)).finish(SOON).await
}

async fn look(path: &str, component: &impl Inspect) -> Node {
    Inspection::start(path, 9, View::Everything, |request| component.inspect(request)).finish(SOON).await
}

#[tokio::test]
async fn the_answer_to_an_update_is_the_value_after_it() {
    let throttle = Throttle::default();
    assert_eq!(update("rates/limit", "41", &throttle).await, Ok(Value::Unsigned(42)));
    assert_eq!(look("rates/limit", &throttle).await, Node::Value(Value::Unsigned(42)));
    assert_eq!(update("/rates/limit/", "8", &throttle).await, Ok(Value::Unsigned(8)));
    assert_eq!((throttle.limit.get(), throttle.writes.get()), (8, 2));
    assert_eq!(update("secret", "10", &throttle).await, Ok(Value::Unsigned(10)));
}

#[tokio::test]
async fn a_look_never_writes_and_an_update_touches_no_other_node() {
    let throttle = Throttle::default();
    let tree = look("", &throttle).await;
    assert_eq!(tree.to_string(), "line: eth0\nrates:\n  limit: 0\n  now: 7\nsecret: 0\n");
    assert_eq!((throttle.reads.get(), throttle.writes.get()), (1, 0));
    assert_eq!(update("secret", "2", &throttle).await, Ok(Value::Unsigned(2)));
    assert_eq!((throttle.reads.get(), throttle.writes.get()), (1, 1));
}

#[tokio::test]
async fn what_is_no_writable_node_is_refused_and_told_apart() {
    let throttle = Throttle::default();
    for path in ["", "/", "line", "rates", "rates/now"] {
        assert_eq!(update(path, "1", &throttle).await, Err(UpdateError::NotWritable), "{path:?}");
    }
    for path in ["lin", "rates/limit/low", "rates/now/low", "line/0", "rates//limit/0", "\0", "rates/limit\0"]
    {
        assert_eq!(update(path, "1", &throttle).await, Err(UpdateError::NotFound), "{path:?}");
    }
    assert_eq!(throttle.writes.get(), 0);
}

#[tokio::test]
async fn a_value_that_the_type_or_the_component_does_not_take_changes_nothing() {
    let throttle = Throttle::default();
    for text in ["", " 1", "-1", "1.0", "0x10", "18446744073709551616", "1\0", "many"] {
        let error = update("rates/limit", text, &throttle).await.unwrap_err();
        let expected = "a whole number from 0 to 18446744073709551615".to_owned();
        assert_eq!(error, UpdateError::NotParseable { value: text.to_owned(), expected });
    }
    assert_eq!(throttle.writes.get(), 0, "such text does not reach the component");

    let error = update("rates/limit", "101", &throttle).await.unwrap_err();
    assert_eq!(error.to_string(), "refused: 101 is more than the line can do");
    assert_eq!((throttle.limit.get(), throttle.writes.get()), (0, 1));
}

#[tokio::test]
async fn of_a_long_value_the_beginning_is_told() {
    let error = update("rates/limit", &"é".repeat(1 << 20), &Throttle::default()).await.unwrap_err();
    assert!(error.to_string().starts_with("\"éé") && error.to_string().len() < 300, "{error}");
}

/// Takes its questions away.
#[derive(Default)]
struct Elsewhere(Vec<Deferred>);

impl InspectMut for Elsewhere {
    fn inspect_mut(&mut self, request: Request<'_>) {
        self.0.push(request.defer());
    }
}

/// What another thread shares with the test.
struct Shared<'a>(&'a AtomicU64);

impl Inspect for Shared<'_> {
    fn inspect(&self, request: Request<'_>) {
        let Self(cell) = self;
        request.respond().writable(
            "limit",
            || cell.load(Ordering::Relaxed),
            |new| {
                cell.store(new, Ordering::Relaxed);
                Ok::<_, String>(new)
            },
        );
    }
}

fn begin(path: &str, text: &str, elsewhere: &mut Elsewhere) -> Update {
    Update::start(path, text, |request| {
        request.respond().field_mut("unit", elsewhere);
    })
}

#[tokio::test]
async fn a_deferred_update_is_made_by_another_thread() {
    static LIMIT: AtomicU64 = AtomicU64::new(0);
    let mut elsewhere = Elsewhere::default();
    let update = begin("unit/inner/limit", "3", &mut elsewhere);
    let outer = elsewhere.0.pop().unwrap();
    let thread = std::thread::spawn(move || {
        // Taken away once more on its way.
        let mut further = Elsewhere::default();
        outer.answer(|request| {
            request.respond().field_mut("inner", &mut further);
        });
        further.0.pop().unwrap().inspect(&Shared(&LIMIT));
    });
    assert_eq!(update.finish(Duration::from_secs(60)).await, Ok(Value::Unsigned(3)));
    assert_eq!(LIMIT.load(Ordering::Relaxed), 3);
    thread.join().unwrap();

    let update = begin("unit/nothing", "4", &mut elsewhere);
    elsewhere.0.pop().unwrap().inspect(&Shared(&LIMIT));
    assert_eq!(update.finish(SOON).await, Err(UpdateError::NotFound));
}

#[tokio::test(start_paused = true)]
async fn a_late_update_is_unanswered_and_changes_nothing() {
    let limit = AtomicU64::new(0);
    let mut elsewhere = Elsewhere::default();
    let update = begin("unit/limit", "3", &mut elsewhere);
    assert!(elsewhere.0[0].is_awaited());
    assert_eq!(update.finish(SOON).await, Err(UpdateError::Unanswered));
    let late = elsewhere.0.pop().unwrap();
    assert!(!late.is_awaited());
    late.inspect(&Shared(&limit));
    assert_eq!(limit.load(Ordering::Relaxed), 0);

    let update = begin("unit/limit", "3", &mut elsewhere);
    elsewhere.0.clear();
    assert_eq!(update.finish(SOON).await, Err(UpdateError::Unanswered), "dropped");
    let update = begin("unit", "3", &mut elsewhere);
    elsewhere.0.pop().unwrap().answer(|request| drop(request));
    assert_eq!(update.finish(SOON).await, Err(UpdateError::Unanswered), "not answered");
}

/// Text as it is shown, and as JSON has it.
fn is_read_back<T: FromText + Clone + PartialEq + std::fmt::Debug>(value: T) -> Result<(), TestCaseError> {
    let shown: Value = value.clone().into();
    prop_assert_eq!(T::from_text(&shown.to_string()), Some(value.clone()));
    if !matches!(shown, Value::Text(_)) {
        prop_assert_eq!(T::from_text(&Node::Value(shown).to_json()), Some(value));
    }
    Ok(())
}

proptest! {
    #[test]
    fn what_a_node_shows_can_be_written_back(
        truth: bool, byte: u8, unsigned: u64, signed: i64, text: String, seconds: u64, nanos in 0..1_000_000_000_u32
    ) {
        is_read_back(truth)?;
        is_read_back(byte)?;
        is_read_back(unsigned)?;
        is_read_back(signed)?;
        is_read_back(text)?;
        is_read_back(Hex(unsigned))?;
        is_read_back(Hex(byte))?;
        is_read_back(Duration::new(seconds, nanos))?;
        is_read_back(Duration::from_nanos(unsigned >> (byte % 64)))?;
    }

    #[test]
    fn no_text_is_too_odd_to_be_looked_at(text: String, number in r"[0-9.+xE]{0,60}(ns|us|ms|s|min|h)?") {
        for text in [&text, &number] {
            if let Some(duration) = Duration::from_text(text) {
                is_read_back(duration)?;
            }
            if let Some(number) = Hex::<u16>::from_text(text) {
                is_read_back(number)?;
            }
        }
    }
}

#[test]
fn durations_have_units_and_nothing_is_rounded() {
    let cases = [
        ("10s", Some(Duration::from_secs(10))),
        ("10", Some(Duration::from_secs(10))),
        ("1.5ms", Some(Duration::from_micros(1_500))),
        ("2min", Some(Duration::from_secs(120))),
        ("0.5h", Some(Duration::from_secs(1_800))),
        ("3us", Some(Duration::from_micros(3))),
        ("18446744073709551615s", Some(Duration::from_secs(u64::MAX))),
        ("18446744073709551616s", None),
        ("1.5ns", None),
        ("", None),
        (".5s", None),
        ("5.s", None),
        ("1.2.3s", None),
        ("-1s", None),
        ("1 s", None),
        ("1S", None),
        ("soon", None),
    ];
    for (text, expected) in cases {
        assert_eq!(Duration::from_text(text), expected, "{text:?}");
    }
    for (text, expected) in
        [("0x1F", Some(Hex(31_u8))), ("31", Some(Hex(31))), ("0x100", None), ("0x+1", None), ("0x", None)]
    {
        assert_eq!(Hex::<u8>::from_text(text), expected, "{text:?}");
    }
}
