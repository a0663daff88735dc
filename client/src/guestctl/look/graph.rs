//! The graph of state units as a text tree, as Graphviz DOT and as an SVG picture.

use guest_client::UnitStatus;
use std::collections::{HashMap, HashSet};
use std::fmt::Write;

/// A tree for people: below each unit the units that it depends on. What nothing depends on stands at the left; what was shown
/// before is not unfolded again.
pub fn tree(units: &[UnitStatus]) -> String {
    let by_name: HashMap<&str, &UnitStatus> = units.iter().map(|unit| (&unit.name[..], unit)).collect();
    let needed: HashSet<&str> = units.iter().flat_map(|unit| &unit.depends_on).map(String::as_str).collect();
    let mut tree = Tree { by_name, shown: HashSet::new(), text: String::new() };
    for unit in units.iter().filter(|unit| !needed.contains(&unit.name[..])) {
        tree.unfold(unit, "", "");
    }
    tree.text
}

struct Tree<'a> {
    by_name: HashMap<&'a str, &'a UnitStatus>,
    shown: HashSet<&'a str>,
    text: String,
}

impl<'a> Tree<'a> {
    fn unfold(&mut self, unit: &'a UnitStatus, branch: &str, indent: &str) {
        let again = !self.shown.insert(&unit.name);
        let more = if again && !unit.depends_on.is_empty() { " …" } else { "" };
        let label = label(unit);
        self.text.push_str(&format!("{branch}{label}{more}\n"));
        if again {
            return;
        }
        let below: Vec<_> =
            unit.depends_on.iter().filter_map(|name| self.by_name.get(&name[..]).copied()).collect();
        for (index, dependency) in below.iter().enumerate() {
            let last = index + 1 == below.len();
            let (fork, rail) = if last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
            self.unfold(dependency, &format!("{indent}{fork}"), &format!("{indent}{rail}"));
        }
    }
}

fn label(unit: &UnitStatus) -> String {
    let waits = match &unit.waits_for[..] {
        [] => String::new(),
        names => format!(", waits for {}", names.join(", ")),
    };
    format!("{} ({}{waits})", unit.name, unit.state)
}

/// Graphviz: an arrow leads from a unit to each that it depends on.
pub fn dot(units: &[UnitStatus]) -> String {
    let mut text = "digraph units {\n    node [shape=box];\n".to_owned();
    for unit in units {
        let name = quoted(&unit.name);
        writes(&mut text, format_args!("    {name} [label={}];\n", quoted(&label(unit))));
        for dependency in &unit.depends_on {
            writes(&mut text, format_args!("    {name} -> {};\n", quoted(dependency)));
        }
    }
    text + "}\n"
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

fn writes(text: &mut String, what: std::fmt::Arguments<'_>) {
    text.write_fmt(what).expect("writing to a String does not fail");
}

const BOX: (usize, usize) = (200, 44);
const GAP: (usize, usize) = (30, 56);
const MARGIN: usize = 20;

/// A picture that a browser shows: a row for each step of dependency, dependants above.
pub fn svg(units: &[UnitStatus]) -> String {
    let rows = rows(units);
    let widest = rows.iter().map(Vec::len).max().unwrap_or(0);
    let (step_x, step_y) = (BOX.0 + GAP.0, BOX.1 + GAP.1);
    let (width, height) = (2 * MARGIN + widest * step_x, 2 * MARGIN + rows.len() * step_y);
    let mut places = HashMap::new();
    for (row, names) in rows.iter().enumerate() {
        let indent = (widest - names.len()) * step_x / 2;
        for (column, name) in names.iter().enumerate() {
            places.insert(*name, (MARGIN + indent + column * step_x, MARGIN + row * step_y));
        }
    }
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <defs><marker id=\"arrow\" viewBox=\"0 0 8 8\" refX=\"8\" refY=\"4\" markerWidth=\"8\" markerHeight=\"8\" orient=\"auto\">\
         <path d=\"M0 0 L8 4 L0 8 z\"/></marker></defs>\n"
    );
    for unit in units {
        let Some(&(x, y)) = places.get(&unit.name[..]) else { continue };
        for &(to_x, to_y) in unit.depends_on.iter().filter_map(|name| places.get(&name[..])) {
            let (from_x, from_y, to_x) = (x + BOX.0 / 2, y + BOX.1, to_x + BOX.0 / 2);
            writes(
                &mut text,
                format_args!(
                    "<line x1=\"{from_x}\" y1=\"{from_y}\" x2=\"{to_x}\" y2=\"{to_y}\" stroke=\"#555\" marker-end=\"url(#arrow)\"/>\n"
                ),
            );
        }
        let (center, name_y, state_y) = (x + BOX.0 / 2, y + 18, y + 35);
        let (w, h, fill) = (BOX.0, BOX.1, fill(&unit.state));
        let (name, state) = (escaped(&unit.name), escaped(&unit.state));
        writes(
            &mut text,
            format_args!(
                "<g><title>{}</title><rect x=\"{x}\" y=\"{y}\" width=\"{w}\" height=\"{h}\" rx=\"6\" fill=\"{fill}\" \
                 stroke=\"#333\"/><text x=\"{center}\" y=\"{name_y}\" text-anchor=\"middle\" font-weight=\"bold\">{name}</text>\
                 <text x=\"{center}\" y=\"{state_y}\" text-anchor=\"middle\">{state}</text></g>\n",
                escaped(&label(unit))
            ),
        );
    }
    text + "</svg>\n"
}

