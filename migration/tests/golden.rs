//! The frames of each protocol version that is spoken, as bytes in `golden/`: today's code reads them, and writes the same ones.
//!
//! A release speaks the version of the release before it. So a file here is never changed; a message that is new gets a new one,
//! and a version that is new a new folder. `HEADROOM_WRITE_GOLDEN=1` writes those that are missing.

#![allow(clippy::unwrap_used)] // What must not fail here fails the test.

use std::collections::BTreeSet;
use std::path::PathBuf;

use migration::guest::{CpuProfile, DeviceSlot, DiskLayout, MachineLayout, MemoryRegion, StatePayload};
use migration::wire::frame::{
    BlockHeader, Digests, HEADER_BYTES, Header, Kind, PackedHeader, PageRun, RunKind, Subject, data_bytes, decode_runs,
    decode_table_head, encode_table, table_bytes, table_head_bytes,
};
use migration::wire::handshake::{Hello, MAGIC, Role, Welcome, proof};
use migration::wire::message::{Comparison, Message, PostcopyFigures, Totals};
use migration::wire::version::{NEWEST, OLDEST};

/// The sample after this one, in the order of the enumeration. Whoever adds a message adds a sample, or this does not compile.
fn next(message: Option<&Message>) -> Option<Message> {
    let totals = Totals { data: 300, zero: 70_000 };
    Some(match message {
        None => Message::Hello(Hello {
            magic: MAGIC,
            versions: (1, 1),
            features: vec!["verify".to_owned(), "postcopy".to_owned()],
            id: "mig-7".to_owned(),
            role: Role::Memory(3),
            proof: *proof(&[1; 32], &[2; 32], "mig-7", Role::Memory(3)).as_bytes(),
            extension: vec![9, 8, 7],
        }),
        Some(Message::Hello(_)) => {
            Message::Welcome(Welcome { version: 1, features: vec!["verify".to_owned()], extension: vec![5] })
        }
        Some(Message::Welcome(_)) => Message::Abort { reason: "no room on this host".to_owned() },
        Some(Message::Abort { .. }) => Message::Layout { layout: layout(), streams: 4 },
        Some(Message::Layout { .. }) => Message::Ready,
        Some(Message::Ready) => Message::Ping { nonce: 300 },
        Some(Message::Ping { .. }) => Message::Pong { nonce: 300 },
        Some(Message::Pong { .. }) => Message::RoundEnd { round: 2, last: true, totals },
        Some(Message::RoundEnd { .. }) => Message::RoundAck { round: 2 },
        Some(Message::RoundAck { .. }) => Message::ZeroBlocks { disk: 1, first: 1 << 33, count: 17 },
        Some(Message::ZeroBlocks { .. }) => Message::CompareFull,
        Some(Message::CompareFull) => Message::DigestsEnd,
        Some(Message::DigestsEnd) => Message::Compared { difference: Some("page 5 differs".to_owned()) },
        Some(Message::Compared { .. }) => {
            Message::State { payloads: vec![StatePayload { slot: slot("vcpu/0"), bytes: (0..=255).collect() }] }
        }
        Some(Message::State { .. }) => Message::Prepared { restore_us: 1234 },
        Some(Message::Prepared { .. }) => Message::Commit,
        Some(Message::Commit) => Message::Resumed { resume_us: 4321 },
        Some(Message::Resumed { .. }) => Message::Verified {
            memory: Comparison { equal: 1000, overwritten: 20, different: 1, first_disk: 0, first_different: Some(77) },
            disks: Comparison::default(),
        },
        Some(Message::Verified { .. }) => Message::Goodbye,
        Some(Message::Goodbye) => Message::PostcopyPrepare,
        Some(Message::PostcopyPrepare) => Message::PostcopyReady,
        Some(Message::PostcopyReady) => {
            Message::Missing { disk: Some(0), first: 64, bits: vec![0x81, 0, 0, 0, 0, 0, 0, 1] }
        }
        Some(Message::Missing { .. }) => Message::MissingEnd { pages: 0, blocks: 3 },
        Some(Message::MissingEnd { .. }) => Message::Demand { disk: None, number: 1 << 20 },
        Some(Message::Demand { .. }) => Message::Complete(PostcopyFigures {
            faults: 10,
            fault_ns_p50: 150_000,
            fault_ns_p99: 900_000,
            pushed_pages: 4000,
        }),
        Some(Message::Complete(_)) => Message::CompleteAck,
        Some(Message::CompleteAck) => Message::AskReusable { disk: 1, first: 1 << 33, count: 300 },
        Some(Message::AskReusable { .. }) => {
            Message::Reusable { digests: vec![None, Some(std::array::from_fn(|at| at as u8))] }
        }
        Some(Message::Reusable { .. }) => return None,
    })
}

fn slot(name: &str) -> DeviceSlot {
    DeviceSlot { name: name.to_owned(), version: 1 }
}

