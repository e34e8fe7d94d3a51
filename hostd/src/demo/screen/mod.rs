//! The demo on a terminal: redrawn in place four times a second, or a plain line a second where there is no terminal or
//! `NO_COLOR` is set.

mod line;
mod scene;

use std::io::{IsTerminal, Write};

pub use line::{Line, Style};
pub use scene::{Happening, Scene};

/// Width that the scene is made for.
pub const COLUMNS: usize = 80;

/// Where the scene is shown.
pub struct Screen {
    live: bool,
    drawn: usize,
    told: usize,
    last_plain_second: Option<u64>,
}

impl Screen {
    /// Looks at standard output and at `NO_COLOR`, and draws in place only where that is wanted.
    pub fn new() -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let live = std::io::stdout().is_terminal() && !unwanted && !dumb;
        let mut screen = Self { live, drawn: 0, told: 0, last_plain_second: None };
        if live {
            screen.put("\x1b[?25l");
        }
        screen
    }

    /// Shows the scene as it is now.
    pub fn show(&mut self, scene: &Scene) {
        if self.live { self.redraw(scene) } else { self.log(scene) }
    }

    /// Prints lines below what was drawn.
    pub fn print(&mut self, lines: &[Line]) {
        let columns = self.size().map_or(usize::MAX, |(columns, _)| columns);
        for line in lines.iter().flat_map(|line| line.wrapped(COLUMNS, 11)) {
            let text = if self.live { line.styled(columns.max(COLUMNS)) } else { line.plain() };
            self.put(&format!("{}\n", text.trim_end()));
        }
        self.drawn = 0;
    }

    fn redraw(&mut self, scene: &Scene) {
        let (columns, rows) = self.size().unwrap_or((COLUMNS, 40));
        // One row stays free for the cursor; a taller scene would scroll and could not be redrawn in place.
        let lines = scene.lines(rows.saturating_sub(1));
        let mut output = String::new();
        if self.drawn > 0 {
            output.push_str(&format!("\x1b[{}A", self.drawn));
        }
        let shown = lines.len().min(rows.saturating_sub(1));
        for line in &lines[..shown] {
            output.push_str(&format!("\r{}\x1b[K\n", line.styled(columns)));
        }
        output.push_str("\x1b[J");
        self.drawn = shown;
        self.put(&output);
    }

    fn log(&mut self, scene: &Scene) {
        for happening in &scene.happenings[self.told.min(scene.happenings.len())..] {
            self.put(&format!("{}\n", happening.line().plain().trim()));
        }
        self.told = scene.happenings.len();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few minutes")]
        let second = scene.at_s.max(0.0) as u64;
        if self.last_plain_second != Some(second) {
            self.last_plain_second = Some(second);
            self.put(&format!("{}\n", scene.plain_line()));
        }
    }

    /// Columns and rows of the terminal.
    fn size(&self) -> Option<(usize, usize)> {
        nix::ioctl_read_bad!(window_size, libc::TIOCGWINSZ, libc::winsize);
        if !self.live {
            return None;
        }
        let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: TIOCGWINSZ fills the structure that it is given, which lives on the stack for the call.
        unsafe { window_size(libc::STDOUT_FILENO, &raw mut size) }.ok()?;
        Some((size.ws_col.into(), size.ws_row.into())).filter(|(columns, rows)| *columns > 0 && *rows > 1)
    }

    fn put(&mut self, text: &str) {
        let mut output = std::io::stdout().lock();
        // A reader that has gone away is no reason to leave machines behind.
        let _ = output.write_all(text.as_bytes()).and_then(|()| output.flush());
    }
}

impl Default for Screen {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if self.live {
            self.put("\x1b[0m\x1b[?25h");
        }
    }
}
