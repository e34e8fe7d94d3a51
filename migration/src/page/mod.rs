//! Pages and blocks: which ones, what they hold, and their digests.

mod bitmap;
pub mod delta;
mod digest;
mod lz4;
pub mod pack;
mod zero;

pub use bitmap::{Bitmap, SharedBitmap};
pub use digest::{Digests, StrongDigest, digest, strong_digest, zero_block, zero_page};
pub use zero::is_zero;
