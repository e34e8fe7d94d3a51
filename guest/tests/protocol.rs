//! The command line and the control protocol: what is written is read back, and nothing that arrives can break the reader.

use headroom_guest::protocol::command_line::MmioDevice;
use headroom_guest::{Address, CommandLine, Reply, Request, Settings, Status, Topic, Workload};
use proptest::prelude::*;

fn any_workload() -> impl Strategy<Value = Workload> {
    let mib = 0_u32..=1 << 20;
    (
        proptest::option::of((any::<[u8; 4]>(), 0_u8..=32)),
        proptest::option::of(any::<[u8; 4]>()),
        (mib.clone(), mib.clone(), mib.clone(), mib.clone()),
        (mib.clone(), mib.clone()),
        (0_u8..=100, mib, 1_u32..=60_000),
    )
        .prop_map(
            |(ip, gateway, (sweep, sweep_rate, disk, disk_rate), (churn, churn_rate), (cpu, fill, heartbeat))| {
                Workload {
                    ip: ip.map(|(octets, prefix)| Address { ip: octets.into(), prefix }),
                    gateway: gateway.map(Into::into),
                    sweep_mib: sweep,
                    sweep_mib_per_second: sweep_rate,
                    disk_mib: disk,
                    disk_mib_per_second: disk_rate,
                    cpu_percent: cpu,
                    fill_mib: fill,
                    churn_mib: churn,
                    churn_mib_per_second: churn_rate,
                    heartbeat_ms: heartbeat,
                }
            },
        )
}

proptest! {
    #[test]
    fn a_workload_survives_the_command_line(workload in any_workload()) {
        let parsed = CommandLine::parse(&format!("console=ttyS0 {workload} quiet"));
        prop_assert_eq!(parsed.workload, workload);
        prop_assert!(parsed.rejected.is_empty());
    }

    #[test]
    fn a_workload_survives_json(workload in any_workload()) {
        let text = serde_json::to_string(&workload).unwrap();
        prop_assert_eq!(serde_json::from_str::<Workload>(&text).unwrap(), workload);
    }

    #[test]
    fn no_command_line_breaks_the_parser(line in "\\PC{0,200}") {
        let parsed = CommandLine::parse(&line);
        prop_assert!(parsed.workload.cpu_percent <= 100 && parsed.workload.heartbeat_ms >= 1);
    }

    #[test]
    fn no_known_word_breaks_the_parser(
        words in proptest::collection::vec(("(ip|gw|sweep|disk|churn|cpu|fill|hb|virtio_mmio.device)", "[-+0-9a-fxKM@:./]{0,24}"), 0..60)
    ) {
        let line: Vec<String> = words.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let parsed = CommandLine::parse(&line.join(" "));
        prop_assert!(parsed.devices.len() <= 32 && parsed.rejected.len() <= 32);
    }

    #[test]
    fn no_datagram_breaks_the_request_parser(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        // Whatever it says, it says it without a panic.
        let _ = serde_json::from_slice::<Request>(&bytes);
    }

    #[test]
    fn no_almost_right_request_breaks_the_parser(
        text in "\\{(\"(set|get|id)\":[\\{\\}\\[\\]0-9a-z\":,.eE+-]{0,60},?){0,3}\\}?"
    ) {
        let _ = serde_json::from_slice::<Request>(text.as_bytes());
    }

    #[test]
    fn settings_keep_a_workload_in_range(
        mut workload in any_workload(), sweep in any::<u32>(), cpu in any::<u8>(), heartbeat in any::<u32>()
    ) {
        let settings = Settings {
            sweep_mib: Some(sweep), cpu_percent: Some(cpu), heartbeat_ms: Some(heartbeat), ..Settings::default()
        };
        settings.apply(&mut workload);
        prop_assert!(workload.cpu_percent <= 100);
        prop_assert!((1..=60_000).contains(&workload.heartbeat_ms));
        prop_assert!(workload.sweep_mib <= 1 << 20);
    }
}

#[test]
fn the_documented_command_line_means_what_it_says() {
    let line = "ip=10.0.0.2/24 gw=10.0.0.1 sweep=64:100 disk=16:8 cpu=25 fill=512 hb=100 \
                virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6";
    let parsed = CommandLine::parse(line);
    assert_eq!(parsed.workload.ip, Some(Address { ip: [10, 0, 0, 2].into(), prefix: 24 }));
    assert_eq!(parsed.workload.gateway, Some([10, 0, 0, 1].into()));
    assert_eq!((parsed.workload.sweep_mib, parsed.workload.sweep_mib_per_second), (64, 100));
    assert_eq!((parsed.workload.disk_mib, parsed.workload.disk_mib_per_second), (16, 8));
    assert_eq!((parsed.workload.cpu_percent, parsed.workload.fill_mib, parsed.workload.heartbeat_ms), (25, 512, 100));
    assert_eq!(
        parsed.devices,
        [MmioDevice { base: 0xd000_0000, size: 4096, gsi: 5 }, MmioDevice { base: 0xd000_1000, size: 4096, gsi: 6 }]
    );
}

#[test]
fn bad_words_are_reported_and_leave_the_defaults() {
    let line = "ip=10.0.0.2 gw=1.2.3 sweep=64 cpu=half virtio_mmio.device=4K@0xd0000000 other=1 word";
    let parsed = CommandLine::parse(line);
    assert_eq!(parsed.workload, Workload::default());
    assert!(parsed.devices.is_empty());
    assert_eq!(
        parsed.rejected,
        ["ip=10.0.0.2", "gw=1.2.3", "sweep=64", "cpu=half", "virtio_mmio.device=4K@0xd0000000"]
    );
}

#[test]
fn device_windows_may_not_wrap() {
    for word in ["4K@0xffffffffffffffff:5", "99999999999999999999K@0:5", "18446744073709551615M@0x0:5", "K@0:1", "@:"] {
        assert_eq!(word.parse::<MmioDevice>(), Err(()), "{word}");
    }
}

#[test]
fn the_documented_requests_are_understood() {
    let request: Request = serde_json::from_str(
        r#"{"set": {"sweep_mib":64,"sweep_mib_per_second":100,"disk_mib":16,"disk_mib_per_second":8,"cpu_percent":25}}"#,
    )
    .unwrap();
    let workload = Workload {
        sweep_mib: 64,
        sweep_mib_per_second: 100,
        disk_mib: 16,
        disk_mib_per_second: 8,
        cpu_percent: 25,
        ..Workload::default()
    };
    let left_out = Settings {
        heartbeat_ms: None,
        fill_mib: None,
        churn_mib: None,
        churn_mib_per_second: None,
        ..Settings::of(&workload)
    };
    assert_eq!(request.set, Some(left_out));
    assert_eq!(request.get, None);

    let request: Request = serde_json::from_str(r#"{"get":"status"}"#).unwrap();
    assert_eq!(request, Request { get: Some(Topic::Status), ..Request::default() });
}

#[test]
fn unknown_fields_are_refused_by_name() {
    let error = serde_json::from_str::<Request>(r#"{"set":{"sweep_mb":64}}"#).unwrap_err().to_string();
    assert!(error.contains("sweep_mb"), "{error}");
}

#[test]
fn a_status_with_fields_of_a_later_version_is_read() {
    let reply: Reply = serde_json::from_str(r#"{"heartbeat":7,"something_new":true}"#).unwrap();
    assert_eq!(reply, Reply::Status(Status { heartbeat: 7, ..Status::default() }));
    let reply: Reply = serde_json::from_str(r#"{"error":"no"}"#).unwrap();
    assert_eq!(reply, Reply::Error { error: "no".to_owned() });
}
