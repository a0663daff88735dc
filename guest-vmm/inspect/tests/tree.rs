//! Trees as they are asked for: by path, by depth, with parts that answer later or never.

use inspect::{Deferred, Hex, Inspect, InspectMut, Inspection, Node, Request, Value, View};
use proptest::prelude::*;
use std::cell::Cell;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(1);

/// Counts how often its parts are computed.
#[derive(Default)]
struct Machine {
    cheap: Cell<u32>,
    dear: Cell<u32>,
}

impl Inspect for Machine {
    fn inspect(&self, request: Request<'_>) {
        request
            .respond()
            .field_with("cheap", || {
                self.cheap.set(self.cheap.get() + 1);
                true
            })
            .child("vps", |request| {
                request.respond().child("0", |request| {
                    self.dear.set(self.dear.get() + 1);
                    request.respond().hex("rip", 0xfff0_u32).field("halted", &false);
                });
            })
            .field("name/with/slashes", "odd");
    }
}

async fn ask(path: &str, depth: usize, component: &impl Inspect) -> Node {
    ask_as(View::Everything, path, depth, component).await
}

async fn ask_as(view: View, path: &str, depth: usize, component: &impl Inspect) -> Node {
    Inspection::start(path, depth, view, |request| component.inspect(request)).finish(SOON).await
}

#[tokio::test]
async fn only_what_is_asked_for_is_computed() {
    let machine = Machine::default();
    let node = ask("", 1, &machine).await;
    assert_eq!(node.child("vps"), Some(&Node::Unevaluated));
    assert_eq!((machine.cheap.get(), machine.dear.get()), (1, 0));

    assert_eq!(ask("", 0, &machine).await, Node::Unevaluated);
    assert_eq!(ask("vps/0/rip", 0, &machine).await, Node::Value(Value::Hex(0xfff0)));
    assert_eq!((machine.cheap.get(), machine.dear.get()), (1, 1));

    let node = ask("/vps/", 9, &machine).await;
    assert_eq!(node.to_string(), "0:\n  rip: 0xfff0\n  halted: false\n");
    assert_eq!(machine.cheap.get(), 1);
}

#[tokio::test]
async fn a_path_that_leads_nowhere_is_not_found() {
    let machine = Machine::default();
    for path in ["vp", "vps/1", "vps/0/rip/low", "cheap/er", "name/with"] {
        assert_eq!(ask(path, 1, &machine).await, Node::NotFound, "{path}");
    }
    assert_eq!(ask("name/with/slashes", 1, &machine).await, Node::Value("odd".into()));
}

#[tokio::test]
async fn values_of_all_kinds_have_a_text_and_a_json_form() {
    struct Kinds;
    impl Inspect for Kinds {
        fn inspect(&self, request: Request<'_>) {
            request
                .respond()
                .field("signed", &-5_i32)
                .field("count", &u64::MAX)
                .field("flags", &Hex(0x10_u8))
                .field("text", "say \"hi\"\n\u{1}\\")
                .child("bytes", |request| request.value(&[0xde_u8, 0x0a][..]))
                .field("time", &Duration::from_micros(1_500))
                .field("none", &None::<bool>)
                .field("list", &vec![1_u8, 2])
                .display("display", &'c')
                .field("unit", &());
        }
    }
    let node = ask("", 3, &Kinds).await;
    let json: serde_json::Value = serde_json::from_str(&node.to_json()).unwrap();
    let expected = serde_json::json!({
        "signed": -5, "count": u64::MAX, "flags": 16, "text": "say \"hi\"\n\u{1}\\", "bytes": "de0a", "time": 0.0015,
        "none": "none", "list": {"0": 1, "1": 2}, "display": "c", "unit": {},
    });
    assert_eq!(json, expected);
    let text = node.to_string();
    for line in ["flags: 0x10", "bytes: de0a", "time: 1.5ms", "list:", "  1: 2", "unit: (empty)"] {
        assert!(text.lines().any(|found| found == line), "{line} is not in {text}");
    }
}

/// Takes its questions away.
struct Elsewhere {
    taken: Vec<Deferred>,
}

impl InspectMut for Elsewhere {
    fn inspect_mut(&mut self, request: Request<'_>) {
        self.taken.push(request.defer());
    }
}

#[tokio::test]
async fn a_deferred_child_is_answered_by_another_thread_and_knows_path_and_depth() {
    let mut elsewhere = Elsewhere { taken: Vec::new() };
    let inspection = Inspection::start("unit/vps", 1, View::Everything, |request| {
        request.respond().field_mut("unit", &mut elsewhere);
    });
    let deferred = elsewhere.taken.pop().unwrap();
    std::thread::spawn(move || deferred.inspect(&Machine::default()));
    let node = inspection.finish(Duration::from_secs(60)).await;
    assert_eq!(node, Node::Children(vec![("0".to_owned(), Node::Unevaluated)]));
}

