"""The sizes of a base model that decide its memory, read from its `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

# Keys of a configuration; older architectures name theirs differently.
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_INTERMEDIATE = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
_POSITIONS = ("max_position_embeddings", "n_positions")
_CONTEXT = (*_POSITIONS, "n_ctx", "max_sequence_length", "seq_length")
# No model is larger; a configuration may say anything.
_MOST, _MOST_LAYERS = 2**30, 1024
# What the libraries' classes take where `config.json` leaves `tie_word_embeddings` out.
_TIED = {
    *("bloom", "cohere", "cohere2", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_bigcode"),
    *("gpt_neo", "opt", "smollm3", "starcoder2"),
}
_LEARNED_POSITIONS = {"gpt2", "gpt_bigcode", "gpt_neo", "opt"}
_QK_NORM = {"gemma3", "gemma3_text", "qwen3", "olmo2", "olmo3"}
_FUSABLE = {"granite", "llama", "ministral", "mistral", "phi3", "qwen2", "qwen3", "smollm3"}
# The window that the libraries' classes take where `config.json` leaves it out; and those that slide only if asked to.
_WINDOWS = {"ministral": 4096, "mistral": 4096}
_SLIDES_IF_ASKED = {"qwen2", "qwen3", "smollm3"}
# Angles that depend on the longest row of a batch; Phi-3's have older names.
_LONG_ROPE = {"phi3": ("longrope", "su", "yarn")}
_ORIGINAL = "original_max_position_embeddings"
_FOUR_NORMS = {"gemma2", "gemma3", "gemma3_text", "glm4"}
_ONE_NORM = {"cohere", "cohere2", "gptj", "phi"}
# No fused attention in transformers 5: the scores of every pair of tokens are kept.
_EAGER = {"bloom", "gemma2", "gpt_neo", "gptj"}
# Their gelu is written out in Python, and keeps an intermediate of each step.
_LONG_GELU = {"gelu_new", "gelu_fast", "gelu_python", "gelu_python_tanh", "gelu_accurate"}
_ATTENTION = {
    "bloom": ("query_key_value", "dense"),
    "falcon": ("query_key_value", "dense"),
    "gpt_neox": ("query_key_value", "dense"),
    "gpt2": ("c_attn", "c_proj"),
    "gpt_bigcode": ("c_attn", "c_proj"),
    "phi3": ("qkv_proj", "o_proj"),
    "gptj": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "gpt_neo": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense"),
}
_MLP = {
    "arcee": ("up_proj", "down_proj"),
    "nemotron": ("up_proj", "down_proj"),
    "bloom": ("dense_h_to_4h", "dense_4h_to_h"),
    "falcon": ("dense_h_to_4h", "dense_4h_to_h"),
    "gpt_neox": ("dense_h_to_4h", "dense_4h_to_h"),
    "gpt2": ("c_fc", "c_proj"),
    "gpt_bigcode": ("c_fc", "c_proj"),
    "gpt_neo": ("c_fc", "c_proj"),
    "starcoder2": ("c_fc", "c_proj"),
    "gptj": ("fc_in", "fc_out"),
    "opt": ("fc1", "fc2"),
    "phi": ("fc1", "fc2"),
    "glm": ("gate_up_proj", "down_proj"),
    "glm4": ("gate_up_proj", "down_proj"),
    "phi3": ("gate_up_proj", "down_proj"),
}
_LLAMA_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LLAMA_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Linear:
    """A linear layer of each decoder layer: the end of its name, the values that go in and out, and what it reads.

    `reads` tells apart what layers share: the attention's or the MLP's normed input, the heads' output, the gated one.
    """

    name: str
    inputs: int
    outputs: int
    reads: str

    @property
    def weights(self) -> int:
        """The number of its weights."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder. `queries` and `keys` are the widths of all query and of all key heads together.

    `gated`: the MLP multiplies two branches. `eager`: attention keeps its scores. `outside` are parameters that no
    text passes through: a vision tower. `four_bit`: the checkpoint itself is stored in 4 bit. `context` is in tokens,
    None where the model has no fixed one. `fusable`: the fast path knows its layers, in rows of up to `fusable_length`
    tokens where that is not None.
    """

    model_type: str
    hidden: int
    layers: int
    heads: int
    queries: int
    keys: int
    intermediate: int
    vocab: int
    tied: bool
    gated: bool
    norms: int = 2
    qk_norm: bool = False
    eager: bool = False
    long_gelu: bool = False
    positions: int = 0
    outside: int = 0
    four_bit: bool = False
    context: int | None = None
    fusable: bool = False
    fusable_length: int | None = None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of one decoder layer."""
        return (*self._attention(), *self._mlp())

    @property
    def linear_weights(self) -> int:
        """The weights of every layer's linear layers: what 4-bit training quantises."""
        return self.layers * sum(linear.weights for linear in self.linears)

    @property
    def other_weights(self) -> int:
        """The weights that stay in 16 bit: embeddings, head, norms, positions, a vision tower."""
        ends = self.vocab * self.hidden * (1 if self.tied else 2)
        norms = (self.layers * self.norms + 1) * self.hidden
        return ends + norms + self.positions * self.hidden + self.outside

    @property
    def weights(self) -> int:
        """The number of all weights, biases left out."""
        return self.linear_weights + self.other_weights

    def as_dict(self) -> dict[str, Any]:
        """Return the sizes as JSON."""
        return asdict(self)

    def _attention(self) -> list[Linear]:
        names = _ATTENTION.get(self.model_type, _LLAMA_ATTENTION)
        *readers, last = (f"self_attn.{name}" for name in names)
        widths = [self.queries, self.keys, self.keys] if len(readers) > 1 else [self.queries + 2 * self.keys]
        read = [Linear(name, self.hidden, width, "attention") for name, width in zip(readers, widths, strict=True)]
        return [*read, Linear(last, self.queries, self.hidden, "heads")]

    def _mlp(self) -> list[Linear]:
        *readers, last = (f"mlp.{name}" for name in _MLP.get(self.model_type, _LLAMA_MLP))
        width = self.intermediate * (2 if self.gated and len(readers) == 1 else 1)
        read = [Linear(name, self.hidden, width, "mlp") for name in readers]
        return [*read, Linear(last, self.intermediate, self.hidden, "gated")]


