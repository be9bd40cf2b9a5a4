#!/usr/bin/env bash
# Writes the tarballs to upload; see --help.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: ./export.sh [--sbom]

Writes the two files that Grand Challenge takes, opens both again and checks them as the platform will, and prints
their sizes and checksums and what to do with them:

  export/ichseg.tar.gz   the container image, weights included
  export/model.tar.gz    the weights alone: used in place of those in the image

and, where cyclonedx-py is installed (pip install cyclonedx-bom; make test brings it):

  export/ichseg.cdx.json   the Python packages in the image, as a CycloneDX SBOM; --sbom writes only this

Refuses weights that are Git LFS pointers or differ from their checksums.

Environment:
  IMAGE             name of the image, built by ./build.sh       (default ichseg:latest)
  CONTAINER_ENGINE  docker, or what stands in for it             (default docker; see ./build.sh --help)
  EXPORT_DIR        where to write                               (default export)
  WEIGHTS           bundle for the model tarball                 (default weights)
  EXTRA_RUN_ARGS    further flags for the run that asks the image for its packages, split at spaces

Compresses with pigz where it is installed (all cores), else with gzip.
HELP
}

fail() {
    echo "export.sh: $*" >&2
    exit 1
}

only_sbom=""
case "${1-}" in
    "") ;;
    --sbom) only_sbom=yes ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && fail "unknown argument: $1" ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")"
image="${IMAGE:-ichseg:latest}"
out="${EXPORT_DIR:-export}"
weights="${WEIGHTS:-weights}"
read -r -a engine <<<"${CONTAINER_ENGINE:-docker}"
command -v "${engine[0]}" >/dev/null || fail "no ${engine[0]} here; CONTAINER_ENGINE=podman uses podman"
"${engine[@]}" version >/dev/null || fail "${engine[0]} does not answer; is its service running?"
"${engine[@]}" image inspect "$image" >/dev/null 2>&1 || fail "there is no image $image; run ./build.sh first"

# What the image's own Python finds, base included; of Debian's packages it knows nothing. The tarballs outlive it.
write_sbom() {
    local tool=.venv/bin/cyclonedx-py packages run_args
    command -v "$tool" >/dev/null || tool=cyclonedx-py
    command -v "$tool" >/dev/null || { no_sbom "cyclonedx-py is not installed (pip install cyclonedx-bom)" && return; }
    read -r -a run_args <<<"${EXTRA_RUN_ARGS-}"
    packages="$("${engine[@]}" run --rm --network none ${run_args[@]+"${run_args[@]}"} --entrypoint python "$image" -c '
import importlib.metadata
found = importlib.metadata.distributions()
print("\n".join(sorted({"{}=={}".format(each.name, each.version) for each in found})))')" ||
        { no_sbom "the image does not say which packages it has" && return; }
    mkdir -p "$out"
    PYTHONWARNINGS=ignore "$tool" requirements --output-reproducible --pyproject pyproject.toml --mc-type application \
        --output-file "$out/ichseg.cdx.json.partial" - <<<"$packages" ||
        { rm -f "$out/ichseg.cdx.json.partial" && no_sbom "cyclonedx-py failed" && return; }
    mv "$out/ichseg.cdx.json.partial" "$out/ichseg.cdx.json"
    echo "$out/ichseg.cdx.json  $(wc -l <<<"$packages") packages"
}

no_sbom() {
    [[ -z "$only_sbom" ]] || fail "no SBOM: $1"
    echo "export.sh: no SBOM: $1" >&2
}

[[ -z "$only_sbom" ]] || { write_sbom && exit 0; }
./build.sh --check-weights "$weights" || fail "$weights/ cannot be exported"

compress=(gzip -n) sum=(sha256sum) tar=tar
! command -v pigz >/dev/null || compress=(pigz -n)
command -v sha256sum >/dev/null || sum=(shasum -a 256) # macOS
! command -v gtar >/dev/null || tar=gtar               # macOS
"$tar" --version | grep -q 'GNU tar' || fail "needs GNU tar; on macOS: brew install gnu-tar"

# podman writes another format unless told; docker knows only one. `docker` may be podman by another name.
save=(save)
! "${engine[@]}" --version | grep -qi podman || save=(save --format docker-archive)

mkdir -p "$out"
opened="$(mktemp -d)"
partial=("$out/ichseg.tar.gz.partial" "$out/model.tar.gz.partial")
trap 'rm -rf "${partial[@]}" "$opened"' EXIT

