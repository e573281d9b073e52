#!/usr/bin/env bash
# Compiles mmcv with its operators, once for all clones, and prints the wheel.
#
#   environments/compile_mmcv.sh PYTHON NAME==VERSION
#
# The wheel is kept in $MMDET_EMA_CACHE (~/.cache/mmdet_ema), one for each
# version of Python and torch. A build that is stopped leaves its objects
# there, and the next one goes on from them.
set -euo pipefail
python=$(realpath -s "$1") name=${2%%==*} version=${2##*==}
cache=${MMDET_EMA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mmdet_ema}
key=$("$python" -c 'import platform, sys, torch; print("cp%d%d-torch%s-%s" % (
  *sys.version_info[:2], torch.__version__.split("+")[0], platform.machine()))')
wheels=$cache/wheels/$key build=$cache/build/$key/$name-$version

find_wheel() { # a wheel that is there in part (a full disk) is no wheel
  for wheel in "$wheels/${name//-/_}-$version"-*.whl; do
    if "$python" -m zipfile -t "$wheel" >/dev/null 2>&1; then
      echo "$wheel"
      return
    fi
  done
  return 1
}

mkdir -p "$wheels" "$build"
exec 9>"$build/lock"
flock 9 # two clones do not build the same thing in one folder
if find_wheel; then exit; fi
command -v c++ >/dev/null || {
  echo "setup: compiling $name needs a C++ compiler (Debian: g++)" >&2
  exit 1
}
echo "setup: compiling $name $version for the CPU, once: 8 minutes on two" \
  "cores; what the compiler says is in $build/log" >&2
cd "$build"
if [ ! -d source ]; then
  "$python" -m pip download --quiet --no-deps --no-build-isolation \
    --no-binary :all: --dest . "$name==$version" >log 2>&1 ||
    { tail -n 5 log >&2 && exit 1; }
  rm -rf unpacked && mkdir unpacked && tar -xzf ./*.tar.gz -C unpacked
  mv unpacked/* source
fi
# Without debug information it takes less than half the time. No GPU is asked
# for, so that it is the same wheel on every machine.
cd source
PATH=$(dirname "$python"):$PATH CFLAGS="-g0 ${CFLAGS:-}" MMCV_WITH_OPS=1 \
  FORCE_CUDA=0 CUDA_VISIBLE_DEVICES='' MAX_JOBS=${MAX_JOBS:-$(nproc)} \
  "$python" -m pip wheel --verbose --no-deps --no-build-isolation \
  --wheel-dir ../wheel . >>../log 2>&1 ||
  { tail -n 30 ../log >&2 && exit 1; }
for wheel in ../wheel/*.whl; do # shown whole or not at all
  cp "$wheel" "$wheels/.part" && mv "$wheels/.part" "$wheels/${wheel##*/}"
done
rm -rf "$build/source" "$build/wheel" "$build"/*.tar.gz
find_wheel