def read_shape(config: Mapping[str, Any]) -> Shape | None:
    """Return the shape that a `config.json` describes, or None where it lacks a size."""
    kind = str(config.get("model_type"))
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(text, Mapping)
    hidden, layers, heads = (_size(text, keys) for keys in (_HIDDEN, _LAYERS, _HEADS))
    vocab = _size(text, ("vocab_size",))
    if not (hidden and layers and heads and vocab) or layers > _MOST_LAYERS or heads > hidden:
        return None
    head_dim = _size(text, ("head_dim",)) or hidden // heads
    return Shape(
        model_type=kind,
        hidden=hidden,
        layers=layers,
        heads=heads,
        queries=heads * head_dim,
        keys=_kv_heads(kind, text, heads) * head_dim,
        intermediate=_size(text, _INTERMEDIATE) or 4 * hidden,
        vocab=vocab,
        tied=_is_tied(kind, config, text),
        gated=len(_MLP.get(kind, _LLAMA_MLP)) == 3 or "gate_up_proj" in _MLP.get(kind, ()),
        norms=4 if kind in _FOUR_NORMS else 1 if kind in _ONE_NORM else 2,
        qk_norm=kind in _QK_NORM,
        eager=kind in _EAGER,
        long_gelu=_activation(text) in _LONG_GELU,
        positions=(_size(text, _POSITIONS) or 0) if kind in _LEARNED_POSITIONS else 0,
        outside=_tower(config),
        four_bit=bool(config.get("quantization_config")),
        context=_size(text, _CONTEXT),
        fusable=_is_fusable(kind, text),
        fusable_length=_fusable_length(kind, text),
    )


def stored_shape(values: Any) -> Shape | None:
    """Return the shape that `as_dict` made `values` of, or None where another version did, or nobody."""
    known = {item.name for item in fields(Shape)}
    try:
        return Shape(**{name: value for name, value in values.items() if name in known})
    except (AttributeError, TypeError):
        return None


def _size(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((config[name] for name in names if type(config.get(name)) is int and 0 < config[name] < _MOST), None)


def _kv_heads(kind: str, config: Mapping[str, Any], heads: int) -> int:
    if kind == "falcon":
        if config.get("new_decoder_architecture"):
            return _size(config, _KV_HEADS) or heads
        return 1 if config.get("multi_query", True) else heads
    if kind == "gpt_bigcode":
        return 1 if config.get("multi_query", True) else heads
    return _size(config, _KV_HEADS) or heads


def _is_tied(kind: str, config: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    asked = [part["tie_word_embeddings"] for part in (config, text) if "tie_word_embeddings" in part]
    return bool(asked[0]) if asked else kind in _TIED


def _activation(config: Mapping[str, Any]) -> Any:
    names = ("hidden_act", "activation_function", "hidden_activation")
    return next((config[name] for name in names if config.get(name)), None)


def _is_fusable(kind: str, config: Mapping[str, Any]) -> bool:
    """Return whether `worker.ml.kernels.cover` admits such layers."""
    drops = config.get("attention_dropout") or config.get("resid_pdrop")
    return kind in _FUSABLE and config.get("hidden_act", "silu") == "silu" and not drops


def _fusable_length(kind: str, config: Mapping[str, Any]) -> int | None:
    """Return the longest row that attention sees as a whole, and that turns by the same angles beside any other."""
    found = []
    if config.get("use_sliding_window", kind not in _SLIDES_IF_ASKED):
        found.append(config.get("sliding_window", _WINDOWS.get(kind)))
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type")) in _LONG_ROPE.get(kind, ("longrope",)):
        found.append(config.get(_ORIGINAL) or rope.get(_ORIGINAL) or 4096)
    return min((length for length in found if type(length) is int and length > 0), default=None)


def _tower(config: Mapping[str, Any]) -> int:
    """Return about how many weights a vision tower has: attention and MLP of each of its layers."""
    vision = config.get("vision_config")
    if not isinstance(vision, dict):
        return 0
    width, depth = _size(vision, ("embed_dim", "hidden_size")), _size(vision, ("num_hidden_layers", "depth"))
    if not (width and depth):
        return 0
    return depth * (4 * width**2 + 2 * width * (_size(vision, ("intermediate_size",)) or 4 * width))
