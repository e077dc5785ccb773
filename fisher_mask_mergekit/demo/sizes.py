"""How large the demo is."""

from dataclasses import dataclass

SEED = 0


@dataclass(frozen=True)
class Sizes:
    """How large the demo is. Chosen by the fine-tuned models' accuracy and the time taken.

    Attributes:
        vocabulary: Word pieces at most.
        layers: L.
        hidden: Width of the encoder.
        heads: H per layer.
        neurons: D per layer.
        max_length: Tokens per text at most.
        batch_size: Texts per training step.
        pretraining_epochs: Passes of the masked-LM training over both tasks' training texts.
        pretraining_rate: Its highest learning rate.
        fine_tuning_epochs: Passes over a task's training rows.
        fine_tuning_rate: Its highest learning rate.
        train_rows: Training rows per task at most; None for all.
        held_out_rows: Held-out rows per task at most; None for all.
    """

    vocabulary: int = 2000
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    neurons: int = 512
    max_length: int = 48
    batch_size: int = 32
    pretraining_epochs: int = 12
    pretraining_rate: float = 1e-3
    fine_tuning_epochs: int = 6
    fine_tuning_rate: float = 5e-4
    train_rows: int | None = None
    held_out_rows: int | None = None
