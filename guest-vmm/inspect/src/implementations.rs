//! `Inspect` for plain values and the usual containers, and the conversions into [`Value`].

use crate::{Inspect, Request, Value};
use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// An unsigned integer that is shown in hexadecimal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hex<T>(pub T);

impl<T: Into<u64>> From<Hex<T>> for Value {
    fn from(hex: Hex<T>) -> Self {
        Self::Hex(hex.0.into())
    }
}

impl<T: Into<u64> + Copy> Inspect for Hex<T> {
    fn inspect(&self, request: Request<'_>) {
        request.value(*self);
    }
}

macro_rules! inspect_as_value {
    ($($from:ty => |$value:ident| $into:expr;)*) => {$(
        impl From<$from> for Value {
            fn from($value: $from) -> Self {
                $into
            }
        }

        impl Inspect for $from {
            fn inspect(&self, request: Request<'_>) {
                request.value(self.clone());
            }
        }
    )*};
}

inspect_as_value! {
    bool => |value| Self::Bool(value);
    u8 => |value| Self::Unsigned(value.into());
    u16 => |value| Self::Unsigned(value.into());
    u32 => |value| Self::Unsigned(value.into());
    u64 => |value| Self::Unsigned(value);
    usize => |value| Self::Unsigned(value as u64);
    i8 => |value| Self::Signed(value.into());
    i16 => |value| Self::Signed(value.into());
    i32 => |value| Self::Signed(value.into());
    i64 => |value| Self::Signed(value);
    String => |value| Self::Text(value);
    Duration => |value| Self::Duration(value);
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<Cow<'_, str>> for Value {
    fn from(text: Cow<'_, str>) -> Self {
        Self::Text(text.into_owned())
    }
}

impl From<&[u8]> for Value {
    fn from(bytes: &[u8]) -> Self {
        Self::Bytes(bytes.to_vec())
    }
}

impl From<Vec<u8>> for Value {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes)
    }
}

impl Inspect for str {
    fn inspect(&self, request: Request<'_>) {
        request.value(self);
    }
}

macro_rules! inspect_atomic {
    ($($atomic:ty)*) => {$(
        /// Shows the value at this moment.
        impl Inspect for $atomic {
            fn inspect(&self, request: Request<'_>) {
                request.value(self.load(Ordering::Relaxed));
            }
        }
    )*};
}

inspect_atomic! { AtomicBool AtomicU32 AtomicU64 AtomicUsize }

/// Shows what it points to.
impl<T: Inspect + ?Sized> Inspect for &T {
    fn inspect(&self, request: Request<'_>) {
        (**self).inspect(request);
    }
}

/// Shows what it points to.
impl<T: Inspect + ?Sized> Inspect for Box<T> {
    fn inspect(&self, request: Request<'_>) {
        (**self).inspect(request);
    }
}

/// Shows what it points to.
impl<T: Inspect + ?Sized> Inspect for Arc<T> {
    fn inspect(&self, request: Request<'_>) {
        (**self).inspect(request);
    }
}

/// Shows the value, or the text `none`.
impl<T: Inspect> Inspect for Option<T> {
    fn inspect(&self, request: Request<'_>) {
        match self {
            Some(value) => value.inspect(request),
            None => request.value("none"),
        }
    }
}

/// Shows the elements as children called by their index.
impl<T: Inspect> Inspect for [T] {
    fn inspect(&self, request: Request<'_>) {
        let mut response = request.respond();
        for (index, element) in self.iter().enumerate() {
            response.field(&index.to_string(), element);
        }
    }
}

/// Shows the elements as children called by their index.
impl<T: Inspect> Inspect for Vec<T> {
    fn inspect(&self, request: Request<'_>) {
        self.as_slice().inspect(request);
    }
}

/// Nothing to show: a node without children.
impl Inspect for () {
    fn inspect(&self, request: Request<'_>) {
        request.respond();
    }
}
