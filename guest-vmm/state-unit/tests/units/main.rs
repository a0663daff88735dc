//! Tests over the public interface of the crate.

mod async_units;
mod random_graphs;
mod spans;
mod stories;
mod support;
