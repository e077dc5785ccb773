"""What to measure, and on what to evaluate: the keys under ``fisher:`` in a recipe, and the commands' options."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from fisher_mask_mergekit.untrusted import LONGEST_STRING, MOST_COUNT, checked_name

DataName = Annotated[str, Field(min_length=1), AfterValidator(checked_name)]
TaskName = Literal[
    "sequence-classification",
    "token-classification",
    "question-answering",
    "multiple-choice",
    "masked-lm",
    "causal-lm",
    "seq2seq-lm",
]
Kind = Literal["mask", "factored", "diagonal"]
Loss = Literal["mean", "sum"]
Estimator = Literal["sample", "batch", "token"]
MaskPlacement = Literal["post", "pre"]
Labels = Literal["data", "sampled", "exact"]
RELEASED_BATCH = 32
"""Samples per batch in the paper's released code."""

WeightDtype = Literal["float32", "bfloat16", "float16", "float64"]


RANDOM = "random"
"""In place of a data set's name: texts of tokens that are drawn at random."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_max_length=LONGEST_STRING)

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: Any) -> Any:
        inside = [*value, *value.values()] if isinstance(value, dict) else [value]
        if any(isinstance(part, bool) for part in inside):
            raise ValueError("YAML reads yes, no, on and off as true and false; put quotes around them")
        return value


class FisherSettings(_Settings):
    """One request for a measurement, as the user wrote it. Unknown keys are an error.

    Attributes:
        data: Data set: ``path[:config[:split]][@revision]`` on the hub, a local file or folder, or ``random``: texts of
            tokens drawn at random.
        samples: How many samples to draw, without replacement.
        seed: Seed of that draw, of the tokens masked for a masked LM, and of the labels with
            ``labels: sampled``.
        task: What the checkpoint predicts; told by its class if not given.
        loss: A sample's loss is the mean over its own predictions (tokens, for one), or their sum.
        text: Column of what the model reads, or several; found by convention if not given.
        label: Column of what it is to predict; found by convention if not given.
        label_map: The data's label (name or index) to the checkpoint's (name or index).
        max_length: Tokens per sample at most; the checkpoint's own limit, at most 512, if not given.
        batch_size: Samples per batch: with ``estimator: batch`` part of the definition, and 32 if not given; else
            at most so many, which only matters for speed and memory.
        share: ``K/N``: only the K-th of N shares of the samples; see :meth:`in_share`.
        estimator: ``sample``, squares of per-sample gradients, mean over samples (eq. 4); or ``batch``,
            squares of the gradient of each batch's mean loss, summed over batches (the released code). Of kind
            ``factored`` ``sample``, or ``token``: of a linear map's matrix, squares of each token's gradient.
        mask_placement: Neuron mask after the activation (``post``) or before it, as in eq. 2 (``pre``).
        labels: ``data`` (empirical), ``sampled`` from the model, or ``exact`` expectation over all labels; the latter two
            need no labels in the data.
        dtype: Dtype of the weights while measuring. Sums are kept in float32 or wider.
        kind: What is measured: mask nodes (``mask``), every parameter by itself (``diagonal``), or the means of that
            over rows and columns (``factored``).
    """

    data: DataName | None = None
    samples: int = Field(default=128, ge=1, le=MOST_COUNT)
    seed: int = Field(default=0, ge=0)
    task: TaskName | None = None
    loss: Loss = "mean"
    text: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    label: str | None = None
    label_map: dict[str | int, str | int] | None = None
    max_length: int | None = Field(default=None, ge=2, le=MOST_COUNT)
    batch_size: int | None = Field(default=None, ge=1, le=MOST_COUNT)
    share: str | None = Field(default=None, pattern=r"^[1-9][0-9]{0,8}/[1-9][0-9]{0,8}$")
    estimator: Estimator = "sample"
    mask_placement: MaskPlacement = "post"
    labels: Labels = "data"
    dtype: WeightDtype = "float32"
    kind: Kind = "mask"

    @property
    def rows(self) -> int | None:
        """Samples per batch at most, None for any number."""
        return self.batch_size or (RELEASED_BATCH if self.estimator == "batch" else None)

    def definition(self) -> dict[str, Any]:
        """What the numbers depend on, as JSON has it: everything, but batches only where they are squared."""
        definition = self.model_dump(mode="json", exclude={"batch_size"})
        return definition | {"batch_size": self.rows} if self.estimator == "batch" else definition

    @property
    def share_of(self) -> tuple[int, int]:
        """K and N."""
        number, of = (self.share or "1/1").split("/")
        return int(number), int(of)

    def in_share(self, place: int) -> bool:
        """Whether a sample is to be measured, by its place among the drawn ones that hold something to predict.

        Of N shares, each takes every N-th sample, or, where batches are part of the definition, every N-th batch. So
        they have no sample in common, and together they have all.
        """
        number, of = self.share_of
        return place // self._each % of == number - 1

    def share_size(self, total: int) -> int:
        """How many of so many samples are to be measured."""
        number, of = self.share_of
        rounds, rest = divmod(total, of * self._each)
        return rounds * self._each + min(max(rest - (number - 1) * self._each, 0), self._each)

    @property
    def _each(self) -> int:
        """How many samples in a row are in one share."""
        return (self.rows or 1) if self.estimator == "batch" else 1

    @model_validator(mode="after")
    def _combinable(self) -> "FisherSettings":
        if self.share_of[0] > self.share_of[1]:
            raise ValueError(f"share {self.share}: expected K/N with K from 1 to N")
        if self.data == RANDOM and self.labels == "data":
            raise ValueError(
                f"data '{RANDOM}' is random tokens and has no labels; take labels sampled, or exact"
            )
        named = [name for name in ("text", "label", "label_map") if getattr(self, name) is not None]
        if self.data == RANDOM and named:
            raise ValueError(f"data '{RANDOM}' is random tokens and has no columns; remove {named[0]}")
        if self.estimator == "batch" and self.labels == "exact":
            raise ValueError(
                "estimator 'batch' squares one gradient per batch; it takes labels data or sampled"
            )
        known = {"mask": ("sample", "batch"), "factored": ("sample", "token"), "diagonal": ("sample",)}[
            self.kind
        ]
        if self.kind == "mask" and self.estimator not in known:
            raise ValueError(
                f"estimator '{self.estimator}' is about matrices; kind 'mask' takes {' or '.join(known)}"
            )
        if self.estimator not in known or (self.kind != "mask" and self.mask_placement != "post"):
            raise ValueError(
                f"kind '{self.kind}' has no masks, and squares no batch's gradients; it takes estimator "
                f"{' or '.join(known)} and mask_placement post"
            )
        return self


class EvaluationSettings(_Settings):
    """What to score a model on. Apart from :class:`FisherSettings`, because no measurement depends on it.

    Attributes:
        eval: Data set as ``data`` names it; its split ``validation`` if it names none. The data set measured
            on, split ``validation``, if not given.
        metric: Name of a metric, or several, of which the first is normalised; the task's own if not given.
    """

    eval: DataName | None = None
    metric: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None

    @field_validator("eval")
    @classmethod
    def _is_data(cls, value: str | None) -> str | None:
        if value == RANDOM:
            raise ValueError(
                f"'{RANDOM}' is random tokens, to measure on: there is nothing in them to score a model on"
            )
        return value
