#!/usr/bin/env bash
# Builds the container image; see --help.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: ./build.sh

Checks that the weights are whole, builds the image, and prints the base it stands on and the image's size.
Next: ./test.sh proves the image on the sample cases, ./export.sh writes the tarballs to upload.

Environment:
  IMAGE             name of the image                    (default ichseg:latest)
  CONTAINER_ENGINE  docker, or what stands in for it     (default docker)
                      CONTAINER_ENGINE=podman ./build.sh
                      CONTAINER_ENGINE="podman --runtime runc" ./build.sh
  BASE_IMAGE        what to build on                     (default: see ARG BASE_IMAGE in the Dockerfile)
                      CPU only, for about a fifth of the size, with torch's CPU build from PyTorch's own index:
                      BASE_IMAGE=python:3.11-slim-bookworm \
                      BUILD_ARGS="--build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu" ./build.sh
  BUILD_ARGS        further flags for the engine's build, split at spaces
                      BUILD_ARGS="--no-cache --network host" ./build.sh
HELP
}

fail() {
    echo "build.sh: $*" >&2
    exit 1
}

case "${1-}" in
    "") ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && fail "unknown argument: $1" ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")"
image="${IMAGE:-ichseg:latest}"
base="${BASE_IMAGE:-$(sed -n 's/^ARG BASE_IMAGE=//p' Dockerfile)}"
read -r -a engine <<<"${CONTAINER_ENGINE:-docker}"
read -r -a build_args <<<"${BUILD_ARGS-}"
command -v "${engine[0]}" >/dev/null || fail "no ${engine[0]} here; CONTAINER_ENGINE=podman uses podman"

check_weights() {
    local file sum=(sha256sum)
    command -v sha256sum >/dev/null || sum=(shasum -a 256) # macOS
    [[ -f weights/model.json && -f weights/SHA256SUMS ]] ||
        fail "weights/ has no model.json or no SHA256SUMS: nothing to ship"
    compgen -G 'weights/*.safetensors' >/dev/null || fail "weights/ has no *.safetensors: nothing to ship"
    for file in weights/*; do
        if [[ "$(head -c 23 "$file" | tr -d '\0')" == "version https://git-lfs" ]]; then
            fail "$file is a Git LFS pointer, not the file itself: run 'git lfs pull' first"
        fi
    done
    for file in weights/model.json weights/*.safetensors; do
        grep -qE "[ *](\./)?${file#weights/}\$" weights/SHA256SUMS || fail "$file is not listed in weights/SHA256SUMS"
    done
    (cd weights && "${sum[@]}" -c SHA256SUMS >/dev/null) ||
        fail "weights/ differs from weights/SHA256SUMS: fetch it again, or export the model again"
}

check_weights

# Fetched by name first: what is built on is then in the local store and can be named by digest.
"${engine[@]}" image inspect "$base" >/dev/null 2>&1 || "${engine[@]}" pull --platform linux/amd64 "$base"
echo "base:  $base"
"${engine[@]}" image inspect --format '       id {{.Id}}{{range .RepoDigests}}
       digest {{.}}{{end}}' "$base"

labels=(--label "org.opencontainers.image.base.name=$base")
if revision="$(git rev-parse HEAD 2>/dev/null)"; then
    git diff --quiet HEAD -- process.py ichseg weights requirements.txt Dockerfile || revision+="-changed"
    labels+=(--label "org.opencontainers.image.revision=$revision")
fi
"${engine[@]}" build --platform linux/amd64 --build-arg "BASE_IMAGE=$base" "${labels[@]}" \
    ${build_args[@]+"${build_args[@]}"} -t "$image" .

size="$("${engine[@]}" image inspect --format '{{.Size}}' "$image")"
echo "image: $image, $((size / 1000000)) MB unpacked"
"${engine[@]}" image inspect --format '       id {{.Id}}' "$image"
