#!/usr/bin/env bash
# Training steps on Burn's wgpu backend against the CPU's, on small golden models; fails where losses, gradients or updated weights differ.
# Runs on software Vulkan (Mesa's lavapipe: Debian's package mesa-vulkan-drivers), so it needs no GPU. The build takes long, for it compiles
# Burn again and wgpu with it; in the run most of the time goes into shaders, which Mesa caches. Set VK_DRIVER_FILES to the .json file of
# another driver to run it there.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${VK_DRIVER_FILES:-}" ]; then
  lavapipe=$(find /usr/share/vulkan/icd.d -name 'lvp_icd*.json' -print -quit 2>/dev/null || true)
  if [ -z "$lavapipe" ]; then
    echo "there is no software Vulkan here: install Debian's package mesa-vulkan-drivers, or set VK_DRIVER_FILES to a driver" >&2
    exit 1
  fi
  export VK_DRIVER_FILES=$lavapipe
fi
echo "Vulkan driver: $VK_DRIVER_FILES"
# Whole-program optimisation would add minutes and tell nothing here.
export CARGO_PROFILE_RELEASE_LTO=off
cargo build --quiet --release --locked --package ernie-train --features gpu --example gpu_step
echo "build: $SECONDS s"
SECONDS=0
target/release/examples/gpu_step
echo "run: $SECONDS s"
