"""Which token has which id: what rows of embeddings, and a tokenizer that is run with them, must agree in."""

from collections.abc import Mapping

from fisher_mask_mergekit.checkpoint import TOKENIZER_FILES, Checkpoint, transformers_errors


def vocabulary(checkpoint: Checkpoint) -> dict[str, int] | None:
    """Every token's id; None if there is no tokenizer, or only one that code of its own makes.

    Raises:
        CheckpointError: If its files are none that can be read.
    """
    if not any(file for pattern in TOKENIZER_FILES for file in checkpoint.folder.glob(pattern)):
        return None
    whole = checkpoint.folder / "tokenizer.json"
    with transformers_errors(checkpoint):
        if whole.is_file():
            from tokenizers import Tokenizer

            return Tokenizer.from_file(str(whole)).get_vocab()
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False).get_vocab()
        except ValueError as error:
            if "trust_remote_code" in str(error):
                return None
            raise


def first_unlike(
    ours: Mapping[str, int], theirs: Mapping[str, int], *, lacking_too: bool = False
) -> tuple[str, int, int | None] | None:
    """The first token that has another id there, or whose id has another token; None if there is none.

    Args:
        ours: Of one vocabulary, every token's id.
        theirs: Of another.
        lacking_too: Whether a token counts that is not there, and its id neither.

    Returns:
        The token, its id here, and there.
    """
    taken = set(theirs.values())
    for token, index in sorted(ours.items(), key=lambda item: item[1]):
        there = theirs.get(token)
        if there != index and (lacking_too or there is not None or index in taken):
            return token, index, there
    return None
