"""CLIP's text encoder as SD 1.x uses it."""

import numpy as np

from ..checkpoint import Part
from .graph import INT64, Graph, Value, Weights

TOKENS = 77
END = 49407  # SD 1.x pads with it as well
HEAD_WIDTH = 64  # of CLIP-L
MASKED = -1e4  # rather than -inf: it suits 16 bits


def text_encoder(part: Part, weights: Weights, batch: int = 1, skip: int = 0) -> Graph:
    """input_ids (B,77) int64 -> last_hidden_state (B,77,D), pooled (B,D), both after the last norm.

    skip: how many of the last layers the hidden state leaves out (clip skip 2 is 1). pooled is always of all layers, at
    the first END.
    """
    graph = Graph("text_encoder", part, weights)
    table = graph.weight("embeddings.token_embedding.weight")
    width, layers = table.shape[1], part.count("encoder.layers.{}")
    heads = part.conventions.get("heads", width // HEAD_WIDTH)
    ids = graph.input("input_ids", (batch, TOKENS), INT64)
    with graph.scope("embeddings"):
        positions = graph.weight("embeddings.position_embedding.weight")
        x = graph.mark("embeddings", graph.add(graph.lookup(table, ids), positions))
    mask = graph.constant("causal", np.triu(np.full((1, 1, TOKENS, TOKENS), MASKED, np.float32), 1))
    hidden = x
    for layer in range(layers):
        with graph.scope(f"layers.{layer}"):
            x = graph.mark(f"encoder.layers.{layer}", _layer(graph, x, f"encoder.layers.{layer}", heads, mask))
        if layer == layers - 1 - skip:
            hidden = x
    last = graph.layer_norm(x, "final_layer_norm")
    graph.output("last_hidden_state", last if hidden is x else graph.layer_norm(hidden, "final_layer_norm"))
    last = last if hidden is not x else graph.outputs[0]
    with graph.scope("pooled"):
        graph.output("pooled", _pooled(graph, ids, last, table.shape[0]))
    return graph


def _layer(graph: Graph, x: Value, name: str, heads: int, mask: Value) -> Value:
    normal = graph.layer_norm(x, f"{name}.layer_norm1")
    q, k, v = (graph.linear(normal, f"{name}.self_attn.{kind}_proj") for kind in "qkv")
    x = graph.add(x, graph.linear(graph.attention(q, k, v, heads, mask), f"{name}.self_attn.out_proj"))
    inner = graph.linear(graph.layer_norm(x, f"{name}.layer_norm2"), f"{name}.mlp.fc1")
    return graph.add(x, graph.linear(graph.silu(inner, 1.702), f"{name}.mlp.fc2"))


def _pooled(graph: Graph, ids: Value, last: Value, rows: int) -> Value:
    """The row at the first END: everything after it is END, so it is the one whose left neighbour is something else.

    A product with a one-hot row, where gathering at a computed index would ask more of a compiler. Whether an id is END
    is looked up: compared as bfloat16, START and END are the same number.
    """
    batch, length, width = last.shape
    ends = graph.lookup(graph.constant("is_end", (np.arange(rows)[:, None] == END).astype(np.float32)), ids)
    later, earlier = graph.cut(ends, 1, 1, length), graph.cut(ends, 1, 0, length - 1)
    first = graph.op("Sub", [later, earlier], later.shape)
    row = graph.matmul(graph.transpose(first, (0, 2, 1)), graph.cut(last, 1, 1, length))
    return graph.reshape(row, (batch, width))
