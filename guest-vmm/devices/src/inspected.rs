//! Devices as an inspection shows them, for tests.

use inspect::{InspectMut, Inspection, Node, Value, View};
use std::time::Duration;

/// Everything at a path. Devices answer at once.
pub(crate) fn inspected(device: &mut (impl InspectMut + ?Sized), path: &str) -> Node {
    ask(device, path, View::Everything)
}

/// What is shown to those who may not see the guest's own.
pub(crate) fn observed(device: &mut (impl InspectMut + ?Sized)) -> Node {
    ask(device, "", View::WithoutSensitive)
}

fn ask(device: &mut (impl InspectMut + ?Sized), path: &str, view: View) -> Node {
    let inspection = Inspection::start(path, usize::MAX, view, |request| device.inspect_mut(request));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(inspection.finish(Duration::ZERO))
}

/// A node of one register.
pub(crate) fn hex(value: impl Into<u64>) -> Node {
    Node::Value(Value::Hex(value.into()))
}
