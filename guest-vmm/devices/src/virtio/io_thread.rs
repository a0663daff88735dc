//! The thread on which the devices' workers run.

use futures::future::LocalBoxFuture;
use std::io;
use std::thread::JoinHandle;
use tokio::sync::mpsc;
use tokio::task::{LocalSet, spawn_local};

type Job = Box<dyn FnOnce() -> LocalBoxFuture<'static, ()> + Send>;

/// Runs tasks on a thread of its own, with a runtime that has I/O and time. Ends what still runs there when it is dropped, and
/// waits for that.
#[derive(Debug)]
pub struct IoThread {
    /// None only while dropping.
    jobs: Option<mpsc::UnboundedSender<Job>>,
    thread: Option<JoinHandle<()>>,
}

/// Gives work to an [`IoThread`], which it does not keep.
#[derive(Debug, Clone)]
pub struct IoHandle(mpsc::WeakUnboundedSender<Job>);

impl IoThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// If the host has no thread, or no descriptors for its runtime.
    pub fn start() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (jobs, mut incoming) = mpsc::unbounded_channel::<Job>();
        let run = move || {
            LocalSet::new().block_on(&runtime, async move {
                while let Some(job) = incoming.recv().await {
                    spawn_local(job());
                }
            });
        };
        let thread = std::thread::Builder::new().name("io".into()).spawn(run)?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Something that gives it work.
    pub fn handle(&self) -> IoHandle {
        IoHandle(self.jobs.as_ref().expect("only dropping takes it").downgrade())
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the I/O thread panicked");
        }
    }
}

impl IoHandle {
    /// Runs the future that `make` makes, on the thread. Without the thread it is dropped.
    pub fn spawn<F: Future<Output = ()> + 'static>(&self, make: impl FnOnce() -> F + Send + 'static) {
        if let Some(jobs) = self.0.upgrade() {
            let _ = jobs.send(Box::new(move || Box::pin(make())));
        }
    }
}
