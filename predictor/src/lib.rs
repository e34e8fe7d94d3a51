//! Forecasts, contention scores and plans; no I/O and no clock.
#![forbid(unsafe_code)]
