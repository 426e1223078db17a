"""The quick-start notebook runs, its statements about the heads hold, and its images are committed."""

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"
# Read from the notebook's variables once it has run.
FINDINGS = """
import json

same_backbone = all(torch.equal(a, b) for a, b in
    zip(model.backbone.parameters(), mar.model.backbone.parameters(), strict=True))
one_jump_spread = (jumps[1][-1] - jumps[1][-1].mean(dim=0)).norm(dim=-1).mean().item()
print(json.dumps({
    "gaps": list(gaps.values()), "spread": spread, "one_jump_spread": one_jump_spread,
    "apart": apart, "shuffled": shuffled,
    "same_backbone": same_backbone,
}))
"""


def pictures(notebook: nbformat.NotebookNode) -> list[str]:
    return [
        output.data["image/jpeg"]
        for cell in code_cells(notebook)
        for output in cell.outputs
        if "image/jpeg" in output.get("data", {})
    ]


def code_cells(notebook: nbformat.NotebookNode) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def committed() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_notebook_is_committed_as_it_ran(committed: nbformat.NotebookNode) -> None:
    """It ran from top to bottom without errors, has its images and is small."""
    assert [cell.execution_count for cell in code_cells(committed)] == list(
        range(1, len(code_cells(committed)) + 1)
    )
    assert not [
        output for cell in code_cells(committed) for output in cell.outputs if output.get("name") == "stderr"
    ]
    assert len(pictures(committed)) == 6
    assert NOTEBOOK.stat().st_size < 500_000


def test_notebook_runs_and_its_statements_hold(committed: nbformat.NotebookNode) -> None:
    notebook = nbformat.v4.new_notebook(cells=[*committed.cells, nbformat.v4.new_code_cell(FINDINGS)])
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    assert len(pictures(notebook)) == 6
    found = json.loads(notebook.cells[-1].outputs[0].text)
    # Each doubling of the jumps brings their ends nearer to the fine path's, and one jump varies less.
    one, *_, eight = found["gaps"]
    assert found["gaps"] == sorted(found["gaps"], reverse=True)
    assert eight < one / 4
    assert found["one_jump_spread"] < found["spread"]
    # Two heads on one backbone have learnt one flow.
    assert found["same_backbone"]
    assert found["apart"] < found["shuffled"] / 2
