"""``MODEL_CARD.md`` beside a bundle: what it is, what it was seen to do, what it is not for.

What it says stands in the template of the same name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ichseg.errors import IchsegError
from ichseg.files import replacing
from ichseg.model.bundle import Model
from ichseg.report import page
from ichseg.wording import counted, duration
from training.crossval import merge, rules, selection
from training.crossval.selection import Selection
from training.data.workspace import evaluation_folder
from training.scoring import summary
from training.scoring.measures import TITLES
from training.scoring.summary import Evaluation

FILE = "MODEL_CARD.md"
_TEMPLATES = Path(__file__).parent / "templates"


def write(model: Model, workspace: Path, out: Path, notes: str = "") -> None:
    """Fill the card from the bundle and from what the workspace holds of its evaluation.

    Args:
        model: What the bundle describes.
        workspace: The workspace that it was trained in.
        out: The folder of the bundle.
        notes: What else people have to know, in Markdown with headings of the second level; the
            card ends with it, in place of a general word on what is not known.

    Raises:
        OutputError: The folder cannot be written.
    """
    folds = model.provenance["folds"].values()
    validated = model.provenance["checkpoint"] == "latest"  # which the cross-validation scores
    environment = page.environment(_TEMPLATES)
    environment.filters |= {
        "cell": lambda text: text.replace("|", r"\|"),
        "duration": duration,
        "numbered": _numbered,
        "rule_in_words": rules.words,
        "short": _short,
        "sizes": _sizes,
        "title_of": TITLES.__getitem__,
    }
    text = environment.get_template(FILE).render(
        model=model,
        provenance=model.provenance,
        epochs=sorted({fold["epochs"] for fold in folds}),
        minutes=sum(fold["minutes"] for fold in folds),
        rounding=_rounding([fold["checked_cases"] for fold in folds]),
        validated=validated,
        evaluations={
            name: _evaluation(workspace, name) if validated else None for name in model.averaged
        },
        selected=_selection(workspace, model) if validated else None,
        notes=notes.strip(),
    )
    with replacing(out / FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _evaluation(workspace: Path, name: str) -> Evaluation | None:
    """The cross-validation of a configuration, if there is one of the weights that it has now."""
    try:
        found = summary.load(evaluation_folder(workspace, name))
        return found if found.made_from == merge.digest_of_folds(workspace, name) else None
    except IchsegError:
        return None


def _selection(workspace: Path, model: Model) -> Selection | None:
    """The workspace's selection, if it is of this ensemble."""
    selected = selection.current(workspace)
    if selected is None:
        return None
    same = (selected.configurations, selected.rules) == (model.averaged, model.rules)
    return selected if same else None


def _rounding(checked_cases: Sequence[int]) -> str:
    """On how many cases of each fold the stored weights were held against those as trained."""
    least, most = min(checked_cases), max(checked_cases)
    if most == 0:
        return "not checked against the weights as trained"
    cases = counted(most, "validation case")
    cases = cases if least == most else f"{least} to {cases}"
    return f"checked on {cases} of each fold to change no mean Dice by over 0.001"


def _numbered(labels: Sequence[str]) -> str:
    return ", ".join(f"{value} {name}" for value, name in enumerate(labels))


def _sizes(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
