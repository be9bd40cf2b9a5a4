"""What has been planned in a workspace."""

from __future__ import annotations

from pathlib import Path

from ichseg.errors import PlansError
from ichseg.model import plans
from ichseg.model.plans import Plans
from training.data.workspace import plans_file


def load_plans(workspace: Path) -> Plans:
    """Read ``WORKSPACE/plans.json``.

    Raises:
        PlansError: Nothing has been planned yet, or the file is damaged or of another schema.
    """
    path = plans_file(workspace)
    if not path.exists():
        raise PlansError(f"{path}: no such file; make it with `plan --workspace {workspace}`")
    return plans.load(path)


def what_is_averaged(planned: Plans) -> str:
    """What is averaged over tiles, mirrorings and networks: ``probabilities`` or ``logits``.

    Of regions the reference's way alone is known, see ``docs/decisions/0024-regions.md``.
    """
    return "logits" if planned.regions else "probabilities"
