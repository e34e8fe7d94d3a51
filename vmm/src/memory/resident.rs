//! How much memory is in use, split into guest RAM and the rest of the process.

use std::ops::Range;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::{Memory, lock};

/// An answer is given again for so many times as long as it took to find: whoever asks often costs a hundredth of a core.
const REUSE: u32 = 100;

/// Resident memory of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Guest RAM that has a page of its own, in bytes. The shared page of zeroes, which a guest sees where it has only read,
    /// does not count.
    pub ram_bytes: u64,
    /// Everything else: program, heap, stacks.
    pub other_bytes: u64,
}

impl Usage {
    /// Now, with the RAM of `memory` told apart if there is any. All zeroes where `/proc` is not mounted.
    ///
    /// The kernel walks the page tables for this: nothing for huge pages, some milliseconds for each GiB of small ones.
    pub fn now(memory: Option<&Memory>) -> Self {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
        let ram: Vec<Range<usize>> =
            memory.iter().flat_map(|memory| memory.mapped()).map(|(start, bytes)| start..start + bytes).collect();
        Self::parse(&maps, &ram)
    }

    /// From the text of `smaps` (proc_pid_smaps(5)): a line `start-end access ...` for each mapping, then its counters.
    fn parse(maps: &str, ram: &[Range<usize>]) -> Self {
        let (mut usage, mut inside) = (Self::default(), false);
        for line in maps.lines() {
            if let Some(kib) = line.strip_prefix("Rss:") {
                let bytes = kib.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap_or(0) << 10;
                *(if inside { &mut usage.ram_bytes } else { &mut usage.other_bytes }) += bytes;
            } else if let Some(start) = start_of_mapping(line) {
                inside = ram.iter().any(|range| range.contains(&start));
            }
        }
        usage
    }
}

fn start_of_mapping(line: &str) -> Option<usize> {
    let (start, rest) = line.split_once('-')?;
    rest.contains(' ').then(|| usize::from_str_radix(start, 16).ok()).flatten()
}

/// The last answer of [`Memory::usage`].
#[derive(Debug, Default)]
pub(super) struct LastUsage(Mutex<Option<(Instant, Duration, Usage)>>);

impl Memory {
    /// Resident memory of this process. On machines with much memory in small pages some seconds old.
    pub fn usage(&self) -> Usage {
        let mut last = lock(&self.last_usage.0);
        match *last {
            Some((at, cost, usage)) if at.elapsed() < cost * REUSE => usage,
            _ => {
                let start = Instant::now();
                let usage = Usage::now(Some(self));
                *last = Some((Instant::now(), start.elapsed(), usage));
                usage
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use migration::guest::PAGE_BYTES;

    use super::*;

    #[test]
    fn ram_is_told_apart_from_the_rest() {
        let text = "55aa00000000-55aa00100000 r-xp 00000000 fe:00 12 /usr/bin/x-y\nSize: 1024 kB\nRss:  100 kB\n\
                    7f0000200000-7f0000400000 rw-p 00000000 00:00 0 \nRss:   40 kB\nSwap: 0 kB\n\
                    7f0000400000-7f0000600000 rw-p 00000000 00:00 0 \nRss:    8 kB\n\
                    7f0000600000-7f0000700000 rw-p 00000000 00:00 0 \nRss:    4 kB\n";
        let usage = Usage::parse(text, &[0x7f00_0020_0000..0x7f00_0040_0000, 0x7f00_0040_0000..0x7f00_0060_0000]);
        assert_eq!(usage, Usage { ram_bytes: 48 << 10, other_bytes: 104 << 10 });
        assert_eq!(Usage::parse("garbage - x\nRss: many kB\n", &[]), Usage::default());
    }

    #[test]
    fn a_page_that_was_only_read_takes_no_memory() {
        let memory = Memory::new(16).unwrap();
        let mut buffer = vec![1; 64 * PAGE_BYTES as usize];
        memory.read_pages(512, &mut buffer).unwrap();
        assert_eq!(Usage::now(Some(&memory)).ram_bytes, 0);
        memory.write_pages(600, &buffer).unwrap();
        let usage = Usage::now(Some(&memory));
        assert!((64 * PAGE_BYTES..=2 << 20).contains(&usage.ram_bytes) && usage.other_bytes > 0, "{usage:?}");
    }
}
