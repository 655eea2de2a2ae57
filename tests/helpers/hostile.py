"""Untrusted content: damaged bytes, any JSON, and a pickle that shows if it was loaded."""

import os

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st


# The same examples each time, so that the tests are deterministic; PHB_EXAMPLES=1000 tries more.
CALM = settings(
    derandomize=True,
    max_examples=int(os.environ.get("PHB_EXAMPLES", 25)),
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)

numbers = st.one_of(
    st.integers(-3, 3), st.floats(), st.sampled_from([10**400, -(10**400), 2**63, 1e308, True, 0.01, "0.01"])
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)


@st.composite
def damaged(draw, content, smallest=0):
    """Draws `content` with bits flipped, cut off, lengthened, or with a piece overwritten, moved or removed."""
    content = bytearray(content)
    for kind in draw(
        st.lists(st.sampled_from(["flip", "cut", "add", "overwrite", "remove", "double"]), min_size=1, max_size=3)
    ):
        at = draw(st.integers(smallest, max(smallest, len(content) - 1)))
        size = draw(st.integers(1, 64))
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at:]
        elif kind == "add":
            content += draw(st.binary(min_size=1, max_size=64))
        elif kind == "overwrite":
            content[at : at + size] = draw(st.binary(min_size=size, max_size=size))
        elif kind == "remove":
            del content[at : at + size]
        elif kind == "double":
            content[at:at] = content[at : at + size]
    return bytes(content)


class Bomb:
    """Makes a folder `marker` when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.makedirs, (self.marker,)
