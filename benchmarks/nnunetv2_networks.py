"""Asks nnunetv2's own networks for the numbers that the networks' tests compare with.

    PYTHONPATH=. .venv/bin/python benchmarks/nnunetv2_networks.py

Runs in the rival's environment (``rivals.py``): parameter counts of the plans that
``test/helpers/nnunetv2_plans.json`` holds, and what tiny networks answer whose weights a formula
gives.
Writes ``test/helpers/nnunetv2_networks.json``; seconds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLANS = ROOT / "test" / "helpers" / "nnunetv2_plans.json"
TASKS = ("instance_28", "isotropic_ct", "four_channels")
COMMAND = "PYTHONPATH=. .venv/bin/python benchmarks/nnunetv2_networks.py"
HOW = (
    "parameters: of each network that nnunetv2 plans for a task of nnunetv2_plans.json, each "
    "tensor once. networks: in float64, with deep supervision, training; the weights are sin(0), "
    "sin(1), ... over the stem, the encoder's levels, the transposed convolutions, the decoder's "
    "levels and the heads, each finest first, and the input is cos(0), cos(1), ...; logits: of "
    "each head, finest first, every stride-th of all its values, the first ones."
)
STRIDE = 29
# features, kernels, strides, convolutions or blocks of the encoder, convolutions of the decoder
# (coarsest first, as nnunetv2 has it); the last level but one of "residual_3d" keeps its features
TINY: dict[str, dict[str, Any]] = {
    "plain_3d": {
        "network": "PlainConvUNet",
        "features": [4, 8, 16],
        "kernels": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "encoder": [2, 1, 2],
        "decoder": [1, 2],
        "input": [2, 2, 4, 16, 16],
        "classes": 3,
    },
    "residual_3d": {
        "network": "ResidualEncoderUNet",
        "features": [4, 8, 16, 16],
        "kernels": [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]],
        "encoder": [1, 3, 2, 2],
        "decoder": [1, 1, 2],
        "input": [2, 1, 4, 16, 16],
        "classes": 2,
    },
    "residual_2d": {
        "network": "ResidualEncoderUNet",
        "features": [4, 8, 16],
        "kernels": [[3, 3], [3, 3], [3, 3]],
        "strides": [[1, 1], [2, 2], [2, 2]],
        "encoder": [1, 2, 1],
        "decoder": [1, 1],
        "input": [1, 2, 16, 24],
        "classes": 2,
    },
}


def build(described: dict[str, Any], channels: int, classes: int) -> Any:
    """Build the network as nnunetv2 builds it, with a head at every decoder level."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    axes = len(described["kernels"][0])
    encoder = (
        "n_conv_per_stage" if described["network"] == "PlainConvUNet" else "n_blocks_per_stage"
    )
    arguments = {
        "n_stages": len(described["features"]),
        "features_per_stage": described["features"],
        "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
        "kernel_sizes": described["kernels"],
        "strides": described["strides"],
        encoder: described["encoder"],
        "n_conv_per_stage_decoder": described["decoder"],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return get_network_from_plans(
        f"dynamic_network_architectures.architectures.unet.{described['network']}",
        arguments,
        ("conv_op", "norm_op", "dropout_op", "nonlin"),
        channels,
        classes,
        deep_supervision=True,
    )


def count_parameters() -> list[dict[str, Any]]:
    """Count the parameters, in one row for each planned network."""
    import torch

    tasks = json.loads(PLANS.read_text())["tasks"]
    rows = []
    for task in TASKS:
        channels, classes = len(tasks[task]["channels"]), tasks[task]["labels"]
        for planner, planned in tasks[task]["planners"].items():
            for name, described in planned["configurations"].items():
                more = classes - 1 if described["previous_stage"] else 0
                with torch.device("meta"):
                    network = build(described, channels + more, classes)
                count = sum(p.numel() for p in network.parameters())  # which names each once
                rows.append({"task": task, "planner": planner, "configuration": name,
                             "parameters": count})  # fmt: skip
    return rows


def answer(described: dict[str, Any]) -> dict[str, Any]:
    """The logits of a tiny network whose weights and input are formulas."""
    import torch

    network = build(described, described["input"][1], described["classes"]).double().train()
    encoder, decoder = network.encoder, network.decoder
    stem = [encoder.stem] if described["network"] == "ResidualEncoderUNet" else []
    levels = [*decoder.transpconvs[::-1], *decoder.stages[::-1], *decoder.seg_layers[::-1]]
    first = 0
    with torch.no_grad():
        for level in (*stem, *encoder.stages, *levels):
            for parameter in level.parameters():
                index = torch.arange(first, first + parameter.numel(), dtype=torch.float64)
                parameter.copy_(index.sin().reshape(parameter.shape))
                first += parameter.numel()
    assert first == sum(p.numel() for p in network.parameters())
    count = torch.Size(described["input"]).numel()
    x = torch.arange(count, dtype=torch.float64).cos().reshape(described["input"])
    logits = [head.flatten()[::STRIDE][:6].tolist() for head in network(x)]
    return {**described, "stride": STRIDE, "logits": logits}


def write(out: Path) -> None:
    """Make the file; runs in the rival's environment."""
    lines = {
        "parameters": count_parameters(),
        "networks": [{"name": name} | answer(tiny) for name, tiny in TINY.items()],
    }
    made_by = {
        "nnunetv2": importlib.metadata.version("nnunetv2"),
        "torch": importlib.metadata.version("torch").split("+")[0],
        "command": COMMAND,
        "how": HOW,
    }
    parts = [f' "made_by": {json.dumps(made_by)}']
    for key, rows in lines.items():
        inner = ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in rows)
        parts.append(f' "{key}": [\n{inner}\n ]')
    out.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    print(f"{len(lines['parameters'])} counts, {len(TINY)} networks -> {out}", flush=True)


def main() -> int:
    """Find the rival's environment and run this file there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "test" / "helpers" / "nnunetv2_networks.json"
    )
    parser.add_argument("--rival-env", type=Path, metavar="FOLDER", help="see rivals.py")
    parser.add_argument("--in-rival", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_rival:
        write(args.out)
        return 0
    from benchmarks import rivals

    python = rivals.python_of(args.rival_env or rivals.DEFAULT_ENV)
    return subprocess.run([python, *sys.argv, "--in-rival"], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
