//! Tables for people, JSON for scripts.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

/// Where and how to print.
#[derive(Clone, Copy, Debug)]
pub(super) struct Output {
    json: bool,
}

impl Output {
    pub(super) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether a live line can be redrawn.
    pub(super) fn live(self) -> bool {
        !self.json && io::stderr().is_terminal()
    }

    /// Writes one line in place of the one before, cut to the width of the terminal: a longer one could not be taken back.
    pub(super) fn redraw(self, line: &str) {
        let columns = terminal_columns().unwrap_or(80).saturating_sub(1);
        let line: String = line.chars().take(columns).collect();
        eprint!("\r\x1b[2K{line}");
        let _ = io::stderr().flush();
    }

    /// Prints `value` as JSON, or what `people` makes of it.
    pub(super) fn print<T: Serialize + ?Sized>(self, value: &T, people: impl FnOnce(&T) -> String) -> io::Result<()> {
        let mut text = if self.json { serde_json::to_string_pretty(value)? } else { people(value) };
        if !text.ends_with('\n') {
            text.push('\n');
        }
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }
}

/// Width of the terminal at standard error.
fn terminal_columns() -> Option<usize> {
    nix::ioctl_read_bad!(window_size, libc::TIOCGWINSZ, libc::winsize);
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ fills the structure that it is given, which lives on the stack for the call.
    unsafe { window_size(libc::STDERR_FILENO, &raw mut size) }.ok()?;
    Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
}

/// Lines with aligned columns. The first line is the head.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(|cell| (*cell).to_owned()).collect()] }
    }

    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The table, or `none` if it has no rows.
    pub(super) fn text(&self, none: &str) -> String {
        if self.rows.len() == 1 {
            return format!("{none}\n");
        }
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(cell);
                line.extend(std::iter::repeat_n(' ', width - cell.chars().count() + 2));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// `1.5 GiB`.
pub(super) fn bytes(value: f64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut scaled = value;
    let mut unit = 0;
    while scaled.abs() >= 1024.0 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{scaled:.0} B") } else { format!("{scaled:.1} {}", UNITS[unit]) }
}

/// `850 ms`, `12.3 s`, `4 min 05 s`.
pub(super) fn duration(ms: f64) -> String {
    if ms < 1000.0 {
        format!("{ms:.0} ms")
    } else if ms < 120_000.0 {
        format!("{:.1} s", ms / 1000.0)
    } else {
        let seconds = (ms / 1000.0).round() as u64;
        format!("{} min {:02} s", seconds / 60, seconds % 60)
    }
}

/// `-` for what is not known.
pub(super) fn or_dash(value: Option<String>) -> String {
    value.unwrap_or_else(|| "-".to_owned())
}

/// The word that a value has in JSON.
pub(super) fn word<T: Serialize>(value: T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word.replace('_', " "),
        Ok(other) => other.to_string(),
        Err(_) => "?".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_under_each_other() {
        let mut table = Table::new(&["NAME", "N"]);
        assert_eq!(table.text("none"), "none\n");
        table.row(vec!["längere".into(), "1".into()]);
        assert_eq!(table.text("none"), "NAME     N\nlängere  1\n");
    }

    #[test]
    fn quantities_read_well() {
        assert_eq!(bytes(1536.0 * 1024.0), "1.5 MiB");
        assert_eq!(duration(85.2), "85 ms");
        assert_eq!(duration(245_000.0), "4 min 05 s");
    }
}
