//! Decoders on arbitrary bytes: they never panic, never accept what is too long, and give back what was encoded.

use migration::guest::{MachineLayout, StatePayload};
use migration::testing::FakeMachine;
use migration::wire::frame::{self, BlockHeader, Digests, HEADER_BYTES, Header, Kind, PageRun, RunKind, Subject};
use migration::wire::handshake::{Hello, MAGIC, Role, Welcome, proof, proves};
use migration::wire::message::{Comparison, MAX_TEXT, Message, Totals, sanitised};
use migration::wire::{WireError, layout};
use proptest::prelude::*;

fn messages() -> impl Strategy<Value = Message> {
    let role = prop_oneof![Just(Role::Control), any::<u16>().prop_map(Role::Memory), Just(Role::Disk)];
    let hello = (
        any::<(u16, u16)>(),
        prop::collection::vec(".{0,20}", 0..5),
        ".{0,40}",
        role,
        any::<[u8; 32]>(),
        any::<Vec<u8>>(),
    )
        .prop_map(|(versions, features, id, role, proof, extension)| {
            Message::Hello(Hello { magic: MAGIC, versions, features, id, role, proof, extension })
        });
    let welcome = (any::<u16>(), prop::collection::vec(".{0,20}", 0..5), any::<Vec<u8>>())
        .prop_map(|(version, features, extension)| Message::Welcome(Welcome { version, features, extension }));
    let payload = (".{0,20}", any::<u16>(), any::<Vec<u8>>()).prop_map(|(name, version, bytes)| StatePayload {
        slot: migration::guest::DeviceSlot { name, version },
        bytes,
    });
    let comparison = any::<(u64, u64, u64, u16, Option<u64>)>().prop_map(
        |(equal, overwritten, different, first_disk, first_different)| Comparison {
            equal,
            overwritten,
            different,
            first_disk,
            first_different,
        },
    );
    prop_oneof![
        hello,
        welcome,
        ".{0,80}".prop_map(|reason| Message::Abort { reason }),
        (1u64..5000, prop::collection::vec(1u64..1 << 40, 0..4), any::<u16>()).prop_map(|(pages, disks, streams)| {
            Message::Layout { layout: FakeMachine::layout(pages, &disks), streams }
        }),
        Just(Message::Ready),
        any::<u64>().prop_map(|nonce| Message::Ping { nonce }),
        any::<u64>().prop_map(|nonce| Message::Pong { nonce }),
        any::<(u32, bool, u64, u64)>().prop_map(|(round, last, data, zero)| Message::RoundEnd {
            round,
            last,
            totals: Totals { data, zero }
        }),
        any::<u32>().prop_map(|round| Message::RoundAck { round }),
        any::<(u16, u64, u64)>().prop_map(|(disk, first, count)| Message::ZeroBlocks { disk, first, count }),
        Just(Message::CompareFull),
        Just(Message::DigestsEnd),
        any::<Option<String>>().prop_map(|difference| Message::Compared { difference }),
        prop::collection::vec(payload, 0..4).prop_map(|payloads| Message::State { payloads }),
        any::<u64>().prop_map(|restore_us| Message::Prepared { restore_us }),
        Just(Message::Commit),
        any::<u64>().prop_map(|resume_us| Message::Resumed { resume_us }),
        (comparison.clone(), comparison).prop_map(|(memory, disks)| Message::Verified { memory, disks }),
        Just(Message::Goodbye),
        any::<(Option<u16>, u64, Vec<u8>)>().prop_map(|(disk, first, bits)| Message::Missing { disk, first, bits }),
        any::<(u64, u64)>().prop_map(|(pages, blocks)| Message::MissingEnd { pages, blocks }),
        any::<(Option<u16>, u64)>().prop_map(|(disk, number)| Message::Demand { disk, number }),
        any::<(u16, u64, u16)>().prop_map(|(disk, first, count)| Message::AskReusable { disk, first, count }),
        prop::collection::vec(any::<Option<[u8; 32]>>(), 0..4).prop_map(|digests| Message::Reusable { digests }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn headers_from_anywhere(bytes in any::<[u8; HEADER_BYTES]>()) {
        if let Ok(header) = Header::decode(&bytes) {
            prop_assert!(u64::from(header.length) <= header.kind.cap());
            prop_assert_eq!(header.encode(), bytes);
        }
    }

    #[test]
    fn messages_from_anywhere(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        if let Ok(message) = Message::decode(&bytes) {
            // It may be written in fewer bytes (numbers have more than one form), but means the same.
            prop_assert_eq!(Message::decode(&message.encode().unwrap()).unwrap(), message);
        }
    }

    #[test]
    fn messages_come_back(message in messages()) {
        let bytes = message.encode().unwrap();
        prop_assert_eq!(Message::decode(&bytes).unwrap(), message.clone());
        // Cut anywhere, or with something behind it, it is refused.
        for cut in 0..bytes.len() {
            prop_assert!(Message::decode(&bytes[..cut]).is_err(), "{:?} cut at {cut}", message.name());
        }
        let longer = [&bytes[..], &[0]].concat();
        prop_assert!(Message::decode(&longer).is_err());
    }

    #[test]
    fn page_tables_from_anywhere(
        head in any::<[u8; 8]>(),
        table in prop::collection::vec(any::<u8>(), 0..400),
        length in any::<u32>(),
        pages in any::<u64>(),
    ) {
        let mut runs = Vec::new();
        if let Ok(count) = frame::decode_table_head(&head, length) {
            prop_assert!(count <= frame::MAX_RUNS);
        }
        if frame::decode_runs(&table, length, pages, &mut runs).is_ok() {
            for run in &runs {
                prop_assert!(run.count > 0 && run.first + u64::from(run.count) <= pages);
            }
        }
    }

    #[test]
    fn page_tables_come_back(list in prop::collection::vec((0u64..1 << 40, 1u32..300, 0usize..3), 1..100)) {
        let runs: Vec<_> = list.into_iter().map(|(first, count, kind)| PageRun { first, count, kind: RunKind::ALL[kind] }).collect();
        let mut bytes = Vec::new();
        frame::encode_table(&runs, &mut bytes);
        let length = (bytes.len() as u64 + frame::data_bytes(&runs)) as u32;
        let head: [u8; 8] = bytes[..8].try_into().unwrap();
        prop_assert_eq!(frame::decode_table_head(&head, length).unwrap(), runs.len());
        let mut back = Vec::new();
        frame::decode_runs(&bytes[8..], length, 1 << 41, &mut back).unwrap();
        prop_assert_eq!(&back, &runs);
        // One page less than the machine needs is refused.
        let end = runs.iter().map(|run| run.first + u64::from(run.count)).max().unwrap();
        let refused = frame::decode_runs(&bytes[8..], length, end - 1, &mut back);
        prop_assert!(matches!(refused, Err(WireError::OutOfRange { .. })), "{:?}", refused);
    }

    #[test]
    fn blocks_and_digests_from_anywhere(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok((head, data)) = BlockHeader::decode(&bytes) {
            prop_assert_eq!([&head.encode()[..], data].concat(), bytes.clone());
        }
        if let Ok(digests) = Digests::decode(&bytes) {
            let mut back = Vec::new();
            Digests::encode(digests.subject, digests.first, digests.values.iter().copied(), &mut back);
            prop_assert_eq!(back, bytes);
        }
    }

    #[test]
    fn digests_come_back(disk in any::<Option<u16>>(), first in any::<u64>(), values in prop::collection::vec(any::<u64>(), 1..50)) {
        let subject = disk.map_or(Subject::Memory, Subject::Disk);
        let mut bytes = Vec::new();
        Digests::encode(subject, first, values.iter().copied(), &mut bytes);
        prop_assert_eq!(Digests::decode(&bytes).unwrap(), Digests { subject, first, values });
    }

    #[test]
    fn a_proof_is_good_for_one_session_migration_and_role_only(
        token in any::<[u8; 32]>(), session in any::<[u8; 32]>(), other in any::<[u8; 32]>(), id in ".{1,20}", number in any::<u16>(),
    ) {
        let good = *proof(&token, &session, &id, Role::Memory(number)).as_bytes();
        prop_assert!(proves(&good, &token, &session, &id, Role::Memory(number)));
        prop_assert!(!proves(&good, &token, &session, &id, Role::Disk));
        prop_assert!(!proves(&good, &token, &session, &id, Role::Memory(number.wrapping_add(1))));
        prop_assert!(!proves(&good, &token, &session, &(id.clone() + "x"), Role::Memory(number)));
        prop_assume!(other != session && other != token);
        prop_assert!(!proves(&good, &token, &other, &id, Role::Memory(number)));
        prop_assert!(!proves(&good, &other, &session, &id, Role::Memory(number)));
    }

    #[test]
    fn text_of_a_peer_is_tamed(text in any::<String>()) {
        let clean = sanitised(&text);
        prop_assert!(clean.len() <= MAX_TEXT && !clean.contains(char::is_control));
    }
}

#[test]
fn each_kind_has_a_cap_that_is_checked_before_anything_is_read() {
    for kind in Kind::ALL {
        let fits = Header { kind, length: kind.cap() as u32, sequence: 3 };
        assert_eq!(Header::decode(&fits.encode()), Ok(fits));
        let long = Header { length: kind.cap() as u32 + 1, ..fits };
        assert!(matches!(Header::decode(&long.encode()), Err(WireError::TooLong { .. })), "{kind:?}");
    }
}

#[test]
fn lengths_inside_a_message_do_not_make_it_allocate() {
    // State with a list that claims 2^60 payloads.
    let state = Message::State { payloads: Vec::new() }.encode().expect("it can be encoded");
    let mut bytes = vec![state[0]];
    bytes.extend([0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x0f]);
    assert!(Message::decode(&bytes).is_err());
}

#[test]
fn layouts_that_no_machine_can_have_are_refused() {
    let good = FakeMachine::layout(100, &[1 << 20]);
    assert_eq!(layout::check(&good, 1), Ok(()));
    let spoil = |change: fn(&mut MachineLayout)| {
        let mut bad = good.clone();
        change(&mut bad);
        layout::check(&bad, 1)
    };
    let changes: [fn(&mut MachineLayout); 10] = [
        |layout| layout.memory.clear(),
        |layout| layout.memory[0].bytes = 0,
        |layout| layout.memory[0].bytes += 1,
        |layout| layout.memory[1].gpa = 4096,
        |layout| layout.memory[1].gpa = u64::MAX - 4095,
        |layout| layout.memory[0].bytes = 1 << 63,
        |layout| layout.disks[0].bytes = 0,
        |layout| layout.disks[0].bytes = u64::MAX,
        |layout| layout.disks[0].id = "x".repeat(300),
        |layout| layout.machine.clear(),
    ];
    for (index, change) in changes.into_iter().enumerate() {
        assert!(spoil(change).is_err(), "change {index}");
    }
    assert!(layout::check(&good, 0).is_err() && layout::check(&good, 17).is_err());
}
