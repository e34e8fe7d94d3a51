//! Lists of what the destination lacks: bitmaps, cut into messages of bounded size.

use super::WireError;
use super::message::{MAX_MISSING_BYTES, Message};
use crate::guest::{BLOCK_BYTES, MachineLayout, PAGE_BYTES};
use crate::page::Bitmap;

const WORD_BYTES: usize = 8;
const WORDS: usize = MAX_MISSING_BYTES / WORD_BYTES;

/// Pages, and blocks of each disk, that are not at the destination, or not as they should be.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct MissingList {
    /// Pages of memory.
    pub pages: Bitmap,
    /// Blocks, by disk.
    pub disks: Vec<Bitmap>,
}

impl MissingList {
    /// Nothing is missing of such a machine.
    pub fn none(layout: &MachineLayout) -> Self {
        let disks = layout.disks.iter().map(|disk| Bitmap::new(disk.blocks()));
        Self { pages: Bitmap::new(layout.pages()), disks: disks.collect() }
    }

    /// How many pages, and blocks of all disks.
    pub fn counts(&self) -> (u64, u64) {
        (self.pages.count(), self.disks.iter().map(Bitmap::count).sum())
    }

    /// Bytes of all that is missing, as whole pages and blocks.
    pub fn bytes(&self) -> u64 {
        let (pages, blocks) = self.counts();
        pages * PAGE_BYTES + blocks * BLOCK_BYTES
    }

    /// Adds what `other` lacks; both describe the same machine.
    pub fn union(&mut self, other: &Self) {
        self.pages.union(&other.pages);
        for (mine, theirs) in self.disks.iter_mut().zip(&other.disks) {
            mine.union(theirs);
        }
    }

    /// Takes out what `other` lacks.
    pub fn subtract(&mut self, other: &Self) {
        self.pages.subtract(&other.pages);
        for (mine, theirs) in self.disks.iter_mut().zip(&other.disks) {
            mine.subtract(theirs);
        }
    }

    /// Whether `other` lacks all of this too.
    pub fn is_subset(&self, other: &Self) -> bool {
        self.pages.is_subset(&other.pages)
            && self.disks.len() == other.disks.len()
            && self.disks.iter().zip(&other.disks).all(|(mine, theirs)| mine.is_subset(theirs))
    }

    /// The list as it travels, [`Message::MissingEnd`] included.
    pub fn messages(&self) -> impl Iterator<Item = Message> {
        let (pages, blocks) = self.counts();
        let disks = (0u16..).zip(&self.disks).flat_map(|(number, bitmap)| pieces(Some(number), bitmap));
        pieces(None, &self.pages).chain(disks).chain([Message::MissingEnd { pages, blocks }])
    }

    /// Takes in one message of a list. True if it was the last one.
    ///
    /// # Errors
    ///
    /// [`WireError`] if it lies outside the machine, is longer than it may be, or the totals do not agree.
    pub fn take(&mut self, message: &Message) -> Result<bool, WireError> {
        match message {
            Message::Missing { disk, first, bits } => {
                let bitmap = match disk {
                    None => Some(&mut self.pages),
                    Some(number) => self.disks.get_mut(usize::from(*number)),
                };
                insert(bitmap, *disk, *first, bits)?;
                Ok(false)
            }
            Message::MissingEnd { pages, blocks } if self.counts() == (*pages, *blocks) => Ok(true),
            Message::MissingEnd { pages, blocks } => {
                let (found_pages, found_blocks) = self.counts();
                let detail =
                    format!("it ends with {pages} pages and {blocks} blocks, and has {found_pages} and {found_blocks}");
                Err(WireError::Malformed { kind: "list of what is missing", detail })
            }
            other => Err(WireError::Unexpected { found: other.name(), expected: "Missing" }),
        }
    }
}

fn pieces(disk: Option<u16>, bitmap: &Bitmap) -> impl Iterator<Item = Message> {
    (0u64..).zip(bitmap.words().chunks(WORDS)).filter_map(move |(index, words)| {
        let start = words.iter().position(|&word| word != 0)?;
        let end = words.iter().rposition(|&word| word != 0)? + 1;
        let bits = words[start..end].iter().flat_map(|word| word.to_le_bytes()).collect();
        Some(Message::Missing { disk, first: (index * WORDS as u64 + start as u64) * 64, bits })
    })
}

