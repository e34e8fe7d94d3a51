//! The machine that leaves.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use migration::guest::{GuestResult, MachineLayout, SourceDisk, SourceGuest, StatePayload};
use migration::page::{Bitmap, SharedBitmap};

use super::explain;
use crate::vm::Machine;

/// A running machine, seen by the source's engine.
pub struct Departure(pub Arc<Machine>);

impl SourceGuest for Departure {
    fn layout(&self) -> GuestResult<MachineLayout> {
        Ok(self.0.layout())
    }

    fn start_dirty_tracking(&self) -> GuestResult<()> {
        self.0.tracker().start().map_err(explain)
    }

    fn stop_dirty_tracking(&self) -> GuestResult<()> {
        self.0.tracker().stop().map_err(explain)
    }

    fn collect_dirty(&self, into: &mut Bitmap) -> GuestResult<()> {
        self.0.tracker().collect(into, self.0.is_parked()).map_err(explain)
    }

    fn next_populated(&self, from: u64) -> GuestResult<Option<Range<u64>>> {
        self.0.memory().next_populated(from).map_err(explain)
    }

    fn read_pages(&self, first: u64, buffer: &mut [u8]) -> GuestResult<()> {
        self.0.memory().read_pages(first, buffer).map_err(explain)
    }

    fn start_free_page_hints(&self, free: &Arc<SharedBitmap>) -> GuestResult<bool> {
        self.0.balloon().map_or(Ok(false), |balloon| balloon.start_hints(Arc::clone(free)).map_err(explain))
    }

    fn free_page_hints_are_over(&self) -> bool {
        self.0.balloon().is_none_or(|balloon| balloon.hints_are_over().unwrap_or(true))
    }

    fn stop_free_page_hints(&self, done: bool) -> GuestResult<()> {
        self.0.balloon().map_or(Ok(()), |balloon| balloon.stop_hints(done).map_err(explain))
    }

    fn vcpu_dirty_rates(&self) -> Vec<f64> {
        self.0.tracker().vcpu_rates()
    }

    fn throttle(&self, percent: &[u8]) -> GuestResult<bool> {
        self.0.throttle(percent).map_err(explain)?;
        Ok(true)
    }

    fn throttled(&self) -> Vec<Duration> {
        self.0.held()
    }

    fn warnings(&self) -> Vec<String> {
        self.0.tracker().warning().into_iter().map(str::to_owned).collect()
    }

    fn settle(&self) -> GuestResult<()> {
        self.0.settle().map_err(explain)
    }

    fn pause(&self) -> GuestResult<()> {
        self.0.pause().map_err(explain)
    }

    fn resume(&self) -> GuestResult<()> {
        self.0.resume().map_err(explain)
    }

    fn save_state(&self) -> GuestResult<Vec<StatePayload>> {
        self.0.save_state().map_err(explain)
    }

    fn fence(&self) -> GuestResult<()> {
        self.0.fence().map_err(explain)
    }

    fn unfence(&self) -> GuestResult<()> {
        self.0.unfence().map_err(explain)
    }

    fn disks(&self) -> Vec<Arc<dyn SourceDisk>> {
        self.0.moving_disks().map(|disk| Arc::clone(disk) as Arc<dyn SourceDisk>).collect()
    }
}
