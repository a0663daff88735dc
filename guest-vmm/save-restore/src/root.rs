//! Messages that can be the whole saved state of a component.

/// A message that can be the whole saved state of a component: a protobuf message with a full name.
///
/// The package is part of that name, and so of the format. The trait is never implemented by hand, so that name and message
/// cannot come apart: the code generated from `.proto` files has it, and [`saved_state_root!`](crate::saved_state_root) gives
/// it to a message that is no part of a schema, such as a test's.
pub trait SavedStateRoot: prost::Message + prost::Name + Default {}

/// Makes a message type that is declared in Rust a [`SavedStateRoot`]: its full name is the package, a dot, and the type's
/// own name.
///
/// ```
/// use save_restore::{SavedStateBlob, saved_state_root};
///
/// #[derive(Clone, PartialEq, prost::Message)]
/// struct CounterState {
///     #[prost(uint32, tag = "1")]
///     count: u32,
/// }
///
/// saved_state_root!(CounterState, package = "example");
///
/// assert_eq!(SavedStateBlob::new(&CounterState { count: 7 }).type_name(), "example.CounterState");
/// ```
#[macro_export]
macro_rules! saved_state_root {
    ($message:ident, package = $package:literal) => {
        impl ::prost::Name for $message {
            const NAME: &'static str = ::core::stringify!($message);
            const PACKAGE: &'static str = $package;
        }

        impl $crate::SavedStateRoot for $message {}
    };
}

/// The saved state of a component that has none.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct NoSavedState {}

saved_state_root!(NoSavedState, package = "save_restore");
