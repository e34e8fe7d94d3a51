//! Can this host's processor stand in for the one that a guest knows?
