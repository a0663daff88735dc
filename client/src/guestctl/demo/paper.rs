//! How the tour is printed: a line per call, with its time and its answer.

use crate::ending::Outcome;
use crate::out::Out;
use guest_client::{ClientError, GuestError};
use std::fmt::Write;
use std::time::{Duration, Instant};

/// How wide the calls are printed.
const CALL: usize = 41;

/// How wide the times are printed.
const TIME: usize = 8;

/// How wide everything is printed.
const LINE: usize = 110;

/// What a call ought to answer, for a guest and a service that work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// It succeeds.
    Ok,
    /// It is refused, or ends, with this.
    Refused(GuestError),
}

#[derive(Clone, Copy)]
enum Colour {
    Bold = 1,
    Dim = 2,
    Red = 31,
    Green = 32,
    Yellow = 33,
}

/// The page that the tour is printed on.
pub struct Paper<'a> {
    out: &'a Out,
    coloured: bool,
    calls: u32,
    surprises: u32,
}

impl<'a> Paper<'a> {
    /// Coloured for a terminal, unless NO_COLOR is set.
    pub fn new(out: &'a Out) -> Self {
        let forbidden = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { out, coloured: out.is_terminal() && !forbidden, calls: 0, surprises: 0 }
    }

    /// How many calls were printed, and how many of them did not answer what they ought to.
    pub fn counts(&self) -> (u32, u32) {
        (self.calls, self.surprises)
    }

    /// A heading.
    pub fn heading(&self, text: &str) -> Outcome {
        self.line(&format!("\n{}", self.paint(Colour::Bold, text)))
    }

    /// An explanation, broken into lines.
    pub fn explain(&self, text: &str) -> Outcome {
        wrapped(text, LINE).iter().try_for_each(|line| self.line(&self.paint(Colour::Dim, line)))
    }

    /// What the guest wrote, or something else that is no call.
    pub fn note(&self, what: &str, text: &str) -> Outcome {
        self.line(&format!("  {what:CALL$} {:>TIME$}  {text}", ""))
    }

    /// Waits for the answer of a call that was made at `sent`, and prints it; `show` puts a success into words.
    pub async fn call<T>(
        &mut self,
        what: &str,
        sent: Instant,
        expected: Expected,
        answer: impl Future<Output = Result<T, ClientError>>,
        show: impl FnOnce(&T) -> String,
    ) -> Outcome<Option<T>> {
        let answer = answer.await;
        let took = sent.elapsed();
        let came = match &answer {
            Ok(_) => Some(Expected::Ok),
            Err(error) => error.failure().map(|failure| Expected::Refused(failure.code)),
        };
        let text = match &answer {
            Ok(value) => show(value),
            Err(ClientError::Refused(failure)) => failure.chain(),
            Err(error) => error.to_string(),
        };
        self.answered(what, took, came == Some(expected), &text)?;
        Ok(answer.ok())
    }

    fn answered(&mut self, what: &str, took: Duration, as_expected: bool, text: &str) -> Outcome {
        self.calls += 1;
        let (colour, text) = match (as_expected, text.starts_with("ok")) {
            (true, true) => (Colour::Green, text.to_owned()),
            (true, false) => (Colour::Yellow, text.to_owned()),
            (false, _) => {
                self.surprises += 1;
                (Colour::Red, format!("UNEXPECTED: {text}"))
            }
        };
        let indent = " ".repeat(2 + CALL + 1 + TIME + 2);
        let lines = wrapped(&text, LINE - indent.len());
        for (index, line) in lines.iter().enumerate() {
            let painted = self.paint(colour, line);
            match index {
                0 => self.line(&format!("  {what:CALL$} {:>TIME$}  {painted}", in_words(took)))?,
                _ => self.line(&format!("{indent}{painted}"))?,
            }
        }
        Ok(())
    }

    fn line(&self, text: &str) -> Outcome {
        self.out.write(format!("{text}\n").as_bytes())
    }

    fn paint(&self, colour: Colour, text: &str) -> String {
        let mut painted = text.to_owned();
        if self.coloured && !text.is_empty() {
            painted.clear();
            write!(painted, "\x1b[{}m{text}\x1b[0m", colour as u8).expect("a string takes everything");
        }
        painted
    }
}

/// A time in the unit that suits it.
pub fn in_words(time: Duration) -> String {
    match time.as_micros() {
        us @ 0..1000 => format!("{us} µs"),
        us @ 1000..10_000_000 => format!("{}.{} ms", us / 1000, us / 100 % 10),
        us => format!("{} s", us / 1_000_000),
    }
}

/// Breaks text at its line ends, and at blanks where it is wider than this; a longer word stays whole.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for paragraph in text.lines() {
        let mut line = String::new();
        for word in paragraph.split_whitespace() {
            if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > width {
                lines.push(std::mem::take(&mut line));
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
        lines.push(line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_broken_at_blanks_and_line_ends() {
        assert_eq!(
            wrapped("one two three\nfour averylongword", 8),
            ["one two", "three", "four", "averylongword"]
        );
    }

    #[test]
    fn times_are_in_the_unit_that_suits_them() {
        let words = [7, 999, 1000, 12_345, 12_000_000].map(|us| in_words(Duration::from_micros(us)));
        assert_eq!(words, ["7 µs", "999 µs", "1.0 ms", "12.3 ms", "12 s"]);
    }
}