/// Units by the longest way that leads to them from a unit that nothing depends on.
fn rows(units: &[UnitStatus]) -> Vec<Vec<&str>> {
    let mut depth: HashMap<&str, usize> = units.iter().map(|unit| (&unit.name[..], 0)).collect();
    // The graph has no cycles, so no way is longer than there are units.
    for _ in units {
        let mut settled = true;
        for unit in units {
            let below = depth[&unit.name[..]] + 1;
            for name in &unit.depends_on {
                if let Some(depth) = depth.get_mut(&name[..]).filter(|depth| **depth < below) {
                    *depth = below;
                    settled = false;
                }
            }
        }
        if settled {
            break;
        }
    }
    let deepest = depth.values().max().map_or(0, |depth| depth + 1);
    let mut rows = vec![Vec::new(); deepest];
    units.iter().for_each(|unit| rows[depth[&unit.name[..]]].push(&unit.name[..]));
    rows
}

fn fill(state: &str) -> &'static str {
    match state {
        "running" => "#c8e6c9",
        "stopped" => "#eceff1",
        "faulted" => "#ffcdd2",
        _ => "#fff9c4",
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(name: &str, state: &str, depends_on: &[&str]) -> UnitStatus {
        UnitStatus {
            name: name.into(),
            state: state.into(),
            depends_on: depends_on.iter().map(|&name| name.into()).collect(),
            waits_for: Vec::new(),
        }
    }

    fn machine() -> Vec<UnitStatus> {
        let mut vps = unit("vps", "starting", &["serial", "rtc"]);
        vps.waits_for = vec!["serial".into()];
        vec![
            unit("memory", "running", &[]),
            unit("ioapic", "running", &["memory"]),
            unit("serial", "starting", &["ioapic"]),
            unit("rtc", "running", &["ioapic"]),
            vps,
        ]
    }

    #[test]
    fn the_tree_unfolds_each_unit_once() {
        let expected = "\
vps (starting, waits for serial)
├─ serial (starting)
│  └─ ioapic (running)
│     └─ memory (running)
└─ rtc (running)
   └─ ioapic (running) …
";
        assert_eq!(tree(&machine()), expected);
    }

    #[test]
    fn dot_has_each_unit_and_edge() {
        let text = dot(&machine());
        assert!(text.contains("\"vps\" [label=\"vps (starting, waits for serial)\"];"), "{text}");
        assert_eq!(text.matches(" -> ").count(), 5, "{text}");
        assert!(dot(&[unit("a\"b", "stopped", &[])]).contains(r#""a\"b""#));
    }

    #[test]
    fn the_picture_has_dependants_above() {
        assert_eq!(rows(&machine()), [vec!["vps"], vec!["serial", "rtc"], vec!["ioapic"], vec!["memory"]]);
        let text = svg(&machine());
        assert_eq!((text.matches("<rect").count(), text.matches("<line").count()), (5, 5), "{text}");
    }

    #[test]
    fn no_units_are_an_empty_picture() {
        assert_eq!(tree(&[]), "");
        assert!(svg(&[]).starts_with("<svg"));
    }

    #[test]
    fn names_stay_text_in_a_picture() {
        assert!(svg(&[unit("<script>", "stopped", &[])]).contains("&lt;script&gt;"));
    }
}
