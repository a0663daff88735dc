//! The commands that look into a guest: inspect, events, graph, timeline; and update, which changes what inspect shows.

mod events;
mod graph;
mod timeline;

use crate::ending::{Outcome, Trouble};
use crate::options::{Change, GraphFormat, Look};
use crate::out::Out;
use guest_client::{Event, Host, Rendering};
use std::path::Path;
use tokio::sync::mpsc;

/// How many events may wait for the standard output.
const EVENTS: usize = 64;

/// Prints a guest's inspection tree, or a part of it.
pub async fn inspect(host: &Host, look: &Look, out: &Out) -> Outcome {
    let control = host.find(&look.id).await?.control;
    let rendering = if look.json { Rendering::Json } else { Rendering::Text };
    let mut tree = control.inspect(&look.path, look.depth, rendering).await?;
    if !tree.ends_with('\n') {
        tree.push('\n');
    }
    out.write(tree.as_bytes())
}

/// Gives a node of a guest's inspection tree a new value, and prints what it then has.
pub async fn update(host: &Host, change: &Change, out: &Out) -> Outcome {
    let control = host.find(&change.id).await?.control;
    let value = control.update(&change.path, &change.value).await?;
    out.write(format!("{value}\n").as_bytes())
}

/// Prints what becomes of a guest, until it has ended.
pub async fn events(host: &Host, id: &str, from: u64, json: bool, out: &Out) -> Outcome {
    let observer = host.find(id).await?.observer;
    let (sender, mut arriving) = mpsc::channel::<Event>(EVENTS);
    let subscription = observer.subscribe(from, sender).await?;
    let mut ended = false;
    while let Some(event) = arriving.recv().await {
        ended = matches!(event.kind, guest_client::EventKind::Terminated(_));
        out.write(if json { events::as_json(&event) } else { events::line(&event) }.as_bytes())?;
    }
    drop(subscription);
    if ended { Ok(()) } else { Err(Trouble::Failed("the guest's VMM is gone".to_owned())) }
}

/// Prints a guest's state units and what depends on what.
pub async fn graph(host: &Host, id: &str, format: GraphFormat, out: &Out) -> Outcome {
    let units = host.find(id).await?.observer.unit_graph().await?;
    let text = match format {
        GraphFormat::Tree => graph::tree(&units),
        GraphFormat::Dot => graph::dot(&units),
        GraphFormat::Svg => graph::svg(&units),
    };
    out.write(text.as_bytes())
}

/// Prints the latest transitions unit by unit, or writes them for a trace viewer.
pub async fn timeline(host: &Host, id: &str, trace: Option<&Path>, out: &Out) -> Outcome {
    let passes = host.find(id).await?.observer.timeline().await?;
    match trace {
        None => out.write(timeline::table(&passes).as_bytes()),
        Some(path) => std::fs::write(path, timeline::trace(&passes))
            .map_err(|error| Trouble::Failed(format!("cannot write {}: {error}", path.display()))),
    }
}
