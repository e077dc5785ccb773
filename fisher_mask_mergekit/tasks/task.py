"""What a task is: what it reads of a data set, how that becomes tokens, and what its loss is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fisher_mask_mergekit.columns import Layout
from fisher_mask_mergekit.errors import CheckpointError
from fisher_mask_mergekit.settings import FisherSettings, Loss, TaskName
from fisher_mask_mergekit.tasks.likelihood import Batch, Likelihood


@dataclass(frozen=True)
class Drawn:
    """Samples as a task reads them from rows; JSON can hold all of it.

    Attributes:
        texts: What the model reads, one tuple per sample.
        labels: What it is to predict, one entry per sample; None where that is the text itself, or nobody says.
        columns: Where they were.
        label_map: The data's label to the checkpoint's label index; empty where there are no labels.
        majority: The share of the samples that have the most frequent label, where each has one of a set.
    """

    texts: list[tuple[Any, ...]]
    labels: list[Any]
    columns: Layout
    label_map: dict[str, int]
    majority: float | None


@dataclass(frozen=True)
class Tokenization:
    """How texts become tokens.

    Attributes:
        tokenizer: The checkpoint's own.
        max_length: Tokens per sample at most.
        seed: For tokens drawn at random.
    """

    tokenizer: Any
    max_length: int
    seed: int = 0

    def fast(self, task: str) -> Any:
        """The tokenizer, which must say where in the text its tokens are.

        Raises:
            CheckpointError: If it does not.
        """
        if not self.tokenizer.is_fast:
            raise CheckpointError(
                f"{task} needs to know where in the text a token is, and {type(self.tokenizer).__name__} does not say; "
                "save the checkpoint with a fast tokenizer (tokenizer.json)"
            )
        return self.tokenizer

    def encode(self, *texts: Any, truncation: bool | str = True, **options: Any) -> tuple[Any, bool]:
        """The tokenizer's encoding of one sample, and whether it was truncated."""
        whole = self.tokenizer(*texts, verbose=False, **options)
        if len(whole["input_ids"]) <= self.max_length:
            return whole, False
        cut = self.tokenizer(*texts, truncation=truncation, max_length=self.max_length, **options)
        return cut, True


@dataclass(frozen=True)
class Encoded:
    """One sample as tokens.

    Attributes:
        inputs: What the model takes, lists.
        labels: What the task compares the model's output with: a number, or a list.
        truncated: Whether something of the sample was cut off.
    """

    inputs: dict[str, Any]
    labels: Any
    truncated: bool


@dataclass(frozen=True)
class Task(ABC):
    """How a model's output is compared with the data.

    Attributes:
        name: As the recipe writes it.
        layouts: The columns it reads by convention, the first that are there.
        loss: A sample's loss is the mean over its predictions or their sum.
    """

    name: ClassVar[TaskName]
    layouts: ClassVar[tuple[Layout, ...]]
    loss: Loss = "mean"

    @property
    def kind(self) -> str:
        """The name, more exactly where one name stands for several losses."""
        return self.name

    @property
    def predicts_once(self) -> bool:
        """Whether every sample has exactly one prediction."""
        return False

    @abstractmethod
    def read(self, rows: Any, settings: FisherSettings) -> Drawn:
        """Take the samples from a data set's rows.

        Raises:
            DataError: If the columns or what they hold are not the task's.
        """

    @abstractmethod
    def encode(self, text: tuple[Any, ...], label: Any, index: int, how: Tokenization) -> Encoded | None:
        """One sample as tokens; None if nothing of it is left to predict.

        Args:
            text: As :meth:`read` gives it.
            label: Likewise.
            index: Which of the drawn samples it is.
            how: The tokenizer and its limits.
        """

    @abstractmethod
    def likelihood(self, model: nn.Module, batch: Batch) -> Likelihood:
        """Run the model on a batch."""
