"""How samples become tokens: what is predicted of them, what is cut off, and what is left out."""

from typing import Any

import pytest

from fisher_mask_mergekit.data import Samples
from fisher_mask_mergekit.encoding import encode_samples
from fisher_mask_mergekit.errors import CheckpointError, DataError
from fisher_mask_mergekit.sidecar import DataRecord
from fisher_mask_mergekit.tasks import (
    IGNORED,
    CausalLM,
    Encoded,
    MaskedLM,
    MultipleChoice,
    QuestionAnswering,
    Seq2SeqLM,
    Task,
    TokenClassification,
    Tokenization,
)
from tests import tiny

CLS, SEP, MASK = 2, 3, 4
BOS, EOS = CLS, SEP
TEMPLATE = (
    "{% for m in messages %}{{ '[CLS] ' if loop.first else '' }}{{ 'w11 ' if m.role == 'user' else 'w12 ' }}"
    "{{ m.content + ' [SEP] ' }}{% endfor %}{% if add_generation_prompt %}{{ 'w12 ' }}{% endif %}"
)


def how(max_length: int = 20, *, seed: int = 0, **changes: Any) -> Tokenization:
    tokenizer = tiny.tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return Tokenization(tokenizer, max_length, seed)


def decoder(max_length: int = 20, **changes: Any) -> Tokenization:
    """A tokenizer as decoders have it: a beginning, no end."""
    made = how(max_length, **{"bos_token": "[CLS]", "eos_token": "[SEP]"} | changes)
    from tokenizers.processors import TemplateProcessing

    made.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A $B", special_tokens=[("[CLS]", CLS)]
    )
    return made


def encode(
    task: Task, text: tuple[Any, ...], label: Any, tokenization: Tokenization, index: int = 0
) -> Encoded:
    encoded = task.encode(text, label, index, tokenization)
    assert encoded is not None
    return encoded


class _Halves:
    """Every word as two tokens: a WordPiece tokenizer for which 'w5x' is w5 and ##x."""

    def __new__(cls) -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5, "b": 6, "##x": 7}
        inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )  # fmt: skip
        return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]")


def test_only_a_words_first_token_has_its_tag() -> None:
    tokenization = Tokenization(_Halves(), 20)
    encoded = encode(TokenClassification(), ("ax", "b", "axx"), [1, IGNORED, 2], tokenization)
    assert encoded.inputs["input_ids"] == [CLS, 5, 7, 6, 5, 7, 7, SEP]
    assert encoded.labels == [IGNORED, 1, IGNORED, IGNORED, 2, IGNORED, IGNORED, IGNORED]
    cut = encode(TokenClassification(), ("ax", "b", "axx"), [1, IGNORED, 2], Tokenization(_Halves(), 5))
    assert (cut.labels, cut.truncated) == ([IGNORED, 1, IGNORED, IGNORED, IGNORED], True)
    assert TokenClassification().encode(("ax", "b"), [IGNORED, IGNORED], 0, tokenization) is None
    assert TokenClassification().encode((), [], 0, tokenization) is None


def test_answers_are_the_tokens_that_they_touch() -> None:
    context = "ax bx a b"
    for span, wanted in (
        ([0, 2], [3, 4]),
        ([3, 4], [5, 5]),
        ([4, 7], [6, 7]),
        ([3, 9], [5, 8]),
        (None, [0, 0]),
    ):
        encoded = encode(QuestionAnswering(), ("a", context), span, Tokenization(_Halves(), 20))
        assert encoded.inputs["input_ids"] == [CLS, 5, SEP, 5, 7, 6, 7, 5, 6, SEP]
        assert (encoded.labels, encoded.truncated) == (wanted, False)
        assert "offset_mapping" not in encoded.inputs


def test_an_answer_that_is_cut_off_leaves_the_sample_out() -> None:
    task, texts = QuestionAnswering(), ("a", "ax bx a b")
    kept = encode(task, texts, [3, 5], Tokenization(_Halves(), 8))
    assert kept.inputs["input_ids"] == [CLS, 5, SEP, 5, 7, 6, 7, SEP]
    assert (kept.labels, kept.truncated) == ([5, 6], True)
    assert task.encode(texts, [6, 7], 0, Tokenization(_Halves(), 8)) is None
    assert task.encode(texts, [3, 7], 0, Tokenization(_Halves(), 8)) is None
    assert encode(task, texts, None, Tokenization(_Halves(), 8)).labels == [0, 0]
    with pytest.raises(DataError, match="leaves no room for its context in max_length 4"):
        task.encode(texts, [0, 1], 0, Tokenization(_Halves(), 4))


