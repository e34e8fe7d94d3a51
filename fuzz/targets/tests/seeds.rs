//! What the seeds are made of. `HEADROOM_WRITE_SEEDS=1` writes them; otherwise they must be there and say the same.

#![allow(clippy::unwrap_used)] // What must not fail here fails the test.

use std::path::Path;

use migration::wire::frame::HEADER_BYTES;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The frames that this version and the one before it send.
fn frames() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(ROOT).join("../../migration/tests/golden/v1");
    let mut frames: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            (path.file_stem().unwrap().to_string_lossy().into_owned(), std::fs::read(path).unwrap())
        })
        .collect();
    frames.sort();
    frames
}

fn payload<'a>(frames: &'a [(String, Vec<u8>)], name: &str) -> &'a [u8] {
    &frames.iter().find(|frame| frame.0 == name).unwrap().1[HEADER_BYTES..]
}

fn lists(frames: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut list = Vec::new();
    for name in ["Missing", "MissingEnd"] {
        let message = payload(frames, name);
        list.push(u8::try_from(message.len()).unwrap());
        list.extend_from_slice(message);
    }
    list
}

/// Flags, size 16, tables at 0, 0x100 and 0x200; a chain of a header, data and a status byte.
fn virtqueue() -> Vec<u8> {
    let mut bytes = vec![0u8, 16, 0, 0, 0, 0, 1, 0, 2, 0, 0, 0, 0];
    let mut ram = vec![0u8; 0x600];
    for (index, (gpa, length, flags)) in
        [(0x400u64, 16u32, 1u16), (0x500, 512, 3), (0x480, 1, 2)].into_iter().enumerate()
    {
        let descriptor = &mut ram[index * 16..][..16];
        descriptor[..8].copy_from_slice(&gpa.to_le_bytes());
        descriptor[8..12].copy_from_slice(&length.to_le_bytes());
        descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
        descriptor[14..].copy_from_slice(&(index as u16 + 1).to_le_bytes());
    }
    // One chain is available, whose head is descriptor 0.
    ram[0x102] = 1;
    bytes.extend(ram);
    bytes
}

/// Flags with the number of a balloon's queue, then as above: a chain of what the device reads, and of what it may take.
fn balloon(flags: u8, words: [u32; 3]) -> Vec<u8> {
    let mut bytes = virtqueue();
    bytes[0] = flags;
    let ram = &mut bytes[13..];
    // Twelve bytes to read; then two pages for the device, or (last) a single byte.
    let lengths: [(u64, u32, u16); 3] = [(0x400, 12, 1), (0x2000, 0x2000, 3), (0x480, 1, 2)];
    for (descriptor, (gpa, length, flags)) in ram.chunks_exact_mut(16).zip(lengths) {
        descriptor[..8].copy_from_slice(&gpa.to_le_bytes());
        descriptor[8..12].copy_from_slice(&length.to_le_bytes());
        descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
    }
    for (place, word) in ram[0x400..].chunks_exact_mut(4).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// A request of kind `kind` with a header, `data` and a status byte.
fn request(kind: u32, writable: u8, cuts: [u8; 8], data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![writable << 4];
    bytes.extend(cuts);
    bytes.extend(kind.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(data);
    bytes
}

fn seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let frames = frames();
    let mut seeds = vec![
        ("handshake", "hello", payload(&frames, "Hello").to_vec()),
        ("missing", "list", lists(&frames)),
        ("virtqueue", "one-chain", virtqueue()),
        ("balloon", "inflate", balloon(0, [2, 3, 0xffff_ffff])),
        ("balloon", "statistics", balloon(2, [4, 0x1000, 0])),
        ("balloon", "hints", balloon(32 | 3, [0x8000_0000, 0, 0])),
        ("balloon", "reports", balloon(16 | 4, [0; 3])),
        ("disk_request", "read", request(0, 3, [16, 0, 0, 0, 0, 255, 255, 3], &[])),
        ("disk_request", "discard", request(11, 1, [16, 16, 0, 0, 0, 0, 0, 1], &[1; 16])),
        ("block_state", "new", vmm::fuzzing::new_block_state().expect("a new disk")),
        ("snapshot", "body", b"+\x02{}".iter().copied().chain([0; 64]).collect()),
        ("vmm_api", "machine", b"GET /v1/machine HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        (
            "vmm_api",
            "settle",
            b"PUT /v1/migration/settle HTTP/1.1\r\nContent-Length: 12\r\n\r\n\"runs_there\"".to_vec(),
        ),
        (
            "vmm_api",
            "save",
            b"PUT /v1/machine/save HTTP/1.1\r\nContent-Length: 17\r\n\r\n{\"path\": \"/x/y\"}".to_vec(),
        ),
        ("vmm_api", "inflate", b"PUT /v1/balloon HTTP/1.1\r\nContent-Length: 18\r\n\r\n{\"target_mib\": 16}".to_vec()),
        ("vmm_api", "receive", [&b"PUT /v1/migration/receive HTTP/1.1\r\n\r\n"[..], RECEIVE].concat()),
        ("hostd_api", "create", [&b"c"[..], CREATE].concat()),
        (
            "hostd_api",
            "migrate",
            br#"m{"destination": "b1", "limits": {"downtime_ms": 100, "streams": 2, "mode": "hybrid"}}"#.to_vec(),
        ),
        (
            "hostd_api",
            "event",
            br#"e{"name": "report", "target": {"machine": "vm1"}, "starts_in_s": 5.0, "duration_s": 60, "adds": {}}"#
                .to_vec(),
        ),
        ("hostd_api", "host", [&b"h"[..], HOST].concat()),
        ("hostd_api", "reserve", [&b"r"[..], RESERVE].concat()),
    ];
    for which in 0..4u8 {
        seeds.push((
            "state",
            ["vcpu", "clock", "irqchip", "serial"][usize::from(which)],
            [&[which][..], &[0; 1500]].concat(),
        ));
    }
    // Its control byte, with interrupts on; nothing waits.
    seeds.push(("state", "keyboard", vec![4, 0x45, 0, 0, 0]));
    seeds
}

const RECEIVE: &[u8] =
    br#"{"id": "m1", "listen": "127.0.0.1:0", "token": "00", "source_host": "a", "destination_host": "b",
"tls": {"ca_pem": "", "certificate_pem": "", "key_pem": ""}, "deadline_s": 5}"#;

