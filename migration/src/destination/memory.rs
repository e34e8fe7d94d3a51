//! One memory channel at the destination.

use std::ops::Range;

use super::arrivals::{Arrivals, check_totals};
use super::context::by_peer;
use crate::control::Control;
use crate::error::{Doing, MigrationError};
use crate::guest::{DestinationGuest, MachineLayout, PAGE_BYTES};
use crate::page::{Bitmap, delta};
use crate::transport::channels::{Channel, Incoming, PageSink};
use crate::urgency::Turns;
use crate::wire::WireError;
use crate::wire::message::{Message, Totals};

/// Stores pages and counts them.
struct Store<'a> {
    guest: &'a dyn DestinationGuest,
    control: &'a Control,
    arrived: Bitmap,
    totals: Totals,
    /// Pages that differences are applied to.
    held: Vec<u8>,
}

impl PageSink for Store<'_> {
    type Error = MigrationError;

    fn announce(&mut self, pages: Range<u64>) {
        // One page is as quick by its fault; and what arrives again has its memory.
        if pages.end - pages.start > 1 && !self.arrived.contains(pages.start) {
            self.guest.prepare_pages(pages);
        }
    }

    fn store(&mut self, first: u64, data: &[u8]) -> Result<(), MigrationError> {
        self.guest.write_pages(first, data).doing("storing pages")?;
        let count = data.len() as u64 / PAGE_BYTES;
        self.arrived.insert_range(first..first + count);
        self.totals.data += count;
        Ok(())
    }

    fn apply(&mut self, first: u64, differences: &[u8]) -> Result<(), MigrationError> {
        let mut held = std::mem::take(&mut self.held);
        held.resize(differences.len(), 0);
        self.guest.read_pages(first, &mut held).doing("reading pages that differences came for")?;
        delta::apply(&mut held, differences);
        self.store(first, &held)?;
        self.held = held;
        Ok(())
    }

    fn zero(&mut self, pages: Range<u64>) -> Result<(), MigrationError> {
        self.totals.zero += pages.end - pages.start;
        self.guest.zero_pages(pages).doing("zeroing pages")
    }
}

/// Stores what comes until the last marker.
pub(super) fn receive_pages(
    channel: &mut Channel,
    guest: &dyn DestinationGuest,
    layout: &MachineLayout,
    arrivals: &Arrivals,
) -> Result<(), MigrationError> {
    let pages = layout.pages();
    let (arrived, totals, held) = (Bitmap::new(pages), Totals::default(), Vec::new());
    let mut store = Store { guest, control: &arrivals.control, arrived, totals, held };
    let mut turns = Turns::new();
    loop {
        match channel.next("waiting for pages").map_err(by_peer)? {
            Incoming::Pages { length } => {
                let bytes = channel.read_pages(length, pages, &mut store)?;
                store.control.progress(bytes, 0);
                arrivals.pass(&mut turns);
            }
            Incoming::Message(Message::RoundEnd { round, last, totals }) => {
                check_totals("pages", totals, store.totals)?;
                store.control.set_round(round + 1, 0);
                if last {
                    // The control thread is waiting for this, the source only wants to know.
                    arrivals.memory_complete(&store.arrived);
                }
                channel.send(&Message::RoundAck { round })?;
                if last {
                    return Ok(());
                }
            }
            other => return Err(WireError::Unexpected { found: other.name(), expected: "pages" }.into()),
        }
    }
}