# The first text that stands behind a key in JSON, or nothing.
value_of() {
    { grep -oE "\"$1\": ?\"[^\"]*\"" "$2" || true; } | head -n 1 | sed -E 's/.*: ?"(.*)"/\1/'
}

# As the platform reads it: one manifest with one image, its config, every layer that it names.
check_image() {
    local manifest="$opened/manifest.json" config layer
    # The manifest's place in the archive is anywhere, so the whole archive is read: a truncated one is found here.
    "$tar" -tzf "$1" >"$opened/names" || fail "the image tarball does not open again"
    "$tar" -xzf "$1" -C "$opened" manifest.json || fail "no manifest.json in the image tarball"
    [[ "$(grep -o '"Config"' "$manifest" | wc -l)" -eq 1 ]] || fail "not exactly one image: $(cat "$manifest")"
    config="$(value_of Config "$manifest")"
    "$tar" -xzf "$1" -C "$opened" "$config" || fail "no $config in the image tarball, which its manifest names"
    for layer in $(grep -oE '"Layers": ?\[[^]]*\]' "$manifest" | sed 's/^"Layers"://' | tr '[],"' '    '); do
        grep -qxF "$layer" "$opened/names" || fail "no layer $layer in the image tarball, which its manifest names"
    done
    user="$(value_of User "$opened/$config")"
    case "${user%%:*}" in
        "" | root | 0) fail "the image's USER is '$user'; the platform refuses root" ;;
    esac
    platform="$(value_of os "$opened/$config")/$(value_of architecture "$opened/$config")"
    [[ "$platform" == linux/amd64 ]] || fail "the image is for $platform; the platform runs linux/amd64"
    licences="$(value_of org.opencontainers.image.licenses "$opened/$config")"
    api="$(value_of org.grand-challenge.api-method "$opened/$config")"
    api="${api:-exec}"
    grep -q "\"ICHSEG_API=$api\"" "$opened/$config" ||
        fail "the image's label says API $api, its environment another; build it with ./build.sh --api $api"
}

# As the platform takes it: plain files with plain names, model.json at the top; and whole.
check_model() {
    local unpacked="$opened/model"
    ! "$tar" -tvzf "$1" | grep -v '^[-d]' || fail "links or devices in the model tarball; the platform refuses them"
    ! "$tar" -tzf "$1" | grep -vxE '\./([A-Za-z0-9_][A-Za-z0-9_.-]*)?' || fail "odd names in the model tarball"
    mkdir "$unpacked"
    "$tar" -xzf "$1" -C "$unpacked" || fail "the model tarball does not open again"
    ./build.sh --check-weights "$unpacked" || fail "the model tarball holds other weights than $weights/"
}

echo "saving $image"
"${engine[@]}" "${save[@]}" "$image" | "${compress[@]}" >"${partial[0]}" ||
    fail "${engine[0]} could not save $image (is the disk full?)"
check_image "${partial[0]}"

# No common top folder, as /opt/ml/model/ must hold model.json itself; the same weights give the same bytes.
"$tar" --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX --exclude=__pycache__ \
    -C "$weights" -c . | gzip -n >"${partial[1]}"
check_model "${partial[1]}"

for file in ichseg model; do
    mv "$out/$file.tar.gz.partial" "$out/$file.tar.gz"
    size="$(wc -c <"$out/$file.tar.gz")"
    echo "$out/$file.tar.gz  $((size / 1000000)) MB  sha256 $("${sum[@]}" "$out/$file.tar.gz" | cut -d ' ' -f 1)"
    [[ "$size" -lt 10000000000 ]] || echo "export.sh: over 10 GB, more than the platform is known to take" >&2
done
write_sbom
cat <<STEPS
checked: one $platform image, user $user, API $api, all layers there; model: plain files, checksums right
licences of the image: $licences

To upload to Grand Challenge, as an editor of your algorithm:
  1. Interfaces: an image socket as input, and as output the segmentation socket
     $(value_of output_slug "$weights/model.json"), as in $weights/model.json
  2. Containers: upload $out/ichseg.tar.gz and wait until it is active; that alone is a whole algorithm
  3. Models: upload $out/model.tar.gz, only to run these weights in an image that was uploaded before
  4. Try-out Algorithm: run it on a scan, and compare the mask with the one from here
docs/platform.md walks through all of it.
STEPS
