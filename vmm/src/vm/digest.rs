//! BLAKE3 over a stopped machine's memory and disks: two images are equal if their digests are.
