//! Which protocol two releases speak with each other.
//!
//! Each end names the oldest and the newest version that it speaks; both use the newest one that both know. A release
//! speaks the version of the release before it, so that hosts can be updated one at a time. Things that can be left out
//! are not versions but *features*, named in words: what both ends name is used.

use super::WireError;

/// The newest protocol version of this build.
pub const NEWEST: u16 = 1;
/// The oldest protocol version of this build.
pub const OLDEST: u16 = 1;

/// Digests are sent after the resume and compared by the destination.
pub const VERIFY: &str = "verify";
/// Full images of both stopped machines can be compared before Commit.
pub const COMPARE_FULL: &str = "compare-full";

/// The guest can run at the destination before all of it is there. A destination names it only if its host can do that.
pub const POSTCOPY: &str = "postcopy";

/// Pages and blocks may come compressed.
pub const LZ4: &str = "lz4";

/// The destination's images hold what an earlier attempt has left, and it says what that is. Named only if that is so.
pub const REUSE: &str = "reuse";

/// A page that was sent before may come as what differs from it.
pub const DELTA: &str = "delta";

/// Features of this build.
pub const FEATURES: [&str; 6] = [VERIFY, COMPARE_FULL, POSTCOPY, LZ4, REUSE, DELTA];

/// Most feature names that are read from a peer.
pub const MAX_FEATURES: usize = 64;

/// The newest version that lies in both ranges.
///
/// # Errors
///
/// [`WireError::NoCommonVersion`].
pub fn agree(ours: (u16, u16), theirs: (u16, u16)) -> Result<u16, WireError> {
    let newest = ours.1.min(theirs.1);
    if ours.0 > ours.1 || theirs.0 > theirs.1 || newest < ours.0.max(theirs.0) {
        return Err(WireError::NoCommonVersion {
            theirs_min: theirs.0,
            theirs_max: theirs.1,
            ours_min: ours.0,
            ours_max: ours.1,
        });
    }
    Ok(newest)
}

/// Features that this build and the peer have.
pub fn common(theirs: &[String]) -> Vec<String> {
    FEATURES.iter().filter(|feature| theirs.iter().any(|name| name == *feature)).map(|&name| name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn both_ends_agree_on_the_same(a in 0u16..9, b in 0u16..9, c in 0u16..9, d in 0u16..9) {
            let one = agree((a, b), (c, d));
            let other = agree((c, d), (a, b));
            prop_assert_eq!(one.clone().ok(), other.ok());
            let best = (0..9).rev().find(|v| (a..=b).contains(v) && (c..=d).contains(v));
            prop_assert_eq!(one.ok(), best);
        }
    }
}
