#!/usr/bin/env bash
# Writes the tarballs to upload; see --help.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: ./export.sh

Writes the two files that Grand Challenge takes, opens both again, and prints their sizes and checksums:

  export/ichseg.tar.gz   the container image, weights included (upload as the algorithm's container image)
  export/model.tar.gz    the weights alone (upload as the algorithm's model: used in place of those in the image)

Environment:
  IMAGE             name of the image, built by ./build.sh       (default ichseg:latest)
  CONTAINER_ENGINE  docker, or what stands in for it             (default docker; see ./build.sh --help)
  EXPORT_DIR        where to write                               (default export)

Compresses with pigz where it is installed (all cores), else with gzip.
HELP
}

fail() {
    echo "export.sh: $*" >&2
    exit 1
}

case "${1-}" in
    "") ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && fail "unknown argument: $1" ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")"
image="${IMAGE:-ichseg:latest}"
out="${EXPORT_DIR:-export}"
read -r -a engine <<<"${CONTAINER_ENGINE:-docker}"
"${engine[@]}" image inspect "$image" >/dev/null 2>&1 || fail "there is no image $image; run ./build.sh first"

compress=(gzip -n) sum=(sha256sum) tar=tar
! command -v pigz >/dev/null || compress=(pigz -n)
command -v sha256sum >/dev/null || sum=(shasum -a 256) # macOS
! command -v gtar >/dev/null || tar=gtar               # macOS
"$tar" --version | grep -q 'GNU tar' || fail "needs GNU tar; on macOS: brew install gnu-tar"

# podman writes another format unless told; docker knows only one. `docker` may be podman by another name.
save=(save)
! "${engine[@]}" --version | grep -qi podman || save=(save --format docker-archive)

mkdir -p "$out"
partial=()
trap 'rm -f ${partial[@]+"${partial[@]}"}' EXIT
partial=("$out/ichseg.tar.gz.partial" "$out/model.tar.gz.partial")

"${engine[@]}" "${save[@]}" "$image" | "${compress[@]}" >"${partial[0]}" ||
    fail "${engine[0]} could not save $image (is the disk full?)"
# The manifest's place in the archive is anywhere, so the whole archive is read: a truncated one is found here.
manifest="$("$tar" -xzOf "${partial[0]}" manifest.json)" || fail "the image tarball does not open again"
[[ "$(grep -o '"Config"' <<<"$manifest" | wc -l)" -eq 1 ]] || fail "not exactly one image in the manifest: $manifest"

# No common top folder, as /opt/ml/model/ must hold model.json itself; the same weights give the same bytes.
"$tar" --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX --exclude=__pycache__ \
    -C weights -c . | gzip -n >"${partial[1]}"
"$tar" -tzf "${partial[1]}" | grep -qx './model.json' || fail "no model.json at the top of the model tarball"

for file in ichseg model; do
    mv "$out/$file.tar.gz.partial" "$out/$file.tar.gz"
    size="$(wc -c <"$out/$file.tar.gz")"
    echo "$out/$file.tar.gz  $((size / 1000000)) MB  sha256 $("${sum[@]}" "$out/$file.tar.gz" | cut -d ' ' -f 1)"
done
