"""CLIP's token ids, and the few of them that the demo's text encoders were trained on. Needs numpy alone."""

import numpy as np

TOKENS = 77
CLIP_ROWS = 49408
START, END = 49406, 49407  # SD 1.x pads with END as well
PAD_2 = 0  # what SDXL's second tokenizer pads with
TOKEN_TABLE = "embeddings.token_embedding.weight"  # how the name of a text encoder's token vectors ends


class Vocabulary:
    """The few token ids that a text encoder was trained on; all others share one vector.

    Training sees rows of a small table (0 START, 1 END, 2 every unseen word, then the seen words), so that the file
    holds a hundred vectors rather than CLIP's 49408; `expand` gives the full table back.
    """

    UNSEEN = 2

    def __init__(self, seen: list[int]):
        self.seen = seen
        self.row = {START: 0, END: 1} | {token: 3 + i for i, token in enumerate(seen)}

    def __len__(self):
        return 3 + len(self.seen)

    def rows(self, ids: list[int]) -> list[int]:
        """A prompt's token ids without START and END -> 77 rows: cut to fit, framed and padded as SD 1.x does."""
        rows = [0, *(self.row.get(i, self.UNSEEN) for i in ids[: TOKENS - 2]), 1]
        return rows + [1] * (TOKENS - len(rows))

    def expand(self, table):
        """The small table (len(self), width) -> CLIP's (49408, width); of numpy or torch."""
        rows = np.full(CLIP_ROWS, self.UNSEEN)
        rows[list(self.row)] = list(self.row.values())
        return table[rows]


class Vocabulary2(Vocabulary):
    """As above, with one more row for the pad of SDXL's text encoder 2: 0 START, 1 END, 2 unseen, 3 pad, then words."""

    PAD = 3

    def __init__(self, seen: list[int]):
        self.seen = seen
        self.row = {START: 0, END: 1, PAD_2: self.PAD} | {token: 4 + i for i, token in enumerate(seen)}

    def __len__(self):
        return 4 + len(self.seen)

    def rows(self, ids: list[int]) -> list[int]:
        rows = super().rows(ids)
        end = rows.index(1) + 1
        return rows[:end] + [self.PAD] * (TOKENS - end)
