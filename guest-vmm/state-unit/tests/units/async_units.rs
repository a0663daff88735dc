//! Units that work through a shared reference: they can be looked at while they move.

use inspect::{Inspect, Inspection, Node, Request, Value, View};
use save_restore::{RestoreError, SaveError, SavedStateBlob};
use state_unit::{
    Operation, SaveSupport, StateTransitionError, StateUnit, StateUnits, TransitionInFlight, UnitError,
    UnitOutcome, run_async_unit,
};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::sync::Notify;

/// Stops slowly: in as many steps as it is told.
#[derive(Default)]
struct Queue {
    drained: AtomicU32,
    drain: Notify,
}

impl Inspect for Queue {
    fn inspect(&self, request: Request<'_>) {
        request.respond().field("drained", &self.drained);
    }
}

impl StateUnit for &Queue {
    async fn start(&mut self) -> Result<(), UnitError> {
        Ok(())
    }

    async fn stop(&mut self) -> Result<(), UnitError> {
        for _ in 0..3 {
            self.drain.notified().await;
            self.drained.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    async fn reset(&mut self) -> Result<(), UnitError> {
        Ok(())
    }

    fn can_save(&mut self) -> SaveSupport {
        SaveSupport::Stateless
    }

    async fn save(&mut self) -> Result<Option<SavedStateBlob>, SaveError> {
        Ok(None)
    }

    async fn restore(&mut self, _: SavedStateBlob) -> Result<(), RestoreError> {
        Err(RestoreError::not_supported("a queue has no state"))
    }
}

async fn drained(units: &StateUnits) -> Node {
    let inspector = units.inspector();
    let inspection = Inspection::start("units/queue/unit/drained", 0, View::Everything, |request| {
        inspector.inspect(request)
    });
    inspection.finish(Duration::from_secs(60)).await
}

#[tokio::test]
async fn inspections_are_answered_while_a_transition_is_in_flight() {
    let units = StateUnits::new();
    let queue = std::sync::Arc::new(Queue::default());
    let shared = queue.clone();
    let unit = units
        .add("queue")
        .spawn(|requests| async move {
            let queue: &Queue = &shared;
            run_by_reference(queue, requests).await;
        })
        .unwrap();
    units.start().await.unwrap();
    let (stopped, ()) = tokio::join!(units.stop(), async {
        for step in 0..3 {
            while drained(&units).await != Node::Value(Value::Unsigned(step)) {
                tokio::task::yield_now().await;
            }
            queue.drain.notify_one();
        }
    });
    stopped.unwrap();
    unit.remove().await.unwrap();
}

async fn run_by_reference(queue: &Queue, mut requests: state_unit::RequestReceiver) {
    while let Some(request) = requests.recv().await {
        request.apply_with_concurrent_inspects(queue, &mut requests).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_second_transition_in_flight_is_refused_and_removal_waits_for_the_first() {
    let units = StateUnits::new();
    let unit = units.add("queue").spawn(|requests| run_async_unit(Queue::default(), requests)).unwrap();
    units.start().await.unwrap();
    let late = units.stop().await.unwrap_err();
    assert_eq!(late.units().unwrap().late.len(), 1);

    let busy = units.stop().await.unwrap_err();
    let StateTransitionError::Units(failures) = busy else { panic!("{busy}") };
    assert_eq!(
        failures.failed[0].to_string(),
        "queue failed: an earlier transition of the unit is still in flight"
    );
    let cause = failures.failed[0].cause.as_deref().unwrap();
    assert_eq!(cause.downcast_ref(), Some(&TransitionInFlight));
    // Removal ends the channel; the unit comes back only once it has drained, which it never does here.
    let removed = unit.remove();
    tokio::pin!(removed);
    assert!(futures::poll!(&mut removed).is_pending());
}

#[tokio::test]
async fn a_unit_without_a_post_restore_is_restored_and_given_back_when_it_is_removed() {
    let units = StateUnits::new();
    let queue = Queue::default();
    queue.drained.store(7, Ordering::Relaxed);
    let unit = units.add("queue").spawn(|requests| run_async_unit(queue, requests)).unwrap();
    assert_eq!(units.save().await.unwrap(), []);
    units.restore(Vec::new()).await.unwrap();
    let told = units.timeline().pop().unwrap();
    assert_eq!((told.operation, &told.units[0].outcome), (Operation::PostRestore, &UnitOutcome::Done));
    assert_eq!(unit.remove().await.unwrap().drained.into_inner(), 7);
}
