//! What the tests share: noise and samples.
#![allow(dead_code, reason = "each test binary uses its part")]

use predictor::{PerResource, Sample};

/// xorshift64*: noise that is the same in every run.
pub struct Noise(u64);

impl Noise {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// Evenly in 0..1.
    pub fn uniform(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Mean 0, standard deviation 1.
    pub fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }

    /// Mean 1, never negative, long tail.
    pub fn exponential(&mut self) -> f64 {
        -(1.0 - self.uniform()).ln()
    }
}

pub fn cpu_sample(machine: impl Into<String>, cpu: Option<f64>) -> Sample {
    Sample { machine: machine.into(), values: PerResource { cpu, ..PerResource::default() } }
}
