# The algorithm as Grand Challenge runs it: one case per job, no network, read-only file system, any user but root.
#
# The default base brings CUDA 12.6, which older drivers run; its torch 2.13.0+cu126 satisfies requirements.txt and stays
# in place. Any amd64 base with a `python` 3.11+ and pip does: ./build.sh --help says how to choose another.
ARG BASE_IMAGE=pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime
FROM ${BASE_IMAGE}

# HOME for a uid without a passwd entry; the account below says the same. /tmp is the only place that is always writable.
# getpass (torch's cache folders ask it) falls back on USER where the uid has no name.
ENV HOME=/tmp \
    USER=algorithm \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

RUN groupadd --gid 10001 algorithm \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin algorithm \
    && install -d -m 0755 /input /opt/ml/model \
    && install -d -m 1777 /output

# Before the code, so that a change of code does not install torch again. One layer: torch is 700 MB and more. What
# only tests and compilers use goes again: 280 MB of torch's CPU build and the rest, and OpenVINO's plugins for other devices.
# --break-system-packages: the image is the environment, also where the base's Python belongs to its distribution.
ARG PIP_EXTRA_INDEX_URL=""
COPY requirements.txt /tmp/requirements.txt
RUN python -m pip install --no-cache-dir --break-system-packages --root-user-action=ignore \
        --disable-pip-version-check -r /tmp/requirements.txt \
    && site="$(python -c 'import importlib.util as u; print(u.find_spec("safetensors").submodule_search_locations[0])')/.." \
    && rm -rf "$site"/torch/test "$site"/torch/include "$site"/torch/bin/*[Tt]est* "$site"/torch/bin/protoc* \
        "$site"/openvino/libs/libopenvino_intel_[gn]pu_plugin* "$site"/openvino/libs/cache.json \
    && find "$site" -type d -name tests -prune -exec rm -rf {} + \
    && rm -rf /root/.cache /tmp/*

COPY process.py /opt/algorithm/process.py
COPY ichseg /opt/algorithm/ichseg
COPY weights /opt/algorithm/weights

# Readable by any uid even from a clone made under umask 077; bytecode beforehand, as nothing can be written later.
RUN find /opt/algorithm \( -type d ! -perm -005 -o -type f ! -perm -004 \) -exec chmod a+rX {} + \
    && python -m compileall -q --invalidation-mode unchecked-hash /opt/algorithm

# Licences: of the code, and of the default weights; ./build.sh names those of other weights.
LABEL org.opencontainers.image.title="ichseg" \
      org.opencontainers.image.description="Segments intracranial haemorrhage on non-contrast head CT. Research use only, not a medical device." \
      org.opencontainers.image.licenses="Apache-2.0 AND CC-BY-NC-SA-4.0"

# What the container does when it is started: exec, one run, or invoke, a server. ./build.sh --api invoke sets the
# platform's label along with it, from which the platform learns the same.
ARG API=exec
ENV ICHSEG_API=${API}

USER algorithm
WORKDIR /opt/algorithm
ENTRYPOINT ["python", "/opt/algorithm/process.py"]
