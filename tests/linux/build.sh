#!/usr/bin/env bash
# Builds the small Linux of the tests from Debian's kernel source, once: tests/linux/build.sh [--force]
# The result is kept as ${XDG_CACHE_HOME:-~/.cache}/headroom/linux-KEY/{vmlinux,bzImage}; KEY covers configuration and source.
# HEADROOM_LINUX=FILE names a kernel to be used instead; then nothing is built.
# Prints the folder, or says why it cannot be built and ends with 0: the test that needs it then says that it is skipped
# (or fails, with HEADROOM_REQUIRE_KVM=1).
set -euo pipefail
cd "$(dirname "$0")"
fragment=$PWD/config
package=linux-source
tools=(flex bison bc make gcc xz-utils lz4 libelf-dev)

skip() { echo "tests/linux: no kernel for the Linux test: $*" >&2; exit 0; }

if [ -n "${HEADROOM_LINUX:-}" ]; then
    [ -f "$HEADROOM_LINUX" ] || skip "HEADROOM_LINUX names $HEADROOM_LINUX, which is no file"
    echo "tests/linux: uses $HEADROOM_LINUX" >&2
    exit 0
fi
[ "$(uname -m)" = x86_64 ] || skip "this is not an x86-64 machine"

install() {
    local missing=()
    compgen -G "/usr/src/linux-source-*.tar.xz" >/dev/null && package=
    for name in $package "${tools[@]}"; do
        dpkg-query -W -f '${Status}' "$name" 2>/dev/null | grep -q 'ok installed' || missing+=("$name")
    done
    [ ${#missing[@]} -eq 0 ] && return
    command -v apt-get >/dev/null || skip "not a Debian system; missing: ${missing[*]}"
    [ "$(id -u)" = 0 ] || skip "not root; missing: ${missing[*]}"
    echo "tests/linux: installs ${missing[*]}" >&2
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null 2>&1 ||
        { apt-get update -q >/dev/null 2>&1 && apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null 2>&1; } ||
        skip "apt-get could not install ${missing[*]}"
}

cache=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/headroom
# With a kernel for this configuration in the cache nothing has to be installed.
key=$(sha256sum < "$fragment" | cut -c1-12)
target=$cache/linux-$key
if [ "${1:-}" != --force ] && [ -s "$target/vmlinux" ] && [ -s "$target/bzImage" ]; then
    echo "$target"
    exit 0
fi

install
source=$(compgen -G "/usr/src/linux-source-*.tar.xz" | sort -V | tail -1 || true)
[ -s "$source" ] || skip "there is no /usr/src/linux-source-*.tar.xz although the package is installed"
mkdir -p "$cache"
exec 9> "$cache/linux.lock"
flock 9
# Somebody else may have built it while this one waited.
if [ "${1:-}" != --force ] && [ -s "$target/vmlinux" ] && [ -s "$target/bzImage" ]; then
    echo "$target"
    exit 0
fi

work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "tests/linux: builds a small Linux in $work (about four minutes on two cores)" >&2
tar -xJf "$source" -C "$work" --strip-components=1
log=$cache/build.log
(
    cd "$work"
    # The parts of `make tinyconfig` and ours in one go, so that everything that is not named is off.
    cat kernel/configs/tiny-base.config kernel/configs/tiny.config arch/x86/configs/tiny.config "$fragment" > all.config
    make -s KCONFIG_ALLCONFIG=all.config allnoconfig
    # What the fragment asks for and the kernel does not know would be dropped without a word.
    missing=0
    while read -r line; do
        grep -qxF "$line" .config || { echo "not in the configuration: $line"; missing=1; }
    done < <(grep -E '^CONFIG_' "$fragment")
    [ $missing = 0 ]
    make -s -j"$(nproc)" vmlinux bzImage
) > "$log" 2>&1 || { tail -20 "$log" >&2; skip "the build failed, see $log"; }
mkdir -p "$target"
# Without symbols it loads faster; both steps are atomic for a reader.
strip -o "$target/vmlinux.new" "$work/vmlinux" && mv "$target/vmlinux.new" "$target/vmlinux"
cp "$work/arch/x86/boot/bzImage" "$target/bzImage.new" && mv "$target/bzImage.new" "$target/bzImage"
echo "$target"
