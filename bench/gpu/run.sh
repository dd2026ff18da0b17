#!/usr/bin/env bash
# The device benchmark, on a bare machine or in an environment: bash bench/gpu/run.sh [--help]
#
# PY=python3 names the Python that has torch. Wheels that it lacks are taken from .whl/ and .whl-peers/ in the root of
# the tree, if they exist (bench/gpu/wheels.sh fills them on a machine with a network); nothing else is needed.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec "${PY:-python3}" bench/gpu/run.py "$@"
