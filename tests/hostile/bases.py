"""Base models that nobody should open: each damages a copy of a good one."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Damage = Callable[[Path], None]


@dataclass(frozen=True)
class BadBase:
    """A base model that must be refused: `says` is part of the message."""

    name: str
    damage: Damage
    says: str


def config(name: str, says: str, **values: Any) -> BadBase:
    """Return a base whose `config.json` has other values."""
    return BadBase(name, _changed("config.json", values), says)


def tokenizer(name: str, says: str, **values: Any) -> BadBase:
    """Return a base whose `tokenizer_config.json` has other values."""
    return BadBase(name, _changed("tokenizer_config.json", values), says)


def template(text: str) -> Damage:
    """Return the damage of another chat template."""
    return lambda folder: void((folder / "chat_template.jinja").write_text(text))


def _file(name: str, content: bytes | str) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: void((folder / name).write_bytes(data))


def void(_: object) -> None:
    """Return nothing."""


def _changed(name: str, values: dict[str, Any]) -> Damage:
    def change(folder: Path) -> None:
        known = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(known | values))

    return change


def _sparse(name: str, num_bytes: int) -> Damage:
    def write(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(num_bytes)

    return write


def _pickled(*names: str) -> Damage:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).write_bytes(pickle.dumps({"w": os.system}))

    return write


def _index(weight_map: Any) -> Damage:
    return _file("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


def _weights(change: Callable[[dict[str, Any]], Any], length: int | None = None) -> Damage:
    # Rewrites the header of the weights; `length` is what the file says that the header's length is.
    def write(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        changed = change(header)
        made = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        out = io.BytesIO()
        out.write(struct.pack("<Q", len(made) if length is None else length) + made + data[8 + size :])
        (folder / "model.safetensors").write_bytes(out.getvalue())

    return write


def _tensor(header: dict[str, Any], **values: Any) -> dict[str, Any]:
    name = next(name for name in header if name != "__metadata__")
    return header | {name: header[name] | values}


def _cut(name: str, keep: float) -> Damage:
    def write(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return write


def _linked(name: str) -> Damage:
    def write(folder: Path) -> None:
        outside = folder.parents[1] / f"outside-{folder.name}"
        outside.mkdir(exist_ok=True)
        (folder / name).rename(outside / name)
        (folder / name).symlink_to(outside / name)

    return write


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "special_tokens_map.json")


BOMB = '{"a":' * 5_000 + "1" + "}" * 5_000
LOOP = "{% for i in range(99999) %}"
NF4 = {"load_in_4bit": True, "quant_method": "bitsandbytes"}

WEIGHTS = [
    BadBase("pickled weights", _pickled("pytorch_model.bin"), "pickle files (pytorch_model.bin), which can run code"),
    BadBase("pickled shards", _pickled("pytorch_model-00001-of-00002.bin", "x.pt"), "which can run code"),
    BadBase("a pickled checkpoint", _pickled("consolidated.00.pth"), "consolidated.00.pth"),
    BadBase("an index that leads out", _index({"w": "../../etc/x.safetensors"}), "names '../../etc/x.safetensors'"),
    BadBase("an index of absolute paths", _index({"w": "/etc/x.safetensors"}), "names '/etc/x.safetensors'"),
    BadBase("an index of pickles", _index({"w": "pytorch_model.bin"}), "names 'pytorch_model.bin', which is not"),
    BadBase("an index of nothing", _index({}), "lists no weights"),
    BadBase("an index of numbers", _index({"w": 7}), "names '7', which is not a safetensors file"),
    BadBase("an index that is a list", _index(["a"]), "lists no weights"),
    BadBase("a broken index", _file("model.safetensors.index.json", "{"), "model.safetensors.index.json is not JSON"),
    BadBase("a header of 2**63 bytes", _weights(lambda header: header, 2**63), "its header would be 9,223,372,036"),
    BadBase("a header longer than the file", _weights(lambda header: header, 10**6), "its header would be 1,000,000"),
    BadBase("a header of noise", _weights(lambda _: b"\xff" * 64), "its header is broken"),
    BadBase("a header that nests", _weights(lambda _: BOMB.encode()), "its header is broken"),
    BadBase("a header of a list", _weights(lambda _: [1]), "its header is broken"),
    BadBase("a tensor beyond the end", _weights(lambda h: _tensor(h, data_offsets=[0, 2**40])), "its header is broken"),
    BadBase("a tensor before the start", _weights(lambda h: _tensor(h, data_offsets=[-8, 0])), "its header is broken"),
    BadBase("a tensor of 2**62 items", _weights(lambda h: _tensor(h, shape=[2**31, 2**31])), "its header is broken"),
    BadBase("a tensor of an unknown type", _weights(lambda h: _tensor(h, dtype="PYOBJ")), "its header is broken"),
    BadBase("two tensors in one place", _weights(lambda h: h | {"x": next(v for k, v in h.items() if k[0] != "_")}),
            "overlap or leave gaps"),
    BadBase("weights cut off", _cut("model.safetensors", 0.5), "model.safetensors is cut off"),
    BadBase("weights of seven bytes", _file("model.safetensors", b"\0" * 7), "model.safetensors is not safetensors"),
    BadBase("weights of nothing", _file("model.safetensors", b""), "model.safetensors is not safetensors"),
    BadBase("a pickle named safetensors", _file("model.safetensors", pickle.dumps(os.system)), "is not safetensors"),
]  # fmt: skip

FILES = [
    BadBase("no config", lambda folder: (folder / "config.json").unlink(), "no config.json"),
    BadBase("an empty config", _file("config.json", ""), "config.json is not JSON"),
    BadBase("a broken config", _file("config.json", '{"architectures": ['), "config.json is not JSON"),
    BadBase("a config that is a list", _file("config.json", "[]"), "config.json is not a JSON object"),
    BadBase("a config that is a string", _file("config.json", '"llama"'), "config.json is not a JSON object"),
    BadBase("a config of 100 MB", _sparse("config.json", 100 << 20), "config.json is larger than 33,554,432 bytes"),
    BadBase("a config that nests", _file("config.json", BOMB), "config.json is n"),
    BadBase("a config that nests a little", _file("config.json", '{"a":' * 50 + "1" + "}" * 50), "deeper than 32"),
    BadBase("a config with a key twice", _file("config.json", '{"a": "llama", "a": "evil"}'), "appears twice"),
    BadBase("a config in UTF-16", _file("config.json", '{"a": 1}'.encode("utf-16")), "config.json is not JSON"),
    BadBase("a config of NaN", _file("config.json", '{"rms_norm_eps": NaN}'), "NaN is not JSON"),
    BadBase("a config of many digits", _file("config.json", '{"vocab_size": %s}' % ("9" * 9000)), "too many digits"),
    BadBase("a config elsewhere", _linked("config.json"), "config.json is a link that leads out of the folder"),
    BadBase("a tokenizer elsewhere", _linked("tokenizer.json"), "tokenizer.json is a link that leads out"),
    BadBase("weights elsewhere", _linked("model.safetensors"), "model.safetensors is a link that leads out"),
    BadBase("a pipe", _fifo, "special_tokens_map.json is no plain file"),
    BadBase("an adapter inside", _file("adapter_config.json", '{"base_model_name_or_path": "/etc"}'), "adapter_config"),
    BadBase("no tokenizer", lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
    BadBase("a broken tokenizer", _cut("tokenizer.json", 0.5), "its tokenizer cannot be loaded"),
    BadBase("a tokenizer of nothing", _file("tokenizer.json", "{}"), "its tokenizer cannot be loaded"),
    BadBase("a tokenizer of 300 MB", _sparse("tokenizer.json", 300 << 20), "tokenizer.json is larger than 134,217,728"),
    BadBase("a broken tokenizer_config", _file("tokenizer_config.json", "{"), "tokenizer_config.json is not JSON"),
    BadBase("a template of 2 MB", template("x" * (2 << 20)), "chat_template.jinja is larger than 1,048,576 bytes"),
]  # fmt: skip

CONFIGS = [
    config("code by auto_map", "asks for Python code of its own", auto_map={"AutoModelForCausalLM": "evil.Model"}),
    config("code for a sub-model", "asks for Python code", text_config={"auto_map": {"AutoConfig": "evil--x.C"}}),
    config("an unknown architecture", "its architecture 'EvilForCausalLM' is not", architectures=["EvilForCausalLM"]),
    config("no architecture", "its architecture None is not supported", architectures=None),
    config("an architecture of a list", "its architecture None is not", architectures=[["LlamaForCausalLM"]]),
    config("an image model", "its architecture 'CLIPModel' is not supported", architectures=["CLIPModel"]),
    config("another type", "sets model_type to 'mamba'", model_type="mamba"),
    config("an unknown type", "sets model_type to 'evil'", model_type="evil"),
    config("no type", "sets model_type to None", model_type=None),
    config("a type of a list", "sets model_type to ['llama']", model_type=["llama"]),
    config("attention from the hub", "sets _attn_implementation to 'evil/kernel'", _attn_implementation="evil/kernel"),
    config("attention from the hub, by the other name", "sets attn_implementation", attn_implementation="a/b@main:f"),
    config("attention by parts", "sets attn_implementation", attn_implementation={"": "evil/kernel"}),
    config("weights of another name", "sets transformers_weights", transformers_weights="../x.bin"),
    config("weights of GGUF", "sets gguf_file", gguf_file="/etc/passwd"),
    config("an unknown dtype", "sets torch_dtype to 'load'", torch_dtype="load"),
    config("a dunder for a dtype", "sets dtype to '__builtins__'", dtype="__builtins__"),
    config("a dtype of an object", "sets dtype to {'a': 1}", dtype={"a": 1}),
    config("an unknown rope", "sets rope_scaling.rope_type to 'evil'", rope_scaling={"rope_type": "evil", "factor": 2}),
    config("an unknown activation", "sets hidden_act to 'exec'", hidden_act="exec"),
    config("GPTQ", "its weights are quantised by 'gptq'", quantization_config={"quant_method": "gptq", "bits": 4}),
    config("GPTQ in disguise", "quantised by 'gptq'", quantization_config=NF4 | {"quant_method": "gptq"}),
    config("an unknown quantisation", "quantised by 'evil'", quantization_config={"quant_method": "evil"}),
    config("a quantisation by name", "quantised by 'nf4'", quantization_config="nf4"),
    config("a quantisation of truth", "load_in_4bit to 'yes'", quantization_config=NF4 | {"load_in_4bit": "yes"}),
    config("quantisation with code", "quantization_config.modules", quantization_config=NF4 | {"modules": "evil.py"}),
    config("computing in an attribute", "bnb_4bit_compute_dtype to 'hub'",
           quantization_config=NF4 | {"bnb_4bit_compute_dtype": "hub"}),
    config("8 bit and 4 bit", "load_in_8bit to True", quantization_config=NF4 | {"load_in_8bit": True}),
    config("a trillion words", "sets vocab_size to 1000000000000", vocab_size=10**12),
    config("no words", "sets vocab_size to 0", vocab_size=0),
    config("a billion layers", "sets num_hidden_layers to 1000000000", num_hidden_layers=10**9),
    config("layers less than none", "sets num_hidden_layers to -1", num_hidden_layers=-1),
    config("a width of truth", "sets hidden_size to True", hidden_size=True),
    config("a width of a fraction", "sets hidden_size to 64.5", hidden_size=64.5),
    config("a width of a string", "sets hidden_size to '64'", hidden_size="64"),
    config("a context of less than nothing", "sets max_position_embeddings to -5", max_position_embeddings=-5),
    config("a context of truth", "sets max_position_embeddings to True", max_position_embeddings=True),
    config("an intermediate size of 2**62", "sets intermediate_size", intermediate_size=2**62),
    config("more heads than fit", "sets num_attention_heads", num_attention_heads=2**40),
    config("heads that do not divide", "refused by transformers", num_attention_heads=7),
    config("fewer words than tokens", "its tokenizer makes the token", vocab_size=50),
    config("a dropout of words", "refused by transformers", attention_dropout="much"),
    config("a layer type of numbers", "refused by transformers", rms_norm_eps="small"),
]  # fmt: skip

TOKENIZERS = [
    tokenizer("a tokenizer with code", "asks for Python code of its own", auto_map={"AutoTokenizer": ["evil.T", None]}),
    tokenizer("a vocabulary elsewhere", "sets vocab_file to '/etc/passwd'", vocab_file="/etc/passwd"),
    tokenizer("a vocabulary up there", "sets tokenizer_file to '../../x'", tokenizer_file="../../x"),
    tokenizer("an added token of a number", "its tokenizer cannot be loaded", added_tokens_decoder={"0": 7}),
    tokenizer("an added token at no number", "its tokenizer cannot be loaded",
              added_tokens_decoder={"x": {"content": "a"}}),
    tokenizer("no end of sequence", "no end-of-sequence token", eos_token=None),
]  # fmt: skip

TEMPLATES = [
    BadBase("a template that is no template", template("{% for %}"), "its chat template cannot be run"),
    BadBase("a template that reaches for classes", template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
            "its chat template cannot be run: SecurityError"),
    BadBase("a template that reaches through a filter", template("{{ (messages|attr('__init__')).__globals__ }}"),
            "its chat template cannot be run: SecurityError"),
    BadBase("a template that changes its input", template("{{ messages.clear() }}"),
            "its chat template cannot be run: SecurityError"),
    BadBase("a template that formats its way out",
            template("{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}"),
            "its chat template cannot be run: SecurityError"),
    BadBase("a template that counts to a trillion", template("{% for i in range(10**12) %}{% endfor %}"),
            "its chat template cannot be run: OverflowError"),
    BadBase("a template that does not end", template(f"{LOOP}{LOOP}{{% endfor %}}{{% endfor %}}"),
            "its chat template does not end"),
    BadBase("a template that calls itself", template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
            "its chat template cannot be run: RecursionError"),
    BadBase("a template that divides by nothing", template("{{ 1 // 0 }}"), "cannot be run: ZeroDivisionError"),
    BadBase("a template that fills the memory", template("{{ 'x' * (10**15) }}"), "cannot be run: MemoryError"),
    BadBase("a template that repeats", template("{{ 'x' * (3 * 10**6) }}"), "makes 3,000,000 characters of two short"),
]  # fmt: skip

ALL = [*WEIGHTS, *FILES, *CONFIGS, *TOKENIZERS, *TEMPLATES]
