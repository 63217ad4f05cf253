#!/usr/bin/env bash
# Gather what a bare machine with a GPU lacks to run benchmarks/gpu.py, and print the commands to run there.
#
#   benchmarks/gpu_kit.sh [--without-onnxruntime]
#
# The machine is expected to have Python 3.12, torch, torchvision, timm, transformers, onnx, onnxscript, safetensors,
# tokenizers, tensorboard, matplotlib, typer, rich, Pillow, PyYAML, scipy, scikit-learn and pytest, a GPU of compute
# capability 9.0, and no network.  This repository's files are copied there, .gpu_kit/ beside them, 64 MiB at most in
# each copy.  Everything lies in .gpu_kit/, which git ignores.
#
# - wheels/: the packages that are missing there, in the versions of constraints.txt, about 17 MiB.  OpenVINO (over 50
#   MiB) is left out: the quickstart then exports for ONNX Runtime alone.
# - onnxruntime/: ONNX Runtime for the GPU.  Its wheel has 256 MB and xz -9 only makes 185 MB of its largest library, so
#   gpu_kit_onnxruntime.py keeps the kernels of this kind of GPU, which makes it about 45 MiB.  It does not fit into one
#   copy together with wheels/, so it goes first, in a copy of its own, to the same machine.
# - commit: what the results are of, because the files are copied without their history.
set -euo pipefail
cd "$(dirname "$0")/.."

limit_mib=64
kit=.gpu_kit
python=${PYTHON:-python3}
packages=(
    open_clip_torch ftfy wcwidth pydantic pydantic_core annotated-types typing-inspection
    typer timm nncf openvino-telemetry pydot plotly webdataset braceexpand
)

# The versions of constraints.txt; a name there may differ in case and in - or _.
pinned() {
    awk -F== -v name="$1" 'BEGIN { gsub("-", "_", name); name = tolower(name) }
        { found = tolower($1); gsub("-", "_", found); if (found == name) print }' constraints.txt
}

download() { # FOLDER REQUIREMENT...
    local folder=$1 platforms=()
    shift
    for tag in manylinux_2_{17,24,26,27,28,31,34}_x86_64 manylinux{1,2010,2014}_x86_64; do
        platforms+=(--platform "$tag")
    done
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version 3.12 --implementation cp "${platforms[@]}" --dest "$folder" "$@"
}

bytes_of() { find "$@" -type f -print0 | du --apparent-size -bc --files0-from=- | tail -1 | cut -f1; }
mib() { echo $((($1 + 1048575) / 1048576)); }

rm -rf "$kit/wheels"
mkdir -p "$kit/wheels" "$kit/onnxruntime"
git describe --always --dirty --abbrev=12 >"$kit/commit"

requirements=()
for package in "${packages[@]}"; do
    found=$(pinned "$package")
    requirements+=("${found:-$package}")
done
download "$kit/wheels" "${requirements[@]}"

packed=$kit/onnxruntime/onnxruntime_gpu.tar.xz
if [ "${1:-}" = --without-onnxruntime ]; then
    rm -f "$packed"
elif [ ! -f "$packed" ]; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    download "$scratch" "$(pinned onnxruntime-gpu)"
    "$python" benchmarks/gpu_kit_onnxruntime.py "$scratch"/onnxruntime_gpu-*.whl "$scratch/packed"
    mv "$scratch/packed" "$packed"
fi

tree=$(git ls-files -z --cached --others --exclude-standard | du --apparent-size -bc --files0-from=- | tail -1 | cut -f1)
wheels=$(bytes_of "$kit/wheels")
echo "files of the repository: $(mib "$tree") MiB; wheels: $(mib "$wheels") MiB"
if [ "$(mib $((tree + wheels)))" -gt "$limit_mib" ]; then
    echo "together they are more than $limit_mib MiB" >&2
    exit 1
fi

if [ -f "$packed" ]; then
    size=$(stat -c %s "$packed")
    echo "ONNX Runtime for the GPU: $(mib "$size") MiB"
    if [ "$(mib $((tree + size)))" -gt "$limit_mib" ]; then
        echo "with the repository that is more than $limit_mib MiB, so its rows on the GPU cannot be measured" >&2
    else
        cat <<END

1. Optional, for the rows of ONNX Runtime on the GPU; a minute. Copy there: $kit/onnxruntime
   Then at once step 2, on the same machine.

python3 -m tarfile -e $packed /tmp/site && ls /tmp/site/onnxruntime/capi
END
    fi
fi
cat <<END

2. At most 600 s. Copy there: $kit/wheels $kit/commit
   The results are in \$OUT, at most six files, each below 16 MiB; gpu.md goes to benchmarks/results/gpu.md.

python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site $kit/wheels/*.whl; PYTHONPATH=/tmp/site python3 benchmarks/gpu.py --out "\$OUT" --minutes 9.3

   Again for single steps, while time is left (copy the same, a fresh machine needs the first half too):

python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site $kit/wheels/*.whl; PYTHONPATH=/tmp/site python3 benchmarks/gpu.py --out "\$OUT" --only train_step --minutes 3
END
