#!/usr/bin/env bash
# Installs what the build and the demo need and this machine lacks. Debian 12 or newer, or Ubuntu; as root.
# Usage: scripts/install-deps.sh [build|test|bench]
set -euo pipefail

want=${1:-build}
missing=()
need_command() { command -v "$1" >/dev/null 2>&1 || missing+=("$2"); }
need_file() { compgen -G "$1" >/dev/null || missing+=("$2"); }

need_command cc gcc
need_command ip iproute2
# bindgen, run by the build of the crate userfaultfd, loads libclang and reads the C library's headers.
ls /usr/lib/llvm-*/lib/libclang*.so* /usr/lib/*/libclang*.so* 2>/dev/null | grep -qE 'libclang(-[0-9.]+)?\.so' || missing+=(libclang-dev)
need_file '/usr/include/linux/userfaultfd.h' linux-libc-dev
need_file '/usr/include/stdio.h' libc6-dev

# A TLS client that is not ours: it tries to speak TLS 1.2. A ping that is not ours either. (The small Linux of the tests installs what it needs itself.)
if [ "$want" = test ]; then
  need_command openssl openssl
  need_command ping iputils-ping
fi
if [ "$want" = bench ]; then
  need_command qemu-system-x86_64 qemu-system-x86
  need_command fio fio
fi

if [ ${#missing[@]} -gt 0 ]; then
  if ! command -v apt-get >/dev/null 2>&1; then
    echo "missing: ${missing[*]} (Debian's package names). Install them with this system's package manager and run make again." >&2
    exit 1
  fi
  if [ "$(id -u)" != 0 ]; then
    echo "missing: ${missing[*]}. Run as root: apt-get install ${missing[*]}" >&2
    exit 1
  fi
  echo "installing from Debian: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

if ! command -v cargo >/dev/null 2>&1; then
  echo "cargo is missing: install a Rust toolchain ($(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) or newer), for example with rustup, and run make again." >&2
  exit 1
fi
