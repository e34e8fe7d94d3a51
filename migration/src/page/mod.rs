//! Pages and blocks: which ones, what they hold, and their digests.

mod bitmap;

pub use bitmap::Bitmap;
