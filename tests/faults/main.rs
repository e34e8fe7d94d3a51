//! What can go wrong does, and the machine keeps running at its source; then it is put right, and the same move works.

mod before;
mod during;
