"""The documentation against the program. `python -m tests.test_docs` writes what is generated of it."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fisher_mask_mergekit.cli import app
from fisher_mask_mergekit.columns import LABEL_COLUMNS, TEXT_COLUMNS
from fisher_mask_mergekit.diagonal_sidecar import DiagonalMetadata, TensorRecord
from fisher_mask_mergekit.evaluation.metrics import DEFAULTS, METRICS
from fisher_mask_mergekit.factored_sidecar import FactoredRecord
from fisher_mask_mergekit.parameter_records import ViewRecord
from fisher_mask_mergekit.recipe import read_recipe
from fisher_mask_mergekit.settings import EvaluationSettings, FisherSettings
from fisher_mask_mergekit.sidecar import DataRecord, Metadata
from fisher_mask_mergekit.sites import GovernedTensor, Site
from fisher_mask_mergekit.tasks import (
    CausalLM,
    MaskedLM,
    MultipleChoice,
    QuestionAnswering,
    Seq2SeqLM,
    Task,
    TokenClassification,
)

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
CLI = ROOT / "docs" / "cli.md"
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def with_help(page: str) -> str:
    """The page with the help text of every command that it marks."""

    def block(match: re.Match[str]) -> str:
        shown = CliRunner().invoke(
            app,
            [match[1], "--help"],
            prog_name="mergekit-fisher",
            env={"COLUMNS": "80"},
        )
        assert shown.exit_code == 0
        return f"<!-- help: {match[1]} -->\n```text\n{shown.stdout.rstrip()}\n```"

    return re.sub(r"<!-- help: (\w+) -->(?:\n```text\n.*?\n```)?", block, page, flags=re.DOTALL)


def test_the_reference_shows_every_commands_help() -> None:
    page = CLI.read_text()
    assert sorted(re.findall(r"<!-- help: (\w+) -->", page)) == COMMANDS
    shown = with_help(page)
    if f"typer=={version('typer')}" in (ROOT / "constraints.txt").read_text().split():
        assert shown == page, "run: python -m tests.test_docs"
    else:  # Which lays it out otherwise.
        options = r"^ +(--[\w-]+)"
        assert re.findall(options, shown, re.MULTILINE) == re.findall(options, page, re.MULTILINE)


def test_the_reference_names_every_setting_and_column() -> None:
    page = CLI.read_text()
    for name in FisherSettings.model_fields:
        assert f"`{name}`" in page
        assert f"--{name.replace('_', '-')}" in page
    for name in EvaluationSettings.model_fields:
        assert f"`{name}`" in page
    for columns in TEXT_COLUMNS:
        assert " and ".join(columns) in re.sub(r"\s+", " ", page)
    for name in LABEL_COLUMNS:
        assert name in page


def test_the_reference_names_every_metric_and_marks_the_defaults() -> None:
    page = CLI.read_text().partition("## evaluate")[2]
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", page, flags=re.MULTILINE))
    others = {"multi-label-classification": "several labels per text", "regression": "regression"}
    for kind, defaults in DEFAULTS.items():
        (row,) = [row for name, row in rows.items() if f"`{kind}`" in name or name == others.get(kind)]
        for metric in METRICS:
            assert (f"`{metric.name}`" in row) == (kind in metric.kinds), (kind, metric.name)
        bold = row.partition(";")[0]
        assert re.findall(r"\*\*`(\w+)`\*\*", bold) == list(defaults)


OTHER_TASKS: list[type[Task]] = [
    TokenClassification,
    QuestionAnswering,
    MultipleChoice,
    MaskedLM,
    CausalLM,
    Seq2SeqLM,
]


@pytest.mark.parametrize("task", OTHER_TASKS, ids=lambda task: task.name)
def test_the_reference_names_every_tasks_columns(task: type[Task]) -> None:
    row, *_ = re.findall(rf"^\| `{task.name}` .*$", CLI.read_text(), flags=re.MULTILINE)
    for layout in task.layouts:
        for name in (*layout.text, *filter(None, [layout.label])):
            assert re.search(rf"\b{name}\b", row), name


def test_the_sidecar_page_names_every_field() -> None:
    page = (ROOT / "docs" / "sidecar.md").read_text()
    for model in (
        Metadata,
        DataRecord,
        Site,
        GovernedTensor,
        DiagonalMetadata,
        TensorRecord,
        ViewRecord,
        FactoredRecord,
    ):
        for name in model.model_fields:
            assert f"`{name}`" in page, name


def test_the_readme_names_every_command() -> None:
    page = (ROOT / "README.md").read_text()
    for name in COMMANDS:
        assert f"mergekit-fisher {name}" in page


def test_the_readmes_recipe_is_one(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for index, block in enumerate(blocks):
        file = tmp_path / f"{index}.yml"
        file.write_text(block)
        assert all(model.settings is not None for model in read_recipe(file).models)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, target


if __name__ == "__main__":
    CLI.write_text(with_help(CLI.read_text()))
