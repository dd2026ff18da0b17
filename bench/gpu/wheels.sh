#!/usr/bin/env bash
# Fetches, on a machine with a network, what a bare machine lacks for bench/gpu/run.sh: wheels for CPython 3.12 on x86-64
# into .whl/ (the project's) and .whl-peers/ (the peers'), both kept out of git. A machine with torch, triton,
# transformers, accelerate and pytest needs nothing else.
#
#   bash bench/gpu/wheels.sh            # both
#   bash bench/gpu/wheels.sh --no-peers # the project's only
set -euo pipefail
cd "$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel)"
PYTHON=${PYTHON:-python3}

PROJECT=(  # versions of constraints.txt
  zarr==3.1.6 numcodecs==0.16.6 donfig==0.8.1.post1 google-crc32c==1.9.0
  datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19
)
PEERS=(  # bench/peers-requirements.txt and what pip resolves with it; for wandb, run.py writes a stub
  sae-lens==6.54.12 transformer-lens==3.9.0 better-abc==0.0.3 simple-parsing==0.1.9 docstring-parser==0.18.0
  dictionary-learning==0.1.0 nnsight==0.3.7 pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0
  typing-inspection==0.4.5 python-socketio==5.18.1 python-engineio==4.15.1 bidict==0.24.1 websocket-client==1.9.2
  zstandard==0.25.0 eai-sparsify==1.3.3 natsort==8.4.0 schedulefree==1.4.1
)

tags=()
for tag in manylinux_2_39 manylinux_2_34 manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  tags+=(--platform "${tag}_x86_64")
done

fetch() {  # folder name==version...
  local folder=$1; shift
  rm -rf "$folder"; mkdir -p "$folder"
  "$PYTHON" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${tags[@]}" -d "$folder" "$@"
  # If a release has several builds, pip has no preference: check that there is exactly one of each.
  [ "$(ls "$folder"/*.whl | wc -l)" = $# ] || { echo "$folder: expected $# wheels" >&2; ls "$folder" >&2; exit 1; }
}

exclude=$(git rev-parse --git-path info/exclude)
mkdir -p "$(dirname "$exclude")"
for folder in .whl .whl-peers; do
  grep -qxF "/$folder/" "$exclude" 2>/dev/null || echo "/$folder/" >> "$exclude"
done
fetch .whl "${PROJECT[@]}"
git rev-parse --short=9 HEAD > .whl/COMMIT  # for a copy of the tree without git
rm -rf .whl-peers
[ "${1:-}" = --no-peers ] || fetch .whl-peers "${PEERS[@]}"
du -sh .whl .whl-peers 2>/dev/null
