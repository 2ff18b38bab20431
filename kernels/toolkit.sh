#!/usr/bin/env bash
# Prints `export` lines for building with feature `cuda`: eval "$(kernels/toolkit.sh)".
# A CUDA toolkit found on the machine (12.x or 13.x) is used as it is. Without one, NVIDIA's own Python wheels, which
# hold a complete compiler and the link-time libraries (1.2 GB), are installed once into a cache folder.
set -euo pipefail

cache="${XDG_CACHE_HOME:-$HOME/.cache}/wan-train/cuda-13.0"
wheels=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85
        nvidia-cuda-runtime==13.0.96 nvidia-cuda-nvrtc==13.0.88 nvidia-cublas==13.1.0.3 nvidia-curand==10.4.0.35)

say() { echo "$*" >&2; }

find_toolkit() {
  for home in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda /opt/cuda; do
    if [ -n "$home" ] && [ -x "$home/bin/nvcc" ]; then echo "$home"; return; fi
  done
  if command -v nvcc >/dev/null; then dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")"; fi
}

install_wheels() {
  say "no CUDA compiler found: installing one from NVIDIA's Python wheels (1.2 GB) into $cache"
  command -v python3 >/dev/null || { say "error: python3 is missing (it only unpacks the compiler)"; say "hint: apt-get install python3-venv, or install a CUDA toolkit and set CUDA_HOME"; exit 1; }
  local partial="$cache.partial"
  rm -rf "$partial"
  python3 -m venv "$partial" >&2
  "$partial/bin/pip" install --quiet --disable-pip-version-check "${wheels[@]}" >&2
  local home
  home=$(echo "$partial"/lib/python3*/site-packages/nvidia/cu13)
  ( cd "$home/lib"
    for name in cublas cublasLt cudart curand nvrtc; do ln -sf "$(ls lib$name.so.* | head -n 1)" "lib$name.so"; done
    mkdir -p stubs
    # The driver is only there on GPU machines; its place is held by an empty library of the same name.
    echo | cc -shared -x c - -o stubs/libcuda.so -Wl,-soname,libcuda.so.1 )
  ln -sfn lib "$home/lib64"
  # The folder has its final name only when everything in it is complete.
  rm -rf "$cache"
  mv "$partial" "$cache"
}

home=$(find_toolkit)
if [ -z "$home" ]; then
  mkdir -p "${cache%/*}"
  exec 9>"${cache%/*}/.cuda.lock"
  flock 9
  [ -d "$cache" ] || install_wheels
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1 || true)
  if [[ "$driver" =~ ^[0-9]+$ ]] && [ "$driver" -lt 580 ]; then
    say "warning: programs built with CUDA 13 need NVIDIA's driver 580 or later, this machine has $driver"
    say "hint: update the driver, or install a CUDA 12 toolkit and set CUDA_HOME"
  fi
  home=$(echo "$cache"/lib/python3*/site-packages/nvidia/cu13)
fi
echo "export CUDA_HOME='$home' CUDA_PATH='$home' CUDA_ROOT='$home' PATH='$home/bin':\"\$PATH\""
# PTX of this level runs on every later card; our own kernels are compiled for each card by kernels/build.rs.
echo "export CUDA_COMPUTE_CAP=80 LIBRARY_PATH='$home/lib64:$home/lib64/stubs'\${LIBRARY_PATH:+:\$LIBRARY_PATH}"
