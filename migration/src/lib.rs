//! Live migration of memory and disks over mutual TLS 1.3.
//!
//! The engine knows nothing of KVM, files or tap devices: it moves whatever implements [`guest`]'s traits, from
//! [`source::run`] to [`destination::run`]. Blocking calls and threads, no async runtime; no unsafe code.
//!
//! # One migration
//!
//! ```text
//!  source                                            destination
//!    |                                                   | listens, knows migration id, token, the source's name
//!    |===== TLS 1.3, both certificates, both names =====>|
//!    |----- Hello{versions, features, id, role, proof} ->| control channel
//!    |<---- Welcome{version, features} ------------------|
//!    |----- Layout{memory, disks, devices, cpu} -------->|
//!    |===== memory 0..n, disk: TLS, Hello, Welcome =====>|
//!    |                                                   | builds the machine, empty and not running
//!    |<---- Ready ---------------------------------------|
//!    |                                                   |
//!    | round 0: all populated pages, all blocks          |
//!    |..... Pages ..... Block ..... RoundEnd(0) ........>| each data channel
//!    |<.... RoundAck(0) .................................| stored; blocks on stable storage
//!    | round 1, 2, ...: what the guest has written       |
//!    |  Ping/Pong on the control channel every second    |
//!    |                                                   |
//!    | converge(): expected downtime fits                |
//!  --+- pause -------------------------------------------+------ downtime
//!    |..... last pages, last blocks, RoundEnd(n, last) ->|
//!    |----- State -------------------------------------->| waits for every channel's last marker, checks totals,
//!    |<---- Prepared ------------------------------------| restores
//!    | nobody can cancel from here; fence                |
//!    |----- Commit ------------------------------------->| POINT OF NO RETURN
//!    |                                                   | resumes, announces MAC addresses
//!  --+---------------------------------------------------+------
//!    |<---- Resumed -------------------------------------|
//!    |----- Digests, DigestsEnd ------------------------>| compares what the guest has not overwritten since
//!    |<---- Verified ------------------------------------|
//!    |----- Goodbye ------------------------------------>|
//!    | frees the machine                                 |
//! ```
//!
//! # States of either end
//!
//! ```text
//!            Handshake -> Precopy -> Switchover -> Committed -> Verify -> Ended
//!  source    connect      rounds     guest stopped Commit sent  digests   Completed
//!                |           |           |            |
//!                +-----------+-----------+            +-- "did not run": unfence, resume -> Failed
//!                            |                        +-- no answer, or nonsense: stays fenced -> InDoubt
//!                resume, stop tracking -> Failed | Cancelled
//!
//!  destin.   listen       receive    State arrived Commit came  compares  Received
//!                |           |           |            |
//!                +-----------+-----------+------------+-- discard -> NotCommitted   (Committed: resume refused)
//! ```
//!
//! Post-copy is a further state of both ends between Committed and Verify, entered from pre-copy after any round: the guest
//! runs at the destination, what it waits for is asked for over a fault channel of its own, the rest is pushed. Once the
//! destination has everything, the fault channel becomes the control channel of the verification. `docs/migration-protocol.md`
//! has its sequence, and what happens when the link is lost in it.
//!
//! # Who recovers what
//!
//! | what fails | source | destination | machine |
//! | --- | --- | --- | --- |
//! | stranger, wrong certificate, wrong token | - | drops the connection, goes on listening | runs at the source |
//! | anything before the pause: link, either disk, layout refused, cancel | stops tracking, reports | discards | runs at the source, never stopped |
//! | the same between pause and Commit | resumes, stops tracking, reports | discards | runs at the source after a pause |
//! | either process dies before Commit was sent | - | link lost: discards | source alive: runs there; dead: the machine died with its process |
//! | Commit sent, destination cannot start it and says so | unfences, resumes, `Failed` | discards | runs at the source |
//! | Commit sent, link lost before it arrived | stays fenced, `InDoubt` | discards, `NotCommitted` | nowhere until the daemons have compared notes, then at the source |
//! | Commit arrived, link lost before Resumed did | stays fenced, `InDoubt` | runs it, verification incomplete | at the destination |
//! | link lost after Resumed | `Completed`, digests `null` | runs it, verification incomplete | at the destination |
//! | post-copy: link lost after Commit | fenced, keeps what is missing, reconnects until it works or it is abandoned | the guest stands at the next missing page, goes on after the reconnect | at the destination |
//! | post-copy: the source does not come back | died, or `InDoubt` when abandoned | stops the machine, `Lost` with what is missing | nowhere: restart it from its disks at the source |
//! | digests differ after the resume | `Completed`, says which page | runs it, warns | at the destination; the operator decides |
//!
//! # Rules
//!
//! * **Versions**: each end names the oldest and newest protocol version it speaks, both use the newest common one
//!   ([`wire::version`]); a release speaks the version before its own. Optional things are features, named in words.
//! * **Order**: a round ends when every channel has acknowledged its marker, so a page or block of one round can never
//!   overtake that of an earlier one, whichever channels they take.
//! * **Trust**: nothing reaches the frame parser before TLS has accepted certificate and name; nothing is allocated by a
//!   length that was not checked against a cap; numbers of pages and blocks are checked against the layout.
//! * **Decisions** are pure functions of what was measured ([`policy`]).
#![forbid(unsafe_code)]

mod blocks;
pub mod control;
pub mod destination;
pub mod error;
pub mod guest;
pub mod mirror;
pub mod page;
pub mod policy;
pub mod report;
pub mod source;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod throttle;
pub mod transport;
mod urgency;
pub mod wire;
