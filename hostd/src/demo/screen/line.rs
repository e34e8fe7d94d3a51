//! Lines of styled text that know how wide they are.

use std::fmt::Write;

/// How a piece of text looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// As the terminal does.
    Plain,
    /// Less important.
    Dim,
    /// A heading.
    Bold,
    /// All is well.
    Good,
    /// Attention.
    Warn,
    /// Trouble.
    Bad,
    /// Progress.
    Accent,
}

impl Style {
    /// Parameters of the SGR sequence (ECMA-48).
    fn code(self) -> &'static str {
        match self {
            Self::Plain => "0",
            Self::Dim => "2",
            Self::Bold => "1",
            Self::Good => "32",
            Self::Warn => "33",
            Self::Bad => "1;31",
            Self::Accent => "36",
        }
    }
}

/// One line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Line(Vec<(Style, String)>);

impl Line {
    /// An empty line.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds text.
    #[must_use]
    pub fn add(mut self, style: Style, text: impl Into<String>) -> Self {
        self.0.push((style, text.into()));
        self
    }

    /// Adds unstyled text.
    #[must_use]
    pub fn text(self, text: impl Into<String>) -> Self {
        self.add(Style::Plain, text)
    }

    /// Adds a bar of `width` columns, filled to `share` of it, with a mark at `mark` of it.
    #[must_use]
    pub fn bar(self, width: usize, share: f64, mark: Option<f64>) -> Self {
        let style = if share >= 1.0 {
            Style::Bad
        } else if share >= 0.85 {
            Style::Warn
        } else {
            Style::Good
        };
        let cells = columns(width, share);
        let mark = mark.map(|mark| columns(width, mark).min(width.saturating_sub(1)));
        let mut line = self;
        for cell in 0..width {
            line = match (Some(cell) == mark, cell < cells) {
                (true, _) => line.add(Style::Warn, "▒"),
                (_, true) => line.add(style, "█"),
                _ => line.add(Style::Dim, "░"),
            };
        }
        line
    }

    /// Broken at spaces into lines of at most `columns`, all but the first indented.
    pub fn wrapped(&self, columns: usize, indent: usize) -> Vec<Self> {
        let mut lines = vec![Self::new()];
        for (style, text) in &self.0 {
            for word in text.split_inclusive(' ') {
                let width = lines.last().map_or(0, Self::width);
                if width > indent && width + word.trim_end().chars().count() > columns {
                    lines.push(Self::new().text(" ".repeat(indent)));
                }
                if let Some(line) = lines.last_mut() {
                    line.0.push((*style, word.to_owned()));
                }
            }
        }
        lines
    }

    /// Columns that it takes; every character that is used here takes one.
    pub fn width(&self) -> usize {
        self.0.iter().map(|(_, text)| text.chars().count()).sum()
    }

    /// Without styles.
    pub fn plain(&self) -> String {
        self.0.iter().map(|(_, text)| text.as_str()).collect()
    }

    /// With escape sequences, at most `columns` wide.
    pub fn styled(&self, columns: usize) -> String {
        let mut output = String::new();
        let mut left = columns;
        let mut current = Style::Plain;
        for (style, text) in &self.0 {
            let text: String = text.chars().take(left).collect();
            if text.is_empty() {
                continue;
            }
            left -= text.chars().count();
            if *style != current {
                // Writing to a string cannot fail. The leading 0 ends the style before.
                let _ = write!(output, "\x1b[0;{}m", style.code());
                current = *style;
            }
            output.push_str(&text);
        }
        if current != Style::Plain {
            output.push_str("\x1b[0m");
        }
        output
    }
}

fn columns(width: usize, share: f64) -> usize {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 0..=width")]
    let cells = (share.clamp(0.0, 1.0) * width as f64).round() as usize;
    cells
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn styled_text_is_cut_by_what_is_seen_and_not_by_its_bytes() {
        let line = Line::new().add(Style::Good, "██████").text("abc");
        assert_eq!(line.width(), 9);
        assert_eq!(line.styled(7), "\x1b[0;32m██████\x1b[0;0ma");
        assert_eq!(line.plain(), "██████abc");
    }

    #[test]
    fn long_lines_are_broken_at_spaces_and_keep_their_styles() {
        let line = Line::new().add(Style::Bad, " BROKEN ").text("one two three four");
        let lines = line.wrapped(15, 3);
        let plain: Vec<String> = lines.iter().map(Line::plain).collect();
        assert_eq!(plain, [" BROKEN one two ", "   three four"]);
        assert!(lines[0].styled(80).starts_with("\x1b[0;1;31m BROKEN "));
        assert_eq!(Line::new().text("short").wrapped(15, 3), vec![Line::new().text("short")]);
    }

    #[test]
    fn bars_fill_and_mark() {
        assert_eq!(Line::new().bar(10, 0.3, Some(0.8)).plain(), "███░░░░░▒░");
        assert_eq!(Line::new().bar(4, 7.0, Some(7.0)).plain(), "███▒");
        assert_eq!(Line::new().bar(4, -1.0, None).plain(), "░░░░");
        assert_eq!(Line::new().bar(0, 0.5, Some(0.5)).plain(), "");
    }
}