#[tokio::test(start_paused = true)]
async fn a_late_child_is_unanswered_and_delays_nobody_else() {
    let (mut stuck, mut dropped, mut slow) =
        (Elsewhere { taken: vec![] }, Elsewhere { taken: vec![] }, Elsewhere { taken: vec![] });
    let inspection = Inspection::start("", 2, View::Everything, |request| {
        request
            .respond()
            .field_mut("stuck", &mut stuck)
            .field_mut("dropped", &mut dropped)
            .field_mut("slow", &mut slow);
    });
    dropped.taken.clear();
    tokio::spawn(async move {
        tokio::time::sleep(SOON / 2).await;
        // Answered by a component that takes a part of it away again.
        let mut inner = Elsewhere { taken: vec![] };
        let answer = slow.taken.pop().unwrap();
        answer.answer(|request| {
            request.respond().field("ready", &true).field_mut("inner", &mut inner);
        });
        inner.taken.pop().unwrap().inspect(&7_u8);
    });
    let node = inspection.finish(SOON).await;
    assert_eq!(
        node.to_string(),
        "stuck: (unanswered)\ndropped: (unanswered)\nslow:\n  ready: true\n  inner: 7\n"
    );
    assert_eq!(node.child("stuck").unwrap().to_json(), r#"{"$state":"unanswered"}"#);
    // The question is over: answering it now computes nothing.
    stuck.taken.pop().unwrap().answer(|_| panic!("nobody waits"));
}

/// Counts how often its sensitive parts are computed.
#[derive(Default)]
struct Port {
    computed: Cell<u32>,
}

impl Inspect for Port {
    fn inspect(&self, request: Request<'_>) {
        request
            .respond()
            .field("queued", &3_u8)
            .sensitive(|response| {
                self.computed.set(self.computed.get() + 1);
                response.child("registers", |request| {
                    request.respond().hex("lcr", 0x83_u8);
                });
            })
            .field("running", &true);
    }
}

#[tokio::test]
async fn sensitive_children_exist_only_for_whom_may_see_them() {
    let port = Port::default();
    let node = ask_as(View::WithoutSensitive, "", 9, &port).await;
    assert_eq!(node.to_string(), "queued: 3\nrunning: true\n");
    for path in ["registers", "registers/lcr"] {
        assert_eq!(ask_as(View::WithoutSensitive, path, 9, &port).await, Node::NotFound, "{path}");
    }
    assert_eq!(ask_as(View::WithoutSensitive, "running", 0, &port).await, Node::Value(true.into()));
    assert_eq!(port.computed.get(), 0);

    let node = ask("", 9, &port).await;
    assert_eq!(node.to_string(), "queued: 3\nregisters:\n  lcr: 0x83\nrunning: true\n");
    assert_eq!(ask("registers/lcr", 0, &port).await, Node::Value(Value::Hex(0x83)));
}

#[tokio::test]
async fn a_deferred_request_knows_what_may_be_seen() {
    for (view, expected) in [(View::Everything, 3), (View::WithoutSensitive, 2)] {
        let mut elsewhere = Elsewhere { taken: Vec::new() };
        let inspection = Inspection::start("", 2, view, |request| {
            // Below a child, so that the view has come down the tree before it is taken away.
            request.respond().field_mut("port", &mut elsewhere);
        });
        let deferred = elsewhere.taken.pop().unwrap();
        assert!(deferred.is_awaited());
        deferred.inspect(&Port::default());
        let Some(Node::Children(children)) = inspection.finish(SOON).await.child("port").cloned() else {
            panic!("no children");
        };
        assert_eq!(children.len(), expected, "{view:?}");
    }
}

#[tokio::test]
async fn nobody_awaits_an_answer_after_the_inspection() {
    let mut elsewhere = Elsewhere { taken: Vec::new() };
    let inspection = Inspection::start("", 1, View::Everything, |request| elsewhere.inspect_mut(request));
    assert!(elsewhere.taken[0].is_awaited());
    drop(inspection);
    assert!(!elsewhere.taken[0].is_awaited());
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::Hex),
        any::<String>().prop_map(Value::from),
        any::<Vec<u8>>().prop_map(Value::from),
        (any::<u64>(), 0..1_000_000_000_u32).prop_map(|(s, ns)| Duration::new(s, ns).into()),
    ]
}

fn node() -> impl Strategy<Value = Node> {
    let leaf = prop_oneof![
        6 => value().prop_map(Node::Value),
        1 => Just(Node::Unevaluated),
        1 => Just(Node::Unanswered),
    ];
    leaf.prop_recursive(4, 40, 5, |inner| {
        proptest::collection::vec((any::<String>(), inner), 0..5).prop_map(Node::Children)
    })
}

fn leaves(node: &Node) -> usize {
    match node {
        Node::Children(children) => children.iter().map(|(_, child)| leaves(child)).sum(),
        _ => 1,
    }
}

proptest! {
    #[test]
    fn any_tree_renders_as_valid_json_and_as_a_line_per_leaf(node in node()) {
        prop_assert!(serde_json::from_str::<serde_json::Value>(&node.to_json()).is_ok());
        prop_assert!(node.to_string().lines().count() >= leaves(&node));
    }
}
