"""Tasks: every per-sample loss against transformers' own of that sample run alone, in float64."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.testing import assert_close
from transformers import PreTrainedModel

from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.tasks import (
    IGNORED,
    Batch,
    Categorical,
    CausalLM,
    Encoded,
    Gaussian,
    MaskedLM,
    MultiLabelClassification,
    MultipleChoice,
    QuestionAnswering,
    Regression,
    Seq2SeqLM,
    SequenceClassification,
    Task,
    TokenClassification,
)
from tests import tiny, tiny_tasks

TASKS: dict[str, Any] = {
    "tokens": TokenClassification,
    "answers": QuestionAnswering,
    "choices": MultipleChoice,
    "masked": MaskedLM,
    "pretraining": MaskedLM,
    "causal": CausalLM,
    "seq2seq": Seq2SeqLM,
}
CASES = [name for name in tiny_tasks.MODELS if not name.endswith("sequences")]


def case(name: str) -> tuple[PreTrainedModel, type[Task], list[Encoded]]:
    kind = name.rpartition("-")[2]
    return tiny_tasks.model(name), TASKS[kind], tiny_tasks.samples(kind)


def losses(task: Task, model: Any, batches: Iterable[Batch]) -> Tensor:
    """By the samples' index, whatever the order."""
    found: dict[int, Tensor] = {}
    for batch in batches:
        found |= dict(zip(batch.index, task.likelihood(model, batch).losses(), strict=True))
    return torch.stack([found[index] for index in sorted(found)]).detach()


