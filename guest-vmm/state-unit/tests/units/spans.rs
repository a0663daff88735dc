//! What somebody who listens with `tracing` learns of a transition.

use crate::support::{Machine, Script};
use std::collections::HashMap;
use std::fmt::Debug;
use std::future::Future;
use std::sync::{Arc, Mutex, Once};
use tokio::sync::Notify;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Instrument, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

/// One span that was opened, with the latest value of each field.
#[derive(Debug, Clone, Default)]
struct Seen {
    name: &'static str,
    parent: Option<u64>,
    fields: HashMap<&'static str, String>,
    closed: bool,
}

impl Visit for Seen {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.fields.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields.insert(field.name(), value.to_owned());
    }
}

/// Spans by id, ids in the order in which they were opened, and events with the spans that they happened in.
#[derive(Debug, Default)]
struct Notes {
    spans: HashMap<u64, Seen>,
    opened: Vec<u64>,
    events: Vec<(String, Vec<u64>)>,
}

#[derive(Debug, Clone, Default)]
struct Listener(Arc<Mutex<Notes>>);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Listener {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let parent = context.span(id).and_then(|span| span.parent()).map(|parent| parent.id().into_u64());
        let mut seen = Seen { name: attributes.metadata().name(), parent, ..Seen::default() };
        attributes.record(&mut seen);
        let mut notes = self.0.lock().unwrap();
        notes.opened.push(id.into_u64());
        let former = notes.spans.insert(id.into_u64(), seen);
        assert!(former.is_none(), "ids are not used again in so few spans");
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, _: Context<'_, S>) {
        values.record(self.0.lock().unwrap().spans.get_mut(&id.into_u64()).unwrap());
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut said = Seen::default();
        event.record(&mut said);
        let scope = context.event_scope(event).into_iter().flatten().map(|span| span.id().into_u64());
        let message = said.fields.remove("message").unwrap_or_default();
        self.0.lock().unwrap().events.push((message, scope.collect()));
    }

    fn on_close(&self, id: Id, _: Context<'_, S>) {
        self.0.lock().unwrap().spans.get_mut(&id.into_u64()).unwrap().closed = true;
    }
}

impl Listener {
    /// Runs `story` with this as the only listener of the thread.
    fn during<T>(&self, story: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        // Otherwise a test on another thread, where nobody listens, may turn a span off for all of them.
        static EVERYWHERE: Once = Once::new();
        EVERYWHERE
            .call_once(|| tracing::subscriber::set_global_default(tracing_subscriber::registry()).unwrap());
        let subscriber = tracing_subscriber::registry().with(self.clone());
        tracing::subscriber::with_default(subscriber, || runtime.unwrap().block_on(story))
    }

    fn spans(&self, name: &str) -> Vec<Seen> {
        let notes = self.0.lock().unwrap();
        let spans = notes.opened.iter().map(|id| notes.spans[id].clone());
        spans.filter(|span| span.name == name).collect()
    }

    /// `unit operation outcome` of the units' spans, in the order in which they were opened.
    fn units(&self) -> Vec<String> {
        let text = |span: &Seen, field| span.fields.get(field).cloned().unwrap_or_else(|| "-".to_owned());
        let line = |span: &Seen| ["unit", "operation", "outcome"].map(|field| text(span, field)).join(" ");
        self.spans("unit").iter().map(line).collect()
    }
}

#[test]
fn a_transition_is_a_span_and_each_units_part_a_child_of_it() {
    let listener = Listener::default();
    listener.during(async {
        let machine = Machine::new();
        let memory = machine.add(machine.unit("memory"), &[]);
        let disk = machine.add(machine.unit("disk").on("start", Script::Fail("no image")), &[&memory]);
        let _vps = machine.add(machine.unit("vps"), &[&disk]);
        let asked_in = tracing::info_span!("caller");
        machine.units.start().instrument(asked_in).await.unwrap_err();
        assert_eq!(machine.units.timeline().len(), 2);
        assert!(listener.spans("transition")[0].closed, "the timeline does not keep it open");
    });
    assert_eq!(
        listener.units(),
        ["memory start done", "disk start failed", "vps start skipped", "memory stop done"]
    );
    let notes = listener.0.lock().unwrap();
    let transition = notes.spans.iter().find(|(_, span)| span.name == "transition");
    let (id, transition) = transition.expect("there is one");
    assert_eq!(notes.spans[&transition.parent.unwrap()].name, "caller");
    assert_eq!((&*transition.fields["operation"], &*transition.fields["outcome"]), ("start", "failed"));
    assert!(transition.fields["error"].contains("disk failed: no image"), "{transition:?}");
    for span in notes.spans.values() {
        assert!(span.closed, "{span:?}");
        if span.name == "unit" {
            assert_eq!(span.parent, Some(*id));
        }
    }
}

