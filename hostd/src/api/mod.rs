//! The control API: HTTP/1.1 and JSON on a unix socket, under `/v1`.

pub mod types;
