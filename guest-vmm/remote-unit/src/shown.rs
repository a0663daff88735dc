//! What a remote unit shows of itself: JSON, as a part of the inspection tree.

use inspect::{Request, Value};
use serde_json::Value as Json;

/// Text that is no JSON is shown as text.
pub(crate) fn answer(request: Request<'_>, json: &str) {
    match serde_json::from_str(json) {
        Ok(json) => show(request, &json),
        Err(_) => request.value(json.to_owned()),
    }
}

fn show(request: Request<'_>, json: &Json) {
    match json {
        Json::Object(children) => {
            let mut response = request.respond();
            for (name, child) in children {
                response.child(name, |request| show(request, child));
            }
        }
        Json::Array(items) => {
            let mut response = request.respond();
            for (index, item) in items.iter().enumerate() {
                response.child(&index.to_string(), |request| show(request, item));
            }
        }
        scalar => request.value(value(scalar)),
    }
}

fn value(scalar: &Json) -> Value {
    match scalar {
        Json::Bool(value) => Value::Bool(*value),
        Json::String(text) => Value::Text(text.clone()),
        Json::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(value), _) => Value::Unsigned(value),
            (None, Some(value)) => Value::Signed(value),
            (None, None) => Value::Text(number.to_string()),
        },
        other => Value::Text(other.to_string()),
    }
}