@pytest.mark.parametrize("task", [TokenClassification(), QuestionAnswering()])
def test_a_tokenizer_that_knows_no_places_is_refused(task: Task) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(CheckpointError, match="Slow does not say; save the checkpoint with a fast tokenizer"):
        task.encode(("w5", "w6"), [0, 1], 0, Tokenization(Slow(), 9))


def test_a_seventh_of_the_tokens_is_masked_and_the_special_ones_never() -> None:
    words = " ".join(["w10"] * 20)
    masked = kept = other = 0
    for index in range(300):
        encoded = encode(MaskedLM(), (words,), None, how(40), index)
        ids, labels = encoded.inputs["input_ids"], encoded.labels
        places = [place for place, label in enumerate(labels) if label != IGNORED]
        assert len(places) == 3
        assert (ids[0], ids[-1], labels[0], labels[-1]) == (CLS, SEP, IGNORED, IGNORED)
        assert all(labels[place] == 10 for place in places)
        assert all(one == 10 for place, one in enumerate(ids[1:-1], 1) if place not in places)
        masked += sum(ids[place] == MASK for place in places)
        kept += sum(ids[place] == 10 for place in places)
        other += sum(ids[place] not in (MASK, 10) for place in places)
    assert masked == pytest.approx(720 + 900 * 0.1 / 64, abs=50)
    assert kept == pytest.approx(90, abs=35)
    assert other == pytest.approx(90, abs=35)


def test_masks_depend_on_the_sample_and_the_seed_alone() -> None:
    words = " ".join(f"w{index}" for index in range(10, 30))
    first = encode(MaskedLM(), (words,), None, how(40), 3)
    assert encode(MaskedLM(), (words,), None, how(40), 3) == first
    assert encode(MaskedLM(), (words,), None, how(40), 4) != first
    assert encode(MaskedLM(), (words,), None, how(40, seed=1), 3) != first
    assert encode(MaskedLM(), ("w5",), None, how(), 0).labels == [IGNORED, 5, IGNORED]
    assert encode(MaskedLM(), (words,), None, how(9), 3).truncated
    assert MaskedLM().encode(("",), None, 0, how()) is None


def test_a_masked_lm_needs_a_mask() -> None:
    with pytest.raises(CheckpointError, match="tokenizer has no mask token"):
        MaskedLM().encode(("w5",), None, 0, how(mask_token=None))


def test_text_is_predicted_whole() -> None:
    encoded = encode(CausalLM(), ("w5 w6 w7",), None, decoder())
    assert encoded.inputs == {"input_ids": [BOS, 5, 6, 7], "attention_mask": [1, 1, 1, 1]}
    assert encoded.labels == [BOS, 5, 6, 7]
    cut = encode(CausalLM(), ("w5 w6 w7",), None, decoder(3))
    assert (cut.labels, cut.truncated) == ([BOS, 5, 6], True)
    assert CausalLM().encode(("",), None, 0, decoder()) is None


def test_a_prompt_is_not_predicted_and_the_completions_end_is() -> None:
    encoded = encode(CausalLM(), ("w5 w6",), "w7 w8", decoder())
    assert encoded.inputs["input_ids"] == [BOS, 5, 6, 7, 8, EOS]
    assert encoded.labels == [IGNORED, IGNORED, IGNORED, 7, 8, EOS]
    assert encode(CausalLM(), ("w5",), "w7 [SEP]", decoder()).labels == [IGNORED, IGNORED, 7, EOS]
    endless = encode(CausalLM(), ("w5",), "w7", decoder(eos_token=None))
    assert endless.labels == [IGNORED, IGNORED, 7]
    # A tokenizer that ends every text does not end the prompt, but leaves alone what the prompt itself says.
    ending = how(bos_token="[CLS]", eos_token="[SEP]")
    assert encode(CausalLM(), ("w5",), "w7", ending).inputs["input_ids"] == [BOS, 5, 7, EOS]
    assert encode(CausalLM(), ("w5 [SEP]",), "w7", ending).inputs["input_ids"] == [BOS, 5, EOS, 7, EOS]


