#!/usr/bin/env bash
# Everything worth a few minutes of a CUDA device: right, fast, and where the time goes.
# Usage, in an environment with agentsd[bench,dev]: scripts/gpu_check.sh [FOLDER]   (default: benchmarks/results)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
folder=${1:-benchmarks/results}
mkdir -p "$folder"
device=$($python -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
stamp=$folder/$device-$(date -u +%F)
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -1)
echo "$device, driver $driver"

$python -m pytest -m gpu --quiet tests

ours=(--method stock --method floor:of=paper --method paper --method faithful --method floor:of=fast --method fast --method turbo)
methods=("${ours[@]}")
for peer in tomesd:tomesd deepcache:DeepCache xformers:xformers; do
    if $python -c "import ${peer#*:}" 2>/dev/null; then methods+=(--method "${peer%%:*}"); fi
done
bench() { $python -m agentsd.cli.bench --device cuda --dtype float16 "$@"; }
for model in sd15 sdxl; do
    # 512², 768², 1024², 1536² and 2048² pixels.
    bench --model $model --latent 64 96 128 192 256 --repeats 7 --memory "${methods[@]}" --output "$stamp-$model.json"
    bench --model $model --latent 64 128 --repeats 7 --compile "${ours[@]}" --output "$stamp-$model-compiled.json"
done
bench --profile --latent 64 --output "$stamp-profile-64.json"
bench --profile --latent 256 --output "$stamp-profile-256.json"
bench --launches --latent 64 --output "$stamp-launches.json"
bench --micro --output "$stamp-layers.json"
$python -m agentsd.cli.bench --table "$stamp"*.json
