//! Which pages are in a layer: the part `pages`.

use crate::PAGE;
use crate::error::OpenError;
use guest_saved_state::machine::snapshot_file::LayerPages;
use std::ops::Range;

const PART: &str = "pages";

/// The message for these ranges of bytes: whole pages, ascending, none touching the next.
pub(crate) fn encode(ranges: &[Range<u64>]) -> LayerPages {
    let mut at = 0;
    let mut runs = Vec::with_capacity(ranges.len() * 2);
    for range in ranges {
        runs.extend([(range.start - at) / PAGE, (range.end - range.start) / PAGE]);
        at = range.end;
    }
    LayerPages { runs }
}

/// The ranges of bytes, within `bytes`.
pub(crate) fn decode(pages: &LayerPages, bytes: u64) -> Result<Vec<Range<u64>>, OpenError> {
    let bad = |index: usize, problem: String| OpenError::field(PART, format!("runs[{index}]"), problem);
    let mut ranges = Vec::with_capacity(pages.runs.len() / 2);
    let mut at = 0u64;
    for (index, run) in pages.runs.chunks(2).enumerate() {
        let index = index * 2;
        let &[gap, count] = run else {
            return Err(bad(index, "it is the last, and says how many pages are as the base's".into()));
        };
        if gap == 0 && index != 0 || count == 0 {
            return Err(bad(index, format!("{gap} and {count}: a run is of no pages")));
        }
        let end =
            |from: u64, pages: u64| from.checked_add(pages.checked_mul(PAGE)?).filter(|end| *end <= bytes);
        let range = end(at, gap).and_then(|start| Some(start..end(start, count)?));
        let range =
            range.ok_or_else(|| bad(index, format!("{gap} and {count} lie behind the memory's end")))?;
        at = range.end;
        ranges.push(range);
    }
    Ok(ranges)
}
