"""Tiny models of every Transformer architecture that mergekit knows or infers, one row each."""

from tests.families.decoders import DECODERS
from tests.families.encoders import ENCODERS
from tests.families.experts import EXPERTS
from tests.families.family import Fails, Family, Loses, build, inputs, sibling, siblings
from tests.families.others import ENCODER_DECODERS, TOWERS
from tests.families.remote import REMOTE, Remote

FAMILIES: tuple[Family, ...] = (*ENCODERS, *DECODERS, *EXPERTS, *ENCODER_DECODERS, *TOWERS)

__all__ = [
    "FAMILIES",
    "REMOTE",
    "Fails",
    "Family",
    "Loses",
    "Remote",
    "build",
    "inputs",
    "sibling",
    "siblings",
]
