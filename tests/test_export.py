"""The library holds what the notebooks say, and nothing else."""

import json
from pathlib import Path

import papermill
import pytest

from toolpost.profile import STAGES

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
STAGE_NOTEBOOKS = [n for n in NOTEBOOKS if n.parent.name == "stages"]


def cells(notebook: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return found


def test_every_module_comes_from_a_notebook() -> None:
    exported = set()
    for notebook in NOTEBOOKS:
        for cell in cells(notebook):
            first = "".join(cell["source"]).partition("\n")[0].split()  # type: ignore[arg-type]
            if first[:2] == ["#|", "default_exp"]:
                exported.add(Path(first[2].replace(".", "/") + ".py"))
    package = ROOT / "toolpost"
    present = {p.relative_to(package) for p in package.rglob("*.py") if not p.name.startswith("_")}
    assert present == exported


def test_there_is_a_notebook_for_each_stage() -> None:
    assert [n.stem for n in STAGE_NOTEBOOKS] == list(STAGES)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_sources_hold_no_outputs(notebook: Path) -> None:
    assert not [c for c in cells(notebook) if c.get("outputs")]


@pytest.mark.parametrize("notebook", STAGE_NOTEBOOKS, ids=lambda p: p.stem)
def test_a_stage_declares_what_its_settings_hold(notebook: Path) -> None:
    """Same names and same defaults, each with a comment that papermill shows as help."""
    declared = papermill.inspect_notebook(str(notebook))
    fields = STAGES[notebook.stem].model_fields
    assert set(declared) == set(fields)
    for name, about in declared.items():
        assert fields[name].default == eval(about["default"], {}), name  # noqa: S307  # our own text
        assert about["help"], f"{name} has no comment"
        assert about["inferred_type_name"] != "None", f"{name} has no type"
