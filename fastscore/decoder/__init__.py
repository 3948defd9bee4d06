"""A decoder's forward pass over packs, for the families whose layers are alike; :mod:`.weights` says which."""

from __future__ import annotations

from fastscore.decoder.forward import OwnForward
from fastscore.decoder.instructions import multiplies
from fastscore.decoder.operators import choose_operators
from fastscore.decoder.weights import Decoder, read_decoder

__all__ = ["Decoder", "OwnForward", "choose_operators", "multiplies", "read_decoder"]