@pytest.mark.parametrize(
    ("longest", "ids", "predicted"),
    [
        (7, [BOS, 5, 6, 7, 8, 9, EOS], 3),
        (6, [BOS, 6, 7, 8, 9, EOS], 3),
        (5, [BOS, 7, 8, 9, EOS], 3),
        (4, [BOS, 8, 9, EOS], 3),
        (3, [BOS, 8, 9], 2),
        (2, [BOS, 8], 1),
    ],
)
def test_a_prompt_is_cut_from_the_left_and_a_completion_only_where_it_must(
    longest: int, ids: list[int], predicted: int
) -> None:
    encoded = encode(CausalLM(), ("w5 w6 w7",), "w8 w9", decoder(longest))
    assert encoded.inputs["input_ids"] == ids
    assert encoded.labels == [IGNORED] * (len(ids) - predicted) + ids[len(ids) - predicted :]
    assert encoded.truncated == (longest < 7)


def test_without_a_beginning_one_token_of_the_prompt_stays() -> None:
    plain = decoder(3, bos_token=None)
    plain.tokenizer.backend_tokenizer.post_processor = None
    encoded = encode(CausalLM(), ("w5 w6 w7",), "w8 w9 w10", plain)
    assert (encoded.inputs["input_ids"], encoded.labels) == ([7, 8, 9], [IGNORED, 8, 9])
    assert encode(CausalLM(), ("",), "w8 w9", plain).labels == [8, 9, EOS]
    assert CausalLM().encode(("",), "", 0, plain) is None


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_only_the_last_answer_of_a_chat_is_predicted() -> None:
    chat = (message("user", "w5"), message("assistant", "w6"), message("user", "w7"))
    encoded = encode(CausalLM(), chat, message("assistant", "w8 w9"), decoder(chat_template=TEMPLATE))
    assert encoded.inputs["input_ids"] == [BOS, 11, 5, EOS, 12, 6, EOS, 11, 7, EOS, 12, 8, 9, EOS]
    assert encoded.labels == [IGNORED] * 11 + [8, 9, EOS]
    cut = encode(CausalLM(), chat, message("assistant", "w8 w9"), decoder(6, chat_template=TEMPLATE))
    assert (cut.inputs["input_ids"], cut.truncated) == ([BOS, EOS, 12, 8, 9, EOS], True)


@pytest.mark.parametrize(
    ("template", "error", "says"),
    [
        (None, CheckpointError, "tokenizer has no chat template, .* or on prompt and completion"),
        ("{{ raise_exception('roles must alternate') }}", DataError, "chat template refuses a chat: roles must alternate"),
        (TEMPLATE.replace("{{ 'w12 ' }}{% endif", "{{ 'w13 ' }}{% endif"), CheckpointError, "does not say where the answer begins"),
    ],
)  # fmt: skip
def test_a_chat_needs_a_template_that_fits(template: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        CausalLM().encode(
            (message("user", "w5"),), message("assistant", "w6"), 0, decoder(chat_template=template)
        )


def test_source_and_target_are_cut_each_by_itself() -> None:
    encoded = encode(Seq2SeqLM(), ("w5 w6 w7",), "w8", how(4))
    assert encoded.inputs == {"input_ids": [CLS, 5, 6, SEP], "attention_mask": [1, 1, 1, 1]}
    assert (encoded.labels, encoded.truncated) == ([CLS, 8, SEP], True)
    assert encode(Seq2SeqLM(), ("w5",), "w6 w7 w8", how(4)).labels == [CLS, 6, 7, SEP]
    assert not encode(Seq2SeqLM(), ("w5",), "w6", how(4)).truncated


def test_every_choice_stands_behind_the_question() -> None:
    encoded = encode(MultipleChoice(), ("w5", "w6", "w7 w8"), 1, how())
    assert encoded.inputs["input_ids"] == [[CLS, 5, SEP, 6, SEP], [CLS, 5, SEP, 7, 8, SEP]]
    assert (encoded.labels, encoded.truncated) == (1, False)
    assert encode(MultipleChoice(), ("w5", "w6", "w7 w8"), 1, how(5)).truncated


def test_what_is_left_out_is_counted_and_keeps_the_others_places() -> None:
    record = DataRecord(
        split="train",
        revision=None,
        text=("text",),
        label=None,
        label_map={},
        rows=3,
        digest="",
        majority=None,
    )
    drawn = Samples([("",), ("w5 w6 w7",), ("w5",)], [None] * 3, record)
    encoded = encode_samples(drawn, CausalLM(), decoder(3))
    assert (list(encoded.samples), encoded.left_out, encoded.truncated) == ([1, 2], 1, 1)
    with pytest.raises(
        DataError, match="none of the 3 samples holds anything to predict for causal-lm within 1 tokens"
    ):
        encode_samples(drawn, CausalLM(), decoder(1))
