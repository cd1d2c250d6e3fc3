#!/bin/sh
# Runs the stages of a dataset on the stack, each as a Ray job: jobs.sh STACK DATASET BIN.
set -eu
stack=$1 dataset=$2 PATH=$3:$PATH
export PATH
[ -e "$stack/client.env" ] || { echo "there is no stack in $stack; start one with \`make up\`" >&2; exit 1; }
. "$stack/client.env"
if [ "$dataset" = textures ] && ! [ -e data/textures ]; then
    python -c 'from pathlib import Path; from sprue.demo.textures import write_textures; write_textures(Path("data/textures"))'
fi
[ -d "data/$dataset" ] || { echo "there are no images in data/$dataset" >&2; exit 1; }
for stage in manifest features search fit evaluate register; do
    ray job submit --working-dir . --runtime-env infra/ray/runtime_env.yaml -- \
        env SPRUE_COMMIT="$(git rev-parse HEAD)" \
        python "pipelines/$stage.py" --dataset "$dataset" --data "$PWD/data/$dataset" --store s3://sprue/store
done
