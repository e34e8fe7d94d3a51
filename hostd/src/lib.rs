//! hostd
