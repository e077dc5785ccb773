"""Which of the checkpoint's labels a data set's label is."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from fisher_mask_mergekit.errors import DataError
from fisher_mask_mergekit.settings import FisherSettings


def match_labels(
    raw: Sequence[Any], feature: Any, label2id: Mapping[str, int], settings: FisherSettings
) -> dict[Any, int]:
    """Match the data's labels to the checkpoint's: by name where both have names, else by index.

    Args:
        raw: The labels of the drawn rows.
        feature: The label column's type.
        label2id: The checkpoint's label names and indices.
        settings: The request; its ``label_map`` beats names and indices.

    Returns:
        Every label that occurs, to the checkpoint's index.

    Raises:
        DataError: If a row has no label, or a label no counterpart.
    """
    refused = [value for value in raw if value is None or (isinstance(value, int) and value < 0)]
    if refused:
        raise DataError(
            f"'{settings.data}': {len(refused)} of {len(raw)} drawn rows have label {refused[0]}, that is, none; "
            "use a labelled split, or drop those rows"
        )
    if not all(isinstance(value, int | str) for value in raw):
        raise DataError(f"'{settings.data}': labels are neither whole numbers nor names: {raw[0]!r:.80}")
    checkpoint = {_normalise(name): index for name, index in label2id.items()}
    mapping = {}
    for value in set(raw):
        name = label_name(feature, value)
        if settings.label_map is not None:
            index = _mapped(_keys(value, feature), settings.label_map, checkpoint)
        elif isinstance(name, str) and _normalise(name) in checkpoint:
            index = checkpoint[_normalise(name)]
        elif (
            isinstance(name, str)
            and not name.isdecimal()
            and (_has_names(label2id) or not isinstance(value, int))
        ):
            index = checkpoint.get(_normalise(name))
        else:
            index = int(value) if str(value).isdecimal() else None
        if index is None or index not in label2id.values() or index >= len(label2id):
            raise DataError(
                f"'{settings.data}': label {name!r} has no counterpart among the checkpoint's labels "
                f"({', '.join(f'{key}={index}' for key, index in list(label2id.items())[:20])}); "
                f"{_why_not(raw, feature, value, settings.label_map)}"
            )
        mapping[value] = index
    return mapping


def _mapped(
    keys: tuple[Any, ...], label_map: Mapping[str | int, str | int], checkpoint: Mapping[str, int]
) -> int | None:
    target = next((label_map[key] for key in keys if key in label_map), None)
    if isinstance(target, str):
        return checkpoint.get(_normalise(target), int(target) if target.isdecimal() else None)
    return target


def _why_not(
    raw: Sequence[Any], feature: Any, value: Any, label_map: Mapping[str | int, str | int] | None
) -> str:
    """What is to be said in ``label_map``, or is wrong in it."""
    if label_map is None:
        return "say which with label_map"
    for key in _keys(value, feature):
        if key in label_map:
            return f"label_map says {label_map[key]!r:.80}"
    known = {key for one in set(raw) for key in _keys(one, feature)}
    unknown = [repr(key) for key in label_map if key not in known]
    return "label_map has no key for it" + (
        f", and keys that no drawn row has: {', '.join(unknown):.200}" if unknown else ""
    )


def _keys(value: Any, feature: Any) -> tuple[Any, ...]:
    """What a label can go by in ``label_map``, first what counts most."""
    return label_name(feature, value), value, str(value)


def label_map(mapping: Mapping[Any, int], feature: Any) -> dict[str, int]:
    """What :func:`match_labels` found, by the data's label names, as the sidecar keeps it."""
    ordered = sorted(mapping, key=lambda value: (isinstance(value, str), value))
    return {str(label_name(feature, value)): mapping[value] for value in ordered}


def match_name(name: str, label2id: Mapping[str, int]) -> int | None:
    """The label of this name, however it is spelled."""
    return {_normalise(label): index for label, index in label2id.items()}.get(_normalise(name))


def label_name(feature: Any, value: Any) -> Any:
    """The name of a label, if its column has names; else the label itself."""
    return feature.int2str(value) if isinstance(feature, datasets.ClassLabel) else value


def _normalise(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _has_names(label2id: Mapping[str, int]) -> bool:
    return not all(re.fullmatch(r"LABEL_\d+", name) for name in label2id)