const CREATE: &[u8] = br#"{"name": "vm1", "vcpus": 1, "memory_mib": 64, "kernel": "bundled", "cmdline": "sweep=16:100",
"disks": [{"id": "disk0", "size_mib": 64}], "networks": [{"id": "net0", "mac": "02:00:00:00:00:05"}], "probes": [{"ping": "10.0.0.2"}]}"#;

const RESERVE: &[u8] = br#"{"id": "mig-1", "machine": {"name": "vm1", "vcpus": 1, "memory_mib": 64, "kernel": "bundled",
"initrd": null, "cmdline": "", "disks": [{"id": "disk0", "path": "/x", "bytes": 67108864, "read_only": false, "owned": true}],
"networks": [{"id": "net0", "tap": "t", "mac": "02:00:00:00:00:05"}], "probes": [{"tcp": "10.0.0.2:7"}], "limits": {},
"created_unix_ms": 1, "status": "migrating", "process": null, "migration": "mig-1"}, "usage": null,
"cpu": {"vendor": "GenuineIntel", "flags": ["avx2"]}, "trigger": {"kind": "manual"}, "deadline_s": 5}"#;

const HOST: &[u8] = br#"{"host": "a1", "pool": "a", "run_dir": "/run/headroom", "state_dir": "/var/lib/headroom",
"socket": "/run/headroom/hostd.sock", "listen": "10.1.0.1:7420", "migration_address": "10.1.0.1",
"tls": {"ca": "/c", "certificate": "/d", "key": "/e"}, "peers": [{"host": "b1", "pool": "b", "address": "10.1.0.2:7420"}]}"#;

#[test]
fn the_corpus_is_what_it_should_be() {
    let write = std::env::var_os("HEADROOM_WRITE_SEEDS").is_some();
    let corpus = Path::new(ROOT).join("../corpus");
    let mut all = seeds().into_iter().map(|(target, name, bytes)| (target, name.to_owned(), bytes)).collect::<Vec<_>>();
    for (name, frame) in frames() {
        // The largest one of each kind would only make mutations slow.
        if frame.len() <= 4096 {
            all.push(("message", name.clone(), frame[HEADER_BYTES..].to_vec()));
            all.push(("frame", name, frame));
        }
    }
    for (target, name, bytes) in all {
        let path = corpus.join(target).join(&name);
        if write {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, bytes).unwrap();
        } else {
            let found = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            assert!(
                found == bytes,
                "{} is not what it should be: HEADROOM_WRITE_SEEDS=1 writes it anew",
                path.display()
            );
        }
    }
}

#[test]
fn seeds_of_requests_are_good_ones() {
    for (target, name, bytes) in seeds() {
        if target == "hostd_api" {
            assert!(fuzz_targets::accepts(&bytes), "the daemon would refuse {name}");
        }
    }
}
