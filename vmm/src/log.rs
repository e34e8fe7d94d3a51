//! The log, on standard error.
//!
//! Some of what is worth a line a guest can cause as often as it likes: a queue that it breaks, resets and breaks again. The log is a
//! file on the host. So each line of the program is written so often and no more, and one cannot crowd out the others.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// How often one line of the program is written in one [`SPAN`].
const LINES_MAX: u32 = 100;

/// See [`LINES_MAX`].
const SPAN: Duration = Duration::from_secs(3600);

/// Starts to log what passes `filter`, as `--log` takes it.
///
/// # Errors
///
/// If `filter` is none.
///
/// # Panics
///
/// If it was started before.
pub fn start(filter: &str) -> Result<(), ParseError> {
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_new(filter)?)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .finish()
        .with(Limit::default())
        .init();
    Ok(())
}

/// Lets each line of the program pass so often. What is only logged on request passes always.
#[derive(Debug, Default)]
struct Limit(Mutex<HashMap<Identifier, Span>>);

/// What passed since a moment.
#[derive(Debug)]
struct Span {
    since: Instant,
    count: u32,
}

impl Span {
    /// Counts one more; how many there are now.
    fn count(&mut self, now: Instant) -> u32 {
        if now.duration_since(self.since) >= SPAN {
            *self = Self { since: now, count: 0 };
        }
        self.count = self.count.saturating_add(1);
        self.count
    }
}

impl<S: Subscriber> Layer<S> for Limit {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        if *event.metadata().level() > Level::INFO {
            return true;
        }
        let now = Instant::now();
        let count = {
            let mut spans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            spans.entry(event.metadata().callsite()).or_insert(Span { since: now, count: 0 }).count(now)
        };
        if count == LINES_MAX {
            tracing::warn!(
                "the next line was written {LINES_MAX} times: it is left out for up to {} s",
                SPAN.as_secs()
            );
        }
        count <= LINES_MAX
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::Arc;

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_that_comes_again_and_again_leaves_room_for_others() {
        let written = Written::default();
        let writer = written.clone();
        let log = tracing_subscriber::fmt()
            .with_max_level(Level::DEBUG)
            .with_writer(move || writer.clone())
            .finish()
            .with(Limit::default());
        tracing::subscriber::with_default(log, || {
            for number in 0..10_000 {
                tracing::warn!(number, "the guest broke a virtqueue");
                tracing::debug!("asked for");
            }
            tracing::error!("the machine stopped");
        });
        let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
        let count = |words: &str| text.lines().filter(|line| line.contains(words)).count();
        assert_eq!(count("broke a virtqueue"), LINES_MAX as usize);
        assert_eq!((count("asked for"), count("machine stopped")), (10_000, 1));
    }

    #[test]
    fn it_comes_again_later() {
        let start = Instant::now();
        let mut span = Span { since: start, count: 0 };
        let counted = (0..500).map(|_| span.count(start)).max();
        assert_eq!(counted, Some(500));
        assert_eq!(span.count(start + SPAN - Duration::from_secs(1)), 501);
        assert_eq!(span.count(start + SPAN), 1);
    }
}