@pytest.mark.parametrize("name", CASES)
def test_every_loss_is_transformers_own(name: str) -> None:
    model, task, encoded = case(name)
    wanted = torch.stack([tiny_tasks.own_loss(model, one).detach() for one in encoded])
    assert_close(losses(task(), model, tiny_tasks.batches(encoded, 3)), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_padding_on_either_side_batch_size_and_order_change_nothing(name: str) -> None:
    model, task, encoded = case(name)
    wanted = losses(task(), model, tiny_tasks.batches(encoded, 1))
    backwards = list(reversed(range(len(encoded))))
    for made in (
        tiny_tasks.batches(encoded, 7),
        tiny_tasks.batches(encoded, 4, left=True),
        tiny_tasks.batches(encoded, 3, order=backwards),
    ):
        assert_close(losses(task(), model, made), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_a_sum_is_the_mean_times_the_number_of_predictions(name: str) -> None:
    model, task, encoded = case(name)
    (batch,) = tiny_tasks.batches(encoded, 7)
    counts = torch.tensor(
        [
            sum(label != IGNORED for label in (one.labels[1:] if task is CausalLM else one.labels))
            if isinstance(one.labels, list)
            else 1
            for one in encoded
        ]
    )
    mean, total = (losses(task(loss), model, [batch]) for loss in ("mean", "sum"))
    assert_close(total, mean * counts, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["llama", "roberta", "bert"])
def test_sequence_classification_padded_on_the_left(name: str) -> None:
    model = tiny.classifier(name).double().eval()
    encoded = [tiny_tasks.sample(ids.tolist(), label) for ids, label in tiny.samples()]
    wanted = torch.stack([tiny_tasks.own_loss(model, one).detach() for one in encoded])
    for left in (False, True):
        made = tiny_tasks.batches(encoded, 3, left=left)
        assert_close(losses(SequenceClassification(), model, made), wanted, rtol=1e-10, atol=1e-10)


def test_multi_label_classification_is_a_yes_or_no_per_label() -> None:
    model = tiny_tasks.model("roberta-sequences", problem_type="multi_label_classification")
    draw = tiny_tasks.Draw()
    # As many tokens as labels in one of them: labels are not taken for labels per token.
    encoded = [
        tiny_tasks.sample(draw.ids(length), [draw.number(0, 2) for _ in range(3)]) for length in (3, 2, 5, 3)
    ]
    task = MultiLabelClassification()
    for left in (False, True):
        for one in range(0, 4, 2):
            part = encoded[one : one + 2]
            made = tiny_tasks.batches(part, 2, left=left)
            wanted = []
            for sample in part:
                logits = model(input_ids=torch.tensor([sample.inputs["input_ids"]])).logits[0]
                wanted.append(binary_cross_entropy_with_logits(logits, torch.tensor(sample.labels).double()))
            assert_close(losses(task, model, made), torch.stack(wanted).detach(), rtol=1e-10, atol=1e-10)
    (batch,) = tiny_tasks.batches(encoded, 4)
    assert_close(
        losses(MultiLabelClassification("sum"), model, [batch]),
        losses(task, model, [batch]) * 3,
        rtol=1e-12,
        atol=0,
    )
    likelihood = task.likelihood(model, batch)
    right = (model(**batch.inputs).logits > 0).long() == batch.labels
    assert_close(likelihood.correct(), right.double().mean(1))


@pytest.mark.parametrize("outputs", [1, 3])
def test_regression_is_half_of_transformers_squared_error(outputs: int) -> None:
    model = tiny_tasks.model("roberta-sequences", labels=outputs, problem_type="regression")
    draw = tiny_tasks.Draw()
    encoded = [
        tiny_tasks.sample(draw.ids(draw.number(3, 9)), [draw.number(-9, 9) / 7 for _ in range(outputs)])
        for _ in range(5)
    ]
    wanted = []
    for one in encoded:
        means = model(input_ids=torch.tensor([one.inputs["input_ids"]])).logits[0]
        wanted.append((means - torch.tensor(one.labels, dtype=torch.float64)).square().mean() / 2)
    task = Regression("mean", {str(index): index for index in range(outputs)})
    for left in (False, True):
        made = tiny_tasks.batches(encoded, 2, left=left)
        assert_close(losses(task, model, made), torch.stack(wanted).detach(), rtol=1e-10, atol=1e-10)
    summed = losses(Regression("sum"), model, tiny_tasks.batches(encoded, 5))
    assert_close(summed, torch.stack(wanted).detach() * outputs, rtol=1e-10, atol=1e-10)
    assert task.predicts_once == (outputs == 1)
    likelihood = task.likelihood(model, tiny_tasks.batches(encoded, 5)[0])
    assert bool(likelihood.correct().isnan().all())


def test_a_gaussians_expectation_is_that_of_its_draws() -> None:
    """E[(dl / dmu)^2] over y ~ N(mu, 1), by 20000 draws and by the one exact outcome."""
    means = torch.tensor([[0.3], [-2.0]], dtype=torch.float64, requires_grad=True)

    def squared(outcomes: Tensor, likelihood: Gaussian) -> Tensor:
        (gradient,) = torch.autograd.grad(likelihood.losses(outcomes).sum(), means)
        return gradient.square()

    likelihood = Gaussian(means, torch.zeros(2, 1, dtype=torch.float64), 1.0, (0, 1))
    ((outcomes, weight),) = likelihood.expectation()
    assert_close(squared(outcomes, likelihood) * weight[:, None], torch.ones(2, 1, dtype=torch.float64))
    drawn = torch.stack([squared(likelihood.sampled(seed), likelihood) for seed in range(20000)]).mean(0)
    assert_close(drawn, torch.ones(2, 1, dtype=torch.float64), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", ["bert-tokens", "bert-answers", "gpt2-causal", "t5-seq2seq", "bert-choices"])
def test_draws_depend_on_the_sample_and_the_seed_alone(name: str) -> None:
    model, task, encoded = case(name)
    order = list(reversed(range(len(encoded))))

    def drawn(made: Iterable[Batch], seed: int) -> Tensor:
        found: dict[int, Tensor] = {}
        for batch in made:
            likelihood = task("sum").likelihood(model, batch)
            found |= dict(zip(batch.index, likelihood.losses(likelihood.sampled(seed)), strict=True))
        return torch.stack([found[index] for index in sorted(found)]).detach()

    wanted = drawn(tiny_tasks.batches(encoded, 7), 3)
    assert_close(drawn(tiny_tasks.batches(encoded, 2, order=order), 3), wanted, rtol=1e-10, atol=1e-10)
    assert_close(drawn(tiny_tasks.batches(encoded, 3, left=True), 3), wanted, rtol=1e-10, atol=1e-10)
    with pytest.raises(AssertionError):
        assert_close(drawn(tiny_tasks.batches(encoded, 7), 4), wanted)


def test_draws_have_the_models_probabilities() -> None:
    log_probs = torch.log(torch.tensor([[0.2, 0.0, 0.5, 0.3, 0.0]], dtype=torch.float64))
    one = Categorical(log_probs, torch.tensor([2]), torch.tensor([0]), torch.ones(1), (0,))
    drawn = torch.cat([one.sampled(seed) for seed in range(5000)])
    shares = torch.bincount(drawn, minlength=5) / 5000
    assert_close(shares.double(), log_probs.exp()[0], rtol=0, atol=0.02)


def test_what_cannot_be_is_never_drawn_however_the_probabilities_round() -> None:
    """A rounding error made large: probabilities that add up to a half, and padding behind them."""
    log_probs = torch.tensor([[0.25, 0.25, 0.0]]).log()
    one = Categorical(log_probs, torch.tensor([0]), torch.tensor([0]), torch.ones(1), (0,))
    drawn = torch.cat([one.sampled(seed) for seed in range(1000)])
    assert_close(torch.bincount(drawn, minlength=3) / 1000, torch.tensor([0.5, 0.5, 0.0]), rtol=0, atol=0.05)
    assert bool(one.outputs(0).isfinite().all())


def test_accuracy_is_the_mean_over_samples_of_the_share_that_is_right() -> None:
    log_probs = torch.log_softmax(torch.eye(4, dtype=torch.float64) * 3, -1)
    likelihood = Categorical(
        log_probs, torch.tensor([0, 1, 0, 3]), torch.tensor([0, 0, 0, 1]), torch.ones(4), (5, 6)
    )
    assert_close(likelihood.correct(), torch.tensor([2 / 3, 1.0], dtype=torch.float64))
    assert_close(likelihood.outputs(1), log_probs[3:])


def test_an_answer_is_never_in_the_padding() -> None:
    model, task, encoded = case("bert-answers")
    (batch,) = tiny_tasks.batches(encoded, 7)
    likelihood = task().likelihood(model, batch)
    assert isinstance(likelihood, Categorical)
    own = batch.inputs["attention_mask"].repeat_interleave(2, 0) == 1
    assert bool((likelihood.log_probs[~own] == -torch.inf).all())
    assert_close(likelihood.log_probs.exp().sum(1), torch.ones(14, dtype=torch.float64))
    assert bool(likelihood.outputs(2).isfinite().all())


def test_gradients_with_padding_are_finite_and_those_without() -> None:
    model, task, encoded = case("bert-answers")
    embeddings = model.get_input_embeddings().weight

    def gradient(made: Iterable[Batch]) -> Tensor:
        total = torch.cat([task().likelihood(model, batch).losses() for batch in made]).sum()
        return torch.autograd.grad(total, embeddings)[0]

    assert_close(gradient(tiny_tasks.batches(encoded, 7)), gradient(tiny_tasks.batches(encoded, 1)))


def test_a_sample_without_predictions_is_an_error() -> None:
    model = tiny_tasks.model("bert-masked")
    encoded = [tiny_tasks.sample([5, 6], [5, IGNORED]), tiny_tasks.sample([5, 6], [IGNORED, IGNORED])]
    with pytest.raises(MeasurementError, match="sample 1 has nothing to predict"):
        losses(MaskedLM(), model, tiny_tasks.batches(encoded, 2))
