//! Faults and other events at the n-th call of a trait method.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use crate::guest::{GuestError, GuestResult};

type Hook = Box<dyn FnMut(u64) -> GuestResult<()> + Send>;

/// What happens at which call of which method; methods are named `pause`, `read_pages`, `disk.collect_dirty`, ...
#[derive(Default)]
pub struct Faults {
    calls: Mutex<HashMap<&'static str, u64>>,
    hooks: Mutex<HashMap<&'static str, Hook>>,
}

impl Faults {
    /// Calls `hook` at each call of `method`, with the number of the call from 1; what it returns is what the method
    /// returns if it is an error.
    pub fn on(&self, method: &'static str, hook: impl FnMut(u64) -> GuestResult<()> + Send + 'static) {
        self.hooks.lock().unwrap_or_else(PoisonError::into_inner).insert(method, Box::new(hook));
    }

    /// Makes the `nth` call of `method` fail, counted from 1.
    pub fn fail(&self, method: &'static str, nth: u64) {
        self.on(method, move |call| {
            if call == nth { Err(GuestError::new(format!("injected fault in {method}, call {nth}"))) } else { Ok(()) }
        });
    }

    /// How often `method` was called.
    pub fn calls(&self, method: &str) -> u64 {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).get(method).copied().unwrap_or(0)
    }

    pub(super) fn hit(&self, method: &'static str) -> GuestResult<()> {
        let call = {
            let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
            let count = calls.entry(method).or_default();
            *count += 1;
            *count
        };
        let mut hooks = self.hooks.lock().unwrap_or_else(PoisonError::into_inner);
        match hooks.remove(method) {
            Some(mut hook) => {
                // Called without the lock, since it may wait.
                drop(hooks);
                let result = hook(call);
                self.hooks.lock().unwrap_or_else(PoisonError::into_inner).entry(method).or_insert(hook);
                result
            }
            None => Ok(()),
        }
    }
}
