#!/usr/bin/env bash
# Builds the container image; see --help.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: ./build.sh [--api exec|invoke]
       ./build.sh --check-weights [FOLDER]

Checks that the weights are whole, builds the image, and prints the base it stands on and its size, layer by layer.
The code is Apache-2.0; the image's label org.opencontainers.image.licenses adds the licence of the weights, as
weights/model.json names it, or else weights/LICENSE.
Next: ./test.sh proves the image on the sample cases, ./export.sh writes the tarballs to upload.

  --api exec        the image segments what lies in /input and ends (default)
  --api invoke      the image is a server on port 4743: the platform keeps it running and asks it for one case after
                    another. Sets the label org.grand-challenge.api-method=invoke, by which the platform knows
  --check-weights   only checks the weights bundle in FOLDER (default weights): files listed in SHA256SUMS and
                    unaltered, none of them a Git LFS pointer

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

check_weights() {
    local folder="$1" file sum=(sha256sum)
    command -v sha256sum >/dev/null || sum=(shasum -a 256) # macOS
    [[ -f "$folder/model.json" && -f "$folder/SHA256SUMS" ]] ||
        fail "$folder/ has no model.json or no SHA256SUMS: nothing to ship"
    compgen -G "$folder/*.safetensors" >/dev/null || fail "$folder/ has no *.safetensors: nothing to ship"
    for file in "$folder"/*; do
        [[ -f "$file" && ! -L "$file" ]] || fail "$file is not a plain file; a bundle holds nothing else"
        if [[ "$(head -c 23 "$file" | tr -d '\0')" == "version https://git-lfs" ]]; then
            fail "$file is a Git LFS pointer, not the file itself: run 'git lfs pull' first"
        fi
    done
    for file in "$folder"/model.json "$folder"/*.safetensors; do
        grep -qE "[ *](\./)?${file##*/}\$" "$folder/SHA256SUMS" || fail "$file is not listed in $folder/SHA256SUMS"
    done
    (cd "$folder" && "${sum[@]}" -c SHA256SUMS >/dev/null) ||
        fail "$folder/ differs from $folder/SHA256SUMS: fetch it again, or export the model again"
}

api="exec"
while [[ $# -gt 0 ]]; do
    case "$1" in
        -h | --help) usage && exit 0 ;;
        --check-weights) check_weights "${2:-$(dirname "${BASH_SOURCE[0]}")/weights}" && exit 0 ;;
        --api) api="${2-}" && shift ;;
        --api=*) api="${1#--api=}" ;;
        *) usage >&2 && fail "unknown argument: $1" ;;
    esac
    shift || true
done
[[ "$api" == exec || "$api" == invoke ]] || fail "--api is '$api', expected exec or invoke"

cd "$(dirname "${BASH_SOURCE[0]}")"
image="${IMAGE:-ichseg:latest}"
base="${BASE_IMAGE:-$(sed -n 's/^ARG BASE_IMAGE=//p' Dockerfile)}"
read -r -a engine <<<"${CONTAINER_ENGINE:-docker}"
read -r -a build_args <<<"${BUILD_ARGS-}"
command -v "${engine[0]}" >/dev/null || fail "no ${engine[0]} here; CONTAINER_ENGINE=podman uses podman"
"${engine[@]}" version >/dev/null || fail "${engine[0]} does not answer; is its service running?"

check_weights weights
licence="$(sed -nE 's/^ "licence": "([^"]*)",?$/\1/p' weights/model.json)"
[[ -n "$licence" || ! -f weights/LICENSE ]] || licence="$(sed -n 's/^SPDX-License-Identifier: //p' weights/LICENSE)"
licences="Apache-2.0${licence:+ AND $licence}"

# Fetched by name first: what is built on is then in the local store and can be named by digest.
"${engine[@]}" image inspect "$base" >/dev/null 2>&1 || "${engine[@]}" pull --platform linux/amd64 "$base"
echo "base:  $base"
"${engine[@]}" image inspect --format '       id {{.Id}}{{range .RepoDigests}}
       digest {{.}}{{end}}' "$base"

version="$(sed -n 's/^__version__ = "\(.*\)"/\1/p' ichseg/__init__.py)"
labels=(--label "org.opencontainers.image.base.name=$base" --label "org.opencontainers.image.version=$version"
    --label "org.opencontainers.image.licenses=$licences")
[[ "$api" == exec ]] || labels+=(--label "org.grand-challenge.api-method=$api")
if revision="$(git rev-parse HEAD 2>/dev/null)"; then
    git diff --quiet HEAD -- process.py ichseg weights requirements.txt Dockerfile || revision+="-changed"
    labels+=(--label "org.opencontainers.image.revision=$revision")
fi
"${engine[@]}" build --platform linux/amd64 --build-arg "BASE_IMAGE=$base" --build-arg "API=$api" "${labels[@]}" \
    ${build_args[@]+"${build_args[@]}"} -t "$image" .

size="$("${engine[@]}" image inspect --format '{{.Size}}' "$image")"
echo "image: $image, API $api, $((size / 1000000)) MB unpacked"
echo "       licences $licences"
"${engine[@]}" image inspect --format '       id {{.Id}}' "$image"
echo "       by layer, the last one first:"
"${engine[@]}" history --no-trunc --format '{{.Size}}	{{.CreatedBy}}' "$image" | tr -s ' ' | sed -nE '
    /^0 ?B/d
    s/(dir|file):[0-9a-f]{64}/\1/
    s/^([^	]*)	(RUN )?(\|[0-9]+ )?([A-Z_]+=[^ ]* )*(\/bin\/sh -c )?(#\(nop\) )?(.{0,80}).*/         \1	\7/p'
