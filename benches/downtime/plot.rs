//! The comparison as a picture: for each scenario a bar of ours and one of the peer's, total time and gap.

use std::fmt::Write as _;

/// One pair of bars.
pub struct Pair {
    /// Scenario.
    pub name: String,
    /// Our median.
    pub ours: f64,
    /// The peer's, where it ran.
    pub peer: Option<f64>,
}

/// One panel.
pub struct Panel<'a> {
    /// What is shown, with its unit.
    pub title: &'a str,
    /// From above to below.
    pub pairs: Vec<Pair>,
}

const WIDTH: f64 = 760.0;
const LEFT: f64 = 90.0;
const BAR: f64 = 13.0;
const STEP: f64 = 40.0;
const TITLE: f64 = 34.0;
/// Room for the figure behind the longest bar.
const RIGHT: f64 = 90.0;

/// An SVG with the panels one below the other, each with its own scale, which begins at zero.
pub fn svg(panels: &[Panel<'_>], peer: &str) -> String {
    let height: f64 = panels.iter().map(|panel| TITLE + STEP * panel.pairs.len() as f64).sum::<f64>() + 30.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let mut y = 0.0;
    for panel in panels {
        let values = panel.pairs.iter().flat_map(|pair| [Some(pair.ours), pair.peer]).flatten();
        let most = values.filter(|value| value.is_finite()).fold(f64::MIN_POSITIVE, f64::max);
        let _ = writeln!(out, "<text x=\"8\" y=\"{}\" font-size=\"14\">{}</text>", y + 22.0, panel.title);
        y += TITLE;
        for pair in &panel.pairs {
            let _ = writeln!(out, "<text x=\"8\" y=\"{}\">{}</text>", y + 18.0, pair.name);
            for (row, value, fill) in [(0.0, Some(pair.ours), "#1b6ca8"), (1.0, pair.peer, "#b8b8b8")] {
                let Some(value) = value.filter(|value| value.is_finite()) else { continue };
                let (top, length) = (y + 3.0 + row * (BAR + 1.0), value / most * (WIDTH - LEFT - RIGHT));
                let _ = writeln!(
                    out,
                    "<rect x=\"{LEFT}\" y=\"{top}\" width=\"{length:.1}\" height=\"{BAR}\" fill=\"{fill}\"/>\
                     <text x=\"{:.1}\" y=\"{}\">{value:.1}</text>",
                    LEFT + length + 5.0,
                    top + 11.0
                );
            }
            y += STEP;
        }
    }
    let _ = writeln!(
        out,
        "<text x=\"8\" y=\"{}\"><tspan fill=\"#1b6ca8\">Headroom (mutual TLS 1.3)</tspan>   <tspan fill=\"#888\">{peer}</tspan></text>\n</svg>",
        y + 18.0
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_in_proportion_and_what_is_missing_has_none() {
        let pairs = vec![
            Pair { name: "idle".into(), ours: 50.0, peer: Some(100.0) },
            Pair { name: "disk".into(), ours: 25.0, peer: None },
            Pair { name: "none".into(), ours: f64::NAN, peer: None },
        ];
        let text = svg(&[Panel { title: "total, ms", pairs }], "peer");
        let full = WIDTH - LEFT - RIGHT;
        for part in [1.0, 0.5, 0.25] {
            assert!(text.contains(&format!("width=\"{:.1}\"", full * part)), "{part}: {text}");
        }
        assert_eq!(text.matches("<rect").count(), 4);
        assert!(!text.contains("NaN"));
    }
}
