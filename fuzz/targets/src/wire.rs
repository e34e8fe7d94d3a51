//! Frames and messages of a migration.

use migration::guest::{BLOCK_BYTES, DiskLayout, MachineLayout, MemoryRegion, PAGE_BYTES};
use migration::page::pack;
use migration::wire::frame::{
    BlockHeader, Digests, HEADER_BYTES, Header, Kind, PackedHeader, data_bytes, decode_runs, decode_table_head,
    encode_table, table_bytes, table_head_bytes,
};
use migration::wire::handshake::proves;
use migration::wire::layout;
use migration::wire::message::{MAX_TEXT, Message, sanitised};
use migration::wire::missing::MissingList;
use migration::wire::version::{NEWEST, OLDEST, agree, common};

/// Pages of the machine that frames are decoded for.
const PAGES: u64 = 1 << 20;

/// A header and its payload.
pub fn frame(data: &[u8]) {
    let Some((head, payload)) = data.split_first_chunk::<HEADER_BYTES>() else { return };
    let Ok(header) = Header::decode(head) else { return };
    assert_eq!(header.encode(), *head, "a header that is accepted is the only one that says this");
    assert!(u64::from(header.length) <= header.kind.cap());
    match header.kind {
        Kind::Message => drop(Message::decode(payload)),
        Kind::Pages => pages(payload, header.length),
        Kind::Block => {
            if let Ok((block, rest)) = BlockHeader::decode(payload) {
                assert_eq!([&block.encode()[..], rest].concat(), payload);
            }
        }
        Kind::Digests => {
            if let Ok(digests) = Digests::decode(payload) {
                let mut again = Vec::new();
                Digests::encode(digests.subject, digests.first, digests.values.iter().copied(), &mut again);
                assert_eq!(again, payload);
            }
        }
        Kind::Packed => {
            if let Ok((packed, rest)) = PackedHeader::decode(payload) {
                assert_eq!([&packed.encode()[..], rest].concat(), payload);
                let mut plain = vec![0; packed.length as usize];
                if pack::unpack(rest, &mut plain).is_ok() {
                    match packed.kind {
                        Kind::Pages => pages(&plain, packed.length),
                        _ => drop(BlockHeader::decode(&plain)),
                    }
                }
            }
        }
    }
}

fn pages(payload: &[u8], length: u32) {
    let Some((head, rest)) = payload.split_at_checked(table_head_bytes()) else { return };
    let Ok(head) = head.try_into() else { return };
    let Ok(count) = decode_table_head(head, length) else { return };
    let Some(table) = rest.get(..table_bytes(count) - table_head_bytes()) else { return };
    let mut runs = Vec::new();
    if decode_runs(table, length, PAGES, &mut runs).is_ok() {
        assert!(runs.iter().all(|run| run.count > 0 && run.first + u64::from(run.count) <= PAGES));
        assert_eq!(table_bytes(runs.len()) as u64 + data_bytes(&runs), u64::from(length));
        let mut again = Vec::new();
        encode_table(&runs, &mut again);
        assert_eq!(again, payload[..table_bytes(count)]);
    }
}

/// One message.
pub fn message(data: &[u8]) {
    let Ok(message) = Message::decode(data) else { return };
    let again = message.encode().expect("what was decoded can be encoded");
    assert_eq!(Message::decode(&again).as_ref(), Ok(&message), "{}", message.name());
    match message {
        Message::Abort { reason } => {
            let clean = sanitised(&reason);
            assert!(clean.len() <= MAX_TEXT && !clean.chars().any(char::is_control));
        }
        Message::Layout { layout, streams } if layout::check(&layout, streams).is_ok() => {
            // What is allocated by a layout that was accepted stays within what a machine can have.
            assert!(layout.pages() <= 1 << 34);
            assert!(layout.disks.iter().all(|disk| disk.blocks() > 0 && disk.block_bytes(0) <= BLOCK_BYTES));
        }
        _ => {}
    }
}

/// A hello, and what is agreed on by it.
pub fn handshake(data: &[u8]) {
    let Ok(Message::Hello(hello)) = Message::decode(data) else { return };
    if let Ok(version) = agree((OLDEST, NEWEST), hello.versions) {
        assert!((OLDEST..=NEWEST).contains(&version) && (hello.versions.0..=hello.versions.1).contains(&version));
    }
    let known = common(&hello.features);
    assert!(known.iter().all(|name| hello.features.contains(name)));
    assert!(!proves(&hello.proof, &[0x33; 32], &[0x44; 32], &hello.id, hello.role), "a proof out of nothing");
    drop(sanitised(&hello.id));
}

/// A list of what is missing, as messages one after the other, each with its length before it.
pub fn missing(mut data: &[u8]) {
    let layout = MachineLayout {
        machine: "m".to_owned(),
        vcpus: 1,
        memory: vec![MemoryRegion { gpa: 0, bytes: 1000 * PAGE_BYTES }],
        disks: vec![DiskLayout { id: "d".to_owned(), bytes: 100 * BLOCK_BYTES, read_only: false }],
        devices: Vec::new(),
        cpu: Default::default(),
    };
    let mut list = MissingList::none(&layout);
    while let Some((&length, rest)) = data.split_first() {
        let (message, rest) = rest.split_at(rest.len().min(usize::from(length)));
        data = rest;
        let Ok(message) = Message::decode(message) else { continue };
        if list.take(&message) == Ok(true) {
            break;
        }
    }
    let (pages, blocks) = list.counts();
    assert!(pages <= 1000 && blocks <= 100);
    let mut again = MissingList::none(&layout);
    let mut last = Ok(false);
    for message in list.messages() {
        assert_eq!(last, Ok(false));
        last = again.take(&message);
    }
    assert_eq!((last, &again), (Ok(true), &list));
}
