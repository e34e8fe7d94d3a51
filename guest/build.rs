//! Builds the bare-metal image in `image/` and hands its path to the library, which embeds it.
//!
//! The image is a program of its own with a linker script, flags and a profile that must not reach the workspace (nor
//! the workspace's flags the image), so a second cargo builds it, into a target directory below `OUT_DIR`. Cargo runs
//! this again only when a file of the image changes.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The image is linked for the host's own target, which is always installed. Naming it keeps our flags away from build
/// scripts and procedural macros.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Flags of the image. Absolute addresses below 2 GiB, no C runtime, and no position independence.
const FLAGS: &[&str] = &[
    "-Crelocation-model=static",
    "-Ccode-model=small",
    "-Clink-arg=-nostartfiles",
    "-Clink-arg=-nostdlib",
    "-Clink-arg=-static",
    "-Clink-arg=-no-pie",
    "-Clink-arg=-Wl,--build-id=none",
    "-Clink-arg=-Wl,-z,norelro",
    "-Clink-arg=-Wl,-z,noexecstack",
];

/// Settings of the outer build that would change how the image is built.
fn is_foreign(name: &str) -> bool {
    const EXACT: &[&str] = &[
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_TARGET_DIR",
        "CLIPPY_ARGS",
        "LLVM_PROFILE_FILE",
        "TARGET",
        "PROFILE",
        "OPT_LEVEL",
        "DEBUG",
    ];
    const PREFIX: &[&str] = &["CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_TARGET_", "CARGO_CFG_", "CARGO_FEATURE_"];
    EXACT.contains(&name) || PREFIX.iter().any(|prefix| name.starts_with(prefix))
}

fn variable(name: &str) -> OsString {
    println!("cargo::rerun-if-env-changed={name}");
    env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: run this through cargo"))
}

fn build(crate_dir: &Path, out_dir: &Path) -> PathBuf {
    let image_dir = crate_dir.join("image");
    let target_dir = out_dir.join("image");
    let script = image_dir.join("link.ld");
    let mut flags: Vec<String> = FLAGS.iter().map(|&flag| flag.to_owned()).collect();
    flags.push(format!("-Clink-arg=-Wl,-T,{}", script.display()));

    let mut cargo = Command::new(variable("CARGO"));
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(is_foreign) {
            cargo.env_remove(&name);
        }
    }
    cargo
        .current_dir(&image_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .args(["build", "--release", "--locked", "--target", TARGET, "--target-dir"])
        .arg(&target_dir);
    let output = cargo.output().unwrap_or_else(|error| panic!("cannot start {cargo:?}: {error}"));
    assert!(
        output.status.success(),
        "building the guest image failed ({}):\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    target_dir.join(TARGET).join("release").join("headroom-guest-image")
}

fn main() {
    let crate_dir = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let out_dir = PathBuf::from(variable("OUT_DIR"));
    for input in ["build.rs", "image/src", "image/Cargo.toml", "image/Cargo.lock", "image/link.ld", "src/protocol"] {
        println!("cargo::rerun-if-changed={input}");
    }
    let image = build(&crate_dir, &out_dir);
    println!("cargo::rustc-env=HEADROOM_GUEST_IMAGE={}", image.display());
}