fn insert(bitmap: Option<&mut Bitmap>, disk: Option<u16>, first: u64, bits: &[u8]) -> Result<(), WireError> {
    let malformed = |detail: String| WireError::Malformed { kind: "list of what is missing", detail };
    if bits.is_empty()
        || bits.len() > MAX_MISSING_BYTES
        || !bits.len().is_multiple_of(WORD_BYTES)
        || !first.is_multiple_of(64)
    {
        return Err(malformed(format!("{} bytes from bit {first}", bits.len())));
    }
    let what = disk.map_or("pages".to_owned(), |number| format!("blocks of disk {number}"));
    let limit = bitmap.as_ref().map_or(0, |bitmap| bitmap.len());
    let count = bits.len() as u64 * 8;
    let outside = || WireError::OutOfRange { what: what.clone(), first, count, limit };
    let bitmap = bitmap.ok_or_else(outside)?;
    for (word, bytes) in (first / 64..).zip(bits.chunks_exact(WORD_BYTES)) {
        let value = super::u64_at(bytes, 0).unwrap_or_default();
        let left = limit.saturating_sub(word.saturating_mul(64));
        if left < 64 && value >> left != 0 {
            return Err(outside());
        }
        bitmap.insert_word(word, value);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::guest::{DiskLayout, MemoryRegion};

    fn layout(pages: u64, blocks: u64) -> MachineLayout {
        MachineLayout {
            machine: "m".to_owned(),
            vcpus: 1,
            memory: vec![MemoryRegion { gpa: 0, bytes: pages * PAGE_BYTES }],
            disks: vec![DiskLayout { id: "d".to_owned(), bytes: blocks * BLOCK_BYTES, read_only: false }],
            devices: Vec::new(),
            cpu: Default::default(),
        }
    }

    proptest! {
        #[test]
        fn a_list_arrives_as_it_was(pages in 1u64..2_000_000, set in proptest::collection::vec(0u64..2_000_000, 0..60)) {
            let layout = layout(pages, 100);
            let mut list = MissingList::none(&layout);
            for number in set {
                list.pages.insert(number);
                list.disks[0].insert(number);
            }
            let mut arrived = MissingList::none(&layout);
            let messages: Vec<Message> = list.messages().collect();
            for (index, message) in messages.iter().enumerate() {
                let sent = Message::decode(&message.encode().unwrap()).unwrap();
                prop_assert_eq!(arrived.take(&sent).unwrap(), index + 1 == messages.len());
            }
            prop_assert_eq!(arrived, list);
        }

        #[test]
        fn nothing_from_outside_panics(disk in proptest::option::of(0u16..3), first in any::<u64>(), near in 0u64..300, bits in proptest::collection::vec(any::<u8>(), 0..40)) {
            let layout = layout(100, 10);
            for first in [first, near, near * 64, !63] {
                let mut list = MissingList::none(&layout);
                let _ = list.take(&Message::Missing { disk, first, bits: bits.clone() });
                prop_assert!(list.pages.count() <= 100 && list.disks[0].count() <= 10);
            }
        }
    }

    #[test]
    fn bits_past_the_end_and_wrong_totals_are_refused() {
        let mut list = MissingList::none(&layout(100, 10));
        let past = Message::Missing { disk: None, first: 64, bits: (1u64 << 36).to_le_bytes().to_vec() };
        assert!(matches!(list.take(&past), Err(WireError::OutOfRange { limit: 100, .. })));
        let last = Message::Missing { disk: None, first: 64, bits: (1u64 << 35).to_le_bytes().to_vec() };
        assert_eq!(list.take(&last), Ok(false));
        assert!(list.take(&Message::MissingEnd { pages: 2, blocks: 0 }).is_err());
        assert_eq!(list.take(&Message::MissingEnd { pages: 1, blocks: 0 }), Ok(true));
        let none = Message::Missing { disk: Some(7), first: 0, bits: vec![0; 8] };
        assert!(matches!(list.take(&none), Err(WireError::OutOfRange { limit: 0, .. })));
        let long = Message::Missing { disk: None, first: 0, bits: vec![0; MAX_MISSING_BYTES + 8] };
        assert!(matches!(list.take(&long), Err(WireError::Malformed { .. })));
    }
}