fn layout() -> MachineLayout {
    MachineLayout {
        machine: "vm1".to_owned(),
        vcpus: 2,
        memory: vec![MemoryRegion { gpa: 0, bytes: 3 << 30 }, MemoryRegion { gpa: 1 << 32, bytes: 1 << 30 }],
        disks: vec![DiskLayout { id: "disk0".to_owned(), bytes: (1 << 30) + 512, read_only: false }],
        devices: vec![slot("vcpu/0"), slot("vcpu/1"), slot("virtio-block/disk0")],
        cpu: CpuProfile { leaves: vec![[0x8000_0001, 0, 1, 2, 3, u32::MAX]], tsc_khz: 2_400_000 },
    }
}

fn frame(kind: Kind, sequence: u64, payload: &[u8]) -> Vec<u8> {
    let header = Header { kind, length: payload.len() as u32, sequence };
    [&header.encode()[..], payload].concat()
}

const RUNS: [PageRun; 2] =
    [PageRun { first: 1 << 20, count: 1, kind: RunKind::Data }, PageRun { first: 5, count: 900, kind: RunKind::Zero }];

/// Every kind of frame, as this version writes it.
fn frames() -> Vec<(String, Vec<u8>)> {
    let mut frames = Vec::new();
    let mut message = next(None);
    while let Some(sample) = message {
        let sequence = frames.len() as u64;
        frames.push((sample.name().to_owned(), frame(Kind::Message, sequence, &sample.encode().unwrap())));
        message = next(Some(&sample));
    }
    let mut pages = Vec::new();
    encode_table(&RUNS, &mut pages);
    pages.resize(pages.len() + data_bytes(&RUNS) as usize, 0xa5);
    let run = PageRun { first: 77, count: 1, kind: RunKind::Delta };
    let mut differences = Vec::new();
    encode_table(&[run], &mut differences);
    differences.resize(differences.len() + 4096, 0x3c);
    let mut block = BlockHeader { disk: 2, block: 1 << 34 }.encode().to_vec();
    block.extend([0x5a; 512]);
    let mut digests = Vec::new();
    Digests::encode(Subject::Disk(1), 99, [1, u64::MAX, 1 << 40].into_iter(), &mut digests);
    let mut packed = PackedHeader { kind: Kind::Block, length: 528 }.encode().to_vec();
    packed.extend([0xc3; 40]);
    for (name, kind, payload) in [
        ("pages", Kind::Pages, pages),
        ("block", Kind::Block, block),
        ("digests", Kind::Digests, digests),
        ("packed", Kind::Packed, packed),
        ("differences", Kind::Pages, differences),
    ] {
        frames.push((name.to_owned(), frame(kind, 1 << 40, &payload)));
    }
    frames
}

fn folder(version: u16) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/v{version}"))
}

#[test]
fn this_version_writes_what_it_always_wrote() {
    let folder = folder(NEWEST);
    let write = std::env::var_os("HEADROOM_WRITE_GOLDEN").is_some();
    let frames = frames();
    for (name, bytes) in &frames {
        let path = folder.join(format!("{name}.bin"));
        if write && !path.exists() {
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(&path, bytes).unwrap();
        }
        let kept = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(&kept == bytes, "{name} is not written as protocol version {NEWEST} writes it: raise the version");
    }
    let written: BTreeSet<String> = frames.into_iter().map(|(name, _)| format!("{name}.bin")).collect();
    let kept: BTreeSet<String> =
        std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(written, kept);
}

#[test]
fn every_version_that_is_spoken_is_read_and_written_again() {
    for version in OLDEST..=NEWEST {
        for entry in std::fs::read_dir(folder(version)).unwrap() {
            let path = entry.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            let (head, payload) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
            let header = Header::decode(head).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            assert_eq!((header.encode(), header.length as usize), (*head, payload.len()), "{}", path.display());
            assert_eq!(again(header, payload), payload, "{}", path.display());
        }
    }
}

/// Decodes a payload and encodes what was found.
fn again(header: Header, payload: &[u8]) -> Vec<u8> {
    let mut again = Vec::new();
    match header.kind {
        Kind::Message => return Message::decode(payload).unwrap().encode().unwrap(),
        Kind::Pages => {
            let (head, rest) = payload.split_at(table_head_bytes());
            let count = decode_table_head(head.try_into().unwrap(), header.length).unwrap();
            let (table, data) = rest.split_at(table_bytes(count) - table_head_bytes());
            let mut runs = Vec::new();
            decode_runs(table, header.length, 1 << 21, &mut runs).unwrap();
            encode_table(&runs, &mut again);
            again.extend_from_slice(data);
        }
        Kind::Block => {
            let (head, data) = BlockHeader::decode(payload).unwrap();
            again.extend_from_slice(&head.encode());
            again.extend_from_slice(data);
        }
        Kind::Digests => {
            let digests = Digests::decode(payload).unwrap();
            Digests::encode(digests.subject, digests.first, digests.values.into_iter(), &mut again);
        }
        Kind::Packed => {
            let (head, data) = PackedHeader::decode(payload).unwrap();
            again.extend_from_slice(&head.encode());
            again.extend_from_slice(data);
        }
    }
    again
}
