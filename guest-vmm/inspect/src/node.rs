//! The finished tree and its two renderings.
//!
//! Text is for people: one line per value, children indented. JSON is for programs: objects and scalars; what is not a
//! value is an object with the single key `$state`.

use std::fmt::{self, Write};
use std::time::Duration;

/// One value of a leaf.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// A truth value.
    Bool(bool),
    /// A signed integer.
    Signed(i64),
    /// An unsigned integer.
    Unsigned(u64),
    /// An unsigned integer that people read in hexadecimal: an address, a register, flags.
    Hex(u64),
    /// Text.
    Text(String),
    /// Bytes; rendered as two hexadecimal digits each.
    Bytes(Vec<u8>),
    /// A span of time; rendered in seconds.
    Duration(Duration),
}

/// A node of the finished tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A leaf.
    Value(Value),
    /// Named children, in the order in which the component gave them.
    Children(Vec<(String, Node)>),
    /// There are children, but the depth asked for ends here.
    Unevaluated,
    /// The component took the question away and had not answered by the deadline, or dropped it.
    Unanswered,
    /// The path leads to no node.
    NotFound,
}

impl Node {
    /// The child called `name`, if this node has children and one is called so.
    #[must_use]
    pub fn child(&self, name: &str) -> Option<&Node> {
        let Self::Children(children) = self else { return None };
        children.iter().find(|(found, _)| found == name).map(|(_, node)| node)
    }

    /// This node as compact JSON. Integers are numbers, a duration is a number of seconds, bytes are hexadecimal text.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut out = String::new();
        self.write_json(&mut out).expect("writing to a String does not fail");
        out
    }

    fn write_json(&self, out: &mut String) -> fmt::Result {
        match self {
            Self::Value(value) => value.write_json(out),
            Self::Children(children) => write_json_children(out, children),
            Self::Unevaluated => out.write_str(r#"{"$state":"unevaluated"}"#),
            Self::Unanswered => out.write_str(r#"{"$state":"unanswered"}"#),
            Self::NotFound => out.write_str(r#"{"$state":"not found"}"#),
        }
    }

    fn write_text(&self, f: &mut fmt::Formatter<'_>, indent: usize) -> fmt::Result {
        let Self::Children(children) = self else {
            return writeln!(f, "{}", self.leaf_text());
        };
        for (name, node) in children {
            write!(f, "{:indent$}{name}:", "")?;
            match node {
                Self::Children(inner) if !inner.is_empty() => {
                    f.write_char('\n')?;
                    node.write_text(f, indent + 2)?;
                }
                leaf => writeln!(f, " {}", leaf.leaf_text())?,
            }
        }
        Ok(())
    }

    fn leaf_text(&self) -> String {
        match self {
            Self::Value(value) => value.to_string(),
            Self::Children(_) => "(empty)".to_owned(),
            Self::Unevaluated => "…".to_owned(),
            Self::Unanswered => "(unanswered)".to_owned(),
            Self::NotFound => "(not found)".to_owned(),
        }
    }
}

/// Text for people: `name: value` lines, children indented by two spaces.
impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write_text(f, 0)
    }
}

fn write_json_children(out: &mut String, children: &[(String, Node)]) -> fmt::Result {
    out.write_char('{')?;
    for (index, (name, node)) in children.iter().enumerate() {
        if index > 0 {
            out.write_char(',')?;
        }
        write_json_text(out, name)?;
        out.write_char(':')?;
        node.write_json(out)?;
    }
    out.write_char('}')
}

fn write_json_text(out: &mut String, text: &str) -> fmt::Result {
    out.write_char('"')?;
    for c in text.chars() {
        match c {
            '"' | '\\' => write!(out, "\\{c}")?,
            '\n' => out.write_str("\\n")?,
            c if c.is_control() => write!(out, "\\u{:04x}", u32::from(c))?,
            c => out.write_char(c)?,
        }
    }
    out.write_char('"')
}

impl Value {
    fn write_json(&self, out: &mut String) -> fmt::Result {
        match self {
            Self::Bool(value) => write!(out, "{value}"),
            Self::Signed(value) => write!(out, "{value}"),
            Self::Unsigned(value) | Self::Hex(value) => write!(out, "{value}"),
            Self::Text(text) => write_json_text(out, text),
            Self::Bytes(_) => write!(out, "\"{self}\""),
            Self::Duration(value) => write!(out, "{}.{:09}", value.as_secs(), value.subsec_nanos()),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => write!(f, "{value}"),
            Self::Signed(value) => write!(f, "{value}"),
            Self::Unsigned(value) => write!(f, "{value}"),
            Self::Hex(value) => write!(f, "{value:#x}"),
            Self::Text(text) => f.write_str(text),
            Self::Bytes(bytes) => bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}")),
            Self::Duration(value) => write!(f, "{value:?}"),
        }
    }
}
