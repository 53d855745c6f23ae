"""Names the one alphabet of shapes that annotations, einsums and comments share.

B batch   T tokens given in this call   S slots of one KV head   R packed slots, ΣS over KV heads
L layers  H query heads = K·G           K KV heads               G query heads per KV head
D head size   M model width   F feed-forward width   V vocabulary
P slots per block   N blocks chosen   W observation window
"""

from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

__all__ = ["Ids", "Leaf", "Packed", "Positions", "Queries", "Rows", "Slots", "Tokens"]

Queries = Float[Array, "B T K G D"]  # un-rotated unless a name says otherwise
Tokens = Float[Array, "B T K D"]  # keys or values of new tokens
Positions = Int[Array, "B T"]  # rotary positions of new tokens, -1 = padding
Packed = Float[Array, "B R"]  # one number per slot, heads one after the other
Rows = Float[Array, "B R D"]  # one vector per slot
Slots = Int[Array, "B K T"]  # packed rows that new tokens were written to, R = dropped
Ids = Int[Array, " B"] | Int[np.ndarray, " B"]  # one token per row, -1 = none
Leaf = Any  # a leaf of a pytree: an array, and in transformations also a shape or a sharding
