#!/usr/bin/env bash
# Packs what SGLang and shmroute need on a GPU machine that reaches no package index.
#
#     bench/device/assemble.sh DEST        (DEST is a folder that git ignores, e.g. .device)
#
# It downloads the wheels of packages.txt, leaves out what one Hopper GPU does not need (1.6 GB
# become some 270 MB), adds stubs/ and writes DEST/site.tar.xz, which run.sh unpacks there.
#
#   PY312=COMMAND   a Python 3.12 that compiles the bytecode here; engines start faster there
#   WHEELS=FOLDER   where wheels are kept for the next time
#
# Needs pip, unzip, strip (binutils), tar and xz. About 3 minutes the first time.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dest=${1:?usage: assemble.sh DEST}
limit_mib=55
wheels=${WHEELS:-${XDG_CACHE_HOME:-$HOME/.cache}/shmroute/device-wheels}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir -p "$dest" "$wheels"

# pip matches a platform tag exactly: a wheel for an older glibc has to be named, too.
platforms=(--platform linux_x86_64 --platform manylinux1_x86_64 --platform manylinux2014_x86_64)
for minor in $(seq 5 39); do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
echo "downloading wheels to $wheels" >&2
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
  "${platforms[@]}" --dest "$wheels" --requirement "$here/packages.txt"

# Unpacks the one wheel of a pinned package; what follows its name is left out.
unpack() {
  local name version wheel
  name=$(tr '-' '_' <<<"${1%%==*}") version=${1##*==}
  wheel=$(find "$wheels" -iname "$name-$version-*.whl" -print -quit)
  [ -n "$wheel" ] || { echo "assemble.sh: no wheel of $1 in $wheels" >&2; exit 1; }
  shift
  if [ $# -gt 0 ]; then unzip -qo "$wheel" -d "$site" -x "$@"; else unzip -qo "$wheel" -d "$site"; fi
}

while read -r package; do
  case $package in
  '' | '#'*) ;;
  sglang==*) # diffusion, tests, Rust servers
    unpack "$package" 'sglang/multimodal_gen/*' 'sglang/test/*' 'sglang/srt/server/_core*' \
      'sglang/srt/grpc/_core*' 'sglang/srt/multimodal/_core*' ;;
  sglang-kernel==*) # attention kernels other than Triton's, Blackwell
    unpack "$package" 'sgl_kernel/flash_ops*' 'sgl_kernel/infllm_ops*' 'sgl_kernel/flashmla_ops*' \
      'sgl_kernel/sm100/*' ;;
  xgrammar==*) unpack "$package" 'xgrammar/lib/*' 'xgrammar/include/*' ;;
  zstandard==*) unpack "$package" 'zstandard/_cffi*' ;; # another way to the same library
  torch-memory-saver==*) # builds for CUDA 12
    unpack "$package" '*_cu12.abi3.so' '*_preload.abi3.so' '*_torch.abi3.so' ;;
  *) unpack "$package" ;;
  esac
done <"$here/packages.txt"
# Of two places the loader looks here first on any GPU but Hopper, second on Hopper: both work.
mv "$site/sgl_kernel/sm90/common_ops.abi3.so" "$site/sgl_kernel/common_ops.abi3.so"
strip --strip-unneeded "$site"/xgrammar/*.so "$site"/torch_memory_saver_*.so "$site"/zstandard/*.so
cp -R "$here"/stubs/. "$site"

find "$site" -name __pycache__ -prune -exec rm -rf {} +
if [ -n "${PY312:-}" ]; then
  # Unchecked: unpacking need not restore the sources' times. A file that 3.12 cannot compile
  # (templates) stays without.
  $PY312 -m compileall -q -j 0 --invalidation-mode unchecked-hash "$site" >/dev/null || true
fi
echo "packing $(du -sm "$site" | cut -f1) MiB" >&2
tar -C "$site" -cf - . | xz -T0 -6 >"$dest/site.tar.xz"
size=$(($(stat -c %s "$dest/site.tar.xz") >> 20))
echo "$dest/site.tar.xz: $size MiB" >&2
[ "$size" -lt "$limit_mib" ] || { echo "assemble.sh: more than $limit_mib MiB" >&2; exit 1; }