#[test]
fn a_units_span_tells_what_the_timeline_tells() {
    let listener = Listener::default();
    let record = listener.during(async {
        let machine = Machine::new();
        let memory = machine.add(machine.unit("memory"), &[]);
        let disk = machine.add(machine.unit("disk").on("reset", Script::Fail("no")), &[&memory]);
        let _vps = machine.add(machine.unit("vps"), &[&disk]);
        machine.units.reset().await.unwrap_err();
        machine.units.timeline().remove(0)
    });
    let spans = listener.spans("unit");
    assert_eq!(record.units.len(), spans.len());
    for (unit, span) in record.units.iter().zip(&spans) {
        assert_eq!(span.fields["unit"], *unit.name);
        let moments = [("ready_us", unit.ready), ("begun_us", unit.begun), ("ended_us", unit.ended)];
        for (field, moment) in moments {
            let expected = moment.map(|moment| moment.as_micros().to_string());
            assert_eq!(span.fields.get(field), expected.as_ref(), "{field} of {}", unit.name);
        }
    }
    assert_eq!(spans[1].fields["error"], "no");
    assert_eq!(spans[2].fields.get("ready_us"), None, "passed over");
}

#[test]
fn what_a_unit_logs_carries_its_name() {
    let listener = Listener::default();
    listener.during(async {
        let machine = Machine::new();
        let memory = machine.add(machine.unit("memory"), &[]);
        let _disk = machine.add(machine.unit("disk").on("start", Script::Panic), &[&memory]);
        machine.units.start().await.unwrap_err();
    });
    let notes = listener.0.lock().unwrap();
    let said: Vec<String> = (notes.events.iter())
        .map(|(message, scope)| {
            let scope = scope.iter().map(|id| notes.spans[id].fields.get("unit").map_or("-", |name| name));
            format!("{message} in {}", scope.collect::<Vec<_>>().join(" in "))
        })
        .collect();
    assert_eq!(
        said,
        [
            "memory does start in memory in -",
            "disk does start in disk in -",
            "memory does stop in memory in -"
        ]
    );
}

#[test]
fn a_late_units_span_is_open_until_it_answers_and_a_removed_ones_says_so() {
    let listener = Listener::default();
    listener.during(async {
        let machine = Machine::new();
        let gate = Arc::new(Notify::new());
        let late = machine.add(machine.unit("late").on("reset", Script::WaitFor(gate.clone())), &[]);
        let removed = machine.add(machine.unit("removed").on("reset", Script::Hang), &[]);
        let waiting = machine.add(machine.unit("waiting"), &[&late]);
        let _skipped = machine.add(machine.unit("skipped"), &[&late]);
        let reset = machine.units.reset();
        tokio::pin!(reset);
        while machine.happened().is_empty() {
            assert!(futures::poll!(&mut reset).is_pending());
            tokio::task::yield_now().await;
        }
        drop((removed, waiting));
        reset.await.unwrap_err();
        let open: Vec<_> = listener.spans("unit").into_iter().filter(|span| !span.closed).collect();
        assert_eq!(open.iter().map(|span| &*span.fields["unit"]).collect::<Vec<_>>(), ["late", "removed"]);
        gate.notify_one();
        drop(late.remove().await.unwrap());
    });
    let mut units = listener.units();
    units.sort_unstable();
    let expected =
        ["late reset late", "removed reset removed", "skipped reset skipped", "waiting reset removed"];
    assert_eq!(units, expected);
    assert!(listener.spans("unit").iter().all(|span| span.closed));
}
