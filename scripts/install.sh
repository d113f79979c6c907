#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes .venv: the pinned packages of requirements/, vLLM as pure Python, and this package, editable.
#
#   scripts/install.sh [--dev] [--docs] [--tpu]
#
#   --dev    also tests, lint and types         (requirements/dev.txt)
#   --docs   also the documentation's tools     (requirements/docs.txt)
#   --tpu    also what a TPU VM needs           (requirements_v7x.txt)
#
# A step that is done leaves a stamp in .venv/.stamps with a hash of what it was made from: an interrupted installation goes on
# where it stopped, a changed requirements file repeats its own step only, and a complete one takes no time.
# PYTHON=… chooses the interpreter of a new .venv (3.11 to 3.13).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VLLM_VERSION=0.32.0
readonly TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
readonly VENV=.venv
readonly STAMPS=$VENV/.stamps
readonly SUPPORTED="3.11 3.12 3.13"

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0

say() { printf '==> %s\n' "$*"; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

DEV=0 DOCS=0 TPU=0
for option in "$@"; do
    case $option in
    --dev) DEV=1 ;;
    --docs) DOCS=1 ;;
    --tpu) TPU=1 ;;
    *) die "unknown option $option; known are --dev, --docs and --tpu" ;;
    esac
done

# minor_of PYTHON: prints "3.12", or nothing where that is no working Python.
minor_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

supported() { [[ -n $1 && " $SUPPORTED " == *" $1 "* ]]; }

# The interpreter for a new environment: $PYTHON if given, else python3 if it is supported, else the oldest supported one there is
# (it has been tested the most).
find_python() {
    local candidate seen=()
    if [[ -n ${PYTHON:-} ]]; then
        local given
        given=$(minor_of "$PYTHON")
        supported "$given" || die "PYTHON=$PYTHON is ${given:-no working Python}; one of $SUPPORTED is needed"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.11 python3.12 python3.13; do
        local version
        version=$(minor_of "$candidate")
        if supported "$version"; then
            echo "$candidate"
            return
        fi
        [[ -n $version ]] && seen+=("$candidate is $version")
    done
    die "no supported Python found (${seen[*]:-no python3 at all}); install one of $SUPPORTED, or point at it: make PYTHON=/path/to/python3.11"
}

make_venv() {
    local python
    if [[ -x $VENV/bin/python ]] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        local have
        have=$(minor_of "$VENV/bin/python")
        supported "$have" || die "$VENV holds Python $have; one of $SUPPORTED is needed: remove $VENV and run this again"
        if [[ -n ${PYTHON:-} && $(minor_of "$PYTHON") != "$have" ]]; then
            die "$VENV holds Python $have but PYTHON=$PYTHON is $(minor_of "$PYTHON"): remove $VENV, or leave PYTHON out"
        fi
        return
    fi
    if [[ -x $VENV/bin/python ]] && "$VENV/bin/python" -m ensurepip >/dev/null 2>&1; then
        make_venv # it only lacked pip
        return
    fi
    python=$(find_python)
    say "Creating $VENV with $python ($(minor_of "$python"))"
    # --clear: what is there is the rest of an interrupted creation.
    "$python" -m venv --clear "$VENV" ||
        die "$python -m venv failed; on Debian and Ubuntu: apt-get install python$(minor_of "$python")-venv"
}

hash_of() {
    if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi | cut -d' ' -f1
}

# step NAME MESSAGE INPUTS COMMAND...: run COMMAND unless it has run for the same INPUTS (a string) before.
step() {
    local name=$1 message=$2 inputs=$3 stamp=$STAMPS/$1 log=$STAMPS/$1.log hash start=$SECONDS
    shift 3
    hash=$(printf '%s\n%s\n%s' "$minor" "$inputs" "$(declare -f "$1")" | hash_of)
    [[ -f $stamp && $(<"$stamp") == "$hash" ]] && return
    say "$message"
    rm -f "$stamp"
    if ! "$@" >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        die "that step failed ($log has all of its output); running the same command again goes on from here"
    fi
    printf '%s' "$hash" >"$stamp"
    say "  done in $((SECONDS - start)) s"
    changed=1
}

pip_install() { "$VENV/bin/python" -m pip install "$@"; }

# The CPU build of torch has a local version ("+cpu"), which only PyTorch's own index carries unless yours mirrors it.
install_torch() {
    pip_install --no-deps "$1" || pip_install --no-deps --extra-index-url "$TORCH_CPU_INDEX" "$1"
}

# --no-deps: the files list everything, and no resolver may add a CUDA build beside them.
install_pins() { pip_install --no-deps -r "$1"; }

# vLLM from its own source distribution without any device: no CUDA or CPU platform to get in the way, no compiler needed.
install_vllm() {
    pip_install --no-deps -r requirements/build.txt
    VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$VLLM_VERSION \
        pip_install --no-build-isolation --no-deps --no-binary vllm "vllm==$VLLM_VERSION"
}

install_package() { pip_install --no-deps --no-build-isolation -e .; }

check_imports() {
    "$VENV/bin/python" -c "
import importlib.metadata as metadata
import jax, flax, torch, transformers, vllm
assert metadata.version('vllm') == '$VLLM_VERSION', metadata.version('vllm')
entries = {e.name for e in metadata.entry_points(group='vllm.platform_plugins')}
assert 'tpu_inference' in entries, entries
"
}

make_venv
# One installation at a time; another waits here, then finds everything done.
if command -v flock >/dev/null; then
    exec 9>"$VENV/.install.lock"
    flock -n 9 || { say "Waiting for another installation into $VENV"; flock 9; }
fi
mkdir -p "$STAMPS"
minor=$(minor_of "$VENV/bin/python")
pins=requirements/cpu-py${minor/./}.txt
all_pins=$(cat requirements/cpu-py311.txt "$pins")
torch=$(grep -h '^torch==' <<<"$all_pins" | head -n 1)
changed=0

# A stamp says what was done; forget it where the result has been uninstalled since.
installed() { compgen -G "$VENV/lib/python$minor/site-packages/$1.dist-info" >/dev/null; }
installed 'torch-*' || rm -f "$STAMPS/torch"
installed "vllm-$VLLM_VERSION" || rm -f "$STAMPS/vllm"
installed 'tpu_inference-*' || rm -f "$STAMPS/package"

step torch "Installing $torch" "$torch" install_torch "$torch"
step pins "Installing the pinned packages of $pins (about two minutes on a new machine)" "$all_pins" install_pins "$pins"
step vllm "Installing vLLM $VLLM_VERSION as pure Python" "$VLLM_VERSION $(<requirements/build.txt)" install_vllm
if ((TPU)); then
    step tpu "Installing what a TPU VM needs (requirements_v7x.txt)" "$(<requirements_v7x.txt)" install_pins requirements_v7x.txt
fi
if ((DEV)); then
    step dev "Installing tests, lint and types (requirements/dev.txt)" "$(<requirements/dev.txt)" install_pins requirements/dev.txt
fi
if ((DOCS)); then
    step docs "Installing the documentation's tools (requirements/docs.txt)" "$(<requirements/docs.txt)" install_pins requirements/docs.txt
fi
step package "Installing this package, editable" "$PWD $(<pyproject.toml)" install_package
if ((changed)); then
    rm -f "$STAMPS/imports"
fi
step imports "Checking that what was installed can be imported" "$VLLM_VERSION" check_imports
((changed)) || say "$VENV is complete (Python $minor, vLLM $VLLM_VERSION)"
