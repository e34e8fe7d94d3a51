//! The last value goes on: the floor that every other model has to beat.

use super::Model;
use serde::{Deserialize, Serialize};

/// Random-walk forecast (Hyndman and Athanasopoulos, *Forecasting: Principles and Practice*, 3rd ed., 5.2).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Naive {
    last: Option<f64>,
}

impl Model for Naive {
    const NAME: &'static str = "naive";

    fn update(&mut self, value: Option<f64>) {
        self.last = value.or(self.last);
    }

    fn forecast(&self, _horizons: &[usize], out: &mut [f32]) {
        if let Some(last) = self.last {
            out.fill(last as f32);
        }
    }
}
